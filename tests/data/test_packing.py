import math
from itertools import islice

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from core.data.packing import (
    Tokenized,
    opening_ids,
    pack,
    tokenize_conversations,
    tokenize_documents,
)
from core.data.whole_packing import Waiting, pack_whole, packed_tokens
from core.errors import DataError

# As SmolLM2-135M-Instruct ships it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2 style: no role headers, no system turn; the reply begins behind a space.
INST = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Qwen3 and DeepSeek-R1 style: thinking stays in the last turn only, and the generation prompt opens it.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\nhm\n</think>\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\nso' }}{% endif %}"
)
# No token ends a reply.
BARE = (
    "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# No token ends a reply, but one ends a question.
ASKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q:' + m.content + '<|endoftext|>' }}"
    "{% else %}{{ ' ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
TWO_TURNS = [
    {"role": "user", "content": "What is two and three?"},
    {"role": "assistant", "content": "It is five.\n\nReally 5."},
    {"role": "user", "content": "Why? é 漢"},
    {"role": "assistant", "content": "Räknat på fingrarna 漢字."},
]


def trained_text(tokenizer, tokenized: Tokenized) -> str:
    return tokenizer.decode(tokenized.ids[tokenized.trained == 1])


def with_begin_token(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))],
    )
    return tokenizer


def test_documents_train_all_their_tokens_and_an_end_token(tokenizer):
    texts = ["The first document.", "Another, é 漢 😀", "x"]
    for text, tokenized in zip(texts, tokenize_documents(texts, tokenizer), strict=True):
        assert tokenizer.decode(tokenized.ids) == text + "<|im_end|>"
        assert tokenized.ids.tolist()[:-1] == tokenizer.encode(text)
        assert tokenized.trained.all()
        assert (tokenized.ids.dtype, tokenized.trained.dtype) == (np.int32, np.uint8)


def test_a_begin_token_opens_each_document_and_is_not_trained(tokenizer):
    assert opening_ids(tokenizer) == []
    begin = with_begin_token(tokenizer).convert_tokens_to_ids("<|im_start|>")
    assert opening_ids(tokenizer) == [begin]
    (tokenized,) = tokenize_documents(["two words"], tokenizer)
    assert tokenizer.decode(tokenized.ids) == "<|im_start|>two words<|im_end|>"
    assert trained_text(tokenizer, tokenized) == "two words<|im_end|>"


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenize_documents(["a"], tokenizer)


def test_smollm2_chats_train_the_replies_and_their_end_tokens_only(tokenizer):
    tokenizer.chat_template = SMOLLM2
    (tokenized,) = tokenize_conversations([TWO_TURNS], tokenizer)
    assert tokenized.ids.tolist() == tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]
    assert trained_text(tokenizer, tokenized) == "".join(m["content"] + "<|im_end|>" for m in TWO_TURNS[1::2])


def test_the_mask_equals_that_of_a_template_with_generation_marks(tokenizer):
    marked = SMOLLM2.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert marked != SMOLLM2
    theirs = tokenizer.apply_chat_template(
        TWO_TURNS, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    for template in (SMOLLM2, marked):
        tokenizer.chat_template = template
        (ours,) = tokenize_conversations([TWO_TURNS], tokenizer)
        assert ours.ids.tolist() == theirs["input_ids"]
        assert ours.trained.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (INST, " {1}<|im_end|> {3}<|im_end|>"),
        (THINKING, "{1}<|im_end|>hm\n</think>\n{3}<|im_end|>"),
        (BARE, " {1} {3}<|im_end|>"),
        (ASKING, " {1} {3}<|im_end|>"),
        (None, " {1}<|im_end|> {3}<|im_end|>"),
    ],
    ids=["inst", "thinking", "bare", "asking", "no template"],
)
def test_templates_of_other_kinds_train_the_replies_only(tokenizer, template, expected):
    tokenizer.chat_template = template
    (tokenized,) = tokenize_conversations([TWO_TURNS], tokenizer)
    assert trained_text(tokenizer, tokenized) == expected.format(*[m["content"] for m in TWO_TURNS])


