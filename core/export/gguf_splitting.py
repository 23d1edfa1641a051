r"""How a tokenizer splits texts before merging, and the name or rules by which llama.cpp does the same.

The names and their regular expressions are from llama.cpp's ``src/llama-vocab.cpp``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ExportError

_SPACE = "▁"
"""A space in SentencePiece's vocabularies."""

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
"""The steps of splitting, and whether words of the vocabulary are taken whole, unmerged."""

_REMARKS = {
    "tekken": "For this tokenizer (tekken) llama.cpp splits words at capital letters only in ASCII: some "
    "words with capital letters of other scripts get other tokens.",
}


def splitting_of(definition: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return ``tokenizer.ggml.pre`` for a byte-level BPE, and notes on texts that llama.cpp splits otherwise.

    Raises:
        ExportError: If llama.cpp has no name for its way of splitting, which the error shows.
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
            f"ignore_merges={bool(model.get('ignore_merges'))}. A wrong name would change the tokens of "
            f"every text. Known: {', '.join(sorted(_NAMES.values()))}."
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
            "decomposed form get other tokens.",
        )
    return ()


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer; the last one must turn bytes into characters."""
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
    """A BPE with byte fallback, in llama.cpp's terms."""

    scores: Mapping[str, float]
    """Of each merged token; the pair whose token scores highest is merged first."""
    space_prefix: bool
    """Whether a space is put before a text."""
    notes: tuple[str, ...]
    """Sentences on texts that llama.cpp tokenizes otherwise."""


def sentencepiece_rules(definition: Mapping[str, Any]) -> SentencePieceRules:
    """Turn the merges of a BPE with byte fallback into scores.

    llama.cpp merges any two neighbours that make a token, the highest score first. That equals a list of
    merges if the list holds every such pair, and all pairs of one token in a row, as lists made from a
    SentencePiece model do.

    Raises:
        ExportError: If its merges, or its preparation of texts, have no equal in llama.cpp.
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
                "cannot express. Only merges as SentencePiece makes them can be exported."
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
    """Return whether a space is put before each text, and notes on where llama.cpp does otherwise."""
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
                joined = [t for t in definition["model"]["vocab"] if _SPACE in t[1:]]
                if step.get("split", True) and joined:
                    raise ExportError(
                        f"the tokenizer splits texts at spaces though {joined[0]!r} is a token, and "
                        "llama.cpp does not split them. It cannot be exported."
                    )
                if prefix:
                    where = "at its start" if scheme == "first" else "if there is none already"
                    notes.append(
                        f"The tokenizer puts a space before a text only {where}; llama.cpp always puts one "
                        "before each text and after each special token."
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
