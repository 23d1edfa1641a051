import json
from pydoc_data.topics import topics

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from core.errors import ExportError
from core.export.gguf import export_gguf
from core.model.build import build_model, load_tokenizer
from core.model.checkpoint import save_model
from tests.support.llamacpp import LlamaCpp

TEXTS = [
    "",
    " ",
    "\n",
    "Hello world",
    "  leading and trailing  ",
    "many     spaces,\ttabs\t\tand\n\n\nlines \r\n of all kinds \n ",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # ok?\n",
    "1234567 3.14159 2024-05-01 x²½ ٣٤ Ⅷ 0x1F 1,000,000",
    "I'm you're WE'LL can't 'tis rock'n'roll's 'S 'T",
    "Äpfel, Öl und Übermaß: ÄÖÜ äöüß naïve café É éÉ",
    "日本語のテキスト 中文。标点。 한국어 텍스트",
    "Привет мир ПРИВЕТ مرحبا بالعالم नमस्ते दुनिया",
    "😀 👩‍👩‍👧 🏳️‍🌈 ❤️",
    "CamelCaseHTTPServer snake_case SCREAMING https://example.org/a?b=c&d=e#f",
    "nbsp\u00a0em\u2003zero\u200bwidth ﬁ ǅ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b  <|endoftext|> c<tool> d",
]
TRAINING = [
    *[topics[name] for name in sorted(topics)[:8]],
    "the cat sat on the mat and the hat was thin; there they then thought of other things " * 5,
    "Hello world! We'll see what 1234567 makes of it. CamelCase HTTPServer SCREAMING " * 5,
    "Äpfel Öl Übermaß ÄÖÜ äöü café naïve Привет мир 日本語 テキスト 中文 " * 5,
    "def f(x):\n    return x\n\n\n        if a == b:\n\t\tpass  # many     spaces\n" * 5,
]
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = LETTERS + r"|\p{N}{1,3}" + REST, LETTERS + r"|\p{N}" + REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


