r"""How a tokenizer splits texts before it merges, and by which name or rules llama.cpp does the same.

The names and what they split by were looked up in llama.cpp's ``src/llama-vocab.cpp``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ExportError

_SPACE = "▁"
"""What stands for a space in SentencePiece's vocabularies."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_LETTERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _LETTERS + r"|\p{N}{1,3}" + _AFTER_LETTERS
_QWEN2 = _LETTERS + r"|\p{N}" + _AFTER_LETTERS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NAMES = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""What texts are split by, step by step, and whether words of the vocabulary are taken whole, unmerged."""

_REMARKS = {
    "tekken": "llama.cpp tells small from capital letters only in ASCII where it splits words for this "
    "tokenizer (tekken): some words with capital letters of other scripts fall into other tokens.",
}


def splitting_of(definition: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Name the way in which a byte-level BPE splits texts.

    Args:
        definition: Content of its tokenizer.json.

    Returns:
        The value of ``tokenizer.ggml.pre``, and sentences on texts that llama.cpp splits otherwise.

    Raises:
        ExportError: If llama.cpp has no name for it, with what was found.
    """
    model = definition["model"]
    for extra in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(extra):
            raise ExportError(f"the tokenizer's {extra}={model[extra]!r} cannot be written for llama.cpp.")
    remarks = _normalizer_remarks(definition.get("normalizer"))
    steps = _steps(definition.get("pre_tokenizer"))
    name = _NAMES.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        found = " then ".join(steps) or "nothing"
        raise ExportError(
            f"llama.cpp has no known name for how this tokenizer splits texts: by {found}, with "
            f"ignore_merges={bool(model.get('ignore_merges'))}. Under a wrong name it would read every text "
            f"otherwise. Known are: {', '.join(sorted(_NAMES.values()))}."
        )
    return name, remarks + ((_REMARKS[name],) if name in _REMARKS else ())


def _flat(step: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[parts]:
            yield from _flat(part, parts)
    else:
        yield step


def _normalizer_remarks(normalizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    kinds = [step["type"] for step in _flat(normalizer, "normalizers")]
    if [kind for kind in kinds if kind != "NFC"]:
        raise ExportError(
            f"the tokenizer normalises texts by {' then '.join(kinds)}; llama.cpp's byte-level BPE does not."
        )
    if kinds:
        return (
            "The tokenizer first composes characters (NFC) and llama.cpp does not: texts with letters in "
            "decomposed form fall into other tokens.",
        )
    return ()


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Write down what a pre-tokenizer splits by; the last step must turn bytes to characters."""
    steps = []
    encodes = False
    for step in _flat(pre_tokenizer, "pretokenizers"):
        match step:
            case _ if encodes:  # what follows would see bytes instead of characters
                steps.append(f"{step['type']} after ByteLevel")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                encodes = True
                steps += [_GPT2] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(regex)
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
                steps.append(regex)
            case _:
                options = {key: value for key, value in step.items() if key != "type"}
                steps.append(f"{step['type']} {options}")
    return tuple(steps if encodes else [*steps, "no ByteLevel"])


@dataclass(frozen=True, kw_only=True)
class SentencePieceRules:
    """How a BPE with byte fallback works, in llama.cpp's terms.

    Attributes:
        scores: Of each token that is merged of two others; the pair whose token scores highest goes first.
        space_prefix: Whether a space is put before a text.
        notes: Sentences on texts that llama.cpp cuts otherwise.
    """

    scores: Mapping[str, float]
    space_prefix: bool
    notes: tuple[str, ...] = ()


def sentencepiece_rules(definition: Mapping[str, Any]) -> SentencePieceRules:
    """Turn the merges of a BPE with byte fallback into scores.

    llama.cpp merges whatever two neighbours make a token, the highest score first. That equals a list of
    merges if the list holds every such pair, and all pairs of one token in a row, as lists made from a
    SentencePiece model do.

    Args:
        definition: Content of a tokenizer.json.

    Raises:
        ExportError: If its merges, or what it does to a text before, have no equal in llama.cpp.
    """
    model = definition["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    scores: dict[str, float] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in scores and token != previous:
            raise ExportError(
                f"the tokenizer merges into {token!r} at two different ranks, which llama.cpp's scores "
                "cannot tell. Only merges as SentencePiece makes them can be exported."
            )
        scores.setdefault(token, -float(rank))
        previous = token
    _check_closed(definition, set(merges))
    prefix, notes = _space_prefix(definition)
    return SentencePieceRules(scores=scores, space_prefix=prefix, notes=notes)


def _check_closed(definition: Mapping[str, Any], merges: set[tuple[str, ...]]) -> None:
    added = {token["content"] for token in definition["added_tokens"]}
    vocabulary = definition["model"]["vocab"].keys() - added
    for token in vocabulary:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in merges:
                raise ExportError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r} though {token!r} is a token, "
                    "and llama.cpp would. Only merges as SentencePiece makes them can be exported."
                )


def _space_prefix(definition: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a space is put before each text, and sentences on where llama.cpp does otherwise."""
    before = [*_flat(definition.get("normalizer"), "normalizers")]
    before += [*_flat(definition.get("pre_tokenizer"), "pretokenizers")]
    prefix, escapes, notes = False, False, []
    for step in before:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escapes = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                prefix, escapes = scheme != "never", True
                if step.get("split", True):
                    _check_words(definition["model"]["vocab"])
                if prefix:
                    where = "at the start of a text" if scheme == "first" else "where none stands already"
                    notes.append(
                        f"The tokenizer puts a space before a text only {where}; llama.cpp puts one before "
                        "each text, and after each special token, even where one stands."
                    )
            case _:
                raise ExportError(
                    f"the tokenizer prepares texts by {dict(step)}, which llama.cpp's SentencePiece does not."
                )
    if not escapes:
        raise ExportError(
            f"the tokenizer does not write spaces as {_SPACE!r}, which llama.cpp's SentencePiece does."
        )
    return prefix, tuple(notes)


def _check_words(vocabulary: Mapping[str, int]) -> None:
    for token in vocabulary:
        if _SPACE in token[1:]:
            raise ExportError(
                f"the tokenizer splits texts at spaces though {token!r} is a token, and llama.cpp does not "
                "split them. It cannot be exported."
            )
