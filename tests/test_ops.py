"""Guards the torch ops: opcheck, torch.compile, checkpointing, autocast, grad modes, and what backward keeps."""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import class_for
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import qlora_native as qn
from qlora_native._core.weight import op_arguments

N, K, RANK = 40, 96, 4
ops = torch.ops.qlora_native


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """torch recompiles a function so many times and no more."""
    torch.compiler.reset()


def seed(value=7):
    return torch.tensor(value, dtype=torch.int64)


def operands(dtype=torch.float32, requires_grad=False, **options):
    """x [2, 5, K], the weight, bias, lora_a and lora_b."""
    torch.manual_seed(0)
    q = qn.quantize(torch.randn(N, K), **options)
    x, bias = torch.randn(2, 5, K).to(dtype), torch.randn(N).to(dtype)
    a, b = torch.randn(RANK, K), torch.randn(N, RANK)
    for tensor in (x, bias, a, b):
        tensor.requires_grad_(requires_grad)
    return x, q, bias, a, b


WEIGHTS = [{}, {"double_quant": False}, {"format": "int8"}]


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*WEIGHTS, {"format": "int8", "double_quant": False}], ids=str)
def test_opcheck_of_quantize_and_dequantize(options):
    q = qn.quantize(torch.randn(5, 65), **options)
    weight = torch.randn(7, 64).t().bfloat16()
    torch.library.opcheck(ops.quantize, (weight, q.code, q.nested_code, q.bits, 64))
    torch.library.opcheck(ops.dequantize, (*op_arguments(q), torch.bfloat16))


def test_opcheck_of_scales_in_8_bits():
    q = qn.quantize(torch.randn(9, 640), double_quant=False)
    nested = qn.quantize(torch.randn(9, 640)).nested_code
    torch.library.opcheck(ops.quantize_absmax, (q.absmax, nested))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_opcheck_of_microscaled_formats(format):
    weight = torch.randn(7, 64).t().bfloat16()
    q = qn.quantize(weight, format)
    # Two calls are compared, and NaN, the level of a byte that is no scale, is no number's equal: only the shapes are.
    torch.library.opcheck(
        ops.quantize_microscaled, (weight, q.blocksize), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(ops.dequantize, (*op_arguments(q), torch.bfloat16))


@pytest.mark.parametrize("adapter", ["none", "rank 0", "plain", "dropout"])
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_opcheck_of_products(options, adapter):
    x, q, bias, a, b = operands(requires_grad=True, **options)
    if adapter == "rank 0":
        a, b = a.detach()[:0].requires_grad_(), b.detach()[:, :0].contiguous().requires_grad_()
    dropout = 0.5 if adapter == "dropout" else 0.0
    lora = (None, None) if adapter == "none" else (a, b)
    lora = (*lora, -0.5, dropout, seed() if dropout else None)
    torch.library.opcheck(ops.linear_forward, (x, *op_arguments(q), bias, *lora))
    torch.library.opcheck(ops.linear_forward, (x.detach()[0], *op_arguments(q), None, *lora))
    dy = torch.randn(2, 5, N)
    for need_dx in (True, False):
        arguments = (dy, *op_arguments(q), *(t.detach() if isinstance(t, torch.Tensor) else t for t in lora), need_dx)
        torch.library.opcheck(ops.linear_backward_input, arguments)
    if adapter in ("plain", "dropout"):
        u, v = torch.randn(10, RANK), torch.randn(10, RANK)
        torch.library.opcheck(ops.lora_gradients, (x.detach(), dy, u, v, *lora[2:], torch.bfloat16))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def layer_of(options):
    return class_for(options).from_linear(nn.Linear(K, N), **options)


class Block(nn.Module):
    """A layer as PEFT would call it, between things that a compiler fuses."""

    def __init__(self, dropout=0.0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.base = layer_of(options)
        self.a, self.b = nn.Parameter(torch.randn(RANK, K)), nn.Parameter(torch.randn(N, RANK))
        self.dropout = dropout

    def forward(self, x):
        y = qn.linear(torch.tanh(x), self.base.quantized_weight, self.base.bias, self.a, self.b, 0.5, self.dropout)
        return torch.sin(y) + self.base(x)


def gradients_of(function, parameters, x):
    torch.manual_seed(5)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *parameters))]


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_model_is_one_graph_and_computes_the_same(dropout, options):
    block = Block(dropout, **options)
    parameters = [p for p in block.parameters() if p.requires_grad]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):  # the second time with a symbolic size
        x = torch.randn(batch, 5, K, requires_grad=True)
        for actual, expected in zip(*(gradients_of(f, parameters, x) for f in (compiled, block)), strict=True):
            torch.testing.assert_close(actual, expected)


