"""ShortGPT (arXiv 2403.03853): whole layers go, those first that change their input least.

A layer is a coarse unit: as many go as the size allows, and the rest is taken from the MLPs of the layers
that stay, the same share of each, by the magnitude of their channels. So the size is exact here too.
"""

from collections.abc import Sequence
from dataclasses import replace

from core.errors import TargetError
from core.model.shape import ModelShape
from core.pruning.plan import LayerPlan
from core.pruning.planning import Step, StepRequest, importance_of, sizing_for, step_to
from core.pruning.sparsity import sizes_for_target
from core.quantities import is_share, parse_count
from core.settings.methods import WHOLE_LAYERS
from core.settings.prune import PruneSettings

_GONE = LayerPlan(query_heads=(), kv_heads=(), mlp_channels=())


def plan_step(given: StepRequest) -> Step:
    """Decide the step of a phase: which layers go, and the widths of the others."""
    similarities = given.statistics.similarities.tolist()
    fewest = fewest_layers(given.settings, given.current, given.target_params)
    return step_without(given, _layers_that_go(similarities, given.current, least_params(given), fewest))


def fewest_layers(settings: PruneSettings, shape: ModelShape, target_params: int) -> int:
    """Return how many layers of a model stay at least: those that ``settings.layers`` asks for, if it does.

    Raises:
        TargetError: If those are all, or might have fewer parameters than the target.
    """
    asked, whole = settings.layers, len(shape.layers)
    if asked == "auto":
        return 1 if settings.method in WHOLE_LAYERS else whole
    share = float(asked.strip(" %")) / 100 if is_share(asked) else None
    count = parse_count(asked) if share is None else max(1, round(whole * share))
    if count >= whole:
        raise TargetError(
            f"prune.layers={asked} leaves all {whole} layers of the model. Lower it, or leave it out."
        )
    smallest = sorted(shape.layers, key=shape.layer_num_params)[:count]
    params = shape.with_layers(tuple(smallest)).num_params()
    if params + settings.width_multiple * shape.mlp_channel_params / 2 < target_params:
        raise TargetError(
            f"prune.layers={asked} alone leaves {params:,} parameters ({count} of {whole} layers), fewer "
            f"than the target of {target_params:,}. Raise it, or lower prune.target."
        )
    return count


def least_params(given: StepRequest) -> float:
    """Return the parameters that must stay when whole layers have gone, for the size to be met."""
    return given.target_params - given.settings.width_multiple * given.current.mlp_channel_params / 2


def step_without(given: StepRequest, gone: frozenset[int]) -> Step:
    """Return the step that removes whole layers, and channels of all others for the exact size.

    Args:
        given: What the step is decided from.
        gone: Numbers of the layers in the present model; at least ``least_params`` are left without them.
    """
    statistics, settings, current = given.statistics, given.settings, given.current
    sparsity, target_params = given.sparsity, given.target_params
    stay = [index for index in range(len(current.layers)) if index not in gone]
    shallow = current.with_layers(tuple(current.layers[index] for index in stay))
    alike = (0.0,) * len(stay)
    layers, _ = sizes_for_target(sizing_for(settings, shallow, shallow), alike, alike, target_params)
    scores = tuple(statistics.scores[index] for index in stay)
    step = step_to(
        replace(statistics, scores=scores), layers, current=shallow, importance=alike, sparsity=alike
    )
    plans = dict(zip(stay, step.layers, strict=True))
    importance, after = [0.0] * len(sparsity), [1.0] * len(sparsity)
    # By number in the dense model; what earlier phases removed whole is no longer among the layers.
    present = [number for number, share in enumerate(sparsity) if share < 1]
    for index, (number, own) in enumerate(zip(present, importance_of(statistics), strict=True)):
        importance[number] = own
        if index in plans:
            left = current.prunable_params(plans[index].shape())
            whole = current.prunable_params(current.layers[index])
            after[number] = 1 - (1 - sparsity[number]) * left / whole
    return Step(
        layers=tuple(plans.get(index, _GONE) for index in range(len(current.layers))),
        shape=step.shape,
        importance=tuple(importance),
        sparsity=tuple(after),
    )


def _layers_that_go(
    similarities: Sequence[float], current: ModelShape, least_params: float, fewest: int
) -> frozenset[int]:
    """Return the most similar layers, as many as leave ``least_params``, and at least ``fewest`` layers."""
    gone, params = set[int](), current.num_params()
    for index in sorted(range(len(similarities)), key=lambda i: (-similarities[i], i))[:-fewest]:
        params -= current.layer_num_params(current.layers[index])
        if params < least_params:
            break
        gone.add(index)
    return frozenset(gone)
