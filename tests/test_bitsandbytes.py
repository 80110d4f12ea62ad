"""Guards the file format: bitsandbytes 0.50 is the oracle for the bytes and bits that we read and write."""

import io
import warnings

import cases
import pytest
import torch

import qlora_native as qn
from qlora_native import _C
from qlora_native._core.formats import is_dynamic_map

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes import functional as bnbf
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

pytestmark = pytest.mark.usefixtures("eager")
FORMATS = ("nf4", "fp4")
WEIGHTS = ((1, 1), (1, 64), (3, 65), (7, 333), (5, 190), (96, 128), (33, 3420))


def bits_of(tensor):
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


def theirs(weight, format, blocksize, double_quant):
    """(its codes, its QuantState, the same as our container)."""
    codes, state = bnbf.quantize_4bit(weight, blocksize=blocksize, quant_type=format, compress_statistics=double_quant)
    entries = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return codes, state, qn.QuantizedWeight.from_bitsandbytes({"weight": codes, **entries})


def random_weight(N, K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + K)
    return (torch.randn(N, K, generator=generator) * (0.01 + torch.rand(N, 1, generator=generator))).to(dtype)


def test_tables_are_those_of_bitsandbytes():
    for format in FORMATS:
        assert torch.equal(bits_of(torch.tensor(_C.codebook(format))), bits_of(bnbf.get_4bit_type(format, "cpu")))
    for is_signed in (True, False):
        assert_same_map(torch.tensor(_C.dynamic_map(is_signed)), bnbf.create_dynamic_map(is_signed))


def assert_same_map(ours, theirs):
    """But for the last bits, in which torch.linspace differs between processors."""
    torch.testing.assert_close(ours, theirs, rtol=2**-20, atol=0)


def test_map_of_another_processor_is_recognised():
    ours = torch.tensor(_C.dynamic_map())
    assert is_dynamic_map(ours * (1 + 2**-22), ours)
    for other in (ours * 1.001, ours[:255], ours.double(), torch.full((256,), float("nan"))):
        assert not is_dynamic_map(other, ours)


@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "dq"])
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_decoded_bits_are_those_of_bitsandbytes(format, blocksize, double_quant):
    """Its AVX-512 kernel takes wrong scales where K is no multiple of the blocksize, so the reference is the oracle."""
    for N, K in (*WEIGHTS, (4, 4 * blocksize)):
        for dtype in cases.DTYPES:
            codes, state, q = theirs(random_weight(N, K, dtype), format, blocksize, double_quant)
            absmax = bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else q.absmax
            expected = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, blocksize, (N, K), dtype)
            actual = q.dequantize()
            assert actual.dtype == dtype
            assert_same_bits(actual, expected, f"[{N}, {K}] {dtype}")
            if K % blocksize == 0:
                # + 0: its scalar kernel decodes the second zero of fp4 to -0, its reference and AVX-512 code to 0.
                kernel = bnbf.dequantize_4bit(codes, state).view(N, K)
                assert_same_bits(actual + 0, kernel + 0, f"[{N}, {K}] {dtype}, kernel")


