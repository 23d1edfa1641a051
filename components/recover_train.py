"""Component recover-train."""

from kfp import dsl

from components.decorator import component


@component
def recover_train(
    run: dict, phase: int, checkpoint_uri: str, data_uri: str, recovered: dsl.Output[dsl.Model]
) -> str:
    """Train the pruned checkpoint on the phase's slice; returns the recovered one's URI."""
    from components.runtime import task

    with task("recover-train", phase):
        from components.nodes.following import train_on_nodes
        from core.steps.recover_train import run_recover_train

        return run_recover_train(
            run=run,
            phase=phase,
            checkpoint_uri=checkpoint_uri,
            data_uri=data_uri,
            model=recovered,
            on_nodes=train_on_nodes,
        )
