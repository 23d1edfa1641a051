"""The step that trains: recover-train."""

import logging
from collections.abc import Mapping
from typing import Any

from core.run import Run
from core.steps.evaluate import measure_perplexity
from core.steps.once import Artifact, Workspace, compute_once, describe_checkpoint, digest_of, provenance_of
from core.storage.manifest import fetch

log = logging.getLogger(__name__)


def run_recover_train(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, model: Artifact
) -> str:
    """Train the pruned checkpoint on the phase's slice of the mixture.

    Returns:
        URI of the recovered checkpoint; the pruned one's where the recipe asks for no training.
    """
    from core.pruning.phases import phase_steps

    this = Run.load(run)
    training = this.settings.training
    steps = phase_steps(training.total_steps, this.settings.prune.phases)
    if not steps[phase - 1]:
        log.info("training.tokens=%s: nothing to train", training.tokens)
        describe_checkpoint(checkpoint_uri, model)
        return checkpoint_uri

    def compute(work: Workspace) -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file

        from core.model.build import dtype_of, load_model, pick_device
        from core.model.checkpoint import CheckpointReader, save_model
        from core.training.mixture import slice_name
        from core.training.recover import recover

        folder = fetch(checkpoint_uri, work.scratch / "checkpoint")
        # In the evaluation's precision, so that it compares with the perplexity after recovery.
        precision = dtype_of(this.settings.evaluation.precision)
        network = load_model(folder, dtype=precision, device=pick_device())
        report: dict[str, Any] = {
            "perplexity_pruned": measure_perplexity(this, network, data_uri, work.scratch)
        }
        data = load_file(fetch(data_uri, work.scratch, only=[slice_name(phase)]) / slice_name(phase))
        network = load_model(folder, dtype=torch.float32, device=pick_device())
        torch.manual_seed(this.settings.seed + phase)
        trained = recover(
            network,
            data["input_ids"],
            data["trained"],
            training,
            first_step=sum(steps[: phase - 1]),
            total_steps=training.total_steps,
        )
        with CheckpointReader(folder) as reader:
            dtype = dtype_of(this.settings.model.dtype) or reader.dtype()
        provenance = provenance_of(this, phase, digest_of(checkpoint_uri), step="recover-train")
        save_model(torch.nn.Module.to(network, dtype), work.out, companions=folder, provenance=provenance)
        work.child.log_series("loss", [(step, loss) for step, loss, _ in trained.losses])
        work.child.log_series("learning_rate", [(step, rate) for step, _, rate in trained.losses])
        work.child.log_metrics({"tokens": trained.tokens, "tokens_per_s": trained.tokens_per_s})
        return report | {
            "losses": trained.losses,
            "tokens": trained.tokens,
            "trained_tokens": trained.trained_tokens,
            "tokens_per_s": trained.tokens_per_s,
        }

    uri = this.phase_uri(phase, "recovered")
    compute_once(this, uri, phase=phase, step="recover-train", compute=compute)
    describe_checkpoint(uri, model)
    return uri
