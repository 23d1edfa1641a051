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


def test_what_has_no_reply_that_answers_something_is_left_out(tokenizer):
    tokenizer.chat_template = SMOLLM2
    user, reply = TWO_TURNS[:2]
    tokenized = tokenize_conversations(
        [[], [user], [reply], [user, {**reply, "content": " "}], [user, reply]], tokenizer
    )
    assert [trained_text(tokenizer, t) for t in tokenized] == [reply["content"] + "<|im_end|>"]
    (greeted,) = tokenize_conversations([[reply, *TWO_TURNS[2:], user]], tokenizer)
    assert trained_text(tokenizer, greeted) == TWO_TURNS[3]["content"] + "<|im_end|>"
    assert user["content"] not in tokenizer.decode(greeted.ids)


@pytest.mark.parametrize("turn", ["m.role + ' ' + m.content[:-1]", "m.content|length|string + m.content"])
def test_a_template_that_rewrites_replies_gives_nothing_rather_than_a_wrong_mask(tokenizer, turn):
    tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    assert tokenize_conversations([TWO_TURNS], tokenizer) == []


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
