"""A backend of bitsandbytes: its layers, functions and optimizers call our kernels.

    enable()                 # or QLORA_NATIVE_BNB=1 in the environment, before bitsandbytes is imported

These operations of bitsandbytes (its `_ops.py`) run here, on the CPU, and on CUDA where this build has that backend:

    quantize_4bit, dequantize_4bit, gemm_4bit, gemv_4bit
    optimizer_update_8bit_blockwise and optimizer_update_32bit, of Adam and AdamW

All other calls go on to bitsandbytes' own kernel: another optimizer, LAMB's norms, `skip_zeros`, paged memory, a NaN in
a weight, a gradient for which ours would skip the step, float64. So do its 8-bit weights (LLM.int8) and its blockwise
8-bit operations.

Two results differ from bitsandbytes' own, both on the CPU: its AVX-512 kernel decodes a weight with the wrong scales if
K is not a multiple of the blocksize, and its 8-bit quantizer may miss the nearest level by one. Ours do neither.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ..._core.errors import FLOAT_DTYPES
from ..._core.formats import CODEBOOKS, DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, is_dynamic_map
from ..._core.layouts import LAYOUTS

_ops = torch.ops.qlora_native
_KERNELS: dict[str, Callable[..., Any]] = {}  # {operation: our kernel}
_library: torch.library.Library | None = None
_repack: Any = None  # bitsandbytes' function, while ours replaces it


def enable() -> None:
    """Run bitsandbytes' operations on our kernels, from now on and in the whole process.

    Its layers also stop repacking their weights for evaluation on CPUs with AVX512_BF16, which rounds the scales to
    bf16. Layers that are repacked already stay so.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    global _library, _repack
    import bitsandbytes.nn.modules as modules  # imported first, because it may call our entry point

    if _library is not None:
        return
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for device in devices():
            for name, kernel in _KERNELS.items():
                theirs = torch.library.get_kernel(f"bitsandbytes::{name}", device)
                library.impl(name, _with_fallback(kernel, theirs), device, with_keyset=True, allow_override=True)
    _repack = modules._convert_weight_packed_for_cpu
    modules._convert_weight_packed_for_cpu = lambda weight, state, *_: (weight, state)
    _library = library


def disable() -> None:
    """Run bitsandbytes' operations on its own kernels again."""
    global _library
    if _library is None:
        return
    import bitsandbytes.nn.modules as modules

    modules._convert_weight_packed_for_cpu = _repack
    _library._destroy()
    _library = None


def enabled() -> bool:
    """Whether bitsandbytes' operations run on our kernels."""
    return _library is not None


def devices() -> list[str]:
    """The dispatch keys of the devices whose operations `enable` takes over."""
    return ["CPU"] if _C.cuda_unavailable_reason() else ["CPU", "CUDA"]


def _implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kernel of ours, which takes the arguments of an operation and may return NotImplemented."""

    def decorator(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[name] = kernel
        return kernel

    return decorator


def _with_fallback(kernel: Callable[..., Any], theirs: Any) -> Callable[..., Any]:
    """Our kernel, and bitsandbytes' own for the arguments that ours does not implement."""

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = kernel(*args, **kwargs)
        return theirs.call_boxed(keys, *args, **kwargs) if result is NotImplemented else result

    return call


@functools.cache
def _on(device: torch.device, table: str) -> Tensor:
    tables = {**CODEBOOKS, "dynamic": DYNAMIC_MAP, "udynamic": UNSIGNED_DYNAMIC_MAP}
    return tables[table].to(device)


# ---- 4-bit weights ---------------------------------------------------------------------------------------------------


@_implements("quantize_4bit")
def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> Any:
    if A.dtype in FLOAT_DTYPES and A.numel() > 0:
        code = _on(A.device, quant_type)
        codes, absmax, _, _, non_finite = _ops.quantize(A, code, None, 4, blocksize)
        if not non_finite[0]:
            return codes.view(quant_storage).unsqueeze(1), absmax
    return NotImplemented