def test_thinking_that_the_template_drops_from_earlier_turns_leaves_the_mask_right(tokenizer):
    tokenizer.chat_template = THINKING
    thinking = [
        {**m, "content": "<think>so</think>" + m["content"]} if m["role"] == "assistant" else m
        for m in TWO_TURNS
    ]
    dropped, plain = tokenize_conversations([thinking, TWO_TURNS], tokenizer)
    assert dropped.ids.tolist() == plain.ids.tolist()
    assert dropped.trained.tolist() == plain.trained.tolist()


def test_a_tokenizer_without_a_template_writes_users_and_assistants(tokenizer):
    (tokenized,) = tokenize_conversations([TWO_TURNS[:2]], tokenizer)
    assert (
        tokenizer.decode(tokenized.ids)
        == "User: What is two and three?\n\nAssistant: It is five.\n\nReally 5.<|im_end|>"
    )


def test_a_system_turn_that_the_template_refuses_joins_the_users(tokenizer):
    tokenizer.chat_template = INST
    (tokenized,) = tokenize_conversations(
        [[{"role": "system", "content": "Be brief."}, *TWO_TURNS[:2]]], tokenizer
    )
    assert tokenizer.decode(tokenized.ids).startswith("[INST] Be brief.\n\nWhat is two and three? [/INST]")


def test_a_conversation_that_the_template_refuses_comes_back_with_what_it_said(tokenizer):
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('tools are\nnot for me.') }}{% endif %}"
    tokenizer.chat_template = refusing + SMOLLM2
    refused, fine = tokenize_conversations(
        [[{"role": "tool", "content": "x"}, *TWO_TURNS], TWO_TURNS], tokenizer
    )
    assert str(refused) == "the chat template refuses it (tools are not for me)"
    assert trained_text(tokenizer, fine).startswith(TWO_TURNS[1]["content"])


def test_what_has_no_reply_that_answers_something_is_left_out(tokenizer):
    tokenizer.chat_template = SMOLLM2
    user, reply = TWO_TURNS[:2]
    tokenized = tokenize_conversations(
        [[], [user], [reply], [user, {**reply, "content": " "}], [user, reply]], tokenizer
    )
    assert tokenized[:-1] == [None] * 4
    assert trained_text(tokenizer, tokenized[-1]) == reply["content"] + "<|im_end|>"
    (greeted,) = tokenize_conversations([[reply, *TWO_TURNS[2:], user]], tokenizer)
    assert trained_text(tokenizer, greeted) == TWO_TURNS[3]["content"] + "<|im_end|>"
    assert user["content"] not in tokenizer.decode(greeted.ids)


@pytest.mark.parametrize("turn", ["m.role + ' ' + m.content[:-1]", "m.content|length|string + m.content"])
def test_a_template_that_rewrites_replies_gives_nothing_rather_than_a_wrong_mask(tokenizer, turn):
    tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    assert tokenize_conversations([TWO_TURNS], tokenizer) == [None]


def test_named_templates_without_a_default_are_one_clear_error(tokenizer):
    tokenizer.chat_template = {"tool_use": SMOLLM2, "rag": SMOLLM2}
    with pytest.raises(
        DataError, match=r"the tokenizer's chat template fails: .*no default.*remove it\."
    ) as it:
        tokenize_conversations([TWO_TURNS], tokenizer)
    assert "\n" not in str(it.value)


def test_a_template_that_writes_todays_date_gives_the_same_tokens_every_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + SMOLLM2
    (tokenized,) = tokenize_conversations([TWO_TURNS], tokenizer)
    assert tokenizer.decode(tokenized.ids).startswith("26 Jul 2024<|im_start|>system")
    tokenizer.chat_template = "{{ date_string }}" + SMOLLM2
    assert (tokenize_conversations([TWO_TURNS], tokenizer)[0].ids == tokenized.ids).all()


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_packing_loses_nothing_but_the_last_rest(length):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 30, 40).tolist(), 300, 0, 5]
    stream = [
        Tokenized(rng.integers(0, 10**6, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8))
        for n in sizes
    ]
    packed = list(pack(iter(stream), length))
    count = sum(sizes) // length
    assert len(packed) == count
    for field in (0, 1):
        flat = np.concatenate([document[field] for document in stream])[: count * length]
        assert np.array_equal(np.array([sequence[field] for sequence in packed]).reshape(-1), flat)
        assert all(sequence[field].dtype == stream[0][field].dtype for sequence in packed)


