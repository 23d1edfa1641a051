"""Turn documents and conversations into token ids with a mask of what is trained, and pack them.

A conversation trains the assistant's replies and their end tokens only. Where a reply stands is found in the
rendered text, not in the tokens: rendering the turns before it with the generation prompt tells where it
starts, and a mark put behind every reply tells where each ends. This holds for templates that write a reply
otherwise once another turn follows, too.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.data.texts import Message
from core.errors import DataError
from core.untrusted import foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""How conversations are written for a tokenizer without a chat template."""

_MARK = "\ufdd0"  # a code point that Unicode reserves for internal use: it stands in no text
_DATE = "26 Jul 2024"


class Tokenized(NamedTuple):
    """One document, conversation or packed sequence.

    Attributes:
        ids: (T,) int32 token ids.
        trained: (T,) uint8, 1 where the token is a target of the loss.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.uint8]


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends a document.

    Raises:
        DataError: If the tokenizer names none.
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


def tokenize_documents(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Tokenized]:
    """Tokenize documents; all tokens and the end token are trained, an opening begin-of-text token is not."""
    if not texts:
        return []
    opening, end = opening_ids(tokenizer), end_id(tokenizer)
    batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokenized = []
    for ids in batch["input_ids"]:
        whole = np.array([*opening, *ids, end], dtype=np.int32)
        trained = np.ones(len(whole), dtype=np.uint8)
        trained[: len(opening)] = 0
        tokenized.append(Tokenized(whole, trained))
    return tokenized


def tokenize_conversations(
    conversations: Iterable[Sequence[Message]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Tokenized]:
    """Tokenize conversations as the tokenizer's chat template writes them; only replies are trained.

    Args:
        conversations: Turns with role and content. What follows the last reply is left out.
        tokenizer: A fast one; without a chat template, ``PLAIN_TEMPLATE`` is taken.

    Returns:
        The conversations in order, less those that the template refuses or where no reply can be told apart.

    Raises:
        DataError: If the tokenizer cannot say which characters a token covers, or has no end token.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, which cannot mask prompts. Provide a tokenizer.json.")
    template = _fixed_template(tokenizer)

    def failed(said: str) -> DataError:
        return DataError(f"the tokenizer's chat template fails: {said}. Correct or remove it.")

    with foreign_errors(failed):  # it is a program, though in a sandbox
        rendered = [_render_replies(turns, tokenizer, template) for turns in conversations]
    found = [conversation for conversation in rendered if conversation is not None and conversation[1]]
    if len(found) < len(rendered):
        log.debug("%d of %d conversations left out", len(rendered) - len(found), len(rendered))
    if not found:
        return []
    batch = tokenizer(
        [text for text, _ in found],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    specials = np.array(_special_ids(tokenizer), dtype=np.int32)
    tokenized = []
    for (text, spans), ids, offsets in zip(found, batch["input_ids"], batch["offset_mapping"], strict=True):
        whole = np.array(ids, dtype=np.int32)
        trained = _trained_tokens(text, spans, np.array(offsets), np.isin(whole, specials))
        if not np.isin(whole[trained.nonzero()[0][-1:]], specials).any():
            whole, trained = np.append(whole, np.int32(end_id(tokenizer))), np.append(trained, np.uint8(1))
        tokenized.append(Tokenized(whole, trained))
    return tokenized


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*added, *tokenizer.all_special_ids})


def _fixed_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template with today's date, which some write into the system turn, held still."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    if "strftime_now" not in template:
        return template
    return f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}{template}"


def _render_replies(
    turns: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[str, list[tuple[int, int]]] | None:
    """Render a conversation; where the template refuses a system turn, the user's turn takes it in.

    Returns:
        The text and the character span of each reply, or None if the template refuses the conversation.
    """
    from jinja2 import TemplateError

    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    messages = [{**turn, "content": turn["content"].replace(_MARK, "").strip()} for turn in turns[: last + 1]]
    if not messages:
        return None
    try:
        return _reply_spans(messages, tokenizer, template)
    except TemplateError as error:
        if [turn["role"] for turn in messages[:2]] != ["system", "user"]:
            log.debug("the chat template refuses a conversation: %s", error)
            return None
    system, user, *rest = messages
    try:
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}".strip()}
        return _reply_spans([merged, *rest], tokenizer, template)
    except TemplateError as error:
        log.debug("the chat template refuses a conversation: %s", error)
        return None


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
        return None  # the template rewrites replies: where they end cannot be told
    ends = np.cumsum([len(piece) for piece in pieces[:-1]]).tolist()
    spans = []
    for reply, end in zip(replies, ends, strict=True):
        if reply == 0 or not messages[reply]["content"]:
            continue  # nothing asks for it, or nothing is said
        prompt = render(messages[:reply], prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            # A generation prompt may say more than the turn's header, such as an opened thinking block.
            if not text.startswith(render(messages[:reply])):
                continue
            start = _common_length(text, prompt)
        if start < end:
            spans.append((start, end))
    return text, spans


def _common_length(one: str, other: str) -> int:
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _trained_tokens(
    text: str, spans: list[tuple[int, int]], offsets: NDArray[np.int64], special: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Mark the tokens that hold a character of a reply, and the special token that ends it.

    Args:
        text: The rendered conversation.
        spans: First character and character after the last of each reply.
        offsets: (T, 2) the same for each token.
        special: (T,) whether the token is a special one.

    Returns:
        (T,) uint8 mask.
    """
    first, after = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        trained[(after > start) & (first < end)] = 1
        following = np.flatnonzero(special & (first >= end))[:1]
        if len(following) and not text[end : first[following[0]]].strip():
            trained[(first >= end) & (np.arange(len(offsets)) <= following[0])] = 1
    return trained


def pack(stream: Iterable[Tokenized], sequence_length: int) -> Iterator[Tokenized]:
    """Join documents and cut them into sequences; one that does not fit goes on in the next sequence.

    Args:
        stream: Documents of any length.
        sequence_length: T.

    Yields:
        (T,) ids and mask. Only a last rest of under T tokens is left out.
    """
    ids, trained = np.empty(sequence_length, np.int32), np.empty(sequence_length, np.uint8)
    filled = 0
    for document in stream:
        taken = 0
        while taken < len(document.ids):
            count = min(sequence_length - filled, len(document.ids) - taken)
            ids[filled : filled + count] = document.ids[taken : taken + count]
            trained[filled : filled + count] = document.trained[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == sequence_length:
                yield Tokenized(ids, trained)
                ids, trained = np.empty(sequence_length, np.int32), np.empty(sequence_length, np.uint8)
                filled = 0
