"""Guards the cross-entropy of a linear layer's logits: its definition in float64, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from peak import megabytes, peaks

import qlora_native as qn
from qlora_native._core import head as _head
from qlora_native._core import loss as _loss
from qlora_native._core.weight import op_arguments
from qlora_native.functional import linear_cross_entropy
from qlora_native.testing import SUM_FACTOR, relative_error, unit_roundoff

T, K, V, RANK = 37, 48, 1030, 3
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0, "logit_scale": 0.5},
    "z loss": {"z_loss": 1e-2, "reduction": "sum"},
    "everything": {"label_smoothing": 0.2, "softcap": 3.0, "logit_scale": 1.5, "z_loss": 1e-3, "reduction": "none"},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Rows are cut as those of a large vocabulary."""
    monkeypatch.setattr(_loss, "CHUNK_BYTES", 16 * V * 2)


def choose_dense_products(monkeypatch, by_panels):
    """Dense weights are multiplied in ragged panels, as where a processor has no instructions for 16 bits, or not."""
    monkeypatch.setattr(_head, "has_instructions", lambda x: not by_panels)
    monkeypatch.setattr(_head, "PANEL_BYTES", 4 * K * 100)


def operands(dtype, requires_grad=True):
    """hidden [T, K], a dense weight [V, K], labels, bias, lora_a, lora_b."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, K).to(dtype), (torch.randn(V, K) / K**0.5).to(dtype)
    labels = torch.randint(V, (T,))
    labels[::5] = -100
    bias, a, b = torch.randn(V).to(dtype), torch.randn(RANK, K) / K**0.5, torch.randn(V, RANK) / 2
    for tensor in (hidden, weight, bias, a, b):
        tensor.requires_grad_(requires_grad)
    return hidden, weight, labels, bias, a, b


def definition(hidden, weight, labels, bias, a, b, scaling=0.5, *, round_to=None, **options):
    """(loss, log-probabilities) as the docstring defines them; logits are rounded to `round_to`."""
    logits = hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T
    if round_to is not None:
        logits = logits + (logits.to(round_to).to(logits.dtype) - logits).detach()
    z = options.get("logit_scale", 1.0) * logits
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    lse = z.logsumexp(-1)
    kept = labels != -100
    smoothing = options.get("label_smoothing", 0.0)
    rows = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    rows = rows + options.get("z_loss", 0.0) * lse.square() * kept
    logprobs = (z.gather(-1, labels.clamp(min=0)[:, None])[:, 0] - lse) * kept
    reduction = options.get("reduction", "mean")
    return {"mean": rows.sum() / kept.sum(), "sum": rows.sum(), "none": rows}[reduction], logprobs


def gradients(loss, tensors):
    weights = torch.linspace(0.5, 1.5, T).to(loss.dtype) if loss.dim() else None
    return torch.autograd.grad(loss, tensors, weights)


def assert_close(actual, expected, dtype, roundings=6):
    error, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert error <= SUM_FACTOR * roundings**0.5 * unit_roundoff(dtype) * norm, float(error / norm)


@dtypes
@options
@pytest.mark.parametrize("head", ["dense", "dense by panels", "quantized"])
def test_loss_and_gradients_are_those_of_the_definition(head, dtype, options, monkeypatch):
    choose_dense_products(monkeypatch, head == "dense by panels")
    hidden, weight, labels, *rest = operands(dtype)
    if head == "quantized":
        weight = qn.quantize(weight.detach())
    loss, logprobs = linear_cross_entropy(hidden, weight, labels, *rest, 0.5, return_logprobs=True, **options)
    dense = weight.dequantize(dtype) if head == "quantized" else weight
    x, w, *others = (tensor.detach().double().requires_grad_() for tensor in (hidden, dense, *rest))
    expected, expected_logprobs = definition(x, w, labels, *others, round_to=dtype, **options)
    assert loss.dtype == torch.float32 and loss.shape == expected.shape
    assert_close(loss.detach(), expected.detach(), dtype)
    assert_close(logprobs, expected_logprobs.detach(), dtype)
    trained, doubles = ([hidden, *rest], [x, *others])
    if head != "quantized":
        trained, doubles = [*trained, weight], [*doubles, w]
    for actual, wanted in zip(gradients(loss, trained), gradients(expected, doubles), strict=True):
        assert_close(actual, wanted, dtype)


@dtypes
@pytest.mark.parametrize("by_panels", [False, True])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["sum"], OPTIONS["smoothed"]], ids=str)
def test_error_is_at_most_that_of_the_unfused_loss(dtype, options, by_panels, monkeypatch):
    """Both against float64 over the same operands; the median over seeds, as the promise for products has it."""
    choose_dense_products(monkeypatch, by_panels)
    ratios = []
    for seed in range(9):
        hidden, weight, labels, *_ = operands(dtype)
        torch.manual_seed(seed)
        hidden = torch.randn(T, K).to(dtype).requires_grad_()
        zeros = [torch.zeros(size, dtype=torch.float64) for size in ((V,), (1, K), (V, 1))]
        double, weight = hidden.detach().double().requires_grad_(), weight.detach()
        (exact,) = gradients(definition(double, weight.double(), labels, *zeros, **options)[0], double)
        (ours,) = gradients(linear_cross_entropy(hidden, weight, labels, **options), hidden)
        (theirs,) = gradients(F.cross_entropy(F.linear(hidden, weight).float(), labels, **options), hidden)
        ratios.append(float((ours.double() - exact).norm() / (theirs.double() - exact).norm()))
    assert sorted(ratios)[4] <= 1.1


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33])
def test_cutting_into_chunks_changes_no_row(rows, monkeypatch):
    hidden, weight, labels, bias, _, _ = operands(torch.float32, requires_grad=False)
    hidden, labels = hidden[:rows], labels[:rows]
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
    monkeypatch.setattr(_loss, "CHUNK_BYTES", 1 << 30)
    whole = linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
    assert loss.shape == (rows,)
    assert_close(loss, whole, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**16])
def test_gradient_of_a_mean_keeps_the_bits_of_half_precision(scale):
    """Over thousands of rows p / T is below what fp16 holds, and torch's GradScaler begins with 2^16."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2048, K).half(), torch.randint(V, (2048,))
    weight = (torch.randn(V, K) / K**0.5).half()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*inputs, labels) * scale
    wide = [each.detach().double().requires_grad_() for each in inputs]
    expected = F.cross_entropy(F.linear(*wide), labels) * scale
    for actual, exact in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, wide), strict=True):
        smallest = 2.0**-24 * exact.numel() ** 0.5 / exact.norm().item()  # fp16's step below 2^-14, in each element
        assert relative_error(actual, exact) < 8 * unit_roundoff(torch.float16) + smallest