def assert_same_bits(actual, expected, name):
    differ = bits_of(actual) != bits_of(expected)
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {differ.numel()} differ, first {actual[differ][0]} and {expected[differ][0]}"
    )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_decoded_bits_are_those_of_bitsandbytes_at_extreme_scales(format, dtype):
    scales = torch.tensor([0.0, 1e-45, 3e-42, 1e-39, 1.2e-38, 5e-38, 1e-30, 6e-8, 1e-4, 1.0, 6e4, 1e30, 3.4e38])
    N, K = len(scales), 64
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)[: N * K // 2].view(N, K // 2)
    code = torch.tensor(_C.codebook(format))
    q = qn.QuantizedWeight(codes, scales, None, None, None, code, (N, K), 64, format, dtype)
    expected = _dequantize_4bit_compute(codes.view(-1), scales, code, 64, (N, K), dtype)
    assert_same_bits(q.dequantize(), expected, str(dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_those_of_bitsandbytes_but_at_ties(format, blocksize, dtype):
    for N, K in WEIGHTS:
        weight = random_weight(N, K, dtype)
        codes, state, _ = theirs(weight, format, blocksize, double_quant=False)
        q = qn.quantize(weight, format, blocksize, double_quant=False)
        assert torch.equal(q.absmax, state.absmax)
        assert q.codes.reshape(-1).shape == codes.reshape(-1).shape
        ours, other = (nibbles(c, N * K) for c in (q.codes, codes))
        differ = ours != other
        if not differ.any():
            continue
        # Its last block, where it is not full, is divided by absmax instead of multiplied by the inverse.
        scale = q.absmax.repeat_interleave(blocksize)[: N * K]
        scaled = (weight.reshape(-1).float() * (1 / scale))[differ].double()
        midpoints = (q.code[ours[differ]].double() + q.code[other[differ]].double()) / 2
        distance = (scaled - midpoints).abs()
        assert (distance <= 2**-23 * midpoints.abs().clamp(min=2**-6)).all(), f"[{N}, {K}]: {distance.max():.3g} off"
        assert differ.sum() <= 3 + 2e-3 * N * K, f"[{N}, {K}]: {int(differ.sum())} ties are too many"


def nibbles(codes, elements):
    codes = codes.reshape(-1)
    return torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[:elements].long()


@pytest.mark.parametrize("format", FORMATS)
def test_block_of_zeros_is_that_of_bitsandbytes(format):
    codes, _, _ = theirs(torch.zeros(4, 64), format, 64, double_quant=False)
    assert torch.equal(qn.quantize(torch.zeros(4, 64), format).codes.reshape(-1, 1), codes)


@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "dq"])
@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_is_written_as_it_was_read(format, double_quant):
    options = {"compute_dtype": torch.bfloat16, "compress_statistics": double_quant, "quant_type": format}
    layer = bnb.nn.Linear4bit(128, 96, bias=False, **options)
    layer.load_state_dict({"weight": random_weight(96, 128, torch.bfloat16)})
    state_dict = layer.to(torch.bfloat16).to("cpu").state_dict(prefix="model.q_proj.")
    q = qn.QuantizedWeight.from_bitsandbytes(state_dict, "model.q_proj.")
    assert (q.shape, q.blocksize, q.format, q.dtype) == ((96, 128), 64, format, torch.bfloat16)
    assert q.codes.shape == (96, 64)
    assert q.codes.data_ptr() == state_dict["model.q_proj.weight"].data_ptr(), "copied"
    written = q.to_bitsandbytes("model.q_proj.")
    assert written.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape, name
        assert torch.equal(bits_of(written[name]), bits_of(tensor)), name


def test_format_of_ours_alone_is_named_in_the_error():
    for options in ({"format": "int4"}, {"format": "int8"}, {"codebook": cases.CODEBOOK}):
        with pytest.raises(ValueError, match="format: expected nf4 or fp4, the formats of bitsandbytes, got"):
            qn.quantize(torch.randn(4, 64), **options).to_bitsandbytes()
    q = qn.quantize(torch.randn(4, 64))
    q.code = q.code * 2
    with pytest.raises(ValueError, match="code: expected the codebook of nf4, got another"):
        q.to_bitsandbytes()


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(value):
    """The quant_state as another tensor, or as other text."""
    return {STATE: torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8) if isinstance(value, str) else value}


def without(key):
    return lambda entries: entries.pop(key)


def cast(key, dtype):
    return lambda entries: entries.update({key: entries[key].to(dtype)})


def filled(key, value, index=0):
    return lambda entries: entries[key].view(-1).__setitem__(index, value)


def replaced(old, new):
    return lambda entries: entries.update(state(bytes(entries[STATE].tolist()).decode().replace(old, new)))


