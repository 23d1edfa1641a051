"""The settings of a run: the sections of a recipe, each a module beside this one. Imports no torch.

Defaults are set in these dataclasses only. ``core.settings.recipe`` reads a recipe into them.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from core.errors import refuse
from core.quantities import in_range
from core.redaction import passwords_in
from core.settings.addresses import base_problems
from core.settings.calibration import CalibrationSettings
from core.settings.cluster import ClusterSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.identity import MEASURED, PLACE, digest_of_kind
from core.settings.model import ModelSettings
from core.settings.prune import PruneSettings
from core.settings.registry import RegistrySettings
from core.settings.storage import StorageSettings, TrackingSettings
from core.settings.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run."""

    name: str = field(default="adapt-pruner", metadata=PLACE)
    """Name of the run in tables and in MLflow."""
    seed: int = 0
    """Seed of calibration draws, of the shuffle and of training."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Which model is pruned."""
    prune: PruneSettings = field(default_factory=PruneSettings)
    """How much is removed, in which steps."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    """What importance is measured on."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Recovery training."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings, metadata=MEASURED)
    """What is measured."""
    storage: StorageSettings = field(default_factory=StorageSettings, metadata=PLACE)
    """Where checkpoints go."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings, metadata=PLACE)
    """Where numbers go."""
    registry: RegistrySettings = field(default_factory=RegistrySettings, metadata=PLACE)
    """What becomes of the result in MLflow's registry."""
    cluster: ClusterSettings = field(default_factory=ClusterSettings, metadata=PLACE)
    """How tasks run in pods."""

    def __post_init__(self) -> None:
        """Check what every run needs, and combinations of sections."""
        problems = [*in_range("seed", self.seed, 0, 2**31 - 1), *passwords_in(dataclasses.asdict(self))]
        if not self.model.base:
            problems.append("model.base is empty. Name the model to prune.")
        problems += [f"model.{problem}" for problem in base_problems(self.model.base, self.model.revision)]
        if self.calibration.source is None:
            problems.append("calibration.source is missing. Name the calibration corpus.")
        if self.training.total_steps and self.training.total_steps < self.prune.phases:
            problems.append(
                f"training.tokens={self.training.tokens} gives {self.training.total_steps} optimizer steps "
                f"for prune.phases={self.prune.phases}. Raise the tokens, or lower the phases or the batch."
            )
        if self.prune.criterion == "taylor_per_microbatch" and not self.calibration.micro_batch:
            problems.append(
                "prune.criterion=taylor_per_microbatch needs calibration.micro_batch: with 0 the free memory "
                "would change the scores. Set it, or take taylor_l1."
            )
        if self.training.optimizer_state == "carry" and self.prune.method == "slicegpt":
            problems.append(
                "training.optimizer_state=carry does not go with prune.method=slicegpt, whose new bases the "
                "squares of gradients do not follow. Leave it at reset."
            )
        prune = self.prune
        if self.training.hidden_weight and (
            prune.removes_layers or prune.narrows or prune.method == "slicegpt"
        ):
            problems.append(
                f"training.hidden_weight does not go with prune.method={prune.method}, prune.layers="
                f"{prune.layers} and prune.hidden_size={prune.hidden_size}: what the layers return does not "
                "stand for what those of the base model return. Leave it at 0."
            )
        problems += self._registry_problems()
        refuse(problems)

    def _registry_problems(self) -> Iterator[str]:
        metric, tasks = self.registry.metric, self.evaluation.tasks
        if self.registry.promote == "never":
            return
        if not self.tracking.model_name:
            yield "registry.promote=rule needs a registered model. Name it in tracking.model_name."
        if metric == "perplexity" and self.evaluation.perplexity is None:
            yield "registry.metric=perplexity is not measured. Set evaluation.perplexity, or another metric."
        if metric != "perplexity" and (not tasks if metric == "accuracy" else metric not in tasks):
            yield f"registry.metric={metric} is not measured. Add it to evaluation.tasks, or take another."

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as a recipe holds them."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    def digest(self) -> str:
        """Return a hash of the settings that change the result; see ``core.settings.identity``."""
        also: dict[str, Any] = {}
        if self.prune.criterion == "taylor_per_microbatch":  # which takes absolute values in each micro-batch
            also["micro_batch"] = self.calibration.micro_batch
        training = self.training
        if training.packing == "whole" and any(source.is_plain_text for source in training.sources):
            also["plain_texts"] = "cut to fill"  # earlier versions left padding
        return digest_of_kind(self, "result", **also)

    def measured_digest(self) -> str:
        """Return a short hash of the settings of what is measured; it is part of published names."""
        also = {"items": "drawn"} if self.evaluation.limit else {}  # earlier versions took the first ones
        return digest_of_kind(self, "measured", **also)[:8]