def test_ignored_rows_have_no_loss_and_no_gradient():
    hidden, weight, labels, bias, a, b = operands(torch.float32)
    labels[:] = -100
    loss = linear_cross_entropy(hidden, weight, labels, bias, a, b, reduction="sum", label_smoothing=0.1, z_loss=0.1)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight, bias, a, b)))
    assert linear_cross_entropy(hidden, weight, labels).isnan()  # as F.cross_entropy's mean


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_without_a_softmax_alone_is_nan(value):
    hidden, weight, labels, *_ = operands(torch.float32)
    labels[:] = 3
    with torch.no_grad():
        hidden[4, 0] = value
        hidden[4, 1:] = 0
        weight[:, 0] = weight[:, 0].abs()
    loss = linear_cross_entropy(hidden, weight.detach(), labels, reduction="none")
    assert loss.isnan().tolist() == [row == 4 for row in range(T)]


def test_masked_words_have_no_probability():
    """A bias of -inf, by which words are left out, as in torch's own loss."""
    hidden, weight, labels, bias, *_ = operands(torch.float32)
    labels.clamp_(max=V // 2 - 1)
    with torch.no_grad():
        bias[V // 2 :] = -torch.inf
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    assert_close(loss.detach(), expected.detach(), torch.float32)
    (ours,), (theirs,) = (torch.autograd.grad(each, hidden) for each in (loss, expected))
    assert_close(ours, theirs, torch.float32, 12)


def test_bits_are_the_same_for_any_number_of_threads():
    hidden, weight, labels, *_ = operands(torch.bfloat16)
    q = qn.quantize(weight.detach())
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = linear_cross_entropy(hidden, q, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "isa, multiplied",
    {"amx_bf16": True, "avx512_bf16": True, "neon_bf16": True, "avx512": False, "avx2": False, "scalar": False}.items(),
)
def test_torch_multiplies_bf16_where_a_processor_has_instructions_for_it(isa, multiplied, monkeypatch):
    monkeypatch.setattr(qn._C, "current_isa", lambda: isa)
    assert _head.has_instructions(torch.zeros(1, dtype=torch.bfloat16)) == multiplied
    assert _head.has_instructions(torch.zeros(1))
    assert _head.has_instructions(torch.zeros(1, dtype=torch.bfloat16, device="meta"))  # what a GPU has is not asked


def test_opcheck():
    hidden, weight, labels, bias, a, b = operands(torch.float32, requires_grad=False)
    logits = torch.randn(5, V)
    torch.library.opcheck(
        torch.ops.qlora_native.cross_entropy_, (logits, labels[:5], -100, 1.0, 0.0, 0.1, 0.0, True, torch.rand(5))
    )
    rest = (bias, a, b, 0.5, -100, 1.0, 0.0, 0.1, 0.0, [True, True, True, True], torch.rand(T))
    dense = (hidden, labels, weight, *[None] * 9, V, K, 0, 0, 0, 0)
    torch.library.opcheck(torch.ops.qlora_native.linear_cross_entropy, (*dense, *rest))
    q = qn.quantize(weight)
    rest = (bias, a, b, 0.5, -100, 1.0, 0.0, 0.1, 0.0, [True, False, True, True], None)
    torch.library.opcheck(torch.ops.qlora_native.linear_cross_entropy, (hidden, labels, None, *op_arguments(q), *rest))


@pytest.mark.parametrize("by_panels", [False, True])
def test_autocast_multiplies_in_its_dtype(by_panels, monkeypatch):
    choose_dense_products(monkeypatch, by_panels)
    hidden, weight, labels, bias, *_ = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
        expected = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
    assert_close(loss.detach(), expected.detach(), torch.bfloat16)
    for ours, theirs in zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected)), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, torch.bfloat16)