@_implements("dequantize_4bit")
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Any:
    elements = math.prod(shape)
    if dtype not in FLOAT_DTYPES or elements == 0:
        return NotImplemented
    N, K = elements // shape[-1], shape[-1]
    scales = (absmax.float().contiguous(), None, None, None)
    return _ops.dequantize(*_weight(A, scales, _on(A.device, quant_type), (N, K), blocksize), dtype).view(shape)


@_implements("gemm_4bit")
def _gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    if A.dtype not in FLOAT_DTYPES:
        return NotImplemented
    scales = (absmax.float(), None, None, None)
    if absmax_8bit is not None:
        scales = (absmax_8bit, absmax.float(), absmax_code, absmax_offset.float())
    return _linear(A, B, scales, _on(A.device, quant_type), shapeB, blocksize, bias)


@_implements("gemv_4bit")
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Any:
    # A weight repacked for AVX512_BF16 has bf16 scales [K / blocksize, N], which only bitsandbytes' own kernel reads.
    if absmax.dtype != torch.float32 or A.dtype not in FLOAT_DTYPES:
        return NotImplemented
    return _linear(A, B, (absmax, None, None, None), code.float(), shapeB, blocksize, None)


def _linear(A, B, scales, code, shape, blocksize, bias):
    no_adapter = (None, None, 1.0, 0.0, None)
    return _ops.linear_forward(A, *_weight(B, scales, code, shape, blocksize), bias, *no_adapter)[0]


def _weight(packed: Tensor, scales: tuple[Any, ...], code: Tensor, shape: Sequence[int], blocksize: int) -> Any:
    """The arguments of an op that are a weight, whose codes bitsandbytes stores in any dtype."""
    codes = packed.reshape(-1).view(torch.uint8)
    layout = LAYOUTS["nf4"]  # and that of fp4
    sizes = (layout.bits, blocksize, layout.nested_blocksize, layout.byte_format)
    return codes, *scales, code, None, None, None, *shape, *sizes


# ---- optimizers ------------------------------------------------------------------------------------------------------


@_implements("optimizer_update_8bit_blockwise")
def _optimizer_update_8bit_blockwise(
    optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2,
    weight_decay, gnorm_scale, skip_zeros=False,
):  # fmt: skip
    ours = (
        optimizer_name == "adam"
        and not skip_zeros
        and is_dynamic_map(qmap1, _on(qmap1.device, "dynamic"))
        and is_dynamic_map(qmap2, _on(qmap2.device, "udynamic"))
    )
    options = (lr, beta1, beta2, eps, weight_decay)
    if not (ours and _step(g, p, state1, state2, [absmax1], [absmax2], step, options, gnorm_scale)):
        return NotImplemented


@_implements("optimizer_update_32bit")
def _optimizer_update_32bit(
    optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps,
    weight_decay, step, lr, gnorm_scale, skip_zeros=False,
):  # fmt: skip
    ours = optimizer_name == "adam" and not skip_zeros and max_unorm <= 0 and state1.dtype == torch.float32
    options = (lr, beta1, beta2, eps, weight_decay)
    if not (ours and _step(g, p, state1, state2, [], [], step, options, gnorm_scale)):
        return NotImplemented


def _step(g, p, state1, state2, absmax1, absmax2, step, options, gnorm_scale) -> bool:
    """Step, and return whether it was done: a gradient of NaN or above 1.8e19, or paged memory, is left to them."""
    tensors = (g, p, state1, state2, *absmax1, *absmax2)
    if p.dtype not in FLOAT_DTYPES or g.dtype not in FLOAT_DTYPES:
        return False
    if not all(tensor.is_contiguous() and tensor.device == p.device for tensor in tensors):
        return False
    skipped = torch.zeros(1, dtype=torch.int64, device=p.device)
    before = torch.tensor(step - 1, dtype=torch.int64, device=p.device)
    scale = None if gnorm_scale == 1.0 else torch.tensor(gnorm_scale, dtype=torch.float32, device=p.device)
    groups = ([value] for value in options)
    _ops.optimizer_8bit_step(
        "adamw", [p], [g], [state1], [state2], absmax1, absmax2, [before], [1], *groups, scale, None, skipped, [], []
    )  # fmt: skip
    return not skipped
