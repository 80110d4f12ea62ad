"""Guards every operation: it follows its definition, over cases.py. test_isas.py runs this for each instruction set."""

import cases
import oracle
import pytest
import torch

import qlora_native as qn
from qlora_native import _C
from qlora_native._core.inputs import draw_seed
from qlora_native.testing import assert_close_by_norm, assert_error_ratio

SCALING = 1.7
# No backend chooses panels for fewer rows (product/config.cpp of cpp/ and cuda/).
MIN_PANEL_ROWS = {torch.float32: 256, torch.bfloat16: 256, torch.float16: 33}
MIN_ELEMENTS = 256  # the mean of fewer independent errors says too little
SEEDS = 3


def random_weight(N, K, dtype=torch.float32, seed=0):
    """Normal values, each row of its own size, with an outlier here and there: scales that differ."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(N, K, generator=generator) * (0.3 + torch.rand(N, 1, generator=generator))
    weight.view(-1)[:: max(1, N * K // 7)] *= 4
    return weight.to(dtype)


def quantize(N, K, format, blocksize, double_quant, dtype=torch.float32, seed=0):
    codebook = cases.CODEBOOK if format == "codebook" else None
    return qn.quantize(random_weight(N, K, dtype, seed), format, blocksize, double_quant, codebook)


# ---- quantize, dequantize --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "dq"])
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("format", cases.FORMATS)
def test_decoded_weight_is_code_times_scale_rounded_once(format, blocksize, double_quant):
    for N, K in cases.WEIGHTS:
        q = quantize(N, K, format, blocksize, double_quant)
        for dtype in cases.DTYPES:
            assert_same_bits(q.dequantize(dtype), oracle.decode(q, dtype), f"[{N}, {K}] {dtype}")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("format", cases.FORMATS)
def test_code_is_the_nearest(format, blocksize, dtype):
    for N, K in cases.WEIGHTS:
        weight = random_weight(N, K, dtype)
        q = quantize(N, K, format, blocksize, double_quant=False, dtype=dtype)
        blocks = torch.nn.functional.pad(weight.reshape(-1).float(), (0, -weight.numel() % blocksize))
        blocks = blocks.view(-1, blocksize)
        assert torch.equal(q.absmax, blocks.abs().amax(dim=1))
        scaled = (blocks * (1 / q.absmax)[:, None]).reshape(-1)[: weight.numel()].double()
        levels = torch.arange(-127, 128) / 127.0 if format == "int8" else q.code
        chosen = oracle.decode(with_scales_of_one(q), torch.float32).reshape(-1).double()
        distance = (chosen - scaled).abs()
        nearest = oracle.distance_to_nearest(levels, scaled)
        # A near tie may fall either way: the midpoint is rounded to fp32.
        assert (distance <= nearest + 2**-23).all(), f"[{N}, {K}]: off by {(distance - nearest).max():.3g}"


def with_scales_of_one(q):
    return qn.QuantizedWeight(
        q.codes, torch.ones_like(q.absmax), None, None, None, q.code, q.shape, q.blocksize, q.format, q.dtype
    )


@pytest.mark.parametrize("format", [f for f in cases.FORMATS if f != "int8"])
def test_code_beside_a_midpoint_is_that_of_its_side(format):
    """Every midpoint and the floats on both sides of it, exactly: a scale of 1 leaves elements as they are."""
    codebook = torch.tensor(cases.CODEBOOK) if format == "codebook" else qn.quantize(torch.ones(1, 64), format).code
    levels, order = codebook.sort(stable=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    up, down = (torch.nextafter(midpoints, torch.full_like(midpoints, side * torch.inf)) for side in (1, -1))
    between = 2 * torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 1
    values = torch.cat((midpoints, up, down, levels, between)).clamp(-1, 1)  # int4 has a level beyond
    values = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    weight = torch.cat((torch.ones(len(values), 1), values), dim=1)
    q = qn.quantize(weight, format, 64, False, cases.CODEBOOK if format == "codebook" else None)
    assert (q.absmax == 1).all()
    expected = order[torch.bucketize(weight, midpoints)]  # of the midpoints that are less
    found = torch.stack((q.codes.reshape(-1) >> 4, q.codes.reshape(-1) & 15), dim=-1).view_as(weight)
    wrong = found != expected
    assert not wrong.any(), (
        f"{weight[wrong][:5].tolist()}: {found[wrong][:5].tolist()}, not {expected[wrong][:5].tolist()}"
    )


def test_tie_takes_the_upper_level():
    levels = torch.tensor(cases.CODEBOOK[:8] + (0.25, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0))
    ties = torch.tensor([1.0, 0.375, 0.5625, 0.6875, 0.78125, 0.84375, 0.90625, 0.96875])  # 1 is the block's scale
    q = qn.quantize(ties[None], codebook=levels, double_quant=False)
    assert q.codes.reshape(-1).tolist() == [0xF8, 0x9A, 0xBC, 0xDE]


@pytest.mark.parametrize("format", cases.FORMATS)
def test_block_of_zeros_stays_zero(format):
    q = qn.quantize(torch.zeros(3, 64), format, codebook=cases.CODEBOOK if format == "codebook" else None)
    assert torch.equal(q.dequantize(torch.float32), torch.zeros(3, 64))
    expected = {"nf4": 0x77, "fp4": 0x00, "int4": 0x88, "int8": 0x00, "codebook": 0x88}[format]
    if format != "int4":  # whose zero is level 8 or 7
        assert q.codes.unique().tolist() == [expected]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 65), (48, 96), (130, 512)])
def test_scale_in_8_bits_is_the_nearest(N, K):
    plain = quantize(N, K, "nf4", 32, double_quant=False)
    q = quantize(N, K, "nf4", 32, double_quant=True)
    assert torch.equal(q.codes, plain.codes)
    assert q.offset.item() == pytest.approx(plain.absmax.double().mean().item(), rel=2**-22)
    centered = plain.absmax - q.offset
    blocks = torch.nn.functional.pad(centered, (0, -len(centered) % 256)).view(-1, 256)
    assert torch.equal(q.nested_absmax, blocks.abs().amax(dim=1))
    inverse = torch.where(q.nested_absmax > 0, 1 / q.nested_absmax, 0.0)
    scaled = (blocks * inverse[:, None]).reshape(-1)[: len(centered)].double()
    distance = (q.nested_code[q.absmax.long()].double() - scaled).abs()
    nearest = oracle.distance_to_nearest(q.nested_code, scaled)
    assert (distance <= nearest + 2**-24).all()


def assert_same_bits(actual, expected, name):
    bits = {4: torch.int32, 2: torch.int16}[expected.element_size()]
    differ = actual.view(bits) != expected.view(bits)
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {differ.numel()} differ, first {actual[differ][0]} and {expected[differ][0]}"
    )


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(cases.products()), ids=str)
def test_product_and_its_gradients_are_within_their_tolerance(case):
    check_product(case)


def check_product(case, device="cpu", by_torch=None):
    """One of cases.products(): computed on `device`, compared on the CPU.

    `by_torch`: whether torch's dense product multiplies its panels, so that it may be as far off as that is. The order
    of torch's sums, and with it their error, differs between processors. By default: where a backend may choose panels.
    """
    by_torch = by_torch if by_torch is not None else case.M >= MIN_PANEL_ROWS[case.dtype]
    leaves, actual, reference = compute(case, device)
    # With as many threads as ours had, since torch's sums differ with them too.
    by_others = (reference.dense(device), reference.accumulated(device)) if by_torch else ()
    with oracle.one_thread():
        exact, blocked = reference.exact(), reference.blocked()
        tolerance = reference.tolerance(exact, by_torch)
        assert actual.keys() == exact.keys()
        for name, result in actual.items():
            assert result.dtype == (leaves[name].dtype if name in leaves else case.dtype)
            assert_close_by_norm(name, result, exact[name], tolerance[name])
            if name not in blocked or reference.independent(name) < MIN_ELEMENTS:
                continue
            error, yardstick = reference.errors(name, result, blocked, exact)
            for other in by_others:
                if name in other:
                    yardstick = max(yardstick, reference.errors(name, other[name], blocked, exact)[0])
            assert_error_ratio(name, [error], [yardstick], reference.independent(name))


def long_sums():
    """On a GPU without forward products of up to 8 rows, where what a lane sums is one chain (product/gemv/gemv.cu): at
    this length an error of 1.4 times that of blocks."""
    on_cpu = _C.cpu_tensors_backend() == "cpu"
    return [(case, names) for case, names in cases.long_sums() if on_cpu or case.M > 8 or names != ("y",)]


@pytest.mark.parametrize(("case", "names"), long_sums(), ids=str)
def test_long_sum_is_as_exact_as_sums_in_blocks(case, names):
    """In the median over seeds: a chain that does not start at 0 after each block is found here."""
    errors = {name: [] for name in names}
    for seed in range(SEEDS):
        _, actual, reference = compute(case, seed=seed)
        with oracle.one_thread():
            exact, blocked = reference.exact(), reference.blocked()
            for name in names:
                errors[name].append(reference.errors(name, actual[name], blocked, exact))
    for name, pairs in errors.items():
        assert_error_ratio(name, *zip(*pairs, strict=True), reference.independent(name))


def compute(case, device="cpu", seed=0):
    """({name: what is differentiated}, {name: result}, their oracle.Linear)."""
    generator = torch.Generator().manual_seed(case.M + 1000 * case.N + case.K + 10**9 * seed)

    def randn(*size, dtype=case.dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    q = quantize(case.N, case.K, case.format, case.blocksize, case.double_quant, seed=seed)
    x, dy = randn(case.M, case.K), randn(case.M, case.N)
    bias = randn(case.N, dtype=torch.float32) if case.bias else None
    adapter = {}
    if case.rank is not None:
        adapter = {
            "lora_a": randn(case.rank, case.K, dtype=case.lora_dtype, scale=case.K**-0.5),
            "lora_b": randn(case.N, case.rank, dtype=case.lora_dtype, scale=0.1),
        }
    leaves = {"dx": x, "dbias": bias, "da": adapter.get("lora_a"), "db": adapter.get("lora_b")}
    leaves = {k: leaf.clone().to(device).requires_grad_() for k, leaf in leaves.items() if leaf is not None}
    moved = (leaves.get(name) for name in ("dbias", "da", "db"))
    torch.manual_seed(1)
    y = qn.linear(leaves["dx"], q.to(device), *moved, SCALING, case.dropout)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(device))
    actual = {"y": y.detach().cpu(), **{k: g.cpu() for k, g in zip(leaves, gradients, strict=True)}}

    torch.manual_seed(1)
    drawn = draw_seed(x).item()
    reference = oracle.Linear(
        x, q.dequantize(case.dtype), dy, bias, *adapter.values(), scaling=SCALING, dropout=case.dropout, seed=drawn
    )
    return leaves, actual, reference
