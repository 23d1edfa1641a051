"""A checkpoint's tokenizer as GGUF metadata, so that llama.cpp gives texts the same tokens.

llama.cpp chooses how a byte-level BPE splits texts by a name alone (``tokenizer.ggml.pre``). We derive it
from the tokenizer's rules, and refuse a tokenizer without a matching name: under a wrong one, a file loads
without errors and every text gets other tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from core.errors import ExportError
from core.export.gguf_splitting import sentencepiece_rules, splitting_of

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
_KNOWN_ENDS = frozenset((*_TURN_ENDS[:4], "<|endoftext|>", "</s>", "<|eom_id|>", "<|end_of_text|>", "<eos>"))
"""Tokens at which llama.cpp stops by itself, by their texts."""
_NEVER_MERGED = -1e9
"""Score of a token that no merge gives: the last of all."""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The tokens of a model, by id."""

    texts: list[str]
    types: list[int]


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Any, *, vocab_size: int, end_ids: Sequence[int]
) -> tuple[str, ...]:
    """Write a tokenizer's vocabulary, rules, special tokens and chat template.

    Args:
        writer: The file.
        tokenizer: A transformers tokenizer.
        vocab_size: V, rows of the embedding; ids without a token become unused ones.
        end_ids: Further tokens that end a text, from the model's and the generation config.

    Returns:
        Sentences on texts that llama.cpp will tokenize otherwise.

    Raises:
        ExportError: If llama.cpp has no tokenizer that does the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the tokenizer is not a fast one. Save it as tokenizer.json first.")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a tokenizer of type {model['type']} is not exported; BPE is.")
    notes = _notes_on_added_tokens(definition["added_tokens"])
    if model.get("byte_fallback"):
        rules = sentencepiece_rules(definition)
        vocabulary = _vocabulary(definition, vocab_size, unknown=model.get("unk_token"), has_bytes=True)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([rules.scores.get(text, _NEVER_MERGED) for text in vocabulary.texts])
        writer.add_add_space_prefix(rules.space_prefix)
        notes += rules.notes
    else:
        name, remarks = splitting_of(definition)
        vocabulary = _vocabulary(definition, vocab_size, unknown=None, has_bytes=False)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        # Older tokenizer.json files write a merge as one text.
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        writer.add_add_space_prefix(False)
        notes += remarks
    writer.add_token_list(vocabulary.texts)
    writer.add_token_types(vocabulary.types)
    return notes + _add_special_tokens(writer, tokenizer, vocabulary, end_ids)


def _vocabulary(
    definition: Mapping[str, Any], vocab_size: int, *, unknown: str | None, has_bytes: bool
) -> _Vocabulary:
    """List all tokens; a row of the embedding without a token becomes one that is never used.

    Raises:
        ExportError: If there are more tokens than rows, or two with the same text, at which llama.cpp aborts.
    """
    texts: dict[int, str] = {index: text for text, index in definition["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    if has_bytes:
        for name in (f"<0x{byte:02X}>" for byte in range(256)):
            if name not in definition["model"]["vocab"]:
                raise ExportError(f"the tokenizer has no token {name} to fall back to.")
            types[definition["model"]["vocab"][name]] = gguf.TokenType.BYTE
    for token in definition["added_tokens"]:
        texts[token["id"]] = token["content"]
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        types[token["id"]] = gguf.TokenType.UNKNOWN if token["content"] == unknown else kind
    if max(texts) >= vocab_size:
        raise ExportError(
            f"the tokenizer has a token {max(texts)}, but the embedding only {vocab_size} rows. "
            "Resize the embedding, or give the checkpoint its own tokenizer."
        )
    listed = [texts.get(index) or f"[PAD{index}]" for index in range(vocab_size)]
    if len(set(listed)) < vocab_size:
        twice = next(text for text in listed if listed.count(text) > 1)
        raise ExportError(f"the tokenizer has two tokens {twice!r}; llama.cpp loads no such file.")
    return _Vocabulary(
        texts=listed, types=[types.get(index, gguf.TokenType.UNUSED) for index in range(vocab_size)]
    )


def _notes_on_added_tokens(added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    strips = [t["content"] for t in added if t["lstrip"] or t["rstrip"] or t["single_word"]]
    notes = [
        f"Around {text!r} llama.cpp keeps spaces that the original tokenizer removes." for text in strips
    ]
    return tuple(notes[:1])


def _add_special_tokens(
    writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: _Vocabulary, end_ids: Sequence[int]
) -> tuple[str, ...]:
    """Write the tokens that begin and end a text, and whether they are put around one.

    Raises:
        ExportError: If no token ends a text: llama.cpp would then use an arbitrary one.
    """
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None))
    if not ends:
        raise ExportError(
            "neither tokenizer nor config names a token that ends a text; llama.cpp would use token 11. Set "
            "eos_token_id in config.json."
        )
    writer.add_eos_token_id(ends[0])
    for write, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            write(index)
    before, after = _put_around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return _add_further_ends(writer, vocabulary, ends, json.dumps(template, ensure_ascii=False))


def _put_around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a text gets a token that begins it, and one that ends it; refuse any others."""
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for after in (False, True):
            if dressed == (begin if before else []) + bare + (end if after else []):
                return before, after
    raise ExportError(
        f"the tokenizer puts {dressed} around a text of tokens {bare}; llama.cpp can only put the tokens "
        "that begin and end a text there."
    )


def _add_further_ends(
    writer: gguf.GGUFWriter, vocabulary: _Vocabulary, ends: Sequence[int], template: str
) -> tuple[str, ...]:
    """Write further tokens to stop at: the end of a turn in the chat template, and those of the configs."""
    ids = {text: index for index, text in enumerate(vocabulary.texts)}
    turn_ends = [ids[text] for text in _TURN_ENDS if text in ids and text in template]
    unknown = [i for i in ends[1:] if i not in turn_ends[:1] and vocabulary.texts[i] not in _KNOWN_ENDS]
    if turn_ends:
        writer.add_eot_token_id(turn_ends[0])
    elif unknown:
        writer.add_eot_token_id(unknown.pop(0))
    if unknown and "<|eom_id|>" not in ids:
        writer.add_eom_token_id(unknown.pop(0))
    return tuple(f"llama.cpp will not stop at {vocabulary.texts[i]!r}, as the model should." for i in unknown)
