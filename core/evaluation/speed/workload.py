"""What a comparison of speed times."""

from dataclasses import dataclass
from typing import Literal

Runtime = Literal["torch", "llama.cpp"]
Kind = Literal["prompt", "decode"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens decoded after a prompt, one at a time.
        batches: Numbers of sequences processed together; each is measured separately.
        rounds: How often everything is measured, after one round to warm up.
        threads: CPU threads; 0 takes one per usable physical core.
        dtype: Number format of the weights in PyTorch; ``auto`` keeps the stored one.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5
    threads: int = 0
    dtype: str = "auto"

    def jobs(self) -> list[tuple[Kind, int]]:
        """Return what is timed in a round: kinds of work and batch sizes."""
        kinds: tuple[Kind, ...] = ("prompt", "decode")
        return [(kind, batch) for batch in self.batches for kind in kinds]

    def tokens(self, kind: Kind, batch: int) -> int:
        """Return the tokens that a job processes."""
        return batch * (self.prompt_tokens if kind == "prompt" else self.new_tokens)
