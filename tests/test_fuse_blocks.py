"""Guards fuse_blocks: fused activations and norms give the same losses and gradients, and save less."""

import copy
import pickle
import threading
import warnings
from types import MethodType

import pytest
import torch
from fuse_models import batch, make, step
from models import assert_same
from peak import saved_bytes
from test_adamw_resume import pickled
from torch import nn

import qlora_native as qn
from qlora_native.integrations.fuse import fuse_blocks
from qlora_native.integrations.fuse._blocks import DeferredActivation
from qlora_native.testing import SUM_FACTOR, unit_roundoff

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

# How many modules are fused in each: of every layer the activation and the norms, and the norm at the end.
FUSED = {"llama": 2 * 3 + 1, "gemma2": 2 * 5 + 1, "phi3": 2 * 3 + 1, "qwen3": 2 * 5 + 1, "qwen3-moe": 2 * 5 + 1}
families = pytest.mark.parametrize("family", FUSED)


def saved_by(model):
    """Bytes that a step saves for backward."""
    return saved_bytes(lambda: model(**batch()).loss, *model.parameters(), *model.buffers())[1]


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_and_gradients_are_the_models_own(family, dtype):
    if family == "qwen3-moe" and dtype == torch.bfloat16:
        pytest.skip("another rounding may send a token to another expert")
    model = make(family, dtype)
    expected = step(copy.deepcopy(model))
    assert fuse_blocks(model) == FUSED[family]
    assert_same(step(model), expected, dtype)


@families
def test_quantized_model_with_adapters_trains_as_it_did(family):
    model = qn.nn.quantize_model(make(family))
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj", "gate_up_proj"]
    if family == "qwen3-moe":
        targets = ["q_proj", "o_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    expected = step(copy.deepcopy(model))
    assert fuse_blocks(model) == FUSED[family]
    assert fuse_blocks(model) == 0
    assert_same(step(model), expected, torch.float32)


def test_layer_saves_less_for_backward():
    """Of each layer: f(gate) and its product with up, and the fp32 copy of each norm for the input in bfloat16."""
    model = qn.nn.quantize_model(make("llama", torch.bfloat16))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets), autocast_adapter_dtype=False)
    before = saved_by(model)
    fuse_blocks(model)
    tokens, width, inner = 33, 64, 96
    activations = 2 * 2 * tokens * inner * 2
    norms = 2 * 2 * tokens * width * (4 - 2)
    assert before - saved_by(model) >= activations + norms


