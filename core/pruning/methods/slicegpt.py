"""SliceGPT (Ashkboos et al., arXiv 2401.15024): the signal between layers loses principal components.

The signal that enters a block is rotated to the eigenvectors of its covariance over a calibration set, and
all but the first D' of them are dropped: the projections that read and write it lose columns and rows, and
the residual sums change the basis on their way, by a matrix each. Norms lose their weights to the projections
that read them. Blocks are treated in order, each on the signal that the sliced blocks before it give.

As in the authors' code, the signal is taken before its norm, each sum of squares is still divided by the full
D, and the last layer ends in the full width, where norm and output head stay as they were. Their damping of
the covariance, which moves all eigenvalues alike, is left out.
"""

import bisect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from core.errors import CheckpointError, TargetError
from core.model.build import model_shape
from core.model.config import config_with_width
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel, frozen, replaced
from core.progress import Progress
from core.pruning.methods.opened import OpenedModel
from core.pruning.plan import LayerPlan
from core.pruning.planning import DecideStep, Step, StepRequest, importance_of
from core.pruning.scoring.batching import fitting_micro_batch

MULTIPLE = 8
"""Widths are multiples of this, as in the paper: GPUs run no others at full speed."""


def sliced_config(config: PreTrainedConfig, target_params: int) -> PreTrainedConfig:
    """Return the config of the sliced model whose size is nearest to a target.

    Args:
        config: Of the model to slice.
        target_params: The shortcut matrices, and an output head of its own where the head was tied, count.

    Raises:
        TargetError: If the narrowest model is larger.
        UnsupportedModelError: If the family cannot be sliced.
    """

    def params(width: int) -> int:
        return model_shape(config_with_width(config, width)).num_params()

    widths = range(MULTIPLE, config.hidden_size + 1, MULTIPLE)
    if not widths or params(widths[0]) > target_params:
        raise TargetError(
            f"prune.target={target_params:,} parameters cannot be reached by prune.method=slicegpt: sliced "
            f"to {MULTIPLE} columns the model has {params(MULTIPLE):,}. Raise prune.target."
        )
    above = bisect.bisect_left(widths, target_params, key=params)
    width = min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(params(width) - target_params))
    return config_with_width(config, width)


def slicing_decision(opened: OpenedModel) -> DecideStep:
    """Return the decision to slice an opened model, and to keep all groups of what that makes."""

    def plan_step(given: StepRequest) -> Step:
        config = sliced_config(opened.model.model.config, given.target_params)
        width = config.sliced_hidden_size
        opened.remake(
            config, sliced_parts(opened.model, opened.tokens, width, micro_batch=opened.micro_batch)
        )
        layers = tuple(
            LayerPlan(
                query_heads=tuple(range(layer.query_heads)),
                kv_heads=tuple(range(layer.kv_heads)),
                mlp_channels=tuple(range(layer.mlp_width)),
            )
            for layer in given.current.layers
        )
        return Step(
            layers=layers,
            shape=model_shape(config),
            importance=importance_of(given.statistics),
            sparsity=(0.0,) * len(layers),
        )

    return plan_step


