"""Guards the readers of quantized files: their weights decode to the bits of each format's own decoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peak import megabytes, peaks
from safetensors import safe_open
from safetensors.torch import load_file

import qlora_native as qn
from qlora_native._files.gguf import GGUF_TYPES
from qlora_native.convert._compressed_tensors import entries, quantization_config, with_rounded_scales
from qlora_native.functional import from_awq, from_compressed_tensors, from_fp8, from_gguf, from_gptq, gguf_rows

gguf = pytest.importorskip("gguf")
compressed_tensors = pytest.importorskip("compressed_tensors")


def same_bits(actual, expected):
    """Whether two tensors of floats are equal, with the signs of their zeros."""
    return torch.equal(actual, expected) and torch.equal(actual.signbit(), expected.signbit())


# ---- GGUF ------------------------------------------------------------------------------------------------------------

# These are the places of the numbers of 16 bits in a block of each type.
FLOAT16_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "MXFP4": (), "NVFP4": (),
}  # fmt: skip


def gguf_bytes(type, rows, K, seed=0):
    """Random blocks of a type: all codes and small scales, and scales of both signs, subnormal ones and zeros."""
    random = np.random.default_rng(seed)
    kind = GGUF_TYPES[type]
    blocks = random.integers(0, 256, (rows * K // kind.elements, kind.bytes), dtype=np.uint8)
    for at in FLOAT16_AT.get(type, (0,)):
        scales = (0.01 * random.standard_normal(len(blocks))).astype(np.float16)
        scales[::5] = random.integers(0, 1024, len(scales[::5]), dtype=np.uint16).view(np.float16)  # subnormal
        scales[1::7], scales[2::7] = 0.0, -0.0
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if type == "MXFP4":
        blocks[:, 0] = np.where(blocks[:, 0] == 255, 254, blocks[:, 0])
    if type == "NVFP4":
        blocks[:, :4] &= 0x7F
    return blocks.reshape(rows, -1)


def decoded_by_gguf(data, type):
    with np.errstate(over="ignore"):
        values = gguf.dequantize(data, gguf.GGMLQuantizationType[type])
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_gguf_weight_has_the_bits_of_ggufs_own_decoder(type):
    data = gguf_bytes(type, 70, 768)
    q = from_gguf(data, gguf.GGMLQuantizationType[type], (70, 768))
    expected = decoded_by_gguf(data, type)
    assert same_bits(q.dequantize(torch.float32), expected)
    assert same_bits(q.dequantize(torch.bfloat16), expected.bfloat16())
    assert q.format == type.lower() and q.shape == (70, 768) and q.dtype == torch.bfloat16


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_gguf_types_have_the_sizes_that_gguf_has(type):
    kind = gguf.GGMLQuantizationType[type]
    assert gguf.GGML_QUANT_SIZES[kind] == (GGUF_TYPES[type].elements, GGUF_TYPES[type].bytes)


@pytest.mark.parametrize("type", ["Q4_1", "Q6_K", "MXFP4"])
def test_gguf_experts_are_read_like_the_rows_of_one_weight(type):
    data = gguf_bytes(type, 3 * 5, 256)
    q = from_gguf(torch.from_numpy(data).reshape(-1), type, (3, 5, 256))
    assert q.shape == (3, 5, 256)
    assert same_bits(q.dequantize(torch.float32), decoded_by_gguf(data, type).view(3, 5, 256))


def test_gguf_weight_is_read_in_pieces_of_rows(monkeypatch):
    data = gguf_bytes("Q4_K", 23, 512)
    whole = from_gguf(data, "Q4_K", (23, 512))
    monkeypatch.setattr("qlora_native._files._codes._PIECE", 3 * 512)
    pieces = from_gguf(data, "Q4_K", (23, 512))
    assert all(torch.equal(whole.tensors()[name], tensor) for name, tensor in pieces.tensors().items())


def test_rows_of_gguf_bytes_move_without_a_change_of_values():
    data = gguf_bytes("Q5_0", 24, 64)
    rows = gguf_rows(data, "Q5_0", (24, 64))
    assert rows.data_ptr() == torch.from_numpy(data).data_ptr()
    undone = rows.view(2, 6, 2, -1).transpose(1, 2)  # two heads of twelve rows
    q = from_gguf(undone, "Q5_0", (24, 64))
    expected = decoded_by_gguf(data, "Q5_0").view(2, 6, 2, 64).transpose(1, 2).reshape(24, 64)
    assert same_bits(q.dequantize(torch.float32), expected)


def test_gguf_nvfp4_takes_the_scale_of_the_tensor():
    data = gguf_bytes("NVFP4", 6, 128)
    q = from_gguf(data, "NVFP4", (6, 128), scale=0.0078125)
    assert same_bits(q.dequantize(torch.float32), 0.0078125 * decoded_by_gguf(data, "NVFP4"))


def test_gguf_array_that_is_mapped_for_reading_is_read(tmp_path):
    data = gguf_bytes("Q8_0", 4, 64)
    data.tofile(tmp_path / "data")
    q = from_gguf(np.memmap(tmp_path / "data", mode="r"), "Q8_0", (4, 64))
    assert same_bits(q.dequantize(torch.float32), decoded_by_gguf(data, "Q8_0"))


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def packed(values, bits, axis):
    """Pack unsigned codes [rows, columns] along an axis into words of 32 bits, the first in the lowest bits."""
    values = np.moveaxis(values, axis, 0).astype(np.uint32)
    per_word = 32 // bits
    values = np.pad(values, ((0, -len(values) % per_word), (0, 0)))
    words = np.zeros((len(values) // per_word, values.shape[1]), np.uint32)
    for k, row in enumerate(values):
        words[k // per_word] |= row << np.uint32(bits * (k % per_word))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32))


def affine_parts(N, K, group, bits, seed=0, scale_dtype=torch.float16, middle=False):
    """Random codes [K, N], zero points [groups, N] from 1 on and scales [groups, N], some of them subnormal."""
    random = np.random.default_rng(seed)
    groups = -(-K // group)
    codes = random.integers(0, 1 << bits, (K, N))
    zeros = np.full((groups, N), 1 << bits - 1) if middle else random.integers(1, 1 << bits, (groups, N))
    scales = torch.from_numpy(0.01 * random.random((groups, N))).to(scale_dtype)
    scales[:, ::5] = 3 * 2.0**-24  # subnormal in fp16
    return codes, zeros, scales


def affine_value(codes, zeros, scales, g_idx):
    """W [N, K] in fp32: one rounding of scale * (code - zero point), which is exact with scales of 16 bits."""
    K, N = codes.shape
    w = np.empty((N, K), np.float32)
    for k in range(K):
        for n in range(N):
            w[n, k] = np.float32(scales[g_idx[k], n].item()) * np.float32(codes[k, n] - zeros[g_idx[k], n])
    return torch.from_numpy(w)


def gptq_tensors(codes, zeros, scales, bits, offset=1):
    return {"qweight": packed(codes, bits, 0), "qzeros": packed(zeros - offset, bits, 1), "scales": scales}


GPTQ_CASES = [  # bits, N, K, group_size, dtype of scales
    (4, 24, 128, 32, torch.float16),
    (4, 24, 128, -1, torch.float16),
    (4, 19, 96, 48, torch.float16),
    (4, 24, 208, 128, torch.bfloat16),
    (8, 24, 128, 64, torch.float16),
    (8, 18, 640, -1, torch.float16),
]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "N", "K", "group_size", "scale_dtype"), GPTQ_CASES)
def test_gptq_weight_is_scale_times_code_minus_zero_point(bits, N, K, group_size, scale_dtype, symmetric):
    group = K if group_size == -1 else group_size
    codes, zeros, scales = affine_parts(N, K, group, bits, scale_dtype=scale_dtype, middle=symmetric)
    expected = affine_value(codes, zeros, scales, np.arange(K) // group)
    for offset, checkpoint_format in ((1, "gptq"), (0, "gptq_v2"), (1, "auto_round:auto_gptq"), (0, "auto_round")):
        q = from_gptq(
            **gptq_tensors(codes, zeros, scales, bits, offset),
            bits=bits,
            group_size=group_size,
            sym=symmetric,
            checkpoint_format=checkpoint_format,
        )
        assert same_bits(q.dequantize(torch.float32), expected)
        assert same_bits(q.dequantize(torch.float16), expected.half())
        assert (q.zero_point is None) == symmetric
        assert q.absmax.dtype == scale_dtype and q.column_order is None


@pytest.mark.parametrize(("bits", "stored"), [(4, 7), (4, 8), (8, 127), (8, 128)])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_zero_points_of_symmetric_weights_are_the_middle_under_either_label(bits, stored, checkpoint_format):
    codes, zeros, scales = affine_parts(16, 64, 32, bits, middle=True)
    tensors = gptq_tensors(codes, np.full_like(zeros, stored), scales, bits, offset=0)
    q = from_gptq(**tensors, bits=bits, group_size=32, sym=True, checkpoint_format=checkpoint_format)
    assert same_bits(q.dequantize(torch.float32), affine_value(codes, zeros, scales, np.arange(64) // 32))


@pytest.mark.parametrize(("bits", "K", "group"), [(4, 128, 32), (8, 128, 32), (4, 160, 64)])
def test_gptq_columns_in_the_order_of_activations_are_sorted_by_their_groups(bits, K, group):
    codes, zeros, scales = affine_parts(24, K, group, bits)
    g_idx = np.random.default_rng(1).permutation(np.arange(K) // group)
    q = from_gptq(
        **gptq_tensors(codes, zeros, scales, bits),
        g_idx=torch.from_numpy(g_idx).int(),
        bits=bits,
        group_size=group,
        sym=False,
    )
    expected = affine_value(codes, zeros, scales, g_idx)
    assert same_bits(q.dequantize(torch.float32), expected)
    assert torch.equal(torch.from_numpy(g_idx)[q.column_order.long()], torch.arange(K) // group)
    x = torch.randn(3, K)
    torch.testing.assert_close(qn.linear(x, q), x @ expected.t())


def test_gptq_columns_in_order_need_no_column_order():
    codes, zeros, scales = affine_parts(16, 64, 32, 4)
    g_idx = (torch.arange(64) // 32).int()
    q = from_gptq(**gptq_tensors(codes, zeros, scales, 4), g_idx=g_idx, group_size=32, sym=False)
    assert q.column_order is None


# ---- AWQ -------------------------------------------------------------------------------------------------------------

# The column of eight that each four bits of a word belong to, from the lowest (AutoAWQ, utils/packing_utils.py).
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_packed(values):
    """Unsigned codes [rows, columns] -> int32 [rows, columns / 8]."""
    return packed(values.reshape(len(values), -1, 8)[..., AWQ_ORDER].reshape(len(values), -1), 4, 1)


def awq_tensors(codes, zeros, scales):
    return {"qweight": awq_packed(codes), "qzeros": awq_packed(zeros), "scales": scales}


@pytest.mark.parametrize(("N", "K", "group_size"), [(24, 128, 32), (16, 96, 48), (40, 640, -1)])
def test_awq_weight_is_scale_times_code_minus_zero_point(N, K, group_size, monkeypatch):
    group = K if group_size == -1 else group_size
    codes, zeros, scales = affine_parts(N, K, group, 4)
    zeros[0, :4] = 0, 15, 8, 1
    q = from_awq(**awq_tensors(codes, zeros, scales), group_size=group_size)
    expected = affine_value(codes, zeros, scales, np.arange(K) // group)
    assert same_bits(q.dequantize(torch.float32), expected)
    monkeypatch.setattr("qlora_native._files._codes._PIECE", 8 * K)
    pieces = from_awq(**awq_tensors(codes, zeros, scales), group_size=group_size)
    assert torch.equal(pieces.codes, q.codes)


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(format, N, K, dtype=torch.bfloat16, **weights):
    """(the tensors that compressed-tensors writes for a random weight, what it decompresses them to, its `weights`)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(N, K) + 0.01).to(dtype)
    rows, columns = {
        "tensor": (N, K), "channel": (1, K), "group": (1, args.group_size), "block": args.block_structure,
    }[args.strategy]  # fmt: skip
    full = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
    blocks = full.view(len(full) // rows, rows, -1, columns)
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    if args.strategy == "tensor":
        scale, zero_point = scale.view(1), zero_point.view(1)
    state = {"weight": weight, "weight_scale": scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(tensors, scheme)["weight"], args.model_dump(mode="json")


INT_STRATEGIES = [
    {"strategy": "group", "group_size": 32},
    {"strategy": "group", "group_size": 80},
    {"strategy": "channel"},
    {"strategy": "tensor"},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", INT_STRATEGIES, ids=str)
@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized", "naive-quantized"])
def test_compressed_integers_have_the_bits_of_the_packages_own_decoder(format, strategy, bits, symmetric, dtype):
    tensors, expected, weights = compressed(
        format, 34, 160, dtype, num_bits=bits, type="int", symmetric=symmetric, **strategy
    )
    q = from_compressed_tensors(tensors, weights, format)
    assert same_bits(q.dequantize(dtype), expected)
    assert q.bits == (bits if format == "pack-quantized" else 8)
    assert (q.zero_point is None) == symmetric


@pytest.mark.parametrize("format", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", [
    {"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "block", "block_structure": [128, 128]},
    {"strategy": "block", "block_structure": [48, 64]},
], ids=str)  # fmt: skip
def test_compressed_fp8_has_the_bits_of_the_packages_own_decoder(format, strategy):
    tensors, expected, weights = compressed(format, 200, 320, num_bits=8, type="float", symmetric=True, **strategy)
    q = from_compressed_tensors(tensors, weights, format)
    assert q.format == "fp8"
    assert same_bits(q.dequantize(torch.bfloat16), expected)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_scales_in_fp32_beside_zero_points_are_kept_in_16_bits_if_they_fit(narrow):
    scheme = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    tensors, expected, weights = compressed("pack-quantized", 34, 160, narrow, **scheme)
    wide = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    q = from_compressed_tensors(wide, weights, "pack-quantized")
    assert q.absmax.dtype == narrow and same_bits(q.dequantize(narrow), expected)
    wide["weight_scale"] = wide["weight_scale"] * (1 + 2**-20)
    with pytest.raises(ValueError, match="weight_scale: expected numbers of bfloat16 or of float16 beside zero points"):
        from_compressed_tensors(wide, weights, "pack-quantized")


def test_compressed_zero_points_are_read_packed_and_unpacked():
    tensors, expected, weights = compressed(
        "pack-quantized", 34, 160, num_bits=4, type="int", symmetric=False, strategy="group", group_size=32
    )
    assert tensors["weight_zero_point"].dtype == torch.int32
    q = from_compressed_tensors(tensors, weights, "pack-quantized")
    unpacked = q.zero_point.view(34, 5)
    again = from_compressed_tensors({**tensors, "weight_zero_point": unpacked}, weights, "pack-quantized")
    assert torch.equal(again.zero_point, q.zero_point)


@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized"])
def test_compressed_columns_in_the_order_of_activations_are_sorted_by_their_groups(format):
    bits, group, K = 8, 32, 128
    tensors, _, weights = compressed(
        format, 16, K, num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group
    )
    g_idx = torch.randperm(K) // group
    q = from_compressed_tensors({**tensors, "weight_g_idx": g_idx.int()}, weights, format)
    stored = tensors["weight"] if format == "int-quantized" else None
    if stored is None:
        stored = (tensors["weight_packed"].view(torch.uint8) ^ 0x80).view(torch.int8)
    assert same_bits(q.dequantize(torch.float32), stored.float() * tensors["weight_scale"].float()[:, g_idx])
    unset = from_compressed_tensors({**tensors, "weight_g_idx": torch.full((K,), -1)}, weights, format)
    assert unset.column_order is None


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_compressed_file_of_a_weight_of_ours_is_read_with_its_values(format):
    q = with_rounded_scales(qn.quantize(torch.randn(24, 128), format, 32, double_quant=False), torch.bfloat16)
    config = quantization_config(format, 32, [])
    weights = config["config_groups"]["group_0"]["weights"]
    read = from_compressed_tensors(entries(q, ""), weights, config["format"])
    assert torch.equal(read.dequantize(torch.bfloat16), q.dequantize(torch.bfloat16))
    assert torch.equal(entries(q, "")["weight_packed"].view(torch.uint8), packed_again(read))


def packed_again(q):
    """The bytes of `weight_packed` from the codes of a weight."""
    return q.codes >> 4 | q.codes << 4 if q.bits == 4 else q.codes ^ 0x80


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def fp8_codes(*shape, seed=0):
    """Random numbers of E4M3, without NaN: all of them if there is space."""
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return torch.where(codes & 0x7F == 0x7F, codes ^ 1, codes).view(torch.float8_e4m3fn)


def scaled_fp8(weight, scale, rows, columns):
    """fp32(w) * s[n // rows, k // columns], as `weight_dequant` of DeepSeek-V3 computes it."""
    *_, N, K = weight.shape
    return weight.float() * scale.float()[..., torch.arange(N) // rows, :][..., torch.arange(K) // columns]


@pytest.mark.parametrize("shape", [(576, 256), (192, 544), (130, 224), (3, 72, 160)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_blocks_share_a_scale_and_may_be_incomplete(shape, scale_dtype):
    *leading, N, K = shape
    weight = fp8_codes(*shape)
    scale = torch.rand(*leading, -(-N // 128), -(-K // 128)) / 100
    expected_scale = scale = scale.to(torch.float8_e8m0fnu if scale_dtype == torch.uint8 else scale_dtype)
    if scale_dtype == torch.uint8:
        scale = scale.view(torch.uint8)
    q = from_fp8(weight, scale)
    expected = scaled_fp8(weight, expected_scale, 128, 128)
    assert same_bits(q.dequantize(torch.float32), expected)
    assert same_bits(q.dequantize(torch.bfloat16), expected.bfloat16())
    assert q.codes.data_ptr() == weight.data_ptr()


def test_fp8_without_blocks_has_a_scale_of_the_tensor_or_of_each_row():
    weight = fp8_codes(20, 96)
    for scale in (torch.tensor(0.03), torch.tensor([0.03]), torch.rand(20, 1)):
        q = from_fp8(weight, scale, block_size=None)
        assert same_bits(q.dequantize(torch.float32), weight.float() * scale.reshape(-1, 1))
    experts, scale = fp8_codes(3, 20, 96), torch.rand(3, 1, 1)
    assert same_bits(from_fp8(experts, scale, block_size=None).dequantize(torch.float32), experts.float() * scale)


def test_fp8_scales_may_be_powers_of_two_up_to_119():
    weight = torch.full((2, 32), 0.5).to(torch.float8_e4m3fn)
    q = from_fp8(weight, torch.tensor([[0], [246]], dtype=torch.uint8), block_size=(1, 128))
    assert torch.equal(q.dequantize(torch.float32)[:, 0], torch.tensor([2.0**-128, 2.0**118]))
    with pytest.raises(ValueError, match=r"absmax: expected scales below 2\^120"):
        from_fp8(weight, torch.tensor([[0], [247]], dtype=torch.uint8), block_size=(1, 128))


# ---- what other libraries have written -------------------------------------------------------------------------------

LAYERS = Path(__file__).parent / "data" / "quantized_layers.safetensors"
with safe_open(LAYERS, "pt") as file:
    CASES = {case: json.loads(arguments) for case, arguments in sorted(file.metadata().items())}


@pytest.mark.parametrize("case", CASES)
def test_layer_of_another_library_has_the_bits_of_its_own_decoder(case):
    """data/quantized_layers.py says how GPTQModel and auto-round have made them. They round values to fp16."""
    tensors = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in load_file(LAYERS).items()
        if name.startswith(f"{case}.")
    }
    weight = tensors.pop("weight")
    q = (from_awq if case == "awq" else from_gptq)(**tensors, **CASES[case])
    assert same_bits(q.dequantize(torch.float16), weight)
    assert (q.column_order is not None) == (case == "gptq_desc_act")


# ---- bad input -------------------------------------------------------------------------------------------------------


def gptq_layer(**changes):
    codes, zeros, scales = affine_parts(16, 64, 32, 4)
    return from_gptq(**{**gptq_tensors(codes, zeros, scales, 4), "group_size": 32, "sym": False, **changes})


def awq_layer(**changes):
    return from_awq(**{**awq_tensors(*affine_parts(16, 64, 32, 4)), "group_size": 32, **changes})


def int_layer(format="pack-quantized", drop="", scheme=None, **changes):
    tensors = {
        "weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "weight": torch.zeros(16, 64, dtype=torch.int8),
        "weight_shape": torch.tensor([16, 64]),
        "weight_scale": torch.ones(16, 2),
        "weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
    }
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32, **(scheme or {})}
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if name != drop}
    return from_compressed_tensors(tensors, weights, format)


def float_layer(symmetric=True, **changes):
    weight = torch.zeros(16, 64).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": torch.ones(16, 1), "weight_zero_point": torch.zeros(16, 1), **changes}
    weights = {"type": "float", "strategy": "channel", "symmetric": symmetric}
    return from_compressed_tensors(tensors, weights, "float-quantized")


def fp8_layer(weight=None, scale=None, **changes):
    weight = torch.zeros(200, 64).to(torch.float8_e4m3fn) if weight is None else weight
    return from_fp8(weight, torch.ones(2, 1) if scale is None else scale, **changes)


def gguf_layer(type="Q4_1", shape=(2, 64), at=None, **changes):
    data = np.zeros((2, 2, 20), np.uint8)
    if at is not None:
        data[1, 1, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
    return from_gguf(**{"data": data, "type": type, "shape": shape, **changes})


def words(*shape, fill=0):
    return torch.full(shape, fill, dtype=torch.int32)


def nan_at(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


HALF = torch.ones(2, 16).half()
E4M3_NAN = torch.full((200, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
BAD = [  # the reader, its changed arguments, what the error says
    (gguf_layer, {"type": "IQ2_XXS"}, r"type: expected one of Q4_0, .*, got IQ2_XXS"),
    (gguf_layer, {"type": gguf.GGMLQuantizationType.TQ1_0}, "type: expected one of .*, got TQ1_0"),
    (gguf_layer, {"type": "F16"}, "type: expected one of .*, got F16"),
    (gguf_layer, {"type": 3}, "type: expected one of .*, got 3"),
    (gguf_layer, {"shape": (2, 48)}, "shape: expected K that is a multiple of 32, .*Q4_1, got 48"),
    (gguf_layer, {"type": "Q4_K"}, "shape: expected K that is a multiple of 256, .*, got 64"),
    (gguf_layer, {"shape": (3, 64)}, r"data: expected 120 bytes, .*\[3, 64\], got 80"),
    (gguf_layer, {"shape": (2.0, 64)}, "shape: expected a tuple of ints"),
    (gguf_layer, {"shape": (128,)}, r"shape: expected \(N, K\)"),
    (gguf_layer, {"data": torch.zeros(80)}, "data: expected torch.uint8, got torch.float32"),
    (gguf_layer, {"data": np.zeros(80, "U1")}, "data: expected an array of bytes"),
    (gguf_layer, {"data": b"x" * 80}, "data: expected a tensor, got bytes"),
    (gguf_layer, {"data": torch.zeros(80, dtype=torch.uint8, device="meta")}, "data: expected a tensor with values"),
    (gguf_layer, {"at": 0}, "data, absmax: expected finite values"),
    (gguf_layer, {"at": 2}, "data, minimum: expected finite values"),
    (gguf_layer, {"dtype": torch.int8}, "dtype: expected torch.float32"),
    (gguf_layer, {"scale": 2.0}, "scale: expected 1.0 for all types but NVFP4"),
    (gguf_layer, {"type": "MXFP4", "data": np.full(68, 255, np.uint8)}, "data: expected scales of mxfp4"),
    (gptq_layer, {"bits": 3}, "bits: expected 4 or 8, got 3"),
    (gptq_layer, {"sym": 1}, "sym: expected a bool"),
    (gptq_layer, {"checkpoint_format": "gptq_p"}, "checkpoint_format: expected one of gptq, .*'gptq_p'"),
    (gptq_layer, {"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "qweight: expected torch.int32, got torch.int64"),
    (gptq_layer, {"qweight": words(8)}, r"qweight: expected \[K/8, N\]"),
    (gptq_layer, {"qweight": words(10, 16)}, r"scales: expected \[3, 16\], got \[2, 16\]"),
    (gptq_layer, {"qweight": words(1, 16)}, "K and group_size: expected multiples of 16, .* got 8 and 8"),
    (gptq_layer, {"qzeros": words(2, 3)}, r"qzeros: expected \[2, 2\]"),
    (gptq_layer, {"qzeros": words(2, 2, fill=0x0F000000)}, "qzeros: expected zero points less 1 below 15 in gptq"),
    (gptq_layer, {"scales": HALF.double()}, "scales: expected torch.float16 or torch.bfloat16 or torch.float32"),
    (gptq_layer, {"scales": nan_at(HALF)}, "scales: expected finite values"),
    (gptq_layer, {"group_size": 24}, "K and group_size: expected multiples of 16, .* got 64 and 24"),
    (gptq_layer, {"group_size": 0}, "group_size: expected -1, or a number of elements, got 0"),
    (gptq_layer, {"group_size": "32"}, "group_size: expected an int, got str"),
    (gptq_layer, {"g_idx": words(63)}, r"g_idx: expected \[64\]"),
    (gptq_layer, {"g_idx": words(64, fill=2)}, r"g_idx: expected groups 0 ... 1, got 2 ... 2"),
    (gptq_layer, {"g_idx": words(64, fill=-1)}, r"g_idx: expected groups 0 ... 1, got -1 ... -1"),
    (gptq_layer, {"g_idx": words(64)}, r"g_idx: expected 32 columns in each group, got \[64, 0\]"),
    (awq_layer, {"version": "gemv_fast"}, "version: expected gemm, got 'gemv_fast'"),
    (awq_layer, {"bits": 8}, "bits: expected 4, got 8"),
    (awq_layer, {"qweight": words(64)}, r"qweight: expected \[K, N/8\]"),
    (awq_layer, {"qweight": words(80, 2)}, "group_size: expected a divisor of K, 80, got 32"),
    (awq_layer, {"scales": HALF[:1]}, r"scales: expected \[2, 16\], got \[1, 16\]"),
    (awq_layer, {"qzeros": words(2, 1)}, r"qzeros: expected \[2, 2\], got \[2, 1\]"),
    (awq_layer, {"scales": nan_at(HALF)}, "scales: expected finite values"),
    (int_layer, {"format": "marlin-24"}, "format: expected one of pack-quantized, .*'marlin-24'"),
    (int_layer, {"format": "float-quantized"}, "type: expected float in float-quantized, got 'int'"),
    (int_layer, {"scheme": {"num_bits": 3}}, "num_bits: expected 4 or 8 in pack-quantized, got 3"),
    (int_layer, {"scheme": {"strategy": "token"}}, "strategy: expected tensor or channel or .*'token'"),
    (int_layer, {"scheme": {"group_size": None}}, "group_size: expected a number of elements, got None"),
    (int_layer, {"scheme": {"strategy": "block"}}, "block_structure: expected the rows and columns .*None"),
    (int_layer, {"scheme": {"strategy": "block", "block_structure": [0, 1]}}, "block_structure: expected .*0, 1"),
    (int_layer, {"drop": "weight_packed"}, "tensors: expected the key 'weight_packed', got none"),
    (int_layer, {"drop": "weight_zero_point"}, "tensors: expected the key 'weight_zero_point' of a weight"),
    (int_layer, {"weight_shape": torch.tensor([16, 72])}, r"weight_packed: expected \[16, 9\] for weight_shape"),
    (int_layer, {"weight_shape": torch.tensor([16, -64])}, "weight_shape: expected N and K"),
    (int_layer, {"scheme": {"group_size": 48}}, "group_size: expected a divisor of K, 64, got 48"),
    (int_layer, {"weight_scale": torch.ones(16, 3)}, r"weight_scale: expected \[16, 2\]"),
    (int_layer, {"weight_scale": nan_at(torch.ones(16, 2))}, "weight_scale: expected finite values"),
    (int_layer, {"weight_zero_point": words(16, 2, fill=8)}, "weight_zero_point: expected -8 ... 7, got 8 ... 8"),
    (int_layer, {"weight_zero_point": words(3, 2)}, r"weight_zero_point: expected \[16, 2\], or packed along N"),
    (int_layer, {"weight_g_idx": words(64, fill=5)}, "weight_g_idx: expected groups 0 ... 1"),
    (int_layer, {"format": "int-quantized", "weight": torch.zeros(16, 64)}, "weight: expected torch.int8"),
    (float_layer, {"weight_zero_point": torch.ones(16, 1)}, "weight_zero_point: expected zeros in a weight of E4M3"),
    (float_layer, {"symmetric": False}, "symmetric: expected true for numbers of E4M3, got False"),
    (fp8_layer, {"weight": E4M3_NAN}, "weight, codes: expected numbers of E4M3, got NaN"),
    (fp8_layer, {"weight": E4M3_NAN.view(torch.float8_e4m3fnuz)}, "weight: expected torch.float8_e4m3fn, got .*fnuz"),
    (fp8_layer, {"weight": torch.zeros(200, 64)}, "weight: expected torch.float8_e4m3fn, got torch.float32"),
    (fp8_layer, {"weight": torch.zeros(200, 40).to(torch.float8_e4m3fn)}, "K and group_size: expected multiples of 32"),
    (fp8_layer, {"scale": torch.ones(1, 1)}, r"scale: expected \[2, 1\], one for each block .*\[1, 1\]"),
    (fp8_layer, {"scale": nan_at(torch.ones(2, 1))}, "scale: expected finite values"),
    (fp8_layer, {"scale": torch.full((2, 1), 255, dtype=torch.uint8)}, "scale: expected scales of mxfp4: E8M0"),
    (fp8_layer, {"block_size": None}, r"scale: expected one scale, or \[200, 1\], got \[2, 1\]"),
    (fp8_layer, {"block_size": 128}, "block_size: expected the rows and columns of a block, got 128"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "changes", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_error_names_the_argument_and_what_came(layer, changes, message):
    layer()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        layer(**changes)


# ---- memory ----------------------------------------------------------------------------------------------------------

PREPARE = """
from qlora_native import functional as F

class Held(torch.nn.Module):
    def __init__(self, q):
        super().__init__()
        for name, tensor in q.tensors().items():
            self.register_buffer(name, tensor)

N = K = 4096
words = lambda *shape: torch.ones(shape, dtype=torch.int32)
q6_k = torch.zeros(N * K // 256 * 210, dtype=torch.uint8)
scales, g_idx = torch.ones(K // 128, N).half(), torch.randperm(K).int() // 128
gptq, awq, zeros = words(K // 8, N), words(K, N // 8), words(K // 128, N // 8)
fp8 = torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""


def test_reader_takes_a_few_megabytes_beside_its_result():
    """The weights have 8 and 16 MB. Pieces of a million elements, in up to eight bytes each, are read at once."""
    taken = peaks(
        PREPARE,
        "Held(F.from_gguf(q6_k, 'Q6_K', (N, K)))",
        "Held(F.from_gptq(gptq, zeros, scales, g_idx, sym=False))",
        "Held(F.from_awq(awq, zeros, scales))",
        "Held(F.from_fp8(fp8.clone(), torch.ones(N // 128, K // 128)))",
    )
    assert max(taken) < 8 * 2**20, megabytes(taken)


# ---- docs/formats.md -------------------------------------------------------------------------------------------------


def bytes_of(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


def rows_of_the_table():
    """(the layer of a file, the bytes that it has, the weight that it becomes) of [1024, 4096], for each row."""
    N, K, group = 1024, 4096, 128
    groups = K // group
    for type, kind in GGUF_TYPES.items():
        data = torch.zeros(N * K // kind.elements * kind.bytes, dtype=torch.uint8)
        yield f"GGUF {type}", data.nbytes, from_gguf(data, type, (N, K))
    half = torch.ones(groups, N).half()
    for bits, symmetric in ((4, True), (4, False), (8, False)):
        zeros = words(groups, N * bits // 32, fill=0x77777777 if symmetric else 0)
        layer = (words(K * bits // 32, N), zeros, half, torch.arange(K, dtype=torch.int32) // group)
        q = from_gptq(*layer, bits=bits, sym=symmetric)
        yield f"GPTQ int{bits}{', symmetric' if symmetric else ''}", bytes_of(*layer), q
    layer = (words(K, N // 8), words(groups, N // 8), half)
    yield "AWQ int4", bytes_of(*layer), from_awq(*layer)
    shape = torch.tensor([N, K])
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        layer = {"weight_packed": words(N, K * bits // 32), "weight_scale": torch.ones(N, groups).bfloat16()}
        if not symmetric:
            layer["weight_zero_point"] = words(N * bits // 32, groups)
        scheme = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group}
        q = from_compressed_tensors({**layer, "weight_shape": shape}, scheme, "pack-quantized")
        name = f"compressed-tensors int{bits}{', symmetric' if symmetric else ''}"
        yield name, bytes_of(*layer.values()), q
    codes = torch.zeros(N, K).to(torch.float8_e4m3fn)
    for name, scale, block_size in (
        ("FP8, a scale of each row", torch.ones(N, 1).bfloat16(), None),
        ("FP8, blocks of 128 × 128", torch.ones(N // 128, K // 128), (128, 128)),
        ("FP8, blocks of 128 × 128, E8M0", torch.ones(N // 128, K // 128).to(torch.float8_e8m0fnu), (128, 128)),
    ):
        yield name, bytes_of(codes, scale), from_fp8(codes, scale, block_size=block_size)


DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "8 bits",
    torch.int8: "int8",
}


def test_table_of_the_page_of_formats_has_the_bits_of_each_layer():
    lines = ["| layer | bits in the file | bits here | `format` | codes | scales | minima |", "|" + "---|" * 7]
    for name, size, q in rows_of_the_table():
        bits = 8 / (q.shape[0] * q.shape[1])
        tables = bytes_of(*(tensor for tensor in (q.code, q.nested_code, q.offset) if tensor is not None))
        minimum = q.minimum if q.zero_point is None else q.zero_point
        minima = "–" if minimum is None else DTYPES[minimum.dtype] + (" zero points" if minimum is q.zero_point else "")
        lines.append(
            f"| {name} | {size * bits:.2f} | {(q.nbytes - tables) * bits:.2f} | `{q.format}` | {q.bits} bits "
            f"| {DTYPES[q.absmax.dtype]}, blocks of {q.blocksize} | {minima} |"
        )
    table = "\n".join(lines)
    page = Path(__file__).parent.parent / "docs" / "formats.md"
    assert table in page.read_text(encoding="utf-8"), f"the table is now:\n{table}"
