"""A node of a training by several: the process that a TrainJob starts on each of them."""

import argparse
import json
import os

from components.runtime import task
from core.training.parallel.nodes import Place


def main(arguments: list[str] | None = None) -> None:
    """Train a phase together with the other nodes that the environment names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=json.loads, required=True, help="handle of the run (JSON)")
    parser.add_argument("--phase", type=int, required=True)
    parser.add_argument("--checkpoint", required=True, help="URI of the pruned checkpoint")
    parser.add_argument("--data", required=True, help="URI of the mixture")
    given = parser.parse_args(arguments)
    with task("recover-train", given.phase):
        place = Place.of(os.environ)

        from core.steps.recover_train import train_on_node

        train_on_node(
            run=given.run,
            phase=given.phase,
            checkpoint_uri=given.checkpoint,
            data_uri=given.data,
            place=place,
        )


def arguments_of(run: dict[str, str], phase: int, checkpoint_uri: str, data_uri: str) -> list[str]:
    """Return the arguments for ``main``."""
    return [
        f"--run={json.dumps(run)}",
        f"--phase={phase}",
        f"--checkpoint={checkpoint_uri}",
        f"--data={data_uri}",
    ]


if __name__ == "__main__":
    main()
