"""Guards parts of quantized weights: a part decodes to the bits of the whole, or is refused by name."""

import math

import pytest
import torch

import qlora_native as qn
from qlora_native._core.part import part_of


def quantized(shape, format="nf4", double_quant=True):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return qn.quantize(weight, format, double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(256, 256), (8, 256), (4, 6, 128)])
@pytest.mark.parametrize("dim", [0, -1])
def test_parts_decode_to_the_bits_of_the_whole(dim, shape, format, double_quant):
    q = quantized(shape, format, double_quant)
    for count in (2, 4):
        if shape[dim] // count % q.blocksize and dim == -1:
            continue
        parts = [part_of(q, dim, index, count) for index in range(count)]
        assert torch.equal(torch.cat([part.dequantize() for part in parts], dim), q.dequantize())
        assert all(part.codes.numel() == part.codes.untyped_storage().nbytes() for part in parts)


@pytest.mark.parametrize(
    ("dim", "shape", "nested"), [(0, (256, 256), True), (0, (8, 256), False), (-1, (256, 256), False)]
)
def test_scales_stay_in_8_bits_if_their_groups_are_whole(dim, shape, nested):
    part = part_of(quantized(shape), dim, 1, 2)
    assert (part.nested_absmax is not None) == nested
    assert part.absmax.dtype == (torch.uint8 if nested else torch.float32)
    assert part.absmax.numel() == math.prod(shape) // 128


def test_weights_that_cannot_be_cut_are_refused_by_name():
    for shape, dim, count, what in (
        ((6, 128), 0, 4, "rows"),
        ((4, 96), -1, 2, "columns"),
        ((3, 4, 64), 0, 2, "experts"),
    ):
        with pytest.raises(
            ValueError, match=f"shape: expected {what} that divide into {count} equal parts of whole blocks"
        ):
            part_of(quantized(shape), dim, 0, count)
    q = quantized((4, 64), double_quant=False)
    kept = qn.QuantizedWeight(
        q.codes, q.absmax.half(), None, None, None, q.code, q.shape, q.blocksize, "affine4", q.dtype
    )
    with pytest.raises(ValueError, match="format: expected one that weights are quantized to, got affine4"):
        part_of(kept, 0, 0, 2)
