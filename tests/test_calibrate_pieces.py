"""Guards the order of a calibration: each weight is quantized for what the quantized ones before it give."""

from collections import Counter, UserDict

import pytest

transformers = pytest.importorskip("transformers")

import moe  # noqa: E402
import torch  # noqa: E402
from models import ids, make  # noqa: E402
from torch import nn  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native._calibrate.memory import available_memory  # noqa: E402
from qlora_native._calibrate.model import Calibration  # noqa: E402
from qlora_native._calibrate.observe import Inputs  # noqa: E402
from qlora_native._calibrate.quantizer import Quantizer  # noqa: E402
from qlora_native._layers.experts import Experts4bit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = (qn.nn.Linear4bit, Experts4bit)


def batches(count=4):
    return [ids(4, 16, seed) for seed in range(count)]


def calibrate(model, given, monkeypatch):
    """Calibrate. Returns {path: the Gram matrix that its weight was quantized for}, of linear layers."""
    used, quantized = {}, Quantizer.linear

    def noted(self, name, weight, gram, *others):
        used[name] = gram
        return quantized(self, name, weight, gram, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "linear", noted)
        qn.calibrate(model, given, progress=False)
    return used


def grams_of(model, given):
    """{path: the Gram matrix of what a quantized linear layer multiplies}, by calls of the whole model."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, qn.nn.Linear4bit)}
    inputs = Inputs(layers)
    with inputs.observed(), torch.no_grad():
        for batch in given:
            inputs.begin({})
            model(batch, use_cache=False)
    return {path: inputs.gram([inputs.key(path)], path) for path in layers}


def codes(model):
    return {
        path: module.quantized_weight.codes for path, module in model.named_modules() if isinstance(module, QUANTIZED)
    }


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "falcon", "mixtral", "qwen3-next", "deepseek-v3"])
def test_weight_is_quantized_for_the_inputs_that_it_gets_in_the_quantized_model(family, monkeypatch):
    model = (moe.make(family) if family in moe.FAMILIES else make(family)).eval()
    given = batches(16)
    used = calibrate(model, given, monkeypatch)
    found = grams_of(model, given)
    assert used.keys() == found.keys() != set()
    assert [path for path in used if not torch.equal(used[path], found[path])] == []


def test_each_quantized_weight_is_multiplied_by_once_for_each_batch(monkeypatch):
    model, given = make("llama").eval(), batches(8)
    calls = Counter()
    for kind in (nn.Linear, qn.nn.Linear4bit):
        forward = kind.forward

        def counted(self, *args, kind=kind, forward=forward):
            calls[kind] += 1
            return forward(self, *args)

        monkeypatch.setattr(kind, "forward", counted)
    qn.calibrate(model, given, progress=False)
    weights = sum(isinstance(module, qn.nn.Linear4bit) for module in model.modules())
    assert calls[qn.nn.Linear4bit] == weights * len(given)
    # The 16-bit ones run twice over the first batch, to find the layers and the order in each, and the head once.
    assert calls[nn.Linear] == 2 * weights + 1


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bits_are_the_same_where_memory_keeps_no_outputs(family, monkeypatch):
    first, second = (moe.make(family) if family in moe.FAMILIES else make(family) for _ in range(2))
    qn.calibrate(first, batches(8), progress=False)
    monkeypatch.setattr(Calibration, "_has_room", lambda self: False)
    qn.calibrate(second, batches(8), progress=False)
    first, second = codes(first), codes(second)
    assert all(torch.equal(first[path], second[path]) for path in first)


class Layer(nn.Module):
    """A layer with a block of two weights, and what a test wants of it: how the two are called."""

    def __init__(self, call):
        super().__init__()
        self.block = nn.Module()
        self.block.first, self.block.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)
        self.block.forward = lambda x: call(self.block, x)

    def forward(self, x):
        return x + self.last(self.block(x)).tanh()


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(call) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def changed_in_place(block, x):
    return block.second(block.first(x).relu_().add_(x)).mul_(2)


def shared_by_two(block, x):
    block.second.weight = block.first.weight
    return block.second(block.first(x).tanh())


def called_once(block, x):
    return block.second(block.first(x).tanh())


def called_twice(block, x):
    return block.second(block.first(block.first(x).tanh()))


def called_for_the_first_batch(block, x):
    return block.second(block.first(x) if x[0, 0] > 0 else x)


def called_for_others(block, x):
    return block.second(block.first(x) if x[0, 0] < 0 else x)


FORMS = [changed_in_place, shared_by_two, called_twice, called_for_the_first_batch, called_for_others]


@pytest.mark.parametrize("call", FORMS)
@pytest.mark.parametrize("room", [True, False])
def test_layers_of_any_form_are_nearer_to_their_16_bits_than_by_plain_rounding(call, room, monkeypatch):
    monkeypatch.setattr(Calibration, "_has_room", lambda self: room)
    dense, plain, better = (Model(call) for _ in range(3))
    random = torch.Generator().manual_seed(0)
    given = [{"x": torch.randn(100, 64, generator=random) @ torch.randn(64, 64, generator=random)} for _ in range(8)]
    for number, batch in enumerate(given):
        batch["x"][0, 0] = 1 if number == 0 else -1
    dense(given[0]["x"])  # shares what is shared
    qn.nn.quantize_model(plain, progress=False)
    used = calibrate(better, given, monkeypatch)
    assert len(used) == (4 if call is shared_by_two else 6)
    with torch.no_grad():
        wanted, rounded, ours = (torch.cat([model(**x) for x in given]) for model in (dense, plain, better))
    assert (ours - wanted).norm() < 0.9 * (rounded - wanted).norm()


def test_outputs_that_were_changed_in_place_are_computed_again(monkeypatch):
    first, second = Model(changed_in_place), Model(changed_in_place)
    given = [{"x": torch.randn(100, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    qn.calibrate(first, given, progress=False)
    monkeypatch.setattr(Calibration, "_has_room", lambda self: False)
    qn.calibrate(second, given, progress=False)
    first, second = codes(first), codes(second)
    assert all(torch.equal(first[path], second[path]) for path in first)


class Shared(nn.Module):
    """Layers that share a mapping, which the first one fills for the others, as Gemma 3n shares keys and values."""

    class Layer(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number, self.first, self.second = number, nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, shared):
            if self.number == 0:
                shared["first"] = self.first(x)
            return x + self.second(shared["first"] + self.number * self.first(x))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Shared.Layer(number) for number in range(3))

    def forward(self, x):
        shared = UserDict()
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


class Halved(Model):
    """A model that does something between its layers."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x / 2)
        return x


class Overwritten(Model):
    """A model whose layers change their input in place."""

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
        return x


def overwritten(block, x):
    return block.second(block.first(x.mul_(0.5)).tanh())


@pytest.mark.parametrize("make", [Shared, lambda: Halved(called_once), lambda: Overwritten(overwritten)])
def test_layers_that_depend_on_more_than_their_input_are_calibrated_for_what_they_get(make, monkeypatch):
    given = [{"x": torch.randn(100, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    dense, plain, better = (make() for _ in range(3))
    qn.nn.quantize_model(plain, progress=False)
    report = qn.calibrate(better, given, progress=False)
    assert len(report.weights) == 6 and not report.fallbacks
    with torch.no_grad():
        wanted, rounded, ours = (torch.cat([model(**x) for x in given]) for model in (dense, plain, better))
    assert (ours - wanted).norm() < 0.9 * (rounded - wanted).norm()


def test_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    whole = available_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert abs(available_memory(tmp_path) - whole) < 2**30  # the system's own, which other programs change
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory(tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\nactive_file 7\n")
    assert available_memory(tmp_path) == 400
