"""What the tasks of a run are said to need in their pods, before it is submitted."""

import dataclasses

import pytest

from core.model.build import model_shape
from core.model.checkpoint import Checkpoint
from core.settings.model import ModelSettings
from core.settings.recipe import settings_from_dict
from core.steps.footprint import Footprint
from core.steps.needs import base_config, host_bytes, needs_of_tasks, shortages, summary_line
from core.storage.publication import publish
from tests.support.project import recipe_with


def settings_with(**changes):
    return settings_from_dict(
        recipe_with({name.replace("__", "."): value for name, value in changes.items()})
    )


NO_AMPLITUDE = {"prune__amplitude": 0.02}


@pytest.fixture
def config(project):
    return Checkpoint(project / "base").config


def test_the_config_of_a_base_is_read_without_its_weights(project, tmp_path):
    shape = model_shape(Checkpoint(project / "base").config)
    publish(project / "base", str(tmp_path / "published"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((project / "base" / "config.json").read_bytes())
    for base in (project / "base", tmp_path / "alone", (tmp_path / "published").as_uri()):
        found = base_config(ModelSettings(base=str(base)))
        assert model_shape(found) == shape


@pytest.mark.parametrize(
    "base", ["models:/x@champion", "nobody/no such model", "s3://no-such-bucket/x", "/HEAD"]
)
def test_a_base_that_cannot_be_read_here_is_no_error(base, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert base_config(ModelSettings(base=base)) is None


def test_each_process_of_a_task_takes_its_own_memory():
    small, large = (Footprint(parts={"weights": size}, host_bytes=0) for size in (0, 10**9))
    for ranks in (0, 1, 2, 3):
        settings = settings_with(evaluation__ranks=ranks, training__ranks=ranks, cluster={"gpus": 0})
        for component in ("recover-train", "evaluate"):
            alone, more = (host_bytes(component, footprint, settings) for footprint in (small, large))
            assert more - alone == max(1, ranks) * 10**9
            before = host_bytes(component, small, settings_with(cluster={"gpus": 0}))
            assert (alone > before) == (ranks > 1)
        assert host_bytes("calibrate", large, settings) - host_bytes("calibrate", small, settings) == 10**9


def test_accelerators_take_the_device_and_pods_the_host(config):
    on_gpu = settings_with(evaluation__tasks=["arc_easy"])
    on_cpu = settings_with(evaluation__tasks=["arc_easy"], cluster={"gpus": 0})
    needs = needs_of_tasks(config, on_gpu)
    assert list(needs) == ["calibrate", "score-layers", "prune-step", "recover-train", "evaluate"]
    assert "recover-train 0.1 GB on its GPU" in summary_line(needs, on_gpu)
    own = {"gpus": 1, "components": {"recover-train": {"gpus": 4}}}
    several = needs_of_tasks(config, on_four := settings_with(evaluation__tasks=["arc_easy"], cluster=own))
    assert "recover-train 0.1 GB on each of its 4 GPUs" in summary_line(several, on_four)
    assert "evaluate 0.1 GB on its GPU" in summary_line(several, on_four)
    weights = [of["recover-train"].parts["weights"] for of in (needs, several)]
    assert weights[0] == pytest.approx(4 * weights[1], abs=4)
    in_pods = needs_of_tasks(config, on_cpu)
    assert "GPU" not in summary_line(in_pods, on_cpu)
    logits = [of["evaluate"].parts["activations, then logits"] for of in (needs, in_pods)]
    assert logits[0] > 2 * logits[1]  # larger passes
    assert "recover-train" not in needs_of_tasks(
        config, settings_with(training__tokens="0", training__sources=[])
    )


def test_prune_step_needs_what_its_repair_and_its_distillation_take(config):
    def need(**changes):
        return needs_of_tasks(config, settings_with(cluster={"gpus": 0}, **changes)).get("prune-step")

    params = model_shape(config).num_params()
    cut = need(prune__repair="none")
    assert "sums" not in cut.parts
    assert cut.parts["a layer's tensors"] == 8 * max(
        *map(model_shape(config).layer_num_params, model_shape(config).layers),
        model_shape(config).outside_params,
    )
    assert cut.disk_bytes == 8 * params  # what is read, what is written, in float32
    assert need(prune__repair="none", model__dtype_between_phases="same").disk_bytes == 4 * params
    assert need().disk_bytes == 8 * params
    assert need(model__dtype_between_phases="same").disk_bytes == 4 * params
    distilled = need(prune__repair="none", prune__distill_steps=5)
    assert distilled.parts["base model"] == 4 * model_shape(config).num_params()
    assert distilled.parts["optimizer"] < 8 * model_shape(config).num_params()
    for tokens, larger in (("1M", need(prune__repair_tokens="1M")), ("100", distilled)):
        both = need(prune__repair_tokens=tokens, prune__distill_steps=5)
        assert both.parts == larger.parts
        assert both.disk_bytes == distilled.disk_bytes > 16 * params  # a state, and what it is of
    generated = need(prune__generated_tokens="24k", calibration__weights="streamed")
    assert generated.disk_bytes == 8 * params


def test_a_model_that_a_method_makes_lies_in_float32_beside_what_it_is_made_of(config):
    def disk(method, component, **changes):
        changes = NO_AMPLITUDE | {"prune__phases": 1, "prune__method": method} | changes
        needs = needs_of_tasks(config, settings_with(model__dtype_between_phases="same", **changes))
        return needs[component].disk_bytes / model_shape(config).num_params()

    assert disk("slicegpt", "score-layers") == disk("slicegpt", "prune-step") == 8
    assert disk("sheared-llama", "prune-step") == 8
    assert disk("sheared-llama", "score-layers") == 18  # a state, too
    assert disk("minitron", "prune-step", prune__hidden_size="75%") == 8
    distilled, others = (
        disk(method, "prune-step", prune__distill_steps=3) for method in ("slicegpt", "modegpt")
    )
    assert distilled - others == pytest.approx(4)
    assert disk("minitron", "prune-step") == disk("magnitude", "prune-step") == 4


def test_score_layers_needs_a_model_where_widths_are_searched(config):
    def needs(**changes):
        return needs_of_tasks(config, settings_with(cluster={"gpus": 0}, prune__steps_per_phase=1, **changes))

    assert "score-layers" not in needs()
    params = model_shape(config).num_params()
    found = needs(prune__widths="search")["score-layers"]
    assert found.parts["weights"] == 4 * params
    assert needs(**NO_AMPLITUDE, prune__method="minitron-depth")["score-layers"] == found


@pytest.mark.parametrize("steps", [0, 2, 50])
def test_score_layers_measures_again_where_a_phase_may_take_several_steps(config, steps):
    def needs(**cluster):
        return needs_of_tasks(config, settings_with(prune__steps_per_phase=steps, cluster=cluster))

    for gpus in (0, 1):
        found = needs(gpus=gpus)
        assert found["score-layers"] == found["calibrate"]
    apart = needs(components={"score-layers": {"gpus": 0}})
    assert apart["calibrate"] == needs()["calibrate"]
    assert apart["score-layers"] == needs(gpus=0)["score-layers"]
    small = {"score-layers": {"memory": "150Mi", "scratch": "1Ki"}}
    settings = settings_with(prune__steps_per_phase=steps, cluster={"gpus": 0, "components": small})
    lines = list(shortages(needs_of_tasks(config, settings), settings))
    assert [line.partition(" about ")[0] for line in lines] == ["score-layers needs"] * 2


def test_score_layers_needs_what_a_method_does_with_the_model(config):
    def need(method, **others):
        changes = NO_AMPLITUDE | {"cluster": {"gpus": 0}, "prune__phases": 1, "prune__method": method}
        return needs_of_tasks(config, settings_with(**changes, **others))["score-layers"]

    params = model_shape(config).num_params()
    assert need("sheared-llama").parts["optimizer"] == 8 * params
    assert need("slicegpt").parts["sums"] > 0
    assert need("slicegpt").parts["weights"] == 4 * params
    assert need("minitron", prune__hidden_size="75%") == need("slicegpt")


def test_training_is_sized_by_what_the_first_phase_leaves(config):
    def weights(target, phases):
        settings = settings_with(prune__target=target, prune__phases=phases)
        return needs_of_tasks(config, settings)["recover-train"].parts["weights"] / 4

    params = model_shape(config).num_params()
    assert weights("80%", 1) == pytest.approx(0.8 * params, rel=0.02)
    assert weights("80%", 2) == pytest.approx(0.8**0.5 * params, rel=0.02)


@pytest.mark.parametrize(("name", "given"), [("memory", "1Gi"), ("scratch", "1Mi")])
def test_pods_that_get_less_are_named_with_what_would_do(config, name, given):
    settings = settings_with(cluster={"gpus": 0, "components": {"recover-train": {name: given}}})
    settings = dataclasses.replace(
        settings, training=dataclasses.replace(settings.training, global_batch=6, micro_batch=6)
    )
    needs = needs_of_tasks(config, settings)
    if name == "scratch":
        needs = {task: dataclasses.replace(need, disk_bytes=2**21) for task, need in needs.items()}
    (line,) = shortages(needs, settings)
    assert line.startswith("recover-train needs about ")
    assert f"of {name}, and its pods get {given}. Set cluster.components.recover-train.{name}=" in line


def test_pods_with_less_than_a_process_takes_need_no_negative_memory(config):
    small = {task: {"memory": "150Mi"} for task in ("calibrate", "prune-step")}
    settings = settings_with(cluster={"gpus": 0, "components": small})
    needs = needs_of_tasks(config, settings)
    assert min(need.device_bytes for need in needs.values()) > 0
    named = [line.partition(" ")[0] for line in shortages(needs, settings)]
    assert named == ["calibrate", "prune-step"]


def test_enough_is_no_shortage(config):
    settings = settings_with(cluster={"gpus": 0, "memory": "8Gi", "scratch": "8Gi"})
    assert list(shortages(needs_of_tasks(config, settings), settings)) == []