def random_documents(sizes, seed=0, opening=()):
    """Documents without two equal tokens in all of them, the ids of the opening apart."""
    rng, first = np.random.default_rng(seed), 1000
    for size in sizes:
        ids = np.arange(first, first + size, dtype=np.int32)
        ids[: len(opening)] = opening[:size]
        first += size
        yield Tokenized(ids, rng.integers(0, 2, size).astype(np.uint8))


def like_conversations(count, seed=0):
    """Lengths as measured of conversations: half shorter than 162 tokens, a tenth longer than 400."""
    return np.random.default_rng(seed).lognormal(math.log(162), 0.72, count).astype(int) + 1


def parts_of(row):
    """The documents of a packed row, and what follows them."""
    begins = row.starts.nonzero()[0].tolist()
    ends = [*begins[1:], len(row.ids) - row.padding]
    parts = [Tokenized(row.ids[a:b], row.trained[a:b]) for a, b in zip(begins, ends, strict=True)]
    return parts, row.ids[ends[-1] :]


@pytest.mark.parametrize("opening", [[], [7], [7, 8]], ids=len)
@pytest.mark.parametrize("length", [3, 40, 256, 2000])
def test_every_token_is_in_one_row_and_only_what_is_longer_than_a_row_is_cut(length, opening):
    sizes = [*like_conversations(300), 1, 2, 0, length, length + 1, 5 * length, 3]
    documents = list(random_documents(sizes, opening=opening))
    packed = list(pack_whole(iter(documents), length, opening=opening, padding=9, held=4))
    pieces = {}
    for row in packed:
        assert all(values.shape == (length,) for values in row[:3])
        assert (row.starts[0], row.trained[row.starts == 1].any()) == (1, False)
        parts, rest = parts_of(row)
        assert (rest == 9).all()
        assert not row.trained[length - len(rest) :].any()
        for part in parts:
            body = part.ids[len(opening) :]
            pieces[int(body[0]) if len(body) else -len(part.ids)] = part
    for document in filter(lambda document: len(document.ids) > len(opening), documents):
        ids, trained, place = document.ids, document.trained.copy(), len(opening)
        trained[0] = 0
        assert ids[:place].tolist() == opening
        while place < len(ids):
            end = place + length - len(opening)
            begin = 0 if place == len(opening) else place
            if len(ids) > length and not document.trained[begin:end].any():
                assert int(ids[place]) not in pieces  # it would train nothing
                place = end
                continue
            piece = pieces.pop(int(ids[place]))
            assert piece.ids[: len(opening)].tolist() == opening
            body = piece.ids[len(opening) :]
            assert len(piece.ids) == length or place + len(body) == len(ids)
            assert (place + len(body) == len(ids)) or len(ids) > length
            assert np.array_equal(body, ids[place : place + len(body)])
            want = trained[place : place + len(body)].copy()
            want[: max(1 - len(opening), 0)] = 0  # nothing stands before the first token
            assert np.array_equal(piece.trained[len(opening) :], want)
            place += len(body)
    assert all(key < 0 for key in pieces)  # nothing else, but documents that are openings alone


def test_pieces_of_a_cut_conversation_that_train_nothing_are_left_out():
    ids, trained = np.arange(100, 195, dtype=np.int32), np.zeros(95, np.uint8)
    trained[[35, 36, 94]] = 1  # pieces of 20, 18, 18, 18, 18 and 3 tokens
    ids[:2] = opening = [7, 8]
    long, short = Tokenized(ids, trained), Tokenized(ids[:20], trained[:20])
    rows = list(pack_whole([long, short], 20, opening=opening, padding=9, held=1))
    found = [part.ids.tolist() for row in rows for part in parts_of(row)[0]]
    assert sorted(found) == sorted([[7, 8, *range(120, 138)], [7, 8, *range(192, 195)], ids[:20].tolist()])
    assert packed_tokens(long, 20, opening) == 18 + 3
    assert packed_tokens(short, 20, opening) == 20  # not cut
    text = Tokenized(ids, np.ones(95, np.uint8))
    assert packed_tokens(text, 20, opening) == 95


