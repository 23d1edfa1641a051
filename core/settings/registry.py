"""Settings of the section ``registry``: what becomes of the result in MLflow's registry."""

from dataclasses import dataclass
from typing import Literal

from core.errors import refuse
from core.quantities import in_range


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """Whether the result becomes the version in use, the ``champion`` of ``tracking.model_name``."""

    promote: Literal["never", "rule"] = "never"
    """``rule``: at the end of a run the alias ``champion`` moves to the result if that is not worse than the
    champion by more than ``margin``, beyond chance; ``adapt-pruner promote`` does the same."""
    metric: str = "perplexity"
    """What counts: ``perplexity``, a task of ``evaluation.tasks``, or ``accuracy``, the mean over them."""
    margin: float = 0.01
    """How much worse the result may be, in [0, 1]: a share of the champion's perplexity, or of the items of a
    task (0.01: one point)."""
    first: bool = True
    """A result becomes the champion where there is none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        problems = [*in_range("margin", self.margin, 0, 1)]
        if not self.metric:
            problems.append("metric is empty. Name perplexity, accuracy or a task.")
        refuse(problems)