@pytest.mark.parametrize("mode", ["eval", "no_grad", "compiled", "autocast"])
def test_other_modes_of_a_model_give_what_they_gave(mode):
    model = make("llama").eval()
    inputs = batch()

    def run(model):
        call = torch.compile(model, backend="eager") if mode == "compiled" else model
        with torch.set_grad_enabled(mode != "no_grad"), torch.autocast("cpu", enabled=mode == "autocast"):
            return call(**inputs).logits

    expected = run(model)
    fuse_blocks(model)
    dtype = torch.bfloat16 if mode == "autocast" else torch.float32
    assert (run(model) - expected).norm() <= 8 * SUM_FACTOR * unit_roundoff(dtype) * expected.norm()


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_state_dict_and_copies_are_as_before(how):
    model = make("llama")
    names = list(model.state_dict())
    fuse_blocks(model)
    assert list(model.state_dict()) == names
    other = how(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert model.model.norm.forward.args == (model.model.norm,)
    assert model(**batch()).logits.abs().sum() > 0 and other(**batch()).logits.abs().sum() == 0


def test_norm_of_another_dtype_than_its_input_computes_as_before():
    """peft's prepare_model_for_kbit_training makes norms fp32."""
    model = make("llama", torch.bfloat16)
    model.model.norm.float()
    x = torch.randn(3, 64).bfloat16()
    expected = model.model.norm(x)
    fuse_blocks(model)
    result = model.model.norm(x)
    assert result.dtype == expected.dtype and torch.equal(result, expected)


class Block(nn.Module):
    """A gated linear unit and a norm that may be anything."""

    def __init__(self, activation, norm):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act_fn, self.norm = activation, norm

    def forward(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(self.norm(x))


class Centered(nn.Module):
    """A layer norm by other names."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class OtherEpsilon(nn.RMSNorm):
    """It says another epsilon than it uses."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 10 * self.eps)


@pytest.mark.parametrize("norm", [Centered(), OtherEpsilon(8, eps=1e-5), nn.LayerNorm(8), nn.RMSNorm(8)], ids=repr)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Sigmoid()], ids=repr)
def test_what_computes_something_else_is_left_alone(activation, norm):
    model = Block(activation, norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuse_blocks(model) == 0
    assert "forward" not in vars(activation) and "forward" not in vars(norm)


class Swish(nn.Module):
    """SiLU, until its parameter is trained."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Squared(nn.RMSNorm):
    """An RMS norm while its weight is 1 or 0."""

    def forward(self, x):
        return self.weight * super().forward(x)


def zeroed(norm):
    """`norm` as at the end of a residual branch that begins at 0, whatever its weight multiplies."""
    nn.init.zeros_(norm.weight)
    return norm


@pytest.mark.parametrize("norm", [zeroed(nn.LayerNorm(8, bias=False)), Squared(8, eps=1e-5)], ids=repr)
def test_what_computes_something_else_for_other_parameters_is_left_alone(norm):
    model = Block(Swish(), norm)
    assert fuse_blocks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_norm_whose_weight_begins_at_0_is_fused():
    model = Block(nn.SiLU(), zeroed(nn.RMSNorm(8, eps=1e-5)))
    assert fuse_blocks(model) == 2
    assert not model.norm.weight.any()


def test_hooks_see_the_inputs_of_the_model_alone():
    model, seen = Block(nn.SiLU(), nn.RMSNorm(8, eps=1e-5)), []
    for module in (model.act_fn, model.norm):
        module.register_forward_hook(lambda *_: seen.append(True))
    assert fuse_blocks(model) == 2 and not seen
    model(torch.randn(3, 8))
    assert len(seen) == 2


def test_module_that_holds_a_lock_is_left_alone():
    norm = nn.RMSNorm(8, eps=1e-5)
    norm.lock = threading.Lock()
    assert fuse_blocks(Block(nn.SiLU(), norm)) == 1


@pytest.mark.parametrize(
    ("activation", "norm"),
    [(nn.SiLU(), nn.RMSNorm(8, eps=1e-5)), (nn.GELU(approximate="tanh"), nn.RMSNorm(8, eps=1e-3))],
    ids=str,
)
def test_modules_of_any_library_are_known_by_what_they_compute(activation, norm):
    model = Block(activation, norm)
    x = torch.randn(5, 8)
    expected = model(x)
    assert fuse_blocks(model) == 2
    torch.testing.assert_close(model(x), expected)


def test_activation_without_a_product_is_what_it_was():
    block = Block(nn.SiLU(), nn.Identity())
    x = torch.randn(3, 8)
    fuse_blocks(block)
    deferred = block.act_fn(x)
    assert isinstance(deferred, DeferredActivation)
    expected = nn.functional.silu(x)
    for use in (
        lambda f: f + 1,
        lambda f: f.sum(-1),
        lambda f: torch.relu(f),
        lambda f: f[1:],
        lambda f: f * 2.0,
        lambda f: 2.0 * f,
        lambda f: f * torch.ones(8),
        lambda f: torch.ones(3, 8).double() * f,
        lambda f: f @ torch.ones(8, 2),
        lambda f: -f / 2 - 1,
    ):
        torch.testing.assert_close(use(block.act_fn(x)), use(expected))
    assert len(deferred) == 3 and deferred.shape == (3, 8)


class Other(nn.Module):
    """Is found where an activation or a norm is, and takes something else."""

    def __init__(self, forward):
        super().__init__()
        self.weight, self.eps, self.forward_of = nn.Parameter(torch.ones(8)), 1e-5, forward

    def forward(self, *args):
        return self.forward_of(*args)


@pytest.mark.parametrize(
    "forward",
    [lambda x, scale: x * scale, lambda x: x.chunk(2, dim=-2), lambda x: x.value, lambda x: x["gate"]],
    ids=["two arguments", "a matrix", "an object", "a dictionary"],
)
def test_module_that_takes_something_else_is_left(forward):
    model = Block(Other(forward), Other(forward))
    assert fuse_blocks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_forward_that_another_library_replaced_stays():
    model = make("llama")
    norm = model.model.norm
    norm.forward = lambda x: x
    assert fuse_blocks(model) == FUSED["llama"] - 1
    x = torch.randn(2, 64)
    assert norm(x) is x


def forwards_of(model):
    """What stands in the place of its modules' own forwards, beneath a hook of accelerate."""
    every = {path: vars(module) for path, module in model.named_modules()}
    return {path: of.get("_old_forward", of["forward"]) for path, of in every.items() if "forward" in of}


@pytest.mark.parametrize("when", ["before", "after", "with hooks", "loaded by another process"])
def test_model_stays_fused_while_transformers_looks_for_kernels(when, monkeypatch):
    if not transformers.utils.is_kernels_available():
        pytest.skip("transformers takes no kernels")
    model, other = make("llama"), make("llama")
    if when == "before":
        model.set_use_kernels(True)
    assert fuse_blocks(model) == FUSED["llama"]
    expected = forwards_of(model)
    if when == "with hooks":
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
        expected = forwards_of(model)
    if when == "loaded by another process":  # whose classes have their own conditions
        file = pickle.dumps(model)
        for kind in {type(module) for module in model.modules() if hasattr(module, "kernel_layer_name")}:
            monkeypatch.setattr(kind, "kernel_condition", staticmethod(lambda module: True))
        model = pickle.loads(file)
        expected = forwards_of(model)
        assert len(expected) == FUSED["llama"]
    model.set_use_kernels(True)
    for train in (False, True, False):
        assert forwards_of(model.train(train)) == expected
    model.set_use_kernels(False)
    assert forwards_of(model) == expected
    may_be_replaced = type(model.model.norm).kernel_condition
    assert not may_be_replaced(model.model.norm)
    assert may_be_replaced(other.model.norm)


def test_kernel_that_transformers_took_from_the_hub_is_replaced():
    model = make("llama")
    for norm in (model.model.norm, model.model.layers[0].input_layernorm):
        norm.forward, norm._kernel_repo = MethodType(type(norm).forward, norm), "kernels-community/rmsnorm"
    expected = step(copy.deepcopy(model))
    assert fuse_blocks(model) == FUSED["llama"]
    assert fuse_blocks(model) == 0
    assert_same(step(model), expected, torch.float32)


def test_model_with_nothing_to_fuse_says_so():
    with pytest.warns(UserWarning, match="Linear has no gated activation and no RMS norm"):
        assert fuse_blocks(nn.Linear(3, 3)) == 0
    with pytest.raises(TypeError, match="model"):
        fuse_blocks("llama")
