"""LLM-Pruner (arXiv 2305.11627): the first and last layers stay whole, all others lose the same share.

Its recovery by LoRA is ``training.lora_rank``, which any method may be trained with.
"""

_FIRST, _LAST = 4, 2


def whole_layers(layers: int) -> frozenset[int]:
    """Return the layers of a model that stay whole: its first four and its last two.

    Models of fewer than 24 layers keep a sixth and a twelfth of them, rounded down: with six whole layers
    little would be left to prune.
    """
    first, last = min(_FIRST, layers // 6), min(_LAST, layers // 12)
    return frozenset([*range(first), *range(layers - last, layers)])
