"""ggml's IQ4_NL product with fp32 activations, which it rounds to 8 bits: llama.cpp's library, by path.

GGML_LIBRARY names libggml-cpu.so, with libggml-base.so beside it, built for this machine (GGML_NATIVE). There is no
Python package of it; ctypes calls its public C functions.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "ggml IQ4_NL"
# Its levels are not NF4's, so the results differ by the errors of two quantizations, each about 9 % of the weight.
ERROR = 0.15
F32, IQ4_NL = 0, 20  # of enum ggml_type
BLOCK, BLOCK_BYTES = 32, 18
_ggml: Any = None


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    # struct ggml_cplan begins with these two; the rest is passed through, and there is room for more to come.
    _fields_ = (("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_char * 240))


def missing() -> str | None:
    global _ggml
    path = os.environ.get("GGML_LIBRARY")
    if not path:
        return "GGML_LIBRARY, the path of libggml-cpu.so, is not set"
    try:
        for base in sorted(Path(path).parent.glob("libggml-base*.so*"))[:1]:
            ctypes.CDLL(str(base), ctypes.RTLD_GLOBAL)
        _ggml = ctypes.CDLL(path)
        for name in ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data"):
            getattr(_ggml, f"ggml_{name}").restype = ctypes.c_void_p
        _ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        _ggml.ggml_graph_plan.restype = _Plan
    except (OSError, AttributeError) as error:
        return f"GGML_LIBRARY={path}: {error}"
    return None


def supports(case: object) -> bool:
    return case.operation == "forward" and not case.rank and case.via == "function" and case.shape[1] % BLOCK == 0


class Held:
    """A weight [N, K] in ggml's bytes, with the graph of the last product it was used in."""

    def __init__(self, codes: Tensor, shape: tuple[int, int]) -> None:
        """Keep the bytes."""
        self.codes, self.shape = codes, shape
        self.x: Tensor | None = None

    def product(self, x: Tensor) -> None:
        """Build the graph of x · Wᵀ, once for each x."""
        (N, K), M = self.shape, x.shape[0]
        bytes_needed = self.codes.nbytes + 4 * M * (K + N) + (1 << 20)
        context = ctypes.c_void_p(_ggml.ggml_init(_InitParams(bytes_needed, None, False)))
        new = _ggml.ggml_new_tensor_2d
        weight = ctypes.c_void_p(new(context, IQ4_NL, ctypes.c_int64(K), ctypes.c_int64(N)))
        right = ctypes.c_void_p(new(context, F32, ctypes.c_int64(K), ctypes.c_int64(M)))
        result = ctypes.c_void_p(_ggml.ggml_mul_mat(context, weight, right))
        self.graph = ctypes.c_void_p(_ggml.ggml_new_graph(context))
        _ggml.ggml_build_forward_expand(self.graph, result)

        def fill(tensor: ctypes.c_void_p, values: Tensor) -> None:
            ctypes.memmove(_ggml.ggml_get_data(tensor), values.data_ptr(), values.nbytes)

        fill(weight, self.codes)
        fill(right, x.float().contiguous())
        at = _ggml.ggml_get_data(result)
        self.y = torch.frombuffer((ctypes.c_float * (M * N)).from_address(at), dtype=torch.float32).view(M, N)
        self.plan = _ggml.ggml_graph_plan(self.graph, torch.get_num_threads(), None)
        self.work = ctypes.create_string_buffer(max(1, self.plan.work_size))
        self.plan.work_data = ctypes.addressof(self.work)
        self._free()
        self.context, self.x = context, x

    def _free(self) -> None:
        if self.x is not None:
            _ggml.ggml_free(self.context)

    __del__ = _free


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Held:
    N, K = weight.shape
    codes = torch.empty(N * K // BLOCK * BLOCK_BYTES, dtype=torch.uint8)
    source = weight.float().contiguous()
    at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, codes)]
    written = _ggml.ggml_quantize_chunk(IQ4_NL, *at, *(ctypes.c_int64(n) for n in (0, N, K)), None)
    assert written == codes.nbytes, "IQ4_NL blocks of another size"
    return Held(codes, (N, K))


def copy(held: Held) -> Held:
    return Held(held.codes.clone(), held.shape)


def nbytes(held: Held) -> int:
    return held.codes.nbytes


def forward(held: Held, x: Tensor) -> Tensor:
    if held.x is not x:
        held.product(x)
    _ggml.ggml_graph_compute(held.graph, ctypes.byref(held.plan))
    return held.y