def byte_level(pre_tokenizer, *, whole_words=False):
    """A byte-level BPE of 700 tokens.

    Some words of its vocabulary cannot be merged: whether they are found tells how it treats whole words.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=ENDS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TRAINING, trainer)
    definition = json.loads(bpe.to_str())
    definition["model"]["merges"] = definition["model"]["merges"][:-40]
    definition["model"]["ignore_merges"] = whole_words
    bpe = Tokenizer.from_str(json.dumps(definition))
    bpe.add_tokens(["<tool>"])
    return bpe


def sentencepiece(*, prepare, closed=True):
    """A BPE over characters with byte fallback, with the merges of a SentencePiece model."""
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Replace(" ", "▁")
    plain.train_from_iterator(
        TRAINING[:10], trainers.BpeTrainer(vocab_size=300, special_tokens=["\n"], show_progress=False)
    )
    learnt = json.loads(plain.to_str())["model"]
    vocab = {
        text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])
    }
    for text in learnt["vocab"]:
        vocab.setdefault(text, len(vocab))
    merges = [tuple(pair) for pair in learnt["merges"]]
    if closed:
        merges = generate_merges(vocab, {left + right: -i for i, (left, right) in enumerate(merges)})
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer, bpe.pre_tokenizer = prepare
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return bpe


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture
def write(tmp_path):
    """Write a small checkpoint with a tokenizer, and return its folder and the file exported of it."""

    def write(backend, **special):
        special = {"eos_token": "<|im_end|>", "unk_token": None} | special
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=len(tokenizer) + 5,
        )
        torch.manual_seed(0)
        save_model(build_model(config), tmp_path / "model", companions=None, provenance={})
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model", export_gguf(tmp_path / "model", tmp_path / "model.gguf")

    return write


def assert_same_tokens(folder, path, texts=TEXTS):
    ours, theirs = load_tokenizer(folder), LlamaCpp(path)
    for text in texts:
        expected = ours(text)["input_ids"]
        assert theirs.tokenize(text) == expected, (text, ours.convert_ids_to_tokens(expected))


def pre_of(path):
    return gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents()


@pytest.mark.parametrize(
    ("pre_tokenizer", "whole_words", "name"),
    [
        (BYTE_LEVEL, False, "gpt-2"),
        (DIGITS, False, "smollm"),
        (split_by(LLAMA3), True, "llama-bpe"),
        (split_by(LLAMA3), False, "smaug-bpe"),
        (split_by(QWEN2), False, "qwen2"),
    ],
)
def test_llama_cpp_cuts_texts_into_the_same_tokens(write, pre_tokenizer, whole_words, name):
    folder, exported = write(byte_level(pre_tokenizer, whole_words=whole_words))
    assert pre_of(exported.path) == name
    assert_same_tokens(folder, exported.path)
    assert not [note for note in exported.notes if "token" in note]


def test_that_tekken_may_differ_in_capital_letters_is_told(write):
    folder, exported = write(byte_level(split_by(TEKKEN), whole_words=True))
    assert pre_of(exported.path) == "tekken"
    assert [note for note in exported.notes if "capital letters" in note]
    assert_same_tokens(folder, exported.path)


def test_composing_characters_first_is_told(write):
    backend = byte_level(split_by(QWEN2))
    backend.normalizer = normalizers.NFC()
    folder, exported = write(backend)
    assert [note for note in exported.notes if "NFC" in note]
    composed = [text for text in TEXTS if "\u0301" not in text]
    assert_same_tokens(folder, exported.path, composed)


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "whole_words", "problem"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, False, "ByteLevel.*'add_prefix_space': True"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None, False, "by nothing"),
        (split_by(r"\p{L}+|\s+"), None, False, r"by \\p\{L\}\+\|\\s\+, with"),
        (BYTE_LEVEL, None, True, "ignore_merges=True"),
        (split_by(TEKKEN), None, False, "ignore_merges=False"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL]),
            None,
            False,
            "Digits.*False",
        ),
        (
            pre_tokenizers.Sequence([BYTE_LEVEL, pre_tokenizers.Digits(individual_digits=True)]),
            None,
            False,
            "Digits after ByteLevel",
        ),
        (pre_tokenizers.Whitespace(), None, False, "Whitespace.*no ByteLevel"),
        (BYTE_LEVEL, normalizers.Lowercase(), False, "Lowercase"),
    ],
)
def test_a_way_of_splitting_without_a_name_is_refused(write, pre_tokenizer, normalizer, whole_words, problem):
    backend = byte_level(pre_tokenizer, whole_words=whole_words)
    if normalizer:
        backend.normalizer = normalizer
    with pytest.raises(ExportError, match=problem):
        write(backend)


def test_byte_fallback_has_the_same_tokens(write):
    folder, exported = write(sentencepiece(prepare=(PREPEND, None)), **SPECIAL)
    reader = gguf.GGUFReader(exported.path)
    assert reader.get_field("tokenizer.ggml.model").contents() == "llama"
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:4] == [2, 3, 3, 6]
    assert types[-5:] == [5] * 5
    assert_same_tokens(folder, exported.path, [text for text in TEXTS if text])
    assert_same_tokens(folder, exported.path, ["hello</s> there <s>then<unk>"])


@pytest.mark.parametrize(
    ("scheme", "where"), [("first", "at its start"), ("always", "there is none already"), ("never", "")]
)
def test_a_space_is_put_before_texts_as_the_tokenizer_does_or_a_note_says_where_not(write, scheme, where):
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    folder, exported = write(sentencepiece(prepare=(None, metaspace)), **SPECIAL)
    notes = [note for note in exported.notes if "a space before a text" in note]
    assert len(notes) == bool(where)
    assert all(where in note for note in notes)
    texts = [text for text in TEXTS if text and text[0] != " "] if where else TEXTS
    assert_same_tokens(folder, exported.path, texts)


@pytest.mark.parametrize(
    ("prepare", "closed", "problem"),
    [
        ((PREPEND, None), False, "never merges"),
        ((normalizers.NFKC(), None), True, "NFKC"),
        ((None, None), True, "does not write spaces as"),
        (
            (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
            True,
            "splits texts at spaces",
        ),
    ],
)
def test_a_byte_fallback_that_scores_cannot_tell_is_refused(write, prepare, closed, problem):
    with pytest.raises(ExportError, match=problem):
        write(sentencepiece(prepare=prepare, closed=closed), **SPECIAL)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (models.WordPiece({"a": 0, "<|im_end|>": 1}, unk_token="a"), "type WordPiece"),
        (models.Unigram([("a", -1.0), ("b", -2.0)]), "type Unigram"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(write, model, problem):
    with pytest.raises(ExportError, match=problem):
        write(Tokenizer(model))


def field(path, key):
    found = gguf.GGUFReader(path).get_field(f"tokenizer.ggml.{key}")
    return None if found is None else found.contents()


def test_what_is_put_around_a_text_is_what_the_tokenizer_puts(write):
    backend = byte_level(BYTE_LEVEL)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    folder, exported = write(backend, bos_token="<|im_start|>")
    assert (field(exported.path, "add_bos_token"), field(exported.path, "add_eos_token")) == (True, True)
    assert_same_tokens(folder, exported.path)
    (exported.path).unlink()
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(ExportError, match=r"puts \[0, \d+\] around"):
        write(backend, bos_token="<|im_start|>")


def test_generation_stops_at_all_tokens_that_end_a_text(write):
    backend = byte_level(BYTE_LEVEL)
    backend.add_special_tokens(["<over>", "<done>", "<fin>"])
    folder, exported = write(backend)
    over, done, fin = (backend.token_to_id(text) for text in ("<over>", "<done>", "<fin>"))
    assert field(exported.path, "eos_token_id") == 2
    assert field(exported.path, "eot_token_id") is None
    exported.path.unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, over, done, fin]}))
    exported = export_gguf(folder, exported.path)
    assert [field(exported.path, f"{end}_token_id") for end in ("eos", "eot", "eom")] == [2, over, done]
    assert [note for note in exported.notes if "will not stop at '<fin>'" in note]


def test_a_model_without_an_end_is_refused(write, tmp_path):
    folder, _ = write(byte_level(BYTE_LEVEL))
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token": None, "eos_token_id": None}))
    with pytest.raises(ExportError, match="token 11"):
        export_gguf(folder, tmp_path / "endless.gguf")


def test_two_tokens_of_one_text_are_refused(write):
    backend = byte_level(BYTE_LEVEL)
    backend.add_tokens([f"[PAD{backend.get_vocab_size() + 3}]"])  # as the file calls a row without a token
    with pytest.raises(ExportError, match="two tokens"):
        write(backend)


def test_a_chat_reads_the_same(write, tmp_path):
    folder, _ = write(byte_level(BYTE_LEVEL))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    exported = export_gguf(folder, tmp_path / "chat.gguf")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Wie heißt du?\n  Sag's!"},
    ]
    ours = load_tokenizer(folder)
    expected = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert LlamaCpp(exported.path).chat_prompt(messages) == expected
    assert field(exported.path, "eot_token_id") == 2