def test_inductor_compiles_one_graph_that_computes_the_same():
    block = Block()
    parameters = [p for p in block.parameters() if p.requires_grad]
    x = torch.randn(2, 5, K, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    for actual, expected in zip(*(gradients_of(f, parameters, x) for f in (compiled, block)), strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), block(x))
    dropping = torch.compile(Block(0.5), fullgraph=True)
    first, second = dropping(x), dropping(x)
    assert not torch.equal(first, second), "the mask is compiled in"
    assert (first - block(x)).norm() < 2 * block(x).norm()


def test_scaling_in_a_tensor_is_read_at_each_call():
    x, q, bias, a, b = operands(requires_grad=True)
    scaling = torch.tensor(0.5)
    function = torch.compile(lambda: qn.linear(x, q, bias, a, b, scaling), backend="aot_eager", fullgraph=True)
    for value in (0.5, -3.0):
        scaling.fill_(value)
        expected = qn.linear(x, q, bias, a, b, value)
        for y in (qn.linear(x, q, bias, a, b, scaling), function()):
            assert torch.equal(y, expected)
            gradients = (
                torch.autograd.grad(each.square().sum(), (x, a, b), retain_graph=True) for each in (y, expected)
            )
            for actual, wanted in zip(*gradients, strict=True):
                assert (actual - wanted).norm() < 1e-5 * wanted.norm()


def test_compiled_function_takes_any_container():
    x, q, bias, a, b = operands()
    compiled = torch.compile(lambda x, q: qn.linear(x, q, bias), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, q), qn.linear(x, q, bias))
    other = qn.quantize(torch.randn(N, K))
    torch.testing.assert_close(compiled(x, other), qn.linear(x, other, bias))
    decode = torch.compile(lambda q: q.dequantize(torch.float16), backend="aot_eager", fullgraph=True)
    assert torch.equal(decode(q), q.dequantize(torch.float16))


def test_exported_layer_computes_the_same():
    block = Block().eval()
    x = torch.randn(2, 5, K)
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "options", [*WEIGHTS, {"format": "mxfp4"}, {"codebook": [i / 8 - 1 for i in range(16)]}], ids=str
)
def test_exported_layer_alone_gives_the_same_bits(options, strict):
    torch.manual_seed(0)
    layers = {
        layer_of(options): (torch.randn(2, 5, K),),
        qn.nn.Embedding4bit.from_embedding(nn.Embedding(N, K), **options): (torch.tensor([[3, 0], [7, 3]]),),
        qn.nn.Experts4bit.from_parameter(torch.randn(2, N, K), **options): (torch.randn(5, K), torch.tensor([0, 2, 5])),
    }
    for layer, arguments in layers.items():
        program = torch.export.export(layer, arguments, strict=strict)
        assert torch.equal(program.module()(*arguments), layer(*arguments))


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", ["x, adapter", "x", "adapter", "nothing"])
@pytest.mark.parametrize("adapter", [True, False])
def test_step_counts_the_flops_of_the_dense_step(trained, adapter):
    x, q, bias, a, b = operands()
    x.requires_grad_("x" in trained)
    a.requires_grad_("adapter" in trained), b.requires_grad_("adapter" in trained)
    lora = (a, b) if adapter else (None, None)
    dense = q.dequantize()

    def plain():
        y = F.linear(x, dense, bias)
        return y + 0.5 * F.linear(F.linear(x, a), b) if adapter else y

    def total(forward):
        return flops(lambda: forward().sum().backward() if forward().requires_grad else forward())

    assert total(lambda: qn.linear(x, q, bias, *lora, 0.5)) == total(plain) > 0
    grouped = qn.quantize(torch.randn(3, N, K))
    offsets = torch.tensor([0, 4, 4, 10])
    stacks = [each.expand(3, *each.shape) for each in (a, b)] if adapter else (None, None)
    call = functools.partial(qn.functional.linear_grouped, x.view(10, K), grouped, offsets, None, *stacks)
    assert total(lambda: call()) == total(plain)


