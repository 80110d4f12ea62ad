"""Guards PagedWeights where weights are paged: on a GPU, and in CI on the emulated one (QLN_BACKEND=cuda_emulated).

tests/cpp/test_paged_weights.cpp tests the order in which it calls the driver. The budgets here are a few kilobytes.
"""

import copy
import gc

import lora
import models
import peft
import process
import pytest
import torch
from test_adamw_resume import pickled
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_native as qn
from qlora_native import _C
from qlora_native._core.paging import is_pageable
from qlora_native.integrations.peft import register
from qlora_native.nn import Embedding4bit, Experts4bit, Linear4bit, PagedWeights

ON_GPU = torch.cuda.is_available() and not _C.cuda_unavailable_reason()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
PAGED = is_pageable(DEVICE)
paged = pytest.mark.skipif(not PAGED, reason="neither a GPU nor the emulated one: see the first test")
gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")

BLOCKS, WIDTH, HIDDEN, RANK = 4, 64, 96, 4
LAYERS = 2 * BLOCKS
# Each layer has codes, and 96 scales of one byte. Both begin at multiples of 256.
BYTES = WIDTH * HIDDEN // 2 + 256


def test_paged_weights_tests_pass_over_the_emulated_gpu():
    if PAGED:
        pytest.skip("it is what runs")
    assert " passed" in process.pytest_of("test_paged_weights.py", QLN_BACKEND="cuda_emulated").stdout


class Adapted(nn.Module):
    """A 4-bit layer with an adapter."""

    def __init__(self, inputs, outputs, generator):
        super().__init__()
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        self.base = Linear4bit.from_linear(linear)
        self.a = nn.Parameter(torch.randn(RANK, inputs, generator=generator) / inputs**0.5)
        self.b = nn.Parameter(torch.randn(outputs, RANK, generator=generator) / 10)

    def forward(self, x):
        return self.base(x, self.a, self.b)