@pytest.mark.parametrize("held", [1, 3, 50])
def test_a_row_takes_those_that_wait_longest_and_then_the_longest_that_fit(held):
    length, sizes = 700, like_conversations(250)
    packed = pack_whole(random_documents(sizes), length, opening=[], padding=0, held=held)
    waiting, unread = [], [document.ids.tolist() for document in random_documents(sizes)]
    unread = [ids[at : at + length] for ids in unread for at in range(0, len(ids), length)]
    for row in packed:
        while unread and sum(map(len, waiting)) < held * length:
            waiting.append(unread.pop(0))
        room, expected = length, []
        while waiting and len(waiting[0]) <= room:
            expected.append(waiting.pop(0))
            room -= len(expected[-1])
        while fitting := [ids for ids in waiting if len(ids) <= room]:
            expected.append(max(fitting, key=len))  # the first of equal ones
            waiting.remove(expected[-1])
            room -= len(expected[-1])
        assert [part.ids.tolist() for part in parts_of(row)[0]] == expected
        assert row.padding == room
    assert not waiting
    assert not unread


def test_no_more_is_read_ahead_than_is_held():
    read = []

    def counted():
        for document in random_documents(like_conversations(3000)):
            read.append(len(document.ids))
            yield document

    for number, _ in enumerate(pack_whole(counted(), 500, opening=[], padding=0, held=6), start=1):
        assert sum(read) <= (number + 6) * 500 + max(read)


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_less_than_two_percent_of_rows_of_conversations_is_padding(length):
    rows = pack_whole(random_documents(like_conversations(4000)), length, opening=[], padding=0, held=128)
    assert sum(row.padding for row in list(rows)[:-128]) < 0.02 * 4000 * 200


@pytest.mark.parametrize("opening", [[], [7], [7, 8]], ids=len)
def test_pieces_of_plain_text_are_cut_to_fill_rows_and_nothing_else_is(opening):
    """Of each document the parts stand in their order, lose nothing and repeat nothing."""
    length, sizes = 64, [*like_conversations(120), 3, 64, 65, 200]
    rng = np.random.default_rng(4)
    documents = [
        document._replace(trained=np.ones_like(document.trained), divisible=bool(rng.random() < 0.3))
        for document in random_documents([max(size, 4) for size in sizes], opening=opening)
    ]
    rows = list(pack_whole(iter(documents), length, opening=opening, padding=9, held=6))
    parts = [part for row in rows for part in parts_of(row)[0]]
    for document in documents:
        body = document.ids[len(opening) :]
        own = [part for part in parts if len(part.ids) > len(opening) and part.ids[len(opening)] in body]
        assert all(part.ids[: len(opening)].tolist() == opening for part in own)
        found = np.concatenate([part.ids[len(opening) :] for part in own])
        # Pieces that were cut first of a long document may be given out in another order than they stand in.
        assert np.array_equal(np.sort(found), body)
        if not document.divisible:
            assert len(own) == -(-len(body) // (length - len(opening)))
    full = rows[: len(rows) // 2]
    assert sum(row.padding for row in full) / (len(full) * length) < 0.04  # gaps of less than 8 stay


def test_packing_goes_on_from_what_is_left():
    sizes = [*like_conversations(200), 900, 2]
    sizes[9] = 700
    documents = [
        document._replace(divisible=n % 3 == 0) for n, document in enumerate(random_documents(sizes))
    ]
    documents[9].trained[:-1] = 0
    for cut in (1, 17, 100):
        stream, waiting, rest = iter(documents), Waiting(), []
        whole = list(pack_whole(iter(documents), 128, opening=[7], padding=9, held=5))
        head = list(islice(pack_whole(stream, 128, opening=[7], padding=9, held=5, waiting=waiting), cut))
        left = Waiting(list(waiting), list(waiting.unread))
        tail = list(pack_whole(stream, 128, opening=[7], padding=9, held=5, waiting=left))
        assert [row.ids.tolist() for row in head + tail] == [row.ids.tolist() for row in whole]
        assert [row.starts.tolist() for row in head + tail] == [row.starts.tolist() for row in whole]
        stream = iter(documents)
        head = list(islice(pack(stream, 128, rest=rest), cut))
        tail = list(pack(stream, 128, rest=list(rest)))
        assert [row.ids.tolist() for row in head + tail] == [row.ids.tolist() for row in pack(documents, 128)]
