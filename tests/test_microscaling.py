"""Guards MXFP4 and NVFP4: weights are quantized by their rules, and the files of others keep their bits."""

from dataclasses import replace

import cases
import oracle
import pytest
import torch
from test_conformance import assert_same_bits, random_weight

import qlora_native as qn

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FORMATS = list(cases.MICROSCALED)


def codes_of(q):
    """[N * K]: the code of each element."""
    nibbles = torch.stack((q.codes.reshape(-1) >> 4, q.codes.reshape(-1) & 15), dim=1).reshape(-1)
    return nibbles[: q.shape[0] * q.shape[1]].long()


def blocks_of(weight, blocksize):
    """[blocks, blocksize] in fp32, the last filled up with zeros."""
    flat = weight.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def nearest_even(t):
    """The code of the nearest E2M1 number to each of `t` in float64, a tie to the even code; beyond 6 it is 6."""
    size, levels = t.abs().clamp(max=6), E2M1[:8].double()
    distance = (size[..., None] - levels).abs()
    nearest = distance == distance.min(dim=-1, keepdim=True).values
    even = torch.where(nearest, torch.arange(8) % 2, 2).argmin(dim=-1)
    return even + 8 * torch.signbit(t)


def expected_scales(blocks, format):
    """(bytes, scales in fp32, the scale of the tensor) by each format's rule."""
    absmax = blocks.abs().amax(dim=1)
    if format == "mxfp4":
        exponent = torch.frexp(absmax).exponent - 1 - 2  # floor(log2) less the largest exponent of E2M1
        exponent = torch.where(absmax == 0, -127, exponent).clamp(-127, 127)
        return (exponent + 127).to(torch.uint8), torch.exp2(exponent.double()).float(), None
    scale_2 = (absmax.max() / (6.0 * 448.0)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (absmax / (6.0 * scale_2)).clamp(min=2**-9, max=448)  # as ModelOpt
    scale = torch.where(absmax == 0, 1.0, scale).to(torch.float8_e4m3fn)
    return scale.view(torch.uint8), scale.float() * scale_2, scale_2


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_scales_and_codes_follow_the_rule(format, dtype):
    for N, K in cases.WEIGHTS:
        weight = random_weight(N, K, dtype)
        q = qn.quantize(weight, format)
        assert (q.blocksize, q.format, q.dtype) == (cases.MICROSCALED[format], format, dtype)
        blocks = blocks_of(weight, q.blocksize)
        stored, scale, _ = expected_scales(blocks, format)
        assert torch.equal(q.absmax, stored)
        assert_same_bits(oracle.scales(q), scale, f"[{N}, {K}]")
        t = (blocks / scale[:, None]).reshape(-1)[: N * K]
        assert torch.equal(codes_of(q), nearest_even(t.double())), f"[{N}, {K}]"


@pytest.mark.parametrize("format", FORMATS)
def test_ties_take_the_even_code_and_large_values_the_largest(format):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up, down = (torch.nextafter(ties, torch.full_like(ties, side * torch.inf)) for side in (1, -1))
    row = torch.cat((ties, up, down))
    rows = torch.stack((row, -row)).view(-1)
    blocksize = cases.MICROSCALED[format]
    # Beside a 7.5 the scale of MXFP4 is 1, and 7.5 becomes 6. That of NVFP4 is 1 beside 6 in one block and 6 * 448
    # in another.
    largest = 7.5 if format == "mxfp4" else 6.0
    padded = torch.nn.functional.pad(rows, (0, -len(rows) % (blocksize - 1))).view(-1, blocksize - 1)
    weight = torch.cat((torch.full((len(padded), 1), largest), padded), dim=1)
    if format == "nvfp4":
        weight = torch.cat((weight, torch.full((1, blocksize), 6.0 * 448)))
    q = qn.quantize(weight, format)
    codes = codes_of(q).view(weight.shape)[: len(padded)]
    assert (oracle.scales(q)[: len(padded)] == 1).all()
    assert (codes[:, 0] == 7).all()
    found = codes[:, 1:].reshape(-1)[: len(rows)]
    even, above, below = [0, 2, 2, 4, 4, 6, 6], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]
    expected = torch.tensor(even + above + below)
    assert torch.equal(found, torch.cat((expected, expected + 8)))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format):
    q = qn.quantize(torch.zeros(3, 64), format)
    assert not q.codes.any()
    assert torch.equal(q.dequantize(), torch.zeros(3, 64))
    weight = torch.cat((torch.ones(1, 64), torch.zeros(1, 64)))
    assert torch.equal(qn.quantize(weight, format).dequantize()[1], torch.zeros(64))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -125, -124, 0, 100, 127])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_of_every_size_keep_their_rule(format, exponent):
    mantissas = 1 + torch.arange(64) / 64
    weight = torch.ldexp(mantissas.double(), torch.tensor(exponent)).float().view(1, 64)
    q = qn.quantize(weight, format)
    stored, scale, _ = expected_scales(blocks_of(weight, q.blocksize), format)
    assert torch.equal(q.absmax, stored)
    expected = nearest_even((blocks_of(weight, q.blocksize).double() / scale.double()[:, None]).reshape(-1))
    assert torch.equal(codes_of(q), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_decoded_weight_is_code_times_scale_rounded_once(format):
    for N, K in cases.WEIGHTS:
        q = qn.quantize(random_weight(N, K), format)
        for dtype in cases.DTYPES:
            assert_same_bits(q.dequantize(dtype), oracle.decode(q, dtype), f"[{N}, {K}] {dtype}")
        if format == "mxfp4":  # whose scale follows from what it decodes to
            assert torch.equal(qn.quantize(q.dequantize(), format).dequantize(), q.dequantize())


@pytest.mark.parametrize(("format", "bits"), [("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_bits_per_weight_are_the_formats(format, bits):
    q = qn.quantize(torch.ones(1024, 1024), format)
    tables = 8 * (16 + 256 + 1 + q.absmax.numel() / 256) * 4 / 2**20
    assert q.bits_per_weight == bits + tables


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_inf_in_a_weight_are_located_in_the_error(format):
    weight = torch.ones(6, 40)
    weight[3, 5], weight[4, 1] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"weight: expected finite values, got 2 NaN or Inf, the first at \[3, 5\]"):
        qn.quantize(weight, format)


@pytest.mark.parametrize(("format", "only"), list(cases.MICROSCALED.items()))
def test_only_blocksize_of_a_format_is_named_in_the_error(format, only):
    assert qn.quantize(torch.ones(2, 64), format, only).blocksize == only
    with pytest.raises(ValueError, match=f"blocksize: expected {only}, the only one of {format}, got 64"):
        qn.quantize(torch.ones(2, 64), format, 64)
    with pytest.raises(ValueError, match="format: expected nf4 or fp4, the formats of bitsandbytes, got"):
        qn.quantize(torch.ones(2, 64), format).to_bitsandbytes()


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "byte"), [("mxfp4", 255), ("nvfp4", 127), ("nvfp4", 129), ("nvfp4", 255)])
def test_byte_beside_the_scales_is_located_where_a_weight_is_loaded(format, byte):
    layer = qn.nn.Linear4bit.from_linear(torch.nn.Linear(64, 2), format)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["absmax"][1] = byte
    with pytest.raises(RuntimeError, match=f"absmax: expected scales of {format}: .*, got {byte} at 1"):
        layer.load_state_dict(state)
    q = layer.quantized_weight
    q.check_values()
    q.absmax.data[1] = byte
    with pytest.raises(ValueError, match=f"absmax: expected scales of {format}"):
        q.check_values()
    for shape in ((), (255,), (256, 1)):
        table = {**layer.state_dict(), "nested_code": torch.ones(shape)}
        with pytest.raises(RuntimeError, match="nested_code: expected shape"):
            layer.load_state_dict(table)
    table = {**layer.state_dict(), "nested_code": torch.ones(256)}
    with pytest.raises(RuntimeError, match="nested_code: expected .* finite values and NaN after them"):
        layer.load_state_dict(table)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_column_order_with_a_column_twice_is_named(format):
    order = torch.arange(64, dtype=torch.int32)
    q = replace(qn.quantize(torch.randn(2, 64), format), column_order=order)
    q.check_values()
    order[1] = 0
    with pytest.raises(ValueError, match=r"column_order: expected each of 0 \.\.\. 63 once"):
        q.check_values()


# ---- the files of others ---------------------------------------------------------------------------------------------


def random_bytes(*shape, end=256):
    return torch.randint(0, end, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def every_scale():
    """(blocks [255, 8, 16], scales [255, 8]): every E8M0 number with every byte of codes, twice in a row."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)[:, :8]
    blocks = torch.cat((codes, codes + 128)).repeat(128, 1, 1)[:255]
    return blocks.contiguous(), torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 8).contiguous()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_mxfp4_decodes_to_the_bits_of_transformers(dtype):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    experts = random_bytes(3, 10, 2, 16), random_bytes(3, 10, 2, end=255)
    for blocks, scales in ((*(t[None] for t in every_scale()),), experts):
        expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        for expert, theirs in enumerate(expected):
            q = qn.QuantizedWeight.from_mxfp4(blocks[expert], scales[expert])
            assert_same_bits(q.dequantize(dtype), theirs.contiguous(), f"{expert}")
    assert q.dequantize().dtype == torch.bfloat16
    together = qn.QuantizedWeight.from_mxfp4(*experts)
    assert together.shape == (3, 10, 64) and torch.equal(together.dequantize(dtype), expected)


def test_mxfp4_beyond_fp32_is_infinite_and_its_smallest_scale_is_kept():
    q = qn.QuantizedWeight.from_mxfp4(torch.full((2, 16), 0x71, dtype=torch.uint8), torch.tensor([[254], [0]]).byte())
    q.check_values()
    assert q.dequantize(torch.float32)[:, :2].tolist() == [[2.0**126, torch.inf], [2.0**-128, 6 * 2.0**-127]]


def compressed_tensors_scheme(group_size):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategy = "tensor_group" if group_size == 16 else "group"
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group_size)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


def test_nvfp4_of_compressed_tensors_decodes_to_its_bits():
    compressors = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    scales = torch.arange(127, dtype=torch.uint8).repeat(2)[:240].view(30, 8)
    codes = random_bytes(30, 64)
    for global_scale in (1234.567, 0.37, 3e5):
        entries = {
            "weight_packed": codes,
            "weight_scale": scales.view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([global_scale]),
        }
        theirs = compressors.NVFP4PackedCompressor.decompress(entries, compressed_tensors_scheme(16))["weight"]
        q = qn.QuantizedWeight.from_nvfp4(
            codes, entries["weight_scale"], weight_global_scale=entries["weight_global_scale"]
        )
        assert theirs.dtype == q.dtype == torch.bfloat16
        assert_same_bits(q.dequantize(), theirs, f"{global_scale}")


def test_mxfp4_of_compressed_tensors_decodes_to_its_bits():
    compressors = pytest.importorskip("compressed_tensors.compressors.mxfp4")
    codes, scales = every_scale()
    entries = {"weight_packed": codes.view(255, 128), "weight_scale": scales}
    theirs = compressors.MXFP4PackedCompressor.decompress(entries, compressed_tensors_scheme(32))["weight"]
    q = qn.QuantizedWeight.from_mxfp4(entries["weight_packed"], scales)
    assert_same_bits(q.dequantize(), theirs, "every scale")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nvfp4_of_modelopt_decodes_to_its_formula(dtype):
    """modelopt/torch/quantization/qtensor/nvfp4_tensor.py, version 0.47: values * (scale * scale_2), in fp32."""
    codes, scales = random_bytes(30, 64), random_bytes(30, 8, end=127).view(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.0123)
    q = qn.QuantizedWeight.from_nvfp4(codes, scales, weight_scale_2=scale_2)
    values = E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).long()].view(30, 8, 16)
    expected = (values * (scales.float() * scale_2)[..., None]).view(30, 128).to(dtype)
    assert_same_bits(q.dequantize(dtype), expected, str(dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
def test_weight_that_is_quantized_is_what_is_read_again(dtype):
    weight = random_weight(24, 64, dtype)
    mx = qn.quantize(weight, "mxfp4")
    swapped = (mx.codes >> 4) | (mx.codes << 4)
    read = qn.QuantizedWeight.from_mxfp4(swapped.view(24, 2, 16), mx.absmax.view(24, 2), dtype)
    assert torch.equal(read.dequantize(), mx.dequantize())
    nv = qn.quantize(weight, "nvfp4")
    scale_2 = expected_scales(blocks_of(weight, 16), "nvfp4")[2]
    swapped = (nv.codes >> 4) | (nv.codes << 4)
    read = qn.QuantizedWeight.from_nvfp4(swapped, nv.absmax.view(24, 4), weight_scale_2=scale_2, dtype=dtype)
    assert torch.equal(read.dequantize(), nv.dequantize())


BLOCKS, SCALES = random_bytes(6, 2, 16), random_bytes(6, 2, end=255)
CODES, E4M3 = random_bytes(6, 16), random_bytes(6, 2, end=127)
ONE = torch.tensor(1.0)
BAD_MXFP4 = [
    ((BLOCKS.int(), SCALES), TypeError, "blocks: expected torch.uint8, got torch.int32"),
    ((BLOCKS, None), TypeError, "scales: expected a tensor, got NoneType"),
    ((BLOCKS[..., :8], SCALES), ValueError, "blocks: expected .*, got .6, 2, 8. with .6, 2."),
    ((BLOCKS, SCALES[:5]), ValueError, "blocks: expected .*, got .6, 2, 16. with .5, 2."),
    ((BLOCKS.view(6, 32)[:, :24], SCALES), ValueError, "blocks: expected .*, got .6, 24. with .6, 2."),
    ((BLOCKS[:0], SCALES[:0]), ValueError, "scales: expected at least one, got .0, 2."),
    ((BLOCKS, SCALES.clone().fill_(255)), ValueError, "scales: expected scales of mxfp4: .*, got 255 at 0"),
]
BAD_NVFP4 = [
    ((CODES.float(), E4M3), {"weight_scale_2": ONE}, TypeError, "codes: expected torch.uint8, got torch.float32"),
    ((CODES, E4M3.float()), {"weight_scale_2": ONE}, TypeError, "scales: expected .*float8_e4m3fn.*, got"),
    ((CODES[:, :12], E4M3), {"weight_scale_2": ONE}, ValueError, "codes: expected .*, got .6, 12. with .6, 2."),
    ((CODES, E4M3 | 128), {"weight_scale_2": ONE}, ValueError, "scales: expected scales of nvfp4: .*, got "),
    ((CODES, torch.full_like(E4M3, 127)), {"weight_scale_2": ONE}, ValueError, "got 127 at 0"),
    ((CODES, E4M3), {}, ValueError, "weight_global_scale, weight_scale_2: expected one of them, got none"),
    ((CODES, E4M3), {"weight_scale_2": ONE, "weight_global_scale": ONE}, ValueError, "one of them, got both"),
    ((CODES, E4M3), {"weight_scale_2": -ONE}, ValueError, "weight_scale_2: expected a finite number above 0, got -1.0"),
    ((CODES, E4M3), {"weight_global_scale": ONE * torch.nan}, ValueError, "weight_global_scale: .*, got nan"),
    ((CODES, E4M3), {"weight_scale_2": ONE * 3e38}, ValueError, "expected one by which every scale is finite in fp32"),
    ((CODES, E4M3), {"weight_scale_2": 1.0}, TypeError, "expected a tensor of one floating-point number, got float"),
]


BAD = [(qn.QuantizedWeight.from_mxfp4, arguments, {}, *rest) for arguments, *rest in BAD_MXFP4]
BAD += [(qn.QuantizedWeight.from_nvfp4, *row) for row in BAD_NVFP4]


@pytest.mark.parametrize(("read", "arguments", "scales", "error", "message"), BAD)
def test_fault_of_a_file_is_named_in_the_error(read, arguments, scales, error, message):
    with pytest.raises(error, match=message):
        read(*arguments, **scales)
