"""What a training measures at each step, and what it does when the loss leaves its level."""

import json
import math

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from core.errors import SettingsError, TrainingError
from core.machine.memory import peak_bytes
from core.model.build import load_model
from core.runs.run import Run
from core.steps.prepare_data import run_prepare_data
from core.storage.publication import open_publication
from core.training import recover as training
from core.training.measures import DivergenceWatch, peak_flops, step_flops
from core.training.recover import held_out_loss, recover
from core.training.rows import Rows
from core.training.state import read_state, state_tensors, write_state
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny
from tests.support.project import recipe_with, resolve, run_phase
from tests.support.training import training_settings, weights


def some_trained(tokens):
    return (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) > 0.4).int()


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name):
    model, tokens = tiny(name, None if name == "olmo2" else UNEQUAL), random_tokens(rows=3)
    model.set_attn_implementation("eager")
    trained = some_trained(tokens)
    places = trained[:, 1:].nonzero(as_tuple=True)
    with FlopCounterMode(display=False) as counter:
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(states[:, :-1][places])
        cross_entropy(logits, tokens[:, 1:][places]).backward()
    counted = int(trained[:, 1:].sum())
    # The first layer's input needs a gradient as well: the embeddings are trained.
    assert step_flops(model, tokens.shape, counted) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", 989),
        ("", None),
    ],
)
def test_an_accelerator_is_known_by_whole_words_of_its_name(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


def train(model, rows, *, first_step=0, held_out=None, **changes):
    settings = training_settings(**{"learning_rate": 1e-3, "min_learning_rate": 1e-4} | changes)
    return recover(model, rows, settings, held_out=held_out, first_step=first_step, total_steps=40)


def test_each_step_has_a_point_of_each_curve():
    tokens = random_tokens(rows=12)
    rows = Rows(tokens, some_trained(tokens))
    report = train(tiny("llama", UNEQUAL), rows, first_step=7)
    names = ("gradient_norm", "step_tokens_per_s", "peak_memory_bytes", "model_flops_per_s", "time_left_s")
    assert sorted(report.series) == sorted(names), "no utilisation on a CPU, whose peak is not known"
    for points in report.series.values():
        assert [step for step, _ in points] == [7, 8, 9]
        assert all(value > 0 for _, value in points[:-1])
    assert report.series["time_left_s"][-1] == (9, 0), "nothing is left"
    rates, flops = report.series["step_tokens_per_s"], report.series["model_flops_per_s"]
    for number, ((_, rate), (_, found)) in enumerate(zip(rates, flops, strict=True)):
        counted = rows.part(4 * number, 4).trained_tokens
        a_step = step_flops(tiny("llama", UNEQUAL), (4, 12), counted)
        assert found / rate == pytest.approx(a_step / 48)


def test_the_gradient_norm_is_that_before_clipping():
    tokens = random_tokens(rows=4)
    model = tiny("llama")
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    model.zero_grad()
    report = train(model, Rows(tokens, torch.ones_like(tokens)), max_grad_norm=1e-3)
    assert report.series["gradient_norm"] == [(0, pytest.approx(expected, rel=1e-6))]


def test_a_step_waits_for_the_device_once_whatever_the_micro_batch(monkeypatch):
    """Every number that a step reads from a device comes from one tensor."""
    read = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        plain = getattr(torch.Tensor, name)

        def spied(tensor, *args, plain=plain, name=name):
            if tensor.is_floating_point():
                read.append(name)
            return plain(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, spied)
    tokens = random_tokens(rows=12)
    starts = torch.zeros_like(tokens)
    starts[:, ::6] = 1
    for micro_batch in (1, 4):
        read.clear()
        model = tiny("llama")
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
        train(model, Rows(tokens, some_trained(tokens), starts), micro_batch=micro_batch)
        assert read == ["tolist"] * 3


def test_the_held_out_loss_is_that_of_the_model_without_dropout():
    tokens, held = random_tokens(rows=12), random_tokens(rows=5, seed=9)
    trained = some_trained(held)
    undisturbed, model = tiny("llama", UNEQUAL), tiny("llama", UNEQUAL)

    def expected(model):
        logits = model(held).logits[:, :-1]
        places = trained[:, 1:].nonzero(as_tuple=True)
        return cross_entropy(logits[places], held[:, 1:][places]).item()

    before = expected(model)
    rows = Rows(tokens, torch.ones_like(tokens))
    report = train(model, rows, held_out=Rows(held, trained), first_step=10, eval_every=2)
    points = report.series["held_out_loss"]
    assert [step for step, _ in points] == [10, 12, 13]
    assert points[0][1] == pytest.approx(before, rel=1e-6)
    assert points[-1][1] == pytest.approx(expected(model), rel=1e-6)
    train(undisturbed, rows, first_step=10)
    assert torch.equal(weights(model), weights(undisturbed)), "measuring trains nothing"


def test_packed_documents_that_are_held_out_see_themselves_alone():
    held = random_tokens(rows=1, length=12)
    starts = torch.zeros_like(held)
    starts[0, [0, 7]] = 1
    trained = 1 - starts
    model = tiny("llama")
    parts = [held[:, :7], held[:, 7:]]
    losses = [
        cross_entropy(model(part).logits[0, :-1], part[0, 1:], reduction="sum").item() for part in parts
    ]
    settings = training_settings()
    assert held_out_loss(model, Rows(held, trained, starts), settings) == pytest.approx(sum(losses) / 10)
    assert model.training


def test_curves_are_part_of_a_state_and_earlier_states_have_none(tmp_path):
    tokens, saved = random_tokens(rows=12), []
    model = tiny("llama", dtype=torch.float32)

    def save(optimizer, progress):
        folder = tmp_path / str(len(saved))
        write_state(folder, state_tensors(model, optimizer), progress, belongs_to={})
        saved.append((dict(progress.series), read_state(folder).progress.series))

    held = Rows(tokens[:2], torch.ones_like(tokens[:2]))
    recover(
        model,
        Rows(tokens, torch.ones_like(tokens)),
        training_settings(eval_every=1),
        held_out=held,
        first_step=0,
        total_steps=3,
        save=save,
    )
    assert [len(read["gradient_norm"]) for _, read in saved] == [1, 2]
    assert [len(read["held_out_loss"]) for _, read in saved] == [2, 3]
    path = tmp_path / "1" / "state.json"
    data = json.loads(path.read_text())
    assert list(data["progress"]["series"]) == list(saved[1][1])
    del data["progress"]["series"]
    path.write_text(json.dumps(data))
    assert read_state(tmp_path / "1").progress.series == {}


def test_losses_far_above_their_median_end_the_training():
    watch = DivergenceWatch(1.5, [(step, 2.0, 0.1) for step in range(30)])
    for step in range(30, 49):
        watch.see(step, 3.1)
    assert watch.steps_above == 19
    watch.see(49, 2.9)
    assert watch.steps_above == 0, "one step at the old level, and the count begins again"
    for step in range(50, 69):
        watch.see(step, 3.1)
    with pytest.raises(TrainingError, match=r"step 70: for 20 steps .* now 3\.1, .* its level of 2\."):
        watch.see(69, 3.1)


def test_a_loss_that_rises_at_once_ends_the_training():
    watch = DivergenceWatch(2.0, [])
    for step in range(5):
        watch.see(step, 3.0 + step / 2)  # not yet twice the first
    for step in range(5, 24):
        watch.see(step, 11.0)
    with pytest.raises(TrainingError, match=r"step 25: for 20 steps .* now 11, .* its level of 3\."):
        watch.see(24, 11.0)


def test_losses_may_rise_slowly():
    watch = DivergenceWatch(1.2, [])
    for step in range(1000):
        watch.see(step, 1.0 + step / 500)  # never 1.2 times the median of 100 steps
    assert watch.steps_above == 0


def test_without_a_limit_any_loss_goes_on():
    watch = DivergenceWatch(0, [(step, 1.0, 0.1) for step in range(50)])
    for step in range(50, 200):
        watch.see(step, 1e6)


def test_what_an_earlier_attempt_has_seen_counts():
    losses = [(step, 1.0, 0.1) for step in range(40)] + [(step, 9.0, 0.1) for step in range(40, 59)]
    watch = DivergenceWatch(2.0, losses)
    assert watch.steps_above == 19
    with pytest.raises(TrainingError, match="max_loss_rise=2 times"):
        watch.see(59, 9.0)


def test_no_state_is_saved_once_the_loss_has_risen(monkeypatch):
    steps = 60
    tokens, saved = random_tokens(rows=4 * steps), []
    plain = training._train_step

    def diverging(*arguments):
        values = plain(*arguments)
        return values | {"loss": 50.0 if int(arguments[-1].split()[1]) > 30 else values["loss"]}

    monkeypatch.setattr(training, "_train_step", diverging)
    with pytest.raises(TrainingError, match="stopped at step 50: for 20 steps"):
        recover(
            tiny("llama"),
            Rows(tokens, torch.ones_like(tokens)),
            training_settings(max_loss_rise=3.0),
            first_step=0,
            total_steps=steps,
            save=lambda _, progress: saved.append(progress.next_step),
        )
    assert saved == list(range(1, 31)), "the last state is the last good one"


@pytest.mark.parametrize("value", [0.5, 1.0])
def test_a_limit_that_any_loss_breaks_is_refused(value):
    with pytest.raises(SettingsError, match=rf"max_loss_rise={value:g} must be above 1"):
        training_settings(max_loss_rise=value)


def test_peak_memory_is_what_the_process_took():
    before = peak_bytes()
    block = torch.ones(40_000_000)
    assert peak_bytes() >= before
    assert peak_bytes() > block.nbytes


@pytest.mark.slow
def test_a_run_sets_part_of_the_mixture_aside_and_tracks_its_curves(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    changes = {
        "training.held_out_sequences": 5,
        "training.eval_every": 2,
        "training.micro_batch": 0,
        "prune.phases": 1,
        "storage.store": str(tmp_path / "store"),
        "storage.keep": "all",
        "tracking.uri": tracking,
    }
    handle, base_uri = resolve(recipe_with(changes))
    data_uri = run_prepare_data(run=handle, base_uri=base_uri)
    data = open_publication(data_uri).fetch(tmp_path / "data")
    trained, held = (load_file(data / f"slices/phase-0{phase}.safetensors") for phase in (1, 2))
    assert len(held["input_ids"]) == 5
    assert open_publication(data_uri).read_json("report.json")["training_tokens"] == 960
    seen = {tuple(row.tolist()) for row in trained["input_ids"]}
    assert not seen & {tuple(row.tolist()) for row in held["input_ids"]}

    run_phase(handle, 1, base_uri, data_uri, tmp_path / "work")
    run = Run.load(handle)
    found = open_publication(run.phase_uri(1, "recovered")).read_json("report.json")["series"]
    assert [step for step, _ in found["held_out_loss"]] == [0, 2, 4, 5]
    rows = Rows(held["input_ids"], held["trained"], held["starts"])
    for step, (_, loss) in (("pruned", found["held_out_loss"][0]), ("recovered", found["held_out_loss"][-1])):
        model = load_model(open_publication(run.phase_uri(1, step)).fetch(tmp_path / step))
        assert held_out_loss(model, rows, training_settings(micro_batch=2)) == pytest.approx(loss, rel=1e-5)

    client = MlflowClient(tracking)
    runs = client.search_runs([client.get_experiment_by_name("adapt-pruner").experiment_id])
    child = next(each for each in runs if each.data.tags.get("adapt_pruner.step") == "recover-train")
    for name, points in found.items():
        history = client.get_metric_history(child.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [tuple(point) for point in points], name
