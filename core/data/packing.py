"""Turn documents and conversations into token ids with a mask of what is trained, and join them.

A conversation trains the assistant's replies and their end tokens only. A reply is located in the rendered
text, not in the tokens: the rendering of the turns before it, with the generation prompt, gives its start, a
mark behind every reply its end. This holds for templates that change a reply once another turn follows, too.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.data.rows import RowError
from core.data.texts import Message
from core.errors import DataError
from core.untrusted import foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""How conversations are written for a tokenizer without a chat template."""

_MARK = "\ufdd0"  # a code point that Unicode reserves for internal use: no text holds it
_DATE = "26 Jul 2024"
_SHOWN_CHARS = 200


class Tokenized(NamedTuple):
    """One document, conversation or sequence."""

    ids: NDArray[np.int32]
    """(T,) token ids."""
    trained: NDArray[np.uint8]
    """(T,), 1 where the token is a target of the loss."""
    divisible: bool = False
    """Whether it is a piece of a plain text, which may as well be cut elsewhere."""


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the tokenizer's end-of-text token.

    Raises:
        DataError: If it has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token. Set eos_token in its tokenizer_config.json.")
    return int(tokenizer.eos_token_id)


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that the tokenizer puts before a text, such as a begin-of-text token; often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def body_length(length: int, opening: Sequence[int]) -> int:
    """Return the tokens of a sequence beside its opening.

    Raises:
        DataError: If there are none.
    """
    if length <= len(opening):
        raise DataError(f"sequences of {length} tokens leave no room for text. Raise the sequence length.")
    return length - len(opening)


def tokenize_documents(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Tokenized]:
    """Tokenize documents; all tokens and the end token are trained, an opening begin-of-text token is not."""
    opening, end = opening_ids(tokenizer), end_id(tokenizer)
    batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokenized = []
    for ids in batch["input_ids"]:
        whole = np.array([*ids, end], dtype=np.int32)
        tokenized.append(opened(whole, np.ones(len(whole), np.uint8), opening))
    return tokenized


