"""What pods get where the recipe leaves it to the plan of memory."""

import pytest
from transformers import Qwen2Config

from core.model.checkpoint import Checkpoint
from core.quantities import parse_bytes
from core.steps.footprint import Footprint
from core.steps.needs import host_bytes, needs_of_tasks, shortages
from core.steps.pod_sizes import card_bytes, too_large_for_cards, with_pod_sizes
from tests.steps.test_needs import settings_with

GB = 10**9
NEEDS = {
    "calibrate": Footprint(parts={"weights": 16 * GB}, host_bytes=8 * GB, disk_bytes=30 * GB),
    "recover-train": Footprint(parts={"all": 110 * GB}, host_bytes=32 * GB, disk_bytes=100 * GB),
}
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def sized(needs=NEEDS, **cluster):
    settings = settings_with(cluster=cluster)
    return with_pod_sizes(settings, needs), settings


def memory(settings, component):
    return parse_bytes(settings.cluster.of(component).memory)


def test_pods_get_what_the_plan_says_and_room_to_spare():
    settings, before = sized(scratch="auto")
    for component, footprint in NEEDS.items():
        assert memory(settings, component) > 1.2 * host_bytes(component, footprint, before)
        assert parse_bytes(settings.cluster.of(component).scratch) > 1.2 * footprint.disk_bytes
    assert memory(settings, "calibrate") > 2 * 8 * GB + 3 * GB, "it takes half of what it finds free"
    assert settings.cluster.of("finalize").memory == "4Gi"
    assert settings.cluster.of("prepare-data").memory == "32Gi"
    assert settings.cluster.of("prepare-data").scratch == ""
    assert list(shortages(NEEDS, settings)) == []


def test_what_is_given_wins_and_what_is_not_known_stays():
    settings, _ = sized(memory="48Gi", scratch="7Gi")
    assert {settings.cluster.of(c).memory for c in ("calibrate", "finalize", "publish")} == {"48Gi"}
    assert settings.cluster.of("calibrate").scratch == "7Gi"
    own = {"calibrate": {"memory": "9Gi", "cpu": "7"}}
    settings, _ = sized(components=own)
    assert (settings.cluster.of("calibrate").memory, settings.cluster.of("calibrate").cpu) == ("9Gi", "7")
    assert settings.cluster.of("recover-train").memory != "9Gi"
    assert settings.cluster.of("recover-train").scratch == "", "no volume was asked for"
    settings, before = sized(needs={})
    assert settings == before
    assert settings.cluster.of("calibrate").memory == "32Gi"


@pytest.mark.parametrize(
    ("cluster", "size"),
    [
        ({"gpu_node_selector": H100}, 80),
        ({"gpu_node_selector": {"cloud.google.com/gke-accelerator": "nvidia-tesla-t4"}}, 16),
        ({"gpu_node_selector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}}, 48),
        ({"gpu_node_selector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}, 24),
        ({"gpu_type": "nvidia.com/mig-1g.10gb"}, 10),
        ({"node_selector": {"node.kubernetes.io/instance-type": "p5.48xlarge"}}, 0),
        ({"gpus": 0, "gpu_node_selector": H100}, 0),
        ({}, 0),
    ],
)
def test_the_card_is_the_one_that_the_selector_names(cluster, size):
    assert card_bytes(settings_with(cluster=cluster), "recover-train") == size * GB


def test_what_has_no_room_on_the_card_waits_in_host_memory():
    on_any, _ = sized()
    on_h100, _ = sized(gpu_node_selector=H100)
    more = memory(on_h100, "recover-train") - memory(on_any, "recover-train")
    assert more == pytest.approx(1.25 * 30 * GB, abs=2**30)
    hints = list(too_large_for_cards(settings_with(cluster={"gpu_node_selector": {"gpu": "T4"}}), NEEDS))
    assert hints == []
    larger = {"calibrate": Footprint(parts={"weights": 17 * GB})}
    (hint,) = too_large_for_cards(settings_with(cluster={"gpu_node_selector": {"gpu": "T4"}}), larger)
    assert hint.startswith("calibrate needs about 17.0 GB on its GPU, and the card ")


def test_what_measures_between_the_steps_of_a_phase_gets_as_much_as_what_measures_before_them():
    """Once it got what is given without a plan: 32Gi and no volume, for a model of 14 billion parameters."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48}
    config = Qwen2Config(
        **sizes, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False
    )
    cluster = {"memory": "auto", "scratch": "auto", "gpu_node_selector": {"gpu": "T4"}}
    settings = settings_with(
        prune__steps_per_phase=50, calibration__sequences=512, calibration__sequence_length=64,
        calibration__pool_documents=512, calibration__micro_batch=256, calibration__state_memory="8GB",
        cluster=cluster,
    )  # fmt: skip
    needs = needs_of_tasks(config, settings)
    assert needs["score-layers"].disk_bytes > 28 * GB
    planned = with_pod_sizes(settings, needs).cluster
    calibrate, score_layers = planned.of("calibrate"), planned.of("score-layers")
    assert (score_layers.memory, score_layers.scratch) == (calibrate.memory, calibrate.scratch)
    assert parse_bytes(score_layers.scratch) > 1.2 * 28 * GB
    hinted = [hint.partition(" ")[0] for hint in too_large_for_cards(settings, needs)]
    assert hinted[:2] == ["calibrate", "score-layers"]


def test_a_real_plan_gives_sizes_to_all_that_holds_a_model(project):
    settings = settings_with(cluster={"gpus": 0})
    needs = needs_of_tasks(Checkpoint(project / "base").config, settings)
    found = with_pod_sizes(settings, needs).cluster
    sizes = {component: parse_bytes(found.of(component).memory) for component in needs}
    assert all(4 * 2**30 <= size <= 6 * 2**30 for size in sizes.values()), "the model has 0.1 GB"
