"""Write "int4" and "int8" weights into compressed-tensors' files, which vLLM serves and transformers loads.

The format is `pack-quantized` with one scale for each group of a row: W[n, k] = scale[n, k // group] * code[n, k] with
codes -8 ... 7 or -128 ... 127. "int4" and "int8" have this form, with scale = absmax / 7 or absmax / 127, so their
codes are kept, and a scale is rounded once, to the dtype of the model. NF4 and FP4 do not: their levels are not
multiples of one step. The package compressed-tensors is not needed to write the files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._core.errors import bad
from .._core.microscaling import swapped_codes
from .._core.weight import QuantizedWeight

MAX_CODES = {"int4": 7, "int8": 127}  # the code of an element whose absolute value is its block's absmax
PACKED = {"int4": 8, "int8": 4}  # the number of codes in an int32


def check_layer(name: str, K: int, blocksize: int) -> None:
    """Raise ValueError unless rows of K elements are whole groups: in the files no block may straddle rows."""
    if K % blocksize:
        raise bad("blocksize", f"a divisor of {K}, which a row of {name} has, for compressed-tensors", blocksize)


def with_rounded_scales(q: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """Round the fp32 scales of `q` ("int4" or "int8") to what the file stores in `dtype`."""
    scale = (q.absmax / MAX_CODES[q.format]).to(dtype)
    return replace(q, absmax=scale.float() * MAX_CODES[q.format], dtype=dtype)


def entries(q: QuantizedWeight, prefix: str) -> dict[str, Tensor]:
    """Make the entries of a state dict for a weight [N, K].

    Returns:
        `weight_packed` int32 [N, K/8] or [N, K/4], with the first code in the lowest bits, each plus 8 or 128;
        `weight_scale` [N, K/blocksize] in `q.dtype`; `weight_shape` int64 [2].
    """
    N, K = q.shape
    if q.format == "int4":
        codes = swapped_codes(q.codes)
    else:
        codes = q.codes ^ 0x80
    packed = codes.contiguous().view(torch.int32).view(N, K // PACKED[q.format])
    scale = (q.absmax / MAX_CODES[q.format]).to(q.dtype).view(N, K // q.blocksize)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([N, K])}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def quantization_config(format: str, blocksize: int, ignored: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json. `ignored` names the linear layers that are not quantized."""
    weights = {
        "num_bits": 32 // PACKED[format],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": blocksize,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignored,
    }
