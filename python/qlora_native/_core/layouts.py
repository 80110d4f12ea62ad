"""How each format stores a weight: one row for a format, from which checks, containers and kernels follow.

Every format is `value = level * scale + minimum` (cpp/include/qlora_native/types.h). The formats of GGUF have the block
structures of llama.cpp's ggml-common.h; those with 5 and 6 bits, and with 2 and 3, have codes of 8 and of 4 bits here,
which decode to the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a code of 8 bits stands for: ByteFormat in types.h.
ABSMAX_INT8, INT8, E4M3 = range(3)

_SCALES_OF_FILES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layout:
    """How a format stores a weight.

    Attributes:
        bits: of a code: 4 or 8.
        byte_format: what a code of 8 bits stands for.
        blocksize: elements that share a scale, or None: a power of two in `min_blocksize` ... 4096.
        scales: the dtypes that scales may have where they are not bytes; empty if they are always bytes.
        nested: whether scales may be bytes, whose values are nested_code * nested_absmax + offset.
        nested_blocksize: scales that share a second-level scale.
        minimum: "stored", in the dtype of the scales; "nested", in bytes; "zero_point", which may be None; or None.
        quantizes: whether `qlora_native.quantize` makes weights of the format.
    """

    bits: int
    byte_format: int = ABSMAX_INT8
    blocksize: int | None = None
    min_blocksize: int = 32
    scales: tuple[torch.dtype, ...] = (torch.float32,)
    nested: bool = True
    nested_blocksize: int = 256
    minimum: str | None = None
    quantizes: bool = False


def _gguf(bits: int, blocksize: int, minimum: str | None = None) -> Layout:
    """A format with a scale, and perhaps a minimum, of 16 bits in each block."""
    return Layout(bits, INT8, blocksize, scales=(torch.float16,), nested=False, minimum=minimum)


def _k_quant(bits: int, blocksize: int, minimum: str | None = None) -> Layout:
    """A format with blocks in superblocks of 256 elements, which have the second-level scales."""
    return Layout(bits, INT8, blocksize, scales=(), nested_blocksize=256 // blocksize, minimum=minimum)


LAYOUTS = {
    "nf4": Layout(4, quantizes=True),
    "fp4": Layout(4, quantizes=True),
    "int4": Layout(4, quantizes=True),
    "int8": Layout(8, quantizes=True),
    "codebook": Layout(4, quantizes=True),
    "mxfp4": Layout(4, blocksize=32, scales=(), quantizes=True),
    "nvfp4": Layout(4, blocksize=16, scales=(), quantizes=True),
    # GGUF
    "q4_0": _gguf(4, 32),
    "q4_1": _gguf(4, 32, "stored"),
    "q5_0": _gguf(8, 32),
    "q5_1": _gguf(8, 32, "stored"),
    "q8_0": _gguf(8, 32),
    "iq4_nl": _gguf(4, 32),
    "iq4_xs": _k_quant(4, 32),
    "q2_k": _k_quant(4, 16, "nested"),
    "q3_k": _k_quant(4, 16),
    "q4_k": _k_quant(4, 32, "nested"),
    "q5_k": _k_quant(8, 32, "nested"),
    "q6_k": _k_quant(8, 16),
    # GPTQ, AWQ, compressed-tensors and auto-round: (level - zero_point) * scale
    "affine4": Layout(4, min_blocksize=16, scales=_SCALES_OF_FILES, nested=False, minimum="zero_point"),
    "affine8": Layout(8, INT8, min_blocksize=16, scales=_SCALES_OF_FILES, nested=False, minimum="zero_point"),
    # FP8 E4M3 of compressed-tensors and transformers
    "fp8": Layout(8, E4M3, scales=_SCALES_OF_FILES),
}

_SIXTEEN = torch.arange(16, dtype=torch.float32)
# The levels of codes of 4 bits, where they are not those of a codebook (formats.py).
LEVELS: dict[str, Tensor] = {
    "q4_0": _SIXTEEN - 8,
    "q4_1": _SIXTEEN,
    "q4_k": _SIXTEEN,
    "q2_k": _SIXTEEN,
    "q3_k": _SIXTEEN - 4,
    "affine4": _SIXTEEN - 8,
}
LEVELS["iq4_nl"] = LEVELS["iq4_xs"] = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)

_BYTES = torch.arange(256, dtype=torch.float32)
# The values of the bytes of scales and minima.
SCALE_LEVELS: dict[str, Tensor] = {
    "q2_k": _BYTES,
    "q4_k": _BYTES,
    "q5_k": _BYTES,
    "q3_k": _BYTES - 32,
    "iq4_xs": _BYTES - 32,
    "q6_k": _BYTES - 128,
}