class Block(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.up, self.down = Adapted(WIDTH, HIDDEN, generator), Adapted(HIDDEN, WIDTH, generator)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Blocks of two 4-bit layers. `skip` and `twice` are numbers of blocks that run not at all, or twice."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(Block(generator) for _ in range(BLOCKS))

    def forward(self, x, checkpointing=False, skip=None, twice=None):
        for i, block in enumerate(self.blocks):
            for _ in range(0 if i == skip else 2 if i == twice else 1):
                x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x


def plain_and_paged(layers_on_device, cls=Model):
    """The same model twice, and the PagedWeights of the second."""
    plain, model = cls().to(DEVICE), cls()
    pages = PagedWeights(model, layers_on_device * BYTES, DEVICE)
    return plain, model.to(DEVICE), pages


def step(model, seed, **options):
    """The output of a forward pass, and the gradients of a backward pass."""
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    model.zero_grad()
    y = model(x, **options)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_bits(model, plain, seed=0, **options):
    for one, other in zip(step(model, seed, **options), step(plain, seed, **options), strict=True):
        assert torch.equal(one, other)


def moved(pages, before, key="bytes_fetched"):
    return pages.stats()[key] - before[key]


@paged
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("on_device", [2, 3, LAYERS])
def test_step_over_paged_weights_has_the_bits_of_ordinary_ones_and_copies_what_does_not_fit(on_device, checkpointing):
    plain, model, pages = plain_and_paged(on_device)
    assert pages.stats()["bytes_managed"] == LAYERS * BYTES
    assert pages.stats()["bytes_fetched"] == 0
    for seed in range(4):
        before = pages.stats()
        assert_same_bits(model, plain, seed, checkpointing=checkpointing)
        assert pages.stats()["bytes_resident"] == on_device * BYTES  # the budget
        if seed == 0:
            continue
        # Forward all but those that are there since the last step, and backward as many.
        assert moved(pages, before) == 2 * (LAYERS - on_device) * BYTES
        assert moved(pages, before, "faults") == 0
        assert moved(pages, before, "prefetches") == 2 * (LAYERS - on_device)
    if on_device == LAYERS:
        assert pages.stats()["bytes_fetched"] == LAYERS * BYTES


@paged
@pytest.mark.parametrize("change", [{"skip": 2}, {"twice": 1}, {"checkpointing": True}])
def test_changed_order_is_learnt_in_its_first_step(change):
    plain, model, pages = plain_and_paged(3)
    for options in ({}, change, {}):
        for seed in range(5):
            before = pages.stats()
            assert_same_bits(model, plain, seed, **options)
            assert pages.stats()["bytes_resident"] <= 3 * BYTES
        assert moved(pages, before, "faults") == 0


@paged
def test_forward_passes_alone_copy_less_than_the_model():
    plain, model, pages = plain_and_paged(5)
    x = torch.ones(3, WIDTH, device=DEVICE)
    with torch.no_grad():
        for _ in range(6):
            before = pages.stats()
            assert torch.equal(model(x), plain(x))
    assert moved(pages, before, "faults") == 0
    assert moved(pages, before) < LAYERS * BYTES


@paged
def test_two_models_are_paged_apart():
    plain, one, pages_of_one = plain_and_paged(2)
    _, other, pages_of_other = plain_and_paged(3)
    for seed in range(3):
        before = pages_of_one.stats(), pages_of_other.stats()
        assert_same_bits(one, plain, seed)
        assert_same_bits(other, plain, seed)
    assert moved(pages_of_one, before[0], "faults") == moved(pages_of_other, before[1], "faults") == 0
    del one
    gc.collect()
    assert pages_of_one.stats()["bytes_managed"] == 0
    assert_same_bits(other, plain)


@paged
def test_paged_weights_outlive_the_object_and_go_with_their_model():
    plain, model, pages = plain_and_paged(2)
    step(model, 0)
    codes = model.blocks[0].up.base.weight
    del pages
    gc.collect()
    assert_same_bits(model, plain)
    saved = codes.clone()
    del model
    gc.collect()
    assert torch.equal(codes, saved)


@paged
def test_layer_with_another_weight_frees_its_paged_one():
    plain, model, pages = plain_and_paged(2)
    for _ in range(2):
        step(model, 0)
    layer = model.blocks[1].up.base
    layer.replace_weight(copy.deepcopy(plain.blocks[1].up.base.quantized_weight))
    gc.collect()
    assert pages.stats()["bytes_managed"] == (LAYERS - 1) * BYTES
    for seed in range(3):
        before = pages.stats()
        assert_same_bits(model, plain, seed)
    assert moved(pages, before, "faults") == 0
    model.blocks[2].up.base = Linear4bit.from_quantized(copy.deepcopy(plain.blocks[2].up.base.quantized_weight))
    model.blocks[3] = plain.blocks[3]
    gc.collect()
    assert pages.stats()["bytes_managed"] == (LAYERS - 4) * BYTES
    assert_same_bits(model, plain)


@paged
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copy_of_a_paged_model_has_ordinary_memory(how):
    plain, model, pages = plain_and_paged(2)
    step(model, 0)
    twin = how(model)
    before = pages.stats()
    assert_same_bits(twin, plain)
    assert pages.stats() == before


@paged
def test_state_dict_of_a_paged_model_is_that_of_the_model():
    plain, model, _ = plain_and_paged(2)
    expected = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


@paged
@pytest.mark.parametrize("assign", [False, True])
def test_products_see_a_state_dict_that_was_loaded(assign):
    _, model, pages = plain_and_paged(LAYERS)
    other = Model(seed=1).to(DEVICE)
    step(model, 0)  # all copies are on the GPU
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same_bits(model, other)
    gc.collect()
    assert pages.stats()["bytes_managed"] == (0 if assign else LAYERS * BYTES)


@paged
def test_products_see_what_was_written_in_place():
    plain, model, pages = plain_and_paged(LAYERS)
    step(model, 0)
    for each in (model, plain):
        each.blocks[0].up.base.reset_parameters()
    assert_same_bits(model, plain)
    for each in (model, plain):
        each.blocks[1].up.base.weight.fill_(0x5A)
    pages.refresh()
    assert_same_bits(model, plain)


@paged
def test_weights_can_be_paged_anew_with_another_budget():
    plain, model, first = plain_and_paged(2)
    step(model, 0)
    second = PagedWeights(model, 3 * BYTES, DEVICE)
    gc.collect()
    assert first.stats()["bytes_managed"] == 0
    assert second.stats()["bytes_managed"] == LAYERS * BYTES
    assert_same_bits(model, plain)


class Mixture(nn.Module):
    """Layers of several kinds: an embedding tied to the head, experts, and scales in fp32."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        embedding = nn.Embedding(80, WIDTH)
        embedding.weight.data = torch.randn(80, WIDTH, generator=generator)
        self.embedding = Embedding4bit.from_embedding(embedding)
        self.experts = Experts4bit.from_parameter(torch.randn(3, WIDTH, WIDTH, generator=generator))
        linear = nn.Linear(WIDTH, WIDTH)
        linear.weight.data = torch.randn(WIDTH, WIDTH, generator=generator)
        linear.bias.data.zero_()
        self.linear = Linear4bit.from_linear(linear, "int4", double_quant=False)
        self.head = Linear4bit.from_quantized(self.embedding.quantized_weight)

    def forward(self, ids):
        x = self.linear(self.embedding(ids))
        offsets = torch.tensor([0, 2, 2, ids.numel()], device=x.device)
        return self.head(qn.functional.linear_grouped(x, self.experts.quantized_weight, offsets))


@paged
def test_experts_and_a_tied_head_are_paged():
    plain, model = Mixture().to(DEVICE), Mixture()
    pages = PagedWeights(model, 1 << 20, DEVICE)
    model.to(DEVICE)
    assert model.head.weight is model.embedding.weight
    ids = torch.arange(5, device=DEVICE)
    for _ in range(2):
        assert torch.equal(model(ids), plain(ids))
    stats = pages.stats()
    assert stats["bytes_fetched"] == stats["bytes_resident"] == stats["bytes_managed"]  # each once, the head too


@paged
def test_training_over_paged_weights_is_that_over_ordinary_ones():
    plain, model, _ = plain_and_paged(2)
    optimizers = [qn.optim.AdamW8bit(each.parameters(), lr=1e-2, min_8bit_size=256) for each in (plain, model)]
    for seed in range(3):
        assert_same_bits(model, plain, seed)
        for optimizer in optimizers:
            optimizer.step()


@paged
@pytest.mark.filterwarnings("ignore:`")
def test_model_of_transformers_with_peft_and_checkpointing_is_paged():
    plain = peft.get_peft_model(lora.quantized(), register(lora.config()))
    plain.enable_input_require_grads()
    plain.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model = copy.deepcopy(plain)
    pages = PagedWeights(model, 3 * (96 * 96 // 2 + 256), DEVICE)  # three of the largest of 14 layers
    inputs = {name: tensor.to(DEVICE) for name, tensor in models.inputs().items()}
    gradients = []
    for each in (plain.to(DEVICE), model.to(DEVICE)):
        for _ in range(3):
            before = pages.stats()
            each.zero_grad()
            each.train()(**inputs, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == 2 * lora.LINEARS["llama"]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert moved(pages, before, "faults") == 0
    assert 0 < moved(pages, before) < 3 * pages.stats()["bytes_managed"]


@paged
def test_bad_input_of_paged_weights_is_named_in_the_error():
    model = Model()
    with pytest.raises(TypeError, match="model: expected an nn.Module, got list"):
        PagedWeights([], 1 << 20, DEVICE)
    with pytest.raises(ValueError, match="model: expected a model with quantized layers, got ReLU"):
        PagedWeights(nn.ReLU(), 1 << 20, DEVICE)
    with pytest.raises(TypeError, match="device_bytes: expected an int, got float"):
        PagedWeights(model, 1e9, DEVICE)
    with pytest.raises(ValueError, match="device_bytes: expected at least 1, got -5"):
        PagedWeights(model, -5, DEVICE)
    expected = f"device_bytes: expected at least {2 * BYTES}, for the two largest weights, of {BYTES} and {BYTES} bytes"
    with pytest.raises(ValueError, match=expected):
        PagedWeights(model, 2 * BYTES - 1, DEVICE)
    with pytest.raises(ValueError, match="device: expected a GPU, .* got meta"):
        PagedWeights(model, 1 << 20, "meta")
    model.blocks[2].down.base.to_empty(device="meta")
    with pytest.raises(ValueError, match=r"blocks.2.down.base.weight: expected a tensor with values, got one on the"):
        PagedWeights(model, 1 << 20, DEVICE)


def test_paged_weights_of_the_cpu_are_an_error():
    if _C.cpu_tensors_backend() == "cuda_emulated":
        pytest.skip("they can be")
    with pytest.raises(ValueError, match="device: expected a GPU, .* got cpu"):
        PagedWeights(Model(), 1 << 20, "cpu")
    with pytest.raises(RuntimeError, match="PagedWeights: the backend cpu pages nothing"):
        _C.PagedWeights([[1]], 1 << 20, False, 0)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
def test_capture_of_a_product_with_paged_weights_is_an_error():
    _, model, _ = plain_and_paged(2)
    x = torch.ones(3, WIDTH, device=DEVICE)
    model(x)
    with pytest.raises(ValueError, match="stream: expected one that is not captured"), torch.no_grad():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x)
