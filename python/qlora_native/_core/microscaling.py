"""MXFP4 and NVFP4: the meaning of their scales, checks of them, and how other libraries' files lay them out.

MXFP4 is E2M1 in blocks of 32 that share a power of two, E8M0 (OCP Microscaling Formats v1.0, sections 5.3 and 5.4).
NVFP4 is E2M1 in blocks of 16 that share an E4M3 number, times one fp32 scale of the tensor. The products treat both as
double-quantized weights: the table `nested_code` holds the value of each of the 256 bytes of a scale, multiplied by the
scale of the tensor. A byte that is not a valid scale (NaN, or an E4M3 number with a sign) has the value NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .blocks import NESTED_BLOCKSIZE, ceil_div
from .errors import bad, bad_type, check_memory
from .layouts import LAYOUTS

# E8M0: 2^(i-127), where the lowest is subnormal in fp32. E4M3: its numbers without a sign.
_E8M0 = torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(255) - 127).float()
_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
MICROSCALED = {"mxfp4": _E8M0, "nvfp4": _E4M3}  # {format: value of each byte}; higher bytes are no scales


def scale_table(format: str, levels: Tensor | None = None) -> Tensor:
    """The value of each byte of a scale, fp32 [256]: `levels` (default: the format's own), then NaN."""
    levels = MICROSCALED[format] if levels is None else levels
    return torch.cat((levels, levels.new_full((256 - len(levels),), torch.nan)))


def check_scales(name: str, scales: Tensor, format: str) -> None:
    """Raise ValueError if one of the bytes [blocks] is not a scale of `format`."""
    check_memory(name, scales)
    if scales.is_meta or scales.numel() == 0:
        return
    scales = scales.detach().reshape(-1)
    largest = scales.max().item()
    if largest >= len(MICROSCALED[format]):
        kind = "E8M0, of which 255 is NaN" if format == "mxfp4" else "E4M3 without NaN (127, 255) and without a sign"
        raise bad(name, f"scales of {format}: {kind}", f"{largest} at {scales.argmax().item()}")


def check_scale_table(name: str, table: Tensor, format: str) -> None:
    """Raise ValueError unless `table` [256] has a finite value for each scale of `format`, and NaN for other bytes."""
    check_memory(name, table)
    if table.is_meta:
        return
    count = len(MICROSCALED[format])
    if table.shape != (256,):
        raise bad(name, "shape [256]", list(table.shape))
    if not (table[:count].isfinite().all() and table[count:].isnan().all()):
        raise bad(name, f"{count} finite values and NaN after them, as {format} has", "another table")


def mxfp4_fields(blocks: Tensor, scales: Tensor) -> dict[str, Any]:
    """Make the fields of a QuantizedWeight from the arguments of `QuantizedWeight.from_mxfp4`."""
    _check_bytes("blocks", blocks)
    _check_bytes("scales", scales)
    shape: tuple[int, ...]
    if blocks.dim() >= 3 and blocks.shape[-1] == 16 and blocks.shape[:-1] == scales.shape:
        rows = scales.shape[:-1] if scales.dim() == 3 else (math.prod(scales.shape[:-1]),)
        shape = (*rows, 32 * scales.shape[-1])
    elif blocks.dim() == 2 and scales.dim() == 2 and tuple(blocks.shape) == (scales.shape[0], 16 * scales.shape[1]):
        shape = (scales.shape[0], 32 * scales.shape[1])
    else:
        expected = "[..., N, K/32, 16] with scales [..., N, K/32], or [N, K/2] with scales [N, K/32]"
        raise bad("blocks", expected, f"{list(blocks.shape)} with {list(scales.shape)}")
    return microscaled_fields("mxfp4", swapped_codes(blocks), scales, shape, "scales", _E8M0)


def nvfp4_fields(
    codes: Tensor, scales: Tensor, weight_global_scale: Tensor | None, weight_scale_2: Tensor | None
) -> dict[str, Any]:
    """Make the fields of a QuantizedWeight from the arguments of `QuantizedWeight.from_nvfp4`."""
    _check_bytes("codes", codes)
    if isinstance(scales, Tensor) and scales.dtype == torch.float8_e4m3fn:
        scales = scales.view(torch.uint8)
    elif not isinstance(scales, Tensor) or scales.dtype != torch.uint8:
        got = scales.dtype if isinstance(scales, Tensor) else type(scales).__name__
        raise bad_type("scales", "a tensor of torch.float8_e4m3fn, or of its bytes", got)
    check_memory("scales", scales)
    if codes.dim() != 2 or scales.dim() != 2 or tuple(codes.shape) != (scales.shape[0], 8 * scales.shape[1]):
        expected = "[N, K/2] with scales [N, K/16]"
        raise bad("codes", expected, f"{list(codes.shape)} with {list(scales.shape)}")
    if (weight_global_scale is None) == (weight_scale_2 is None):
        raise bad(
            "weight_global_scale, weight_scale_2", "one of them", "both" if weight_scale_2 is not None else "none"
        )
    if weight_scale_2 is not None:
        levels = _E4M3 * _one("weight_scale_2", weight_scale_2)
    else:
        levels = _E4M3 / _one("weight_global_scale", weight_global_scale)
    if not levels.isfinite().all():
        raise bad("weight_global_scale, weight_scale_2", "one by which every scale is finite in fp32", "another")
    shape = (codes.shape[0], 2 * codes.shape[1])
    return microscaled_fields("nvfp4", swapped_codes(codes), scales, shape, "scales", levels)


def nvfp4_block_fields(blocks: Tensor, scales: Tensor, values: Tensor) -> dict[str, Any]:
    """Make the fields of a QuantizedWeight in NVFP4 from tensors in the order of gpt-oss' files.

    Args:
        blocks: uint8 [N, K/16, 8] or [E, N, K/16, 8], with the first of two codes in the low half of a byte.
        scales: uint8 [N, K/16] or [E, N, K/16], E4M3.
        values: fp32 [127], the value of each byte of a scale, multiplied by the scale of the tensor.
    """
    _check_bytes("blocks", blocks)
    _check_bytes("scales", scales)
    if scales.dim() not in (2, 3) or blocks.shape != (*scales.shape, 8):
        got = f"{list(blocks.shape)} with {list(scales.shape)}"
        raise bad("blocks", "[..., N, K/16, 8] with scales [..., N, K/16]", got)
    if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.shape != _E4M3.shape:
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise bad_type("scale_values", f"torch.float32 [{len(_E4M3)}]", got)
    check_memory("scale_values", values)
    if not values.isfinite().all():
        raise bad("scale_values", "finite values", "NaN or Inf")
    shape = (*scales.shape[:-1], 16 * scales.shape[-1])
    return microscaled_fields("nvfp4", swapped_codes(blocks), scales, shape, "scales", values.detach())


def _check_bytes(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise bad_type(name, "a tensor", type(tensor).__name__)
    if tensor.dtype != torch.uint8:
        raise bad_type(name, "torch.uint8", tensor.dtype)
    check_memory(name, tensor)


def _one(name: str, tensor: Any) -> Tensor:
    """Check the scale of a tensor, and return it as fp32 [] on the CPU."""
    if not isinstance(tensor, Tensor) or tensor.numel() != 1 or not tensor.is_floating_point():
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise bad_type(name, "a tensor of one floating-point number", got)
    check_memory(name, tensor)
    value = tensor.detach().float().cpu().reshape(())
    if not (value.isfinite() and value > 0):
        raise bad(name, "a finite number above 0", value.item())
    return value


def swapped_codes(codes: Tensor) -> Tensor:
    """Exchange the two codes of each byte: in files the first is in the low half, and here in the high half."""
    return (codes >> 4) | (codes << 4)


def microscaled_fields(
    format: str, codes: Tensor, scales: Tensor, shape: tuple[int, ...], name: str, levels: Tensor
) -> dict[str, Any]:
    """Make the fields of a QuantizedWeight from codes in our order, with the first of two in the high half of a byte.

    Args:
        format: "mxfp4" or "nvfp4".
        codes: uint8, elements / 2.
        scales: uint8, one for each block.
        shape: (N, K) or (E, N, K).
        name: what an error calls the scales.
        levels: fp32, the value of each byte that is a scale, as MICROSCALED has, times the scale of the tensor.
    """
    if min(shape) < 1:
        raise bad(name, "at least one", list(scales.shape))
    check_scales(name, scales, format)
    blocks = scales.numel()
    return {
        "codes": codes.detach().reshape(*shape[:-1], shape[-1] // 2).contiguous(),
        "absmax": scales.detach().reshape(-1).contiguous(),
        "nested_absmax": torch.ones(ceil_div(blocks, NESTED_BLOCKSIZE), dtype=torch.float32, device=codes.device),
        "nested_code": scale_table(format, levels).to(codes.device),
        "offset": torch.zeros((), dtype=torch.float32, device=codes.device),
        "shape": shape,
        "blocksize": LAYOUTS[format].blocksize,
        "format": format,
    }
