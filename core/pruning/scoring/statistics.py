"""The result of a calibration: layer similarities and group scores."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import PlanError
from core.untrusted import parse_object


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Scores of the groups of one decoder layer; the lowest are removed first.

    Attributes:
        query_heads: (H,) float32 scores of query heads.
        kv_groups: (K,) float32 scores of attention groups: a KV head with its query heads j*n_rep to
            (j+1)*n_rep - 1.
        mlp_channels: (F,) float32 scores of MLP channels.
    """

    query_heads: Tensor
    kv_groups: Tensor
    mlp_channels: Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The result of one calibration of one checkpoint.

    Attributes:
        similarities: (L,) float64, similarity of each layer's input and output, mean over tokens.
        scores: Group scores of each layer.
        loss: Causal-LM loss, nats per token.
        tokens: Tokens of the calibration set.
    """

    similarities: Tensor
    scores: tuple[LayerScores, ...]
    loss: float
    tokens: int

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"similarities": self.similarities}
        for index, scores in enumerate(self.scores):
            for kind in fields(scores):
                tensors[f"layers.{index}.{kind.name}"] = getattr(scores, kind.name).contiguous()
        # One text: safetensors writes several in any order, and equal statistics shall be equal files.
        about = json.dumps({"format": 1, "loss": self.loss, "tokens": self.tokens})
        save_file(tensors, path, metadata={"about": about})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what ``save`` wrote.

        Raises:
            PlanError: If the file is not a statistics file, or holds a number that is not finite.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                about = metadata.get("about")
                told = metadata if about is None else parse_object(about.encode())  # earlier versions: apart
                similarities = file.get_tensor("similarities")
                scores = tuple(
                    LayerScores(
                        **{
                            kind.name: file.get_tensor(f"layers.{index}.{kind.name}")
                            for kind in fields(LayerScores)
                        }
                    )
                    for index in range(len(similarities))
                )
                loss = float(told["loss"])
                values = [similarities, *(value for layer in scores for value in vars(layer).values())]
                if not math.isfinite(loss) or not all(bool(value.isfinite().all()) for value in values):
                    raise ValueError("a loss, similarity or score is not finite")
                return cls(similarities=similarities, scores=scores, loss=loss, tokens=int(told["tokens"]))
        except (
            SafetensorError,
            OSError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
        ) as error:
            raise PlanError(f"{path} is not a statistics file ({error}). Run calibrate again.") from error
