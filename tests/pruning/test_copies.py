"""Scoring as on a GPU, on simulated streams: copies happen as late as they may, targets are NaN before."""

import contextlib
from dataclasses import dataclass, field

import pytest
import torch

from core.pruning.scoring import calibration, copies
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.copies import Copies, CudaCopies, ahead
from core.pruning.scoring.layer_inputs import LayerInputs, Room, share_out
from core.pruning.scoring.measurement import device_memory
from core.settings.calibration import CalibrationSettings
from core.settings.prune import PruneSettings
from core.steps.footprint import scoring_footprint
from tests.support.models import random_tokens, tiny

TOKENS = random_tokens(rows=5)  # micro-batches of 2, 2 and 1
LAYERS, A_LAYER = 3, 5 * 12 * 48 * 8
PINNED = 2**15  # PyTorch pins powers of 2


@dataclass
class Stream:
    """A stream for copies, beside a computation that is always done at once."""

    waiting: list = field(default_factory=list)
    begun: int = 0  # copies that were asked for
    caught_up: bool = False  # whether copies would wait for the computation so far
    unprotected: list = field(default_factory=list)
    most_waiting: int = 0

    def wait_stream(self, other):
        self.caught_up = True

    def record_event(self):
        assert not self.unprotected, "memory that may be used again while a copy is under way"
        return Event(self, self.begun)

    def run(self, until):
        while self.waiting and self.begun - len(self.waiting) < until:
            into, source = self.waiting.pop(0)
            real_copy(into, source)


@dataclass
class Event:
    stream: Stream
    number: int

    def synchronize(self):
        self.stream.run(self.number)


class Computation:
    """The current stream: what waits here lets the other one run."""

    def wait_event(self, event):
        event.synchronize()


real_copy, real_empty = torch.Tensor.copy_, torch.empty


class Bus:
    """Stands in for the parts of torch that know about GPUs, and counts what crosses the bus."""

    def __init__(self, monkeypatch):
        self.stream, self.copying, self.pinned = Stream(), False, {}
        self.bytes = {"up": 0, "down": 0}
        monkeypatch.setattr(
            torch.cuda, "Stream", type("Stream", (), {"__new__": lambda cls, device: self.stream})
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computation())
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self._record(tensor))
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **keywords: self._copy(*args, **keywords))
        monkeypatch.setattr(torch, "empty", self._empty)
        monkeypatch.setattr(calibration, "copies_for", CudaCopies)

    @contextlib.contextmanager
    def _within(self, stream):
        self.copying = True
        yield
        self.copying = stream.caught_up = False

    def _record(self, tensor):
        self.stream.unprotected = [t for t in self.stream.unprotected if t is not tensor]

    def _empty(self, *shape, pin_memory=False, **keywords):
        made = real_empty(*shape, **keywords)
        if pin_memory:
            self.pinned[made.untyped_storage().data_ptr()] = made
        return made

    def _is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.pinned

    def _copy(self, into, source, non_blocking=False):
        if not self.copying:
            return real_copy(into, source)
        stream, downwards = self.stream, self._is_pinned(into)
        assert stream.caught_up, "a copy that does not wait for what it copies, or for who uses its memory"
        assert non_blocking
        self.bytes["down" if downwards else "up"] += into.nbytes
        if not downwards:
            assert all(into.data_ptr() != other.data_ptr() for other, _ in stream.waiting), "in flight"
        stream.unprotected.append(source if downwards else into)
        stream.begun += 1
        stream.waiting.append((into, source))
        if downwards or self._is_pinned(source):
            into.fill_(torch.nan)
            stream.most_waiting = max(stream.most_waiting, len(stream.waiting))
        else:  # from memory that is not pinned the driver copies at once
            stream.run(stream.begun)
        return into


@pytest.fixture
def bus(monkeypatch):
    return Bus(monkeypatch)


def crossing(layers, room):
    """How often a layer's inputs' size crosses the bus: inputs both ways, and states that do not stay."""
    states = 0 if room.stays else 1 + 2 * layers + 2 + 2 * layers  # embedding, forward, head, backward
    return 2 * (layers - room.on_device) + states


def same(found, expected):
    assert found.loss == expected.loss
    assert torch.equal(found.similarities, expected.similarities)
    for a, b in zip(found.scores, expected.scores, strict=True):
        for kind in vars(a):
            assert torch.equal(getattr(a, kind), getattr(b, kind))


PLACES = {
    "all on the device": (4 * A_LAYER, 0, Room(stays=True, on_device=3, in_host=0, left_bytes=0)),
    "outputs too": (5 * A_LAYER, 0, Room(stays=True, on_device=3, in_host=0, left_bytes=A_LAYER)),
    "some pinned": (2 * A_LAYER, None, Room(stays=True, on_device=1, in_host=2, left_bytes=0)),
    "some on disk": (2 * A_LAYER, PINNED, Room(stays=True, on_device=1, in_host=1, left_bytes=0)),
    "states alone stay": (A_LAYER, 3 * PINNED, Room(stays=True, on_device=0, in_host=3, left_bytes=0)),
    "all pinned": (A_LAYER - 1, None, Room(stays=False, on_device=0, in_host=3, left_bytes=A_LAYER - 1)),
    "all on disk": (0, PINNED - 1, Room(stays=False, on_device=0, in_host=0, left_bytes=0)),
}


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize(("device", "host", "room"), PLACES.values(), ids=PLACES)
def test_scores_and_traffic_are_as_planned_wherever_states_lie(
    device, host, room, micro_batch, tmp_path, bus, monkeypatch
):
    assert share_out(LAYERS, A_LAYER, crosses=True, device_bytes=device, host_bytes=host) == room
    model = tiny("llama")
    found = measure(
        model, TOKENS, micro_batch=micro_batch, state_bytes=host, scratch=tmp_path, keep_bytes=device
    )
    on_disk = LAYERS - room.on_device - room.in_host
    assert sum(bus.bytes.values()) + on_disk * A_LAYER == crossing(LAYERS, room) * A_LAYER
    assert bus.stream.most_waiting <= copies._IN_FLIGHT + 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    same(found, measure(model, TOKENS, micro_batch=micro_batch, keep_bytes=room.left_bytes))