def tokenize_conversations(
    conversations: Iterable[Sequence[Message]],
    tokenizer: "PreTrainedTokenizerBase",
    opening: Sequence[int] = (),
) -> list[Tokenized | RowError | None]:
    """Tokenize conversations as the tokenizer's chat template writes them; only replies are trained.

    Without a chat template, ``PLAIN_TEMPLATE`` is used. Turns after the last reply are left out.

    Args:
        conversations: Their turns.
        tokenizer: The base model's.
        opening: Ids to put before each conversation where the template does not write them, such as a
            begin-of-text token.

    Returns:
        What the template said of those that it refuses; None for those in which no reply can be located.

    Raises:
        DataError: If the tokenizer is not a fast one, or has no end token.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, which cannot mask prompts. Provide a tokenizer.json.")

    def failed(said: str) -> DataError:
        return DataError(f"the tokenizer's chat template fails: {said}. Correct or remove it.")

    with foreign_errors(failed):  # it is a program, though in a sandbox
        template = _fixed_template(tokenizer)
        rendered = [_render_replies(turns, tokenizer, template) for turns in conversations]
    found = [
        (n, *conversation)
        for n, conversation in enumerate(rendered)
        if conversation and not isinstance(conversation, RowError) and conversation[1]
    ]
    tokenized: list[Tokenized | RowError | None] = [
        conversation if isinstance(conversation, RowError) else None for conversation in rendered
    ]
    if not found:
        return tokenized
    batch = tokenizer(
        [text for _, text, _ in found],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    specials = np.array([*added, *tokenizer.all_special_ids], dtype=np.int32)
    for (number, text, spans), ids, offsets in zip(
        found, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        whole = np.array(ids, dtype=np.int32)
        trained = _trained_tokens(text, spans, np.array(offsets), np.isin(whole, specials))
        if not np.isin(whole[trained.nonzero()[0][-1:]], specials).any():
            whole, trained = np.append(whole, np.int32(end_id(tokenizer))), np.append(trained, np.uint8(1))
        if opening and whole[: len(opening)].tolist() != list(opening):
            whole, trained, _ = opened(whole, trained, opening)
        tokenized[number] = Tokenized(whole, trained)
    return tokenized


def opened(
    ids: NDArray[np.int32],
    trained: NDArray[np.uint8],
    opening: Sequence[int],
    *,
    divisible: bool = False,
) -> Tokenized:
    """Put ids that are not trained before a text."""
    return Tokenized(
        np.concatenate([np.array(opening, np.int32), ids]),
        np.concatenate([np.zeros(len(opening), np.uint8), trained]),
        divisible,
    )


def _fixed_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template with a fixed date for today's, which some write into the system turn."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    if "strftime_now" not in template:
        return template
    return f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}{template}"


def _render_replies(
    turns: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[str, list[tuple[int, int]]] | RowError | None:
    """Return the rendered text and the character span of each reply, or why the template refuses it.

    If the template refuses a system turn, that becomes part of the user's turn.
    """
    from jinja2 import TemplateError

    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    messages = [{**turn, "content": turn["content"].replace(_MARK, "").strip()} for turn in turns[: last + 1]]
    if not messages:
        return None
    ways = [messages]
    if [turn["role"] for turn in messages[:2]] == ["system", "user"]:
        system, user, *rest = messages
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}".strip()}
        ways.append([merged, *rest])
    for way in ways:
        try:
            return _reply_spans(way, tokenizer, template)
        except TemplateError as error:
            said = " ".join(str(error).split())[:_SHOWN_CHARS].rstrip(".") or type(error).__name__
    return RowError(f"the chat template refuses it ({said})")


def _reply_spans(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[str, list[tuple[int, int]]] | None:
    def render(turns: list[Message], prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=prompt, date_string=_DATE
            )
        )

    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text = render(messages)
    pieces = render(
        [{**m, "content": m["content"] + _MARK} if m["role"] == "assistant" else m for m in messages]
    ).split(_MARK)
    if "".join(pieces) != text or len(pieces) != len(replies) + 1:
        return None  # the template rewrites replies: their ends are unknown
    ends = np.cumsum([len(piece) for piece in pieces[:-1]]).tolist()
    spans = []
    for reply, end in zip(replies, ends, strict=True):
        if reply == 0 or not messages[reply]["content"]:
            continue  # nothing asks for it, or nothing is said
        prompt = render(messages[:reply], prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            # A generation prompt may hold more than the turn's header, such as an opened thinking block.
            if not text.startswith(render(messages[:reply])):
                continue
            start = len(os.path.commonprefix([text, prompt]))  # noqa: RUF071 - of characters
        if start < end:
            spans.append((start, end))
    return text, spans


def _trained_tokens(
    text: str, spans: list[tuple[int, int]], offsets: NDArray[np.int64], special: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return the (T,) mask of the tokens of replies and of the special token behind each.

    ``spans`` are the characters of each reply, ``offsets`` (T, 2) those of each token.
    """
    first, after = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        trained[(after > start) & (first < end)] = 1
        following = np.flatnonzero(special & (first >= end))[:1]
        if len(following) and not text[end : first[following[0]]].strip():
            trained[(first >= end) & (np.arange(len(offsets)) <= following[0])] = 1
    return trained


def pack(
    stream: Iterable[Tokenized], sequence_length: int, *, rest: list[Tokenized] | None = None
) -> Iterator[Tokenized]:
    """Join documents and cut them into sequences of T tokens, wherever that cuts a document.

    A last rest of fewer than T tokens is left out.

    Args:
        stream: Documents.
        sequence_length: T.
        rest: What comes before the stream. Whenever a sequence is given out, it holds what is left of its
            last document: with that and the rest of the stream, another call goes on.
    """
    ids, trained = np.empty(sequence_length, np.int32), np.empty(sequence_length, np.uint8)
    filled, rest = 0, [] if rest is None else rest
    for document in chain(list(rest), stream):
        taken = 0
        while taken < len(document.ids):
            count = min(sequence_length - filled, len(document.ids) - taken)
            ids[filled : filled + count] = document.ids[taken : taken + count]
            trained[filled : filled + count] = document.trained[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == sequence_length:
                rest[:] = [Tokenized(document.ids[taken:], document.trained[taken:])]
                yield Tokenized(ids, trained)
                ids, trained = np.empty(sequence_length, np.int32), np.empty(sequence_length, np.uint8)
                filled = 0
