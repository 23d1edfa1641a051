"""The nine data sets of the paper's Table 2: rows written by hand in each one's own columns."""

import json
from datetime import UTC, datetime
from pathlib import Path

import datasets
import pytest
import yaml

from core.data.rows import open_rows
from core.data.texts import iter_conversations
from core.data.workers import Reader
from core.settings.texts import TextSource

PAPER = Path(__file__).resolve().parents[2] / "recipes/include/paper.yaml"
TWO_TURNS = [("user", "2+3?"), ("assistant", "5"), ("user", "Why?"), ("assistant", "3 after 2.")]
NOW = datetime(2023, 4, 9, tzinfo=UTC)
MODERATION = [{"categories": {"hate": False}, "category_scores": {"hate": 0.1}, "flagged": False}]


def talk(**notes):
    return [{"content": content, "role": role, **notes} for role, content in TWO_TURNS]


NOTES = {
    "country": "Sweden",
    "hashed_ip": "22fd87ba",
    "header": {"accept-language": "sv", "user-agent": "Mozilla/5.0"},
    "language": "English",
    "redacted": False,
    "state": None,
    "timestamp": None,
    "toxic": False,
    "turn_identifier": 102335,
}
# Name, the row, and the conversation that it is.
ROWS = {
    "Open-Orca/OpenOrca": (
        {"id": "cot.64099", "system_prompt": "You are terse.", "question": "2+3?", "response": "5"},
        [("system", "You are terse."), ("user", "2+3?"), ("assistant", "5")],
    ),
    "allenai/WildChat-1M": (
        {
            "conversation_hash": "cf1267ca",
            "model": "gpt-4-0314",
            "timestamp": NOW,
            "conversation": talk(**NOTES),
            "turn": 2,
            "language": "English",
            "openai_moderation": MODERATION,
            "detoxify_moderation": [{"insult": 0.0}],
            "toxic": False,
            "redacted": False,
            "state": None,
            "country": "Sweden",
            "hashed_ip": "22fd87ba",
            "header": NOTES["header"],
        },
        TWO_TURNS,
    ),
    "lmsys/lmsys-chat-1m": (
        {
            "conversation_id": "33f01939",
            "model": "wizardlm-13b",
            "conversation": talk(),
            "turn": 2,
            "language": "English",
            "openai_moderation": MODERATION,
            "redacted": False,
        },
        TWO_TURNS,
    ),
    "teknium/OpenHermes-2.5": (
        {
            "category": "orca",
            "conversations": [
                {"from": "system", "value": "Be kind.", "weight": None},
                {"from": "human", "value": "2+3?", "weight": 0.0},
                {"from": "gpt", "value": "5", "weight": 1.0},
            ],
            "topic": None,
            "title": None,
            "source": "airoboros2.2",
            "model": None,
            "language": None,
            "system_prompt": None,
        },
        [("system", "Be kind."), ("user", "2+3?"), ("assistant", "5")],
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "2+3?", "prompt_id": "f0e37e94", "messages": talk()},
        TWO_TURNS,
    ),
    "openbmb/UltraInteract_sft": (
        {
            "task": "Math_CoT",
            "dataset": "mathqa",
            "instruction": "Solve: 2+3?",
            "response": "Step 1: count. The answer is 5.",
            "id": "c4d9e2",
            "parent_id": "root",
        },
        [("user", "Solve: 2+3?"), ("assistant", "Step 1: count. The answer is 5.")],
    ),
    "O1-OPEN/OpenO1-SFT": (
        {"instruction": "2+3?", "output": "<Thought>count</Thought>\n<Output>5</Output>"},
        [("user", "2+3?"), ("assistant", "<Thought>count</Thought>\n<Output>5</Output>")],
    ),
    "yahma/alpaca-cleaned": (
        {"output": "5", "input": "2 and 3", "instruction": "Add."},
        [("user", "Add.\n\n2 and 3"), ("assistant", "5")],
    ),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Sum?", "context": "2 and 3", "response": "5", "category": "closed_qa"},
        [("user", "Sum?\n\n2 and 3"), ("assistant", "5")],
    ),
}
SOURCES = {source["path"]: source for source in yaml.safe_load(PAPER.read_text())["training"]["sources"]}


def local(name, folder, kind):
    """The paper's own source, with a file here in place of the hub's."""
    row, _ = ROWS[name]
    if kind == "parquet":
        datasets.Dataset.from_list([row, row]).to_parquet(folder / "rows.parquet")
    elif kind == "jsonl":
        (folder / "rows.jsonl").write_text(2 * (json.dumps(row, default=str) + "\n"))
    else:
        (folder / "rows.json").write_text(json.dumps([row, row], default=str, indent=2))
    prompt = tuple(SOURCES[name].get("prompt_fields", ()))
    return TextSource(**SOURCES[name] | {"path": str(folder / f"rows.{kind}"), "prompt_fields": prompt})


def test_the_recipe_names_all_nine_with_the_papers_shares():
    assert SOURCES.keys() == ROWS.keys()
    assert sum(source["weight"] for source in SOURCES.values()) == pytest.approx(3.91, abs=0.01)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_its_conversation(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = list(iter_conversations(local(name, tmp_path, kind)))
    wanted = [{"role": role, "content": content} for role, content in ROWS[name][1]]
    assert found == [wanted, wanted]


@pytest.mark.parametrize("name", ROWS)
def test_its_replies_are_trained_and_nothing_else(name, tmp_path, tokenizer):
    source = local(name, tmp_path, "jsonl")
    with open_rows(source) as rows:
        document = Reader(source=source, rows=rows, tokenizer=tokenizer).read([1]).documents[0]
    replies = [content for role, content in ROWS[name][1] if role == "assistant"]
    trained = tokenizer.decode(document.ids[document.trained == 1])
    assert [part.strip() for part in trained.split("<|im_end|>")] == [*replies, ""]


def test_a_column_of_system_turns_stands_back_where_the_conversation_has_one(tmp_path):
    rows = [
        {"system": "A", "m": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"system": "B", "m": [{"from": "system", "value": "C"}, {"from": "gpt", "value": "a"}]},
        {"system": " ", "m": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
        {"system": None, "m": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSource(path=str(tmp_path / "a.jsonl"), format="chat", field="m", system_field="system")
    found = [[m["content"] for m in messages] for messages in iter_conversations(source)]
    assert found == [["A", "q", "a"], ["C", "a"], ["q", "a"], ["q", "a"]]