@pytest.mark.parametrize("criterion", ["taylor_signed", "wanda_sp", "magnitude_l1"])
@pytest.mark.parametrize("device", [0, A_LAYER])
def test_every_kind_of_criterion_may_have_its_states_in_host_memory(device, criterion, bus, monkeypatch):
    model = tiny("llama")
    found = measure(model, TOKENS, micro_batch=2, criterion=criterion, keep_bytes=device)
    assert (sum(bus.bytes.values()) == 0) == (device > 0 and criterion != "taylor_signed")
    monkeypatch.undo()
    same(found, measure(model, TOKENS, micro_batch=2, criterion=criterion))


def test_the_next_input_is_on_its_way_while_a_layer_runs(bus):
    model, begun = tiny("llama"), []

    def see(*_):
        if torch.is_grad_enabled():
            begun.append(bus.bytes["up"])

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(see)  # the head's pass does without it
    measure(model, TOKENS, micro_batch=2, keep_bytes=A_LAYER)
    a_row = A_LAYER // 5
    sizes = [2, 2, 1] * LAYERS
    assert begun == [sum(sizes[: number + 2]) * a_row for number in range(len(sizes))]


def test_the_last_layers_are_nearest(bus, tmp_path):
    room = share_out(3, A_LAYER, crosses=True, device_bytes=2 * A_LAYER, host_bytes=PINNED)
    device = torch.device("cpu")
    inputs = LayerInputs(
        3,
        (5, 12, 48),
        torch.float64,
        room=room,
        device=device,
        copies=CudaCopies(device),
        scratch=tmp_path,
    )
    states = torch.randn(3, 5, 12, 48, dtype=torch.float64)
    seen = []
    for layer, state in enumerate(states):
        inputs.put(layer, slice(0, 5), state)
        seen.append((len(list(tmp_path.iterdir())), bus.bytes["down"] // A_LAYER))
    assert seen == [(1, 0), (1, 1), (1, 1)]
    for layer, state in reversed(list(enumerate(states))):
        assert torch.equal(inputs.take(layer, slice(0, 5))(), state)


def test_an_8b_model_crosses_the_bus_less():
    """512 sequences of 64 tokens of 4,096 numbers in bfloat16; before, everything went through the host."""
    layers, a_layer = 32, 512 * 64 * 4096 * 2
    gigabytes = {
        quarter: crossing(
            layers, share_out(layers, a_layer, crosses=True, device_bytes=quarter * 10**9, host_bytes=None)
        )
        * a_layer
        / 1e9
        for quarter in (16, 5, 2, 0)
    }
    # Before: inputs up, and states and gradients up and down for every layer, embedding and head: 43.8 GB.
    assert (5 * layers + 3) * a_layer / 1e9 == pytest.approx(43.8, abs=0.05)
    assert gigabytes == {
        16: 0,
        5: pytest.approx(8.1, abs=0.05),
        2: pytest.approx(14.0, abs=0.05),
        0: pytest.approx(52.3, abs=0.05),
    }


@pytest.mark.parametrize("kept", [1, 2, 3, 9])
def test_the_plan_of_memory_is_what_a_measurement_takes(kept, bus, tmp_path):
    """``kept`` times a layer's inputs fit on the device, one layer's in host memory."""
    model = tiny("llama", dtype=torch.float32)
    params, a_layer = sum(p.numel() for p in model.parameters()), A_LAYER // 2
    free, settings = 4 * params + 4 * kept * a_layer, {"sequences": 5, "sequence_length": 12}
    calibration = CalibrationSettings(
        **settings, precision="float32", weights="memory", state_memory=f"{PINNED / 2000}KB", micro_batch=2
    )
    plan = scoring_footprint(model.config, calibration, PruneSettings(), device="cuda", free_bytes=free)
    room = device_memory(free - 4 * params)
    measure(model, TOKENS, micro_batch=2, state_bytes=PINNED // 2, scratch=tmp_path, keep_bytes=room)
    on_the_way = 4 * params
    assert plan.host_bytes == max(on_the_way, sum(PINNED // 2 for _ in bus.pinned))
    assert len(bus.pinned) == (kept < 4)
    on_device, on_disk = plan.parts["kept layer inputs"] - a_layer, plan.disk_bytes - 2 * params
    assert sum(bus.bytes.values()) == 2 * (LAYERS * a_layer - on_device) - on_disk
    assert on_device + plan.parts["kept layer outputs"] + a_layer <= room


def test_the_cpu_copies_nothing_on_the_way_back():
    held = torch.arange(6.0).view(2, 3)
    plain = Copies()
    assert not plain.crosses
    taken = list(ahead(plain.to_device(row) for row in held))
    assert [row.data_ptr() for row in taken] == [row.data_ptr() for row in held]
