"""A checkpoint's tokenizer as GGUF metadata, so that llama.cpp cuts texts into the same tokens.

llama.cpp knows how a byte-level BPE splits texts by a name alone (``tokenizer.ggml.pre``). The name is
derived from what the tokenizer does, never from what it is called, and a tokenizer without a fitting name is
refused: with a wrong one, a file loads well and reads every text otherwise.
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
"""Tokens at which llama.cpp stops by itself, known by their texts."""
_NEVER_MERGED = -1e9
"""Score of a token that comes of no merge: the last of all."""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The tokens of a model, by id, as the file lists them."""

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
        end_ids: What else ends a text, from the model's and the generation config.

    Returns:
        Sentences on texts that llama.cpp will cut otherwise.

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
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
        writer.add_add_space_prefix(False)
        notes += remarks
    writer.add_token_list(vocabulary.texts)
    writer.add_token_types(vocabulary.types)
    return notes + _add_special_tokens(writer, tokenizer, vocabulary, end_ids)


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    # Older tokenizer.json files write a merge as one text.
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _vocabulary(
    definition: Mapping[str, Any], vocab_size: int, *, unknown: str | None, has_bytes: bool
) -> _Vocabulary:
    """List all tokens; a row of the embedding that no token has becomes one that is never used.

    Raises:
        ExportError: If there are more tokens than rows, or two of one text, which llama.cpp aborts at.
    """
    texts: dict[int, str] = {index: text for text, index in definition["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    if has_bytes:
        missing = [b for b in range(256) if _byte_token(b) not in definition["model"]["vocab"]]
        if missing:
            raise ExportError(f"the tokenizer has no token {_byte_token(missing[0])} to fall back to.")
        types |= {definition["model"]["vocab"][_byte_token(b)]: gguf.TokenType.BYTE for b in range(256)}
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


def _byte_token(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _notes_on_added_tokens(added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    strips = [
        token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if not strips:
        return ()
    return (f"Around {strips[0]!r} llama.cpp keeps spaces that the original tokenizer takes away.",)


def _add_special_tokens(
    writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: _Vocabulary, end_ids: Sequence[int]
) -> tuple[str, ...]:
    """Write which tokens begin and end a text, and what is put around one.

    Raises:
        ExportError: If no token ends a text: llama.cpp would then take an arbitrary one for it.
    """
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None))
    if not ends:
        raise ExportError(
            "neither tokenizer nor config names a token that ends a text; llama.cpp would take token 11 for "
            "it. Set eos_token_id in config.json."
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
    """Return whether a text gets a token that begins it, and one that ends it.

    Raises:
        ExportError: If it gets others.
    """
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for after in (False, True):
            if dressed == (begin if before else []) + bare + (end if after else []):
                return before, after
    raise ExportError(
        f"the tokenizer puts {dressed} around a text of tokens {bare}; llama.cpp can put the tokens that "
        "begin and end a text there, and nothing else."
    )


def _add_further_ends(
    writer: gguf.GGUFWriter, vocabulary: _Vocabulary, ends: Sequence[int], template: str
) -> tuple[str, ...]:
    """Write at which other tokens to stop: the end of a turn in the chat template, and what configs name."""
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
