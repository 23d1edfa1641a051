"""Print the exact versions of all packages that the image needs: those of the environment that runs this.

So the image gets what the tests ran with. `make lock` writes them to `docker/requirements.lock`. `pip freeze`
would list the development tools, too; pip-tools and uv resolve again, from an index without torch 2.13.0+cpu.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "adapt-pruner"

# Only a CUDA build of torch needs these, and it pins them itself: left out, the lock holds for every build.
_OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")


def pins(project: str) -> dict[str, str]:
    """Return name and version of every package that an installed project needs, without its extras.

    Versions are public ones: 2.13.0 for 2.13.0+cpu, which only one index has.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    to_do = [(project, "")]
    while to_do:
        name, extra = to_do.pop()
        if (name, extra) in seen or _OF_TORCH.match(name):
            continue
        seen.add((name, extra))
        installed = distribution(name)
        found[name] = Version(installed.version).public
        for requirement in map(Requirement, installed.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                to_do += [(needed, wanted) for wanted in ("", *requirement.extras)]
    del found[project]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    try:
        locked = pins(PROJECT)
    except PackageNotFoundError as error:
        raise SystemExit(f"error: {error.name} is not installed. Run make install first.") from None
    print(f"# Made by `make lock` on Python {platform.python_version()}, {platform.system()}. Do not edit.")
    print("# No hashes: torch is another file on each of the indexes that it may come from.")
    for package, version in locked.items():
        print(f"{package}=={version}")
