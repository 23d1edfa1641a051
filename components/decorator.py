"""The decorator of all components: our image, nothing installed at run time.

Only the pipeline imports this module. A running task cannot: there, kfp has no ``dsl.component``.
"""

import functools

from kfp import dsl

from core.settings.cluster import ClusterSettings

component = functools.partial(
    dsl.component, base_image=ClusterSettings.image, packages_to_install=[], install_kfp_package=False
)