@torch.no_grad()
def sliced_parts(
    model: LayerwiseModel, tokens: Tensor, width: int, *, micro_batch: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a sliced model by name: of each decoder layer, then of the rest; mostly float64.

    Args:
        model: Stays as it is.
        tokens: (S, T) token ids of the calibration set.
        width: D', the width of the signal.
        micro_batch: Sequences that pass through a layer at once; 0 for as many as the free memory suggests.

    Raises:
        CheckpointError: If the signal is not finite.
    """
    whole = model.model
    prefix, device = family_of(whole.config).layers, whole.device
    size = micro_batch or fitting_micro_batch(whole.config, tokens.shape, device=device)
    states = [model.embed(tokens[i : i + size]).cpu() for i in range(0, len(tokens), size)]
    first = entering = principal_components(states, width, device, "the embedding")
    progress = Progress("slice", len(model.layers), "layers")
    for index in range(len(model.layers)):
        with frozen(whole), model.resident(index) as layer:
            # The layer ends at its first sum.
            with replaced([layer.get_submodule("mlp")], [torch.zeros_like]):
                states = [model.run(index, _projected(s, entering, device)).cpu() for s in states]
            between = principal_components(states, width, device, f"the attention of layer {index}")
            states = [_second_sum(layer, _projected(s, between, device)).cpu() for s in states]
            leaving = None
            if index + 1 < len(model.layers):
                leaving = principal_components(states, width, device, f"layer {index}")
            sliced = _sliced_layer(layer, entering, between, leaving)
            yield {f"{prefix}.{index}.{name}": tensor for name, tensor in sliced.items()}
        if leaving is not None:
            entering = leaving
        progress.add()
    progress.close()
    embedding, head = (
        module.get_parameter("weight").detach()
        for module in (whole.get_input_embeddings(), whole.get_output_embeddings())
    )
    yield {
        "model.embed_tokens.weight": torch.cat([part.double() @ first for part in embedding.split(2**14)]),
        "model.norm.weight": whole.get_parameter("model.norm.weight").detach().clone(),
        "lm_head.weight": head.clone(),
    }


def principal_components(states: list[Tensor], width: int, device: torch.device, after: str) -> Tensor:
    """Return the (D, ``width``) float64 leading eigenvectors of the covariance of (B, T, D) states about 0.

    ``after`` names what the states come from.

    Raises:
        CheckpointError: If a state is not finite.
    """
    size = states[0].shape[-1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    for state in states:
        rows = state.flatten(0, 1).to(device).double()
        gram.addmm_(rows.T, rows)
    if not bool(gram.isfinite().all()):
        raise CheckpointError(
            f"the signal after {after} is not finite. Check the checkpoint; else set calibration.precision "
            "to float32."
        )
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]


def _projected(state: Tensor, basis: Tensor, device: torch.device) -> Tensor:
    """Return what a slice leaves of (B, T, D) states, in their own basis."""
    wide = torch.promote_types(state.dtype, torch.float32)
    projector = (basis @ basis.T).to(wide)
    return (state.to(device, wide) @ projector).to(state.dtype)


def _second_sum(layer: Any, state: Tensor) -> Tensor:
    output: Tensor = state + layer.mlp(layer.post_attention_layernorm(state))
    return output


def _sliced_layer(layer: Any, entering: Tensor, between: Tensor, leaving: Tensor | None) -> dict[str, Tensor]:
    """Return a sliced layer's tensors by their names within it.

    Args:
        layer: The whole layer.
        entering: (D, D') basis of the signal that enters it.
        between: (D, D') basis of the signal between attention and MLP.
        leaving: (D, D') basis of the signal that leaves it; None for the full signal as it is.
    """
    full, width = entering.shape
    # The norm divides the sum of squares by D', where it was D.
    scale = math.sqrt(full / width)
    reads = {
        "self_attn": (layer.input_layernorm.weight.double(), entering),
        "mlp": (layer.post_attention_layernorm.weight.double(), between),
    }
    writes = {"self_attn.o_proj": between, "mlp.down_proj": leaving}
    sliced = {}
    for name, parameter in layer.named_parameters():
        tensor, (path, _, kind) = parameter.detach(), name.rpartition(".")
        if path in ("input_layernorm", "post_attention_layernorm"):
            tensor = tensor.new_ones(width)
        elif path in writes:
            if (basis := writes[path]) is not None:
                tensor = basis.T @ tensor.double()
        elif path.endswith("_proj") and kind == "weight":
            norm, basis = reads[path.partition(".")[0]]
            tensor = scale * (tensor.double() * norm) @ basis
        sliced[name] = tensor.clone()
    sliced["attn_shortcut.weight"] = between.T @ entering
    sliced["mlp_shortcut.weight"] = between if leaving is None else leaving.T @ between
    return sliced