STEPS = """
import qlora_native as qn
T, K, V = 1024, 64, 49152
weight = torch.zeros(V, K, dtype=torch.bfloat16)
quantized = qn.quantize(weight)
labels = torch.randint(V, (T,))

def step(weight, rows):
    hidden = torch.zeros(rows, K, dtype=torch.bfloat16, requires_grad=True)
    qn.functional.linear_cross_entropy(hidden, weight, labels[:rows]).backward()

step(weight, 1), step(quantized, 1)  # what is made once
"""


def test_logits_never_exist_as_a_whole():
    """The logits of 1024 rows by 49,152 words are 96 MB in bf16, and 192 MB in fp32; a chunk of them is 24 MB."""
    product = "(torch.nn.functional.linear(torch.zeros(256, K, dtype=torch.bfloat16), weight),)"
    dense, quantized, by_torch = peaks(STEPS, "step(weight, T)", "step(quantized, T)", product)
    # Where a processor does not multiply bf16, torch's product of a chunk has copies in fp32.
    assert 16 << 20 <= dense <= (40 << 20) + by_torch, megabytes([dense, by_torch])
    assert 16 << 20 <= quantized <= 40 << 20, megabytes([quantized])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels": torch.full((T,), V)}, rf"labels: expected 0 ... {V - 1} or -100, got {T} others, the first {V} at"),
        ({"labels": torch.zeros(T)}, "labels: expected an int64 tensor"),
        ({"labels": torch.zeros(T - 1).long()}, rf"labels: expected \[{T}\] on cpu, got \[{T - 1}\]"),
        ({"weight": torch.zeros(V, K + 1)}, r"hidden: expected \[..., 49\] for a weight"),
        ({"weight": torch.zeros(V, K).bfloat16()}, "hidden: expected torch.bfloat16, the dtype of the weight"),
        ({"weight": None}, "weight: expected a tensor or a QuantizedWeight"),
        ({"bias": torch.zeros(V + 1)}, rf"bias: expected \[{V}\]"),
        ({"lora_b": torch.zeros(V, RANK + 1)}, rf"lora_b: expected \[{V}, {RANK}\]"),
        ({"reduction": "max"}, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\]"),
        ({"softcap": 0.0}, "softcap: expected a number above 0, or None"),
        ({"logit_scale": float("inf")}, "logit_scale: expected a finite number"),
        ({"z_loss": -1.0}, "z_loss: expected a number of at least 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named_in_the_error(change, error):
    hidden, weight, labels, bias, a, b = operands(torch.float32, requires_grad=False)
    good = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "lora_a": a, "lora_b": b}
    linear_cross_entropy(**good)
    with pytest.raises((TypeError, ValueError), match=error):
        linear_cross_entropy(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"wanted": []}, r"wanted: expected four bools, at most \[True, True, True, True\]: .*, got \[\]"),
        ({"bias": None}, r"wanted: expected four bools, at most \[True, True, False, True\]"),
        ({"weight": None, "N": 0}, "weight, codes, absmax: expected a dense weight, or codes and absmax"),
        ({"codes": torch.zeros(4, dtype=torch.uint8)}, "weight, codes, absmax: expected a dense weight, or codes and"),
        ({"weight": torch.zeros(0, K)}, r"weight: expected \[V, K\] with V >= 1"),
        ({"hidden": torch.zeros(())}, r"hidden: expected \[..., 48\]"),
        ({"hidden": torch.zeros(2, 3, K)}, r"hidden: expected \[2, 48\], got \[2, 3, 48\]"),
        ({"labels": torch.zeros(T)}, "labels: expected a tensor of torch.int64, got torch.float32"),
        ({"labels": torch.zeros(T - 1).long()}, rf"labels: expected \[{T}\], got \[{T - 1}\]"),
        ({"bias": torch.zeros(V + 1)}, rf"bias: expected \[{V}\], got \[{V + 1}\]"),
        ({"lora_b": None}, "lora_a, lora_b: expected both or neither, got one"),
        ({"lora_a": torch.zeros(())}, r"lora_a: expected \[48\], got \[\]"),
        ({"lora_b": torch.zeros(V, RANK + 1)}, rf"lora_b: expected \[{V}, {RANK}\]"),
        ({"row_gradients": torch.zeros(T).half()}, "row_gradients: expected a tensor of torch.float32, got"),
        ({"row_gradients": torch.zeros(1)}, rf"row_gradients: expected \[{T}\], got \[1\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_argument_of_the_op_is_named_in_the_error(change, error, device):
    hidden, weight, labels, bias, a, b = operands(torch.float32, requires_grad=False)
    good = {
        "hidden": hidden, "labels": labels, "weight": weight, "codes": None, "absmax": None, "nested_absmax": None,
        "nested_code": None, "offset": None, "code": None, "minimum": None, "nested_minimum": None, "zero_point": None,
        "N": V, "K": K, "bits": 0, "blocksize": 0, "nested_blocksize": 0, "byte_format": 0, "bias": bias,
        "lora_a": a, "lora_b": b, "lora_scaling": 0.5, "ignore_index": -100, "scale": 1.0, "softcap": 0.0,
        "label_smoothing": 0.0, "z_loss": 0.0, "wanted": [True] * 4, "row_gradients": None,
    }  # fmt: skip

    def call(arguments):
        moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments.values()]
        torch.ops.qlora_native.linear_cross_entropy(*moved)

    call(good)
    with pytest.raises((TypeError, ValueError), match=error):
        call({**good, **change})
