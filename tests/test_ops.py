"""Guards the torch ops: opcheck, torch.compile, checkpointing, autocast, grad modes, and what backward keeps."""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import class_for
from peak import saved_bytes
from test_aliasing import step as arguments_of_step
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


def test_opcheck_of_optimizer():
    torch.library.opcheck(ops.optimizer_8bit_step, (), arguments_of_step())


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_opcheck_of_microscaled_formats(format):
    weight = torch.randn(7, 64).t().bfloat16()
    q = qn.quantize(weight, format)
    # Two calls are compared, and NaN, the level of a byte that is no scale, is no number's equal: only the shapes are.
    parts = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize_microscaled, (weight, q.blocksize), test_utils=parts)
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


def assert_same_gradients(function, block, x):
    """Of a function that computes what a block does, with the block's parameters."""
    leaves, results = [x, *(p for p in block.parameters() if p.requires_grad)], []
    for call in (function, block):
        torch.manual_seed(5)
        y = call(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_model_is_one_graph_and_computes_the_same(dropout, options):
    block = Block(dropout, **options)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):  # the second time with a symbolic size
        assert_same_gradients(compiled, block, torch.randn(batch, 5, K, requires_grad=True))


def test_inductor_compiles_one_graph_that_computes_the_same():
    block = Block()
    x = torch.randn(2, 5, K, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    assert_same_gradients(compiled, block, x)
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
    leaves = [x := torch.randn(2, 5, K, requires_grad=True), *(p for p in block.parameters() if p.requires_grad)]
    results = []
    for function in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        function(x).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


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


@pytest.mark.parametrize("wanted", range(4), ids=["x", "bias", "a", "b"])
def test_gradient_that_is_wanted_alone_is_the_same(wanted):
    x, q, *rest = operands(requires_grad=True)
    leaves, dy = [x, *rest], torch.randn(2, 5, N)
    expected = torch.autograd.grad(qn.linear(x, q, *rest), leaves, dy)[wanted]
    x, *rest = (leaf if i == wanted else leaf.detach() for i, leaf in enumerate(leaves))
    assert torch.equal(torch.autograd.grad(qn.linear(x, q, *rest), leaves[wanted], dy)[0], expected)


# ---- every function --------------------------------------------------------------------------------------------------

Q, EXPERTS = qn.quantize(torch.ones(8, 64)), qn.quantize(torch.ones(2, 8, 64))
LABELS, INDEX, OFFSETS = torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([0, 1, 2])
COS, SIN = torch.randn(2, 1, 8, 8)
LORA, LORAS = ((2, 64), (8, 2)), ((2, 2, 64), (2, 8, 2))
HEADS, KV_HEADS = (1, 4, 8, 8), (1, 2, 8, 8)
fn = qn.functional
# {what: (the function, the shapes of its operands that have gradients)}
FUNCTIONS = {
    "linear": (lambda x, bias, a, b: qn.linear(x, Q, bias, a, b, 0.5), ((2, 64), (8,), *LORA)),
    "linear_grouped by index": (
        lambda x, bias, a, b: fn.linear_grouped(x, Q, None, bias, a, b, adapter_index=INDEX), ((2, 64), (8,), *LORAS)),
    "linear_grouped by offsets": (
        lambda x, bias, a, b: fn.linear_grouped(x, EXPERTS, OFFSETS, bias, a, b), ((2, 64), (2, 8), *LORAS)),
    "linear_cross_entropy": (
        lambda x, w, c, a, b: fn.linear_cross_entropy(x, w, LABELS, c, a, b), ((2, 64), (8, 64), (8,), *LORA)),
    "linear_cross_entropy of each row": (
        lambda x, bias, a, b: fn.linear_cross_entropy(x, Q, LABELS, bias, a, b, reduction="none"),
        ((2, 64), (8,), *LORA)),
    "attention": (lambda q, k, v: fn.attention(q, k, v, is_causal=True), (HEADS, KV_HEADS, KV_HEADS)),
    "rotary_embedding": (lambda x: fn.rotary_embedding(x, COS, SIN), (HEADS,)),
    "rms_norm": (fn.rms_norm, ((2, 64), (64,))),
    "gated_activation": (fn.gated_activation, ((2, 64), (2, 64))),
}  # fmt: skip
OPS = {
    "linear op": (
        lambda x: ops.linear_forward(x, *op_arguments(Q), None, None, None, 1.0, 0.0, None)[0], ((2, 64),)),
    "linear_cross_entropy op": (
        lambda x: ops.linear_cross_entropy(
            x, LABELS, torch.ones(8, 64), *[None] * 9, 8, 64, *[0] * 4, None, None, None, 1.0, -100, 1.0, 0.0, 0.0, 0.0,
            [False] * 4, None)[0], ((2, 64),)),
    "rms_norm op": (lambda x: ops.rms_norm(x, torch.ones(64), 0.0, 1e-6)[0], ((2, 64),)),
    "attention op": (lambda x: ops.attention(x, x, x, 1.0)[0], (HEADS,)),
}  # fmt: skip


def each_of(table):
    rows = [(name, *row) for name, row in table.items()]
    return pytest.mark.parametrize(("name", "function", "shapes"), rows, ids=table)


def trained(shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@each_of(FUNCTIONS)
def test_compiled_function_gives_the_bits_of_eager(name, function, shapes):
    inputs = trained(shapes)
    compiles = (torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=each) for each in (None, True))
    calls = [function, *compiles]
    expected, *compiled = ((y := f(*inputs), *torch.autograd.grad(y.sum(), inputs)) for f in calls)
    for results in compiled:
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@each_of({name: row for name, row in FUNCTIONS.items() if name != "rotary_embedding"})
def test_second_derivative_is_named_in_the_error(name, function, shapes):
    inputs = trained(shapes)
    gradients = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    op = name.split()[0].removesuffix("_grouped")
    with pytest.raises(NotImplementedError, match=f"{op}: expected to be differentiated once, got a second derivative"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)


@each_of(FUNCTIONS | OPS)
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "dual"])
def test_forward_mode_is_named_in_the_error(name, function, shapes, mode):
    inputs = [each.detach() for each in trained(shapes)]
    assert function(*inputs).isfinite().all()
    for i, x in enumerate(inputs):

        def of_one(x, i=i):
            return function(*inputs[:i], x, *inputs[i + 1 :])

        def dual(x, of_one=of_one):
            with torch.autograd.forward_ad.dual_level():
                return of_one(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

        modes = {
            "jvp": lambda x, of_one=of_one: torch.func.jvp(of_one, (x,), (x,)),
            "jacfwd": torch.func.jacfwd(of_one),
            "dual": dual,
        }
        expected = f"qlora_native.{name.split()[0]}: expected reverse-mode differentiation"
        with pytest.raises(NotImplementedError, match=expected):
            modes[mode](x)


def test_compiled_forward_mode_is_named_in_the_error():
    x = torch.randn(2, 64)
    compiled = torch.compile(lambda x: torch.func.jvp(lambda x: qn.linear(x, Q), (x,), (x,)), backend="aot_eager")
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


def test_activations_are_saved_for_backward_only_where_needed():
    x, q, bias, a, b = operands(requires_grad=True)
    stored = (a, b, *q.tensors().values())

    def saved(*arguments):
        return saved_bytes(lambda: qn.linear(*arguments), *stored)[1]

    u = 10 * RANK * 4
    assert saved(x, q, bias, a, b) == x.nbytes + u
    assert saved(x, q, bias) == 0, "a product with a frozen weight needs no x"
    assert saved(x, q, bias, a.detach(), b.detach()) < x.nbytes
    assert saved(x.detach(), q) == 0
