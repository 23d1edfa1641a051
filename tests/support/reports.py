"""The record of a run, made up, and a page as a browser would see it."""

import re
from html.parser import HTMLParser

from core.runs.record import LayerSizes, PhaseRecord, RunRecord


def make_record(phases=2, layers=30, tasks=("arc_easy", "piqa"), trained=True, **changes):
    """A run whose layers shrink by a different amount each, with all numbers distinct."""
    steps, records = 0, []
    for phase in range(phases + 1):
        share = [phase / phases * (0.1 + 0.6 * i / layers) for i in range(layers)]
        sizes = tuple(
            LayerSizes(query_heads=9 - 3 * (s > 0.3), kv_heads=3 - (s > 0.3), mlp_width=round(1536 * (1 - s)))
            for s in share
        )
        length = 4 + 10 * phase
        losses = tuple((steps + k, 3 - 0.01 * k + 0.1 * (k % 3), 2e-5) for k in range(length))
        records.append(
            PhaseRecord(
                phase=phase,
                params=134_515_008 - phase * (26_200_002 // phases),
                target_params=134_515_008 - phase * (26_200_002 // phases) + phase,
                layers=sizes,
                importance=tuple(1 - 2 * i / (layers - 1) for i in range(layers)) if phase else (),
                sparsity=tuple(share) if phase else (),
                perplexity_pruned=24.5 + 36.25 * phase if phase else None,
                perplexity=24.5 + 6.5 * phase,
                tasks={
                    t: {
                        "acc,none": 0.2,
                        "acc_norm,none": 0.4512 - phase / 50 + i / 100,
                        "acc_norm_stderr,none": 0.0287,
                    }
                    for i, t in enumerate(tasks)
                },
                tokens=20_000 * phase if trained else 0,
                losses=losses if trained and phase else (),
                seconds={"calibrate": 14.5 * phase, "evaluate": 61.25},
            )
        )
        steps += length if phase else 0
    values = {
        "key": "3f9ac1d27be0",
        "name": "demo",
        "base": "org/SmolLM2-135M",
        "revision": "abcdef123",
        "settings": {
            "seed": 17,
            "prune": {"amplitude": 0.0375},
            "training": {"sources": [{"path": "text.txt"}]},
        },
        "phases": tuple(records),
        "checkpoint_uri": "/store/runs/3f9/phases/02/recovered",
        "tracking_uri": "sqlite:////out/mlflow.db",
        "tracking_run": "768a2911",
    }
    return RunRecord(**(values | changes))


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the visible text."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data if "svg" in self.open else f"{data} ")

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]