NESTED_ABSMAX, MAP, NESTED_MAP = "weight.nested_absmax", "weight.quant_map", "weight.nested_quant_map"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("weight"), "state_dict: expected the key 'weight', got none"),
        (without("weight.absmax"), "state_dict: expected the key 'weight.absmax', got none"),
        (without(NESTED_MAP), f"expected the key '{NESTED_MAP}', got none"),
        (without(NESTED_ABSMAX), "absmax: expected torch.float32, got torch.uint8"),
        (without(STATE), "expected one key .* got 0"),
        (cast(NESTED_ABSMAX, torch.bfloat16), "nested_absmax: expected torch.float32, got"),
        (replaced("{", "["), "nf4: expected a JSON object, got something else"),
        (state("[" * 60_000), "nf4: expected a JSON object, got something else"),
        (state("[]"), "nf4: expected a JSON object, got list"),
        (state(torch.tensor(2**33)), r"nf4: expected the bytes of a JSON object, got torch.int64 \[\]"),
        (state(torch.zeros(1 << 17, dtype=torch.uint8)), r"expected the bytes .* \[131072\]"),
        (replaced('"dtype"', '"shape"'), "the key 'shape' occurs twice"),
        (replaced('"nested_offset": ', '"nested_offset": 1e400, "n": '), "nested_offset: expected a finite fp32"),
        (replaced('"nested_offset": ', '"nested_offset": NaN, "n": '), "finite fp32 number, got nan"),
        (replaced('"nested_offset": ', '"nested_offset": true, "n": '), "finite fp32 number, got True"),
        (replaced("[8, 64]", "[-64, -64]"), r"shape: expected .* of at least 1 .* got \[-64, -64\]"),
        (replaced("[8, 64]", "[8, 4611686018427387904]"), "shape: expected .* fewer than 2"),
        (replaced("[8, 64]", "[true, 512]"), r"shape: expected .* got \[True, 512\]"),
        (replaced("[8, 64]", "[8, 60]"), r"weight: expected 240 bytes, as its .* says, got torch.uint8 \[256, 1\]"),
        (replaced("[8, 64]", "[8]"), r"shape: expected \[N, K\] .* got \[8\]"),
        (replaced('"blocksize": 64', '"blocksize": "64"'), "blocksize: expected an int, got str"),
        (replaced('"blocksize": 64, ', ""), "expected quant_type, blocksize, dtype and shape, got no blocks"),
        (replaced('"nf4"', '["nf4"]'), r"quant_type: expected nf4 or fp4, got \['nf4'\]"),
        (replaced('"quant_type": "nf4"', '"quant_type": "nf5"'), "quant_type: expected nf4 or fp4, got 'nf5'"),
        (replaced("float32", "float64"), "dtype: expected float32, bfloat16 or float16, got 'float64'"),
        (replaced('"nested_blocksize": 256', '"nested_blocksize": 128'), "nested_blocksize: expected 256, got"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"weight.absmax": [1.0]}, "weight.absmax: expected a tensor, got list"),
        (cast("weight", torch.int64), "weight: expected codes stored as uint8, .* got torch.int64"),
        (filled(NESTED_ABSMAX, torch.nan), "weight, nested_absmax: expected finite values, got NaN or Inf"),
        (filled(NESTED_MAP, torch.inf, 255), "nested_code: expected finite values"),
        (filled(MAP, -torch.inf, 7), "weight, code: expected finite values"),
    ],
)
def test_damage_of_a_state_dict_is_named_in_the_error(damage, message):
    entries = {name: tensor.clone() for name, tensor in qn.quantize(torch.randn(8, 64)).to_bitsandbytes().items()}
    entries.update(damage) if isinstance(damage, dict) else damage(entries)
    with pytest.raises((ValueError, TypeError), match=message):
        qn.QuantizedWeight.from_bitsandbytes(entries)


def test_entries_of_other_keys_are_ignored():
    q = qn.quantize(torch.randn(8, 64))
    again = qn.QuantizedWeight.from_bitsandbytes({7: None, ("weight",): None, **q.to_bitsandbytes()})
    assert torch.equal(again.dequantize(), q.dequantize())


def test_container_survives_a_file_of_torch():
    q = qn.quantize(torch.randn(8, 64))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again.dequantize(), q.dequantize())
