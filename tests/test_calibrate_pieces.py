"""Guards the order of a calibration: each weight is quantized for what the quantized ones before it give."""

from collections import Counter

import pytest

transformers = pytest.importorskip("transformers")

import moe  # noqa: E402
import torch  # noqa: E402
from models import ids, make  # noqa: E402
from torch import nn  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native._calibrate import model as calibration  # noqa: E402
from qlora_native._calibrate.observe import Inputs  # noqa: E402
from qlora_native._layers.experts import Experts4bit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = (qn.nn.Linear4bit, Experts4bit)


def batches(count=4):
    return [ids(4, 16, seed) for seed in range(count)]


def calibrate(model, given, monkeypatch):
    """Calibrate. Returns {path: the Gram matrix that its weight was quantized for}, of linear layers."""
    used, quantized = {}, calibration.Calibration._quantized

    def noted(self, name, weight, gram, *others):
        used[name] = gram
        return quantized(self, name, weight, gram, *others)

    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibration, "_quantized", noted)
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


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "falcon", "mixtral", "qwen3-moe"])
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
    monkeypatch.setattr(calibration.Calibration, "_has_room", lambda self: False)
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


def called_twice(block, x):
    return block.second(block.first(block.first(x).tanh()))


def chosen_by_the_input(block, x):
    return block.second(block.first(x) if x.sum() > 0 else x)


@pytest.mark.parametrize("call", [changed_in_place, shared_by_two, called_twice, chosen_by_the_input])
@pytest.mark.parametrize("room", [True, False])
def test_layers_of_any_form_are_nearer_to_their_16_bits_than_by_plain_rounding(call, room, monkeypatch):
    monkeypatch.setattr(calibration.Calibration, "_has_room", lambda self: room)
    dense, plain, better = (Model(call) for _ in range(3))
    random = torch.Generator().manual_seed(0)
    given = [{"x": torch.randn(100, 64, generator=random) @ torch.randn(64, 64, generator=random)} for _ in range(8)]
    held = torch.cat([batch["x"] for batch in given])
    dense(held)
    qn.nn.quantize_model(plain, progress=False)
    used = calibrate(better, given, monkeypatch)
    assert len(used) == (4 if call is shared_by_two else 6)
    with torch.no_grad():
        wanted, rounded, ours = (model(held) for model in (dense, plain, better))
    assert (ours - wanted).norm() < 0.9 * (rounded - wanted).norm()


def test_outputs_that_were_changed_in_place_are_computed_again(monkeypatch):
    first, second = Model(changed_in_place), Model(changed_in_place)
    given = [{"x": torch.randn(100, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    qn.calibrate(first, given, progress=False)
    monkeypatch.setattr(calibration.Calibration, "_has_room", lambda self: False)
    qn.calibrate(second, given, progress=False)
    first, second = codes(first), codes(second)
    assert all(torch.equal(first[path], second[path]) for path in first)