@pytest.mark.parametrize("dense_head", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_loss_counts_the_flops_of_the_dense_loss(adapter, dense_head):
    x, q, bias, a, b = operands(requires_grad=True)
    labels, lora = torch.randint(N, (2, 5)), (a, b) if adapter else (None, None)
    weight = q.dequantize().requires_grad_(dense_head)

    def plain():
        y = F.linear(x, weight, bias)
        y = y + F.linear(F.linear(x, a), b) if adapter else y
        F.cross_entropy(y.flatten(0, 1), labels.flatten()).backward()

    def ours():
        qn.functional.linear_cross_entropy(x, weight if dense_head else q, labels, bias, *lora).backward()

    assert flops(ours) == flops(plain) > 0


def test_attention_counts_the_flops_of_torchs():
    q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    shapes = [q.shape] * 3  # torch counts heads that are repeated
    forward, backward = sdpa_flop_count(*shapes), sdpa_backward_flop_count(q.shape, *shapes)
    assert flops(lambda: qn.functional.attention(q, k, v)) == forward
    assert flops(lambda: qn.functional.attention(q, k, v).sum().backward()) == forward + backward


# ---- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_gradient_is_the_same(dropout, use_reentrant):
    block = Block(dropout)
    parameters = [p for p in block.parameters() if p.requires_grad]
    x = torch.randn(2, 5, K, requires_grad=True)

    def gradients(function):
        torch.manual_seed(5)
        for leaf in (x, *parameters):
            leaf.grad = None
        function(x).square().sum().backward()
        return [leaf.grad.clone() for leaf in (x, *parameters)]

    expected = gradients(block)
    actual = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_mask_is_a_function_of_the_seed():
    x, q, _, a, b = operands()

    def dropped(seed):
        torch.manual_seed(seed)
        return qn.linear(x, q, None, a, b, 1.0, 0.5)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    torch.manual_seed(1)
    first = qn.linear(x, q, None, a, b, 1.0, 0.5)
    assert not torch.equal(qn.linear(x, q, None, a, b, 1.0, 0.5), first), "two calls, one mask"


# ---- autocast, grad modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_f_linear(dtype):
    x, q, bias, a, b = operands(requires_grad=True)
    with torch.autocast(device_type="cpu", dtype=dtype):
        y = qn.linear(x, q, bias, a, b, 0.5)
        dense = nn.functional.linear(x, q.dequantize(torch.float32), bias)
        assert y.dtype == dense.dtype == dtype
        assert torch.equal(qn.linear(x, q), qn.linear(x.to(dtype), q))
    expected = qn.linear(x.to(dtype), q, bias, a, b, 0.5)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    leaves = (x, bias, a, b)
    for actual, wanted, leaf in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), leaves, strict=True
    ):
        assert actual.dtype == leaf.dtype
        assert torch.equal(actual, wanted)
    with torch.autocast(device_type="cpu", dtype=dtype, enabled=False):
        assert qn.linear(x, q).dtype == torch.float32


def test_grad_mode_is_heeded_and_keeps_the_result():
    x, q, bias, a, b = operands(requires_grad=True)
    y = qn.linear(x, q, bias, a, b)
    assert y.requires_grad
    with torch.no_grad():
        assert not qn.linear(x, q, bias, a, b).requires_grad
        assert torch.equal(qn.linear(x, q, bias, a, b), y)
    with torch.inference_mode():
        inferred = qn.linear(x, q, bias, a, b)
        assert inferred.is_inference()
        assert torch.equal(inferred, y)
        made_here = qn.quantize(torch.randn(N, K))
    assert qn.linear(x.detach(), made_here).shape == (2, 5, N)
    assert not qn.linear(x.detach(), q).requires_grad


@pytest.mark.parametrize("wanted", ["x", "bias", "a", "b"])
def test_gradient_asked_for_alone_is_the_same(wanted):
    x, q, bias, a, b = operands(requires_grad=True)
    leaves = {"x": x, "bias": bias, "a": a, "b": b}
    dy = torch.randn(2, 5, N)
    expected = dict(
        zip(leaves, torch.autograd.grad(qn.linear(x, q, bias, a, b), tuple(leaves.values()), dy), strict=True)
    )
    alone = {name: leaf if name == wanted else leaf.detach() for name, leaf in leaves.items()}
    y = qn.linear(alone["x"], q, alone["bias"], alone["a"], alone["b"])
    assert torch.equal(torch.autograd.grad(y, alone[wanted], dy)[0], expected[wanted])


def test_gradcheck_of_the_adapter():
    """The formula against finite differences, in fp32: W and the adapter are not rounded."""
    x, q, bias, a, b = operands(requires_grad=True)
    leaves = (x, bias, a, b)
    torch.manual_seed(1)
    dy = torch.randn(2, 5, N)
    gradients = torch.autograd.grad(qn.linear(*(x, q, bias, a, b), 0.5), leaves, dy)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(leaves[i])
        moved = []
        for step in (0.5, -0.5):  # y is linear in each: any step will do
            changed = [leaf.detach() + step * direction if j == i else leaf.detach() for j, leaf in enumerate(leaves)]
            y = qn.linear(changed[0], q, *changed[1:], 0.5)
            moved.append((y.double() * dy.double()).sum().item())
        assert moved[0] - moved[1] == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-2)


def test_second_derivative_is_named_in_the_error():
    x, q, bias, a, b = operands(requires_grad=True)
    y = qn.linear(x, q, bias, a, b)
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected to be differentiated once, got a second derivative"):
        torch.autograd.grad(da.sum(), b)


