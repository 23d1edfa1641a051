"""Questions of multiple choice, their data files, and what a model prefers, by single predictions."""

import json

import torch

from core.settings.evaluation import EvaluationSettings

QUESTIONS = [
    ("Which of these is a metal?", ["iron", "a wooden spoon", "water", "air in a bottle"]),
    ("What do plants need to grow?", ["light", "noise and smoke", "plastic"]),
    ("Where does the sun rise?", ["in the east", "in the west", "at the pole", "nowhere at all"]),
    ("What boils at 100 degrees?", ["water", "gold", "the sea bed", "a stone", "salt"]),
    ("Which animal lays eggs?", ["a hen", "a horse", "a common house cat", "no animal"]),
    ("What does a thermometer measure?", ["temperature", "time", "the age of a tree", "weight"]),
    ("Which planet do we live on?", ["Earth", "Mars", "Jupiter or one of its moons", "Venus"]),
]


def arc_item(number, answer):
    question, choices = QUESTIONS[number]
    labels = list("ABCDE")[: len(choices)]
    return {
        "id": str(number),
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


def write(folder, rows, form="jsonl"):
    folder.mkdir(parents=True)
    if form == "jsonl":
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    import datasets

    data = datasets.Dataset.from_list(rows)
    if form == "parquet":
        data.select(range(2)).to_parquet(folder / "0000.parquet")
        data.select(range(2, len(rows))).to_parquet(folder / "0001.parquet")
    else:
        data.save_to_disk(folder)


def settings_for(folder, *tasks, **others):
    tasks = tasks or ("arc_easy",)
    return EvaluationSettings(tasks=tasks, task_data={task: str(folder) for task in tasks}, **others)


def log_likelihood(model, tokenizer, context, continuation):
    """Log-probability of the continuation's tokens, each from a forward pass of its own."""
    before, tokens = tokenizer.encode(context), tokenizer.encode(context + continuation)
    total = 0.0
    for position in range(len(before), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:position]])).logits[0, -1].double()
        total += float(logits[tokens[position]] - torch.logsumexp(logits, 0))
    return total


def preferences(model, tokenizer):
    """For each question the choice of highest log-likelihood, and of highest log-likelihood per character."""
    plain, normed = [], []
    for question, choices in QUESTIONS:
        scores = [
            log_likelihood(model, tokenizer, f"Question: {question}\nAnswer:", f" {choice}")
            for choice in choices
        ]
        per_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        plain.append(scores.index(max(scores)))
        normed.append(per_character.index(max(per_character)))
    return plain, normed