ONES = qn.quantize(torch.ones(8, 64))
FUNCTIONS = {  # of x [2, 64]
    "linear": lambda x: qn.linear(x, ONES),
    "linear_grouped": lambda x: qn.functional.linear_grouped(
        x, ONES, lora_a=torch.ones(2, 1, 64), lora_b=torch.ones(2, 8, 1), adapter_index=torch.tensor([1, 0])
    ),
    "linear_cross_entropy": lambda x: qn.functional.linear_cross_entropy(x, torch.ones(8, 64), torch.tensor([1, 2])),
    "attention": lambda x: qn.functional.attention(*[x.view(1, 2, 8, 8)] * 3),
    "rotary_embedding": lambda x: qn.functional.rotary_embedding(x.view(1, 2, 8, 8), *[torch.ones(1, 8, 8)] * 2),
    "rms_norm": lambda x: qn.functional.rms_norm(x, torch.ones(64)),
    "gated_activation": lambda x: qn.functional.gated_activation(x, torch.ones(2, 64)),
}
OPS = {
    "linear": lambda x: ops.linear_forward(x, *op_arguments(ONES), None, None, None, 1.0, 0.0, None)[0],
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, torch.tensor([1, 2]), torch.ones(8, 64), *[None] * 6, 8, 64, 0, 0, None, None, None, 1.0, -100, 1.0, 0.0,
        0.0, 0.0, [False] * 4, None,
    )[0],
    "rms_norm": lambda x: ops.rms_norm(x, torch.ones(64), 0.0, 1e-6)[0],
    "attention": lambda x: ops.attention(*[x.view(1, 2, 8, 8)] * 3, 1.0)[0],
}  # fmt: skip


OF_ADAPTERS = {
    "linear": lambda a: qn.linear(torch.ones(2, 64), ONES, None, a, torch.ones(8, 2)),
    "linear_grouped": lambda a: qn.functional.linear_grouped(
        torch.ones(2, 64), ONES, lora_a=a.unsqueeze(1), lora_b=torch.ones(2, 8, 1), adapter_index=torch.tensor([1, 0])
    ),
}


@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "dual"])
@pytest.mark.parametrize(
    ("name", "function"),
    [*FUNCTIONS.items(), *OPS.items(), *OF_ADAPTERS.items()],
    ids=[*FUNCTIONS, *(f"op of {name}" for name in OPS), *(f"{name} of adapters" for name in OF_ADAPTERS)],
)
def test_forward_mode_is_named_in_the_error(name, function, mode):
    x, tangent = torch.randn(2, 64), torch.randn(2, 64)

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            return function(torch.autograd.forward_ad.make_dual(x, tangent))

    modes = {
        "jvp": lambda x: torch.func.jvp(function, (x,), (tangent,)),
        "jacfwd": torch.func.jacfwd(function),
        "dual": dual,
    }
    assert function(x).isfinite().all()
    with pytest.raises(NotImplementedError, match=f"qlora_native.{name}: expected reverse-mode differentiation"):
        modes[mode](x)


def test_compiled_forward_mode_is_named_in_the_error():
    x = torch.randn(2, 64)
    compiled = torch.compile(lambda x: torch.func.jvp(FUNCTIONS["linear"], (x,), (x,)), backend="aot_eager")
    with pytest.raises(Exception, match="qlora_native.linear: expected reverse-mode"):  # in an error of the compiler
        compiled(x)


def test_tensors_without_tangents_pass_through_forward_mode():
    x, q, bias, a, b = operands(requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        y = qn.linear(x, q, bias, a, b)
        assert torch.equal(y, qn.linear(x.detach(), q, bias, a, b))
        assert y.requires_grad


def test_weight_stays_out_of_autograd():
    weight = torch.randn(N, K, requires_grad=True)
    q = qn.quantize(weight)
    assert not any(tensor.requires_grad for tensor in q.tensors().values())
    assert not q.dequantize().requires_grad


def test_activations_are_kept_for_backward_only_where_needed():
    x, q, bias, a, b = operands(requires_grad=True)

    def kept(*arguments):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            qn.linear(*arguments)
        return saved

    def keeps_x(saved):
        return any(t.data_ptr() == x.data_ptr() for t in saved)

    assert keeps_x(kept(x, q, bias, a, b))
    assert not keeps_x(kept(x, q, bias)), "a product with a frozen weight needs no x"
    assert not keeps_x(kept(x, q, bias, a.detach(), b.detach()))
    assert not kept(x.detach(), q)
    decoded = N * K
    assert max(t.numel() * t.element_size() for t in kept(x, q, bias, a, b)) < 4 * decoded
