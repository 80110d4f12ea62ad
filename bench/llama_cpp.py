"""llama.cpp: its product over a weight in a type of GGUF and its quantizer, by ctypes; and a whole model.

The libraries are those of the package llama-cpp-py-sync, or a build for this machine in another folder:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON    in the folder of llama.cpp
    cmake --build build --target ggml-cpu llama

The weight lies where llama.cpp itself would put it (`make_cpu_buft_list` of its llama-model.cpp): in the first buffer
type of the CPU that can multiply it, which may repack it for the processor, and else as it is in the file. Activations
are fp32, and llama.cpp rounds them to 8 bits.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

F32 = 0  # GGML_TYPE_F32; the other types have the numbers of gguf.GGMLQuantizationType
# A context without data has room for some tensors and a graph of the size that ggml chooses.
CONTEXT_BYTES = 4 << 20
INSTRUCTIONS = ("amx_int8", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "sve", "matmul_int8", "neon")


class _InitParams(Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
# {function: (result, arguments)}, by ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h.
BASE = {
    "ggml_log_set": (None, _LOG, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
}
CPU = {
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
}


def folder_of_package() -> Path | None:
    """The folder of the libraries in the package llama-cpp-py-sync, or None."""
    package = find_spec("llama_cpp_py_sync")
    return None if package is None else Path(package.submodule_search_locations[0])


class LlamaCpp:
    """The libraries in a folder, with `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the libraries.

        Raises:
            OSError: they are not there, or cannot be loaded.
        """
        base, cpu = (_library(folder, name) for name in ("ggml-base", "ggml-cpu"))
        for library, functions in ((base, BASE), (cpu, CPU)):
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        self.base = base
        self._silent = _LOG(lambda level, text, data: None)
        base.ggml_log_set(self._silent, None)
        self.instructions = [name for name in INSTRUCTIONS if getattr(cpu, f"ggml_cpu_has_{name}")()]
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        registry = cpu.ggml_backend_cpu_reg()
        self.device = base.ggml_backend_reg_dev_get(registry, 0)
        self.buffer_types = []
        if extra := base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(extra)(self.device)
            while found[len(self.buffer_types)]:
                self.buffer_types.append(found[len(self.buffer_types)])
        self.buffer_types.append(base.ggml_backend_cpu_buffer_type())

    def quantize(self, weight: Tensor, type: int) -> Tensor:
        """The bytes [N, bytes of a row] of a weight [N, K] in fp32, by llama.cpp's quantizer of a type."""
        N, K = weight.shape
        weight = weight.contiguous()
        data = torch.empty(N, self.base.ggml_row_size(type, K), dtype=torch.uint8)
        written = self.base.ggml_quantize_chunk(type, weight.data_ptr(), data.data_ptr(), 0, N, K, None)
        if written != data.numel():
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, {data.numel()} expected")
        return data


class _Context:
    """Tensors without data, and the buffer that `allocate` gives them; both are freed with this object."""

    def __init__(self, library: LlamaCpp) -> None:
        """Make a context of ggml."""
        self._base = library.base
        self.pointer = self._base.ggml_init(_InitParams(CONTEXT_BYTES, None, True))
        weakref.finalize(self, self._base.ggml_free, self.pointer)

    def tensor(self, type: int, rows: int, columns: int) -> int:
        """A tensor [rows, columns]."""
        return self._base.ggml_new_tensor_2d(self.pointer, type, columns, rows)

    def allocate(self, buffer_type: int) -> None:
        """Give memory to the tensors that have none."""
        buffer = self._base.ggml_backend_alloc_ctx_tensors_from_buft(self.pointer, buffer_type)
        weakref.finalize(self, self._base.ggml_backend_buffer_free, buffer)


class Weight:
    """A weight in one of llama.cpp's buffers."""

    def __init__(self, library: LlamaCpp, data: Tensor, type: int, shape: tuple[int, int]) -> None:
        """Copy the bytes of a GGUF tensor into the first buffer type that can multiply them."""
        self.library, self.shape, base = library, shape, library.base
        for buffer_type in library.buffer_types:
            self._context = _Context(library)
            self.tensor = self._context.tensor(type, *shape)
            self._context.allocate(buffer_type)
            operand = self._context.tensor(F32, 1, shape[1])
            product = base.ggml_mul_mat(self._context.pointer, self.tensor, operand)
            if base.ggml_backend_dev_supports_op(library.device, product):
                break
        else:
            raise RuntimeError(f"llama.cpp has no product for the type {type}")
        self.buffer = base.ggml_backend_buft_name(buffer_type).decode()
        data = data.contiguous()
        base.ggml_backend_tensor_set(self.tensor, data.data_ptr(), 0, data.numel())


class Product:
    """A graph of one product. Its result stays in llama.cpp's memory, until `result` copies it."""

    def __init__(self, weight: Weight, x: Tensor) -> None:
        """Build the graph, and give it the activations [M, K]."""
        self._weight, self._library, base = weight, weight.library, weight.library.base
        self._size = (len(x), weight.shape[0])
        self._context = _Context(self._library)
        operand = self._context.tensor(F32, *x.shape)
        self._y = base.ggml_mul_mat(self._context.pointer, weight.tensor, operand)
        self._graph = base.ggml_new_graph(self._context.pointer)
        base.ggml_build_forward_expand(self._graph, self._y)
        self._context.allocate(base.ggml_backend_cpu_buffer_type())
        x = x.float().contiguous()
        base.ggml_backend_tensor_set(operand, x.data_ptr(), 0, x.nbytes)

    def __call__(self) -> None:
        """Compute the product.

        Raises:
            RuntimeError: llama.cpp reports a failure.
        """
        if status := self._library.base.ggml_backend_graph_compute(self._library.backend, self._graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def result(self) -> Tensor:
        """Y [M, N] in fp32."""
        y = torch.empty(self._size)
        self._library.base.ggml_backend_tensor_get(self._y, y.data_ptr(), 0, y.nbytes)
        return y


class Model:
    """A model in a GGUF file with its cache, by the bindings of the package llama-cpp-py-sync.

    All that llama.cpp chooses by itself stays as it is: keys and values are in fp16, and weights may be repacked.
    """

    def __init__(self, folder: Path, path: Path, threads: int, context: int) -> None:
        """Load the file by the library in a folder, with room for `context` tokens, all of them in one batch.

        Raises:
            OSError: the library is not there, or cannot be loaded.
            RuntimeError: llama.cpp does not load the file.
        """
        from llama_cpp_py_sync import _cffi_bindings

        self._ffi = ffi = _cffi_bindings.get_ffi()
        self._library = library = ffi.dlopen(str(_path(folder, "llama")))
        self._silent = ffi.callback("ggml_log_callback", lambda level, text, data: None)
        library.llama_log_set(self._silent, ffi.NULL)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if self._model == ffi.NULL:
            raise RuntimeError(f"llama.cpp does not load {path}")
        weakref.finalize(self, library.llama_model_free, self._model)
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, options)
        if self._context == ffi.NULL:
            raise RuntimeError(f"llama.cpp has no context of {context} tokens for {path}")
        weakref.finalize(self, library.llama_free, self._context)  # before the model: the last made goes first
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append int64 tokens [T] to the cache, and compute the logits of the last.

        Returns:
            fp32 [vocabulary], in llama.cpp's memory.

        Raises:
            RuntimeError: llama.cpp reports a failure.
        """
        ids = self._ffi.new("llama_token[]", tokens.tolist())
        if status := self._library.llama_decode(self._context, self._library.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return torch.frombuffer(self._ffi.buffer(logits, 4 * self._vocabulary), dtype=torch.float32)

    def clear(self) -> None:
        """Empty the cache."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)


def _library(folder: Path, name: str) -> ctypes.CDLL:
    """The library `name` below `folder`."""
    return ctypes.CDLL(str(_path(folder, name)))


def _path(folder: Path, name: str) -> Path:
    """The file of the library `name` below `folder`; for Linux, macOS and Windows."""
    pattern = {"win32": f"{name}.dll", "darwin": f"lib{name}*.dylib"}.get(sys.platform, f"lib{name}.so*")
    if not (paths := sorted(folder.rglob(pattern))):
        raise OSError(f"{folder} has no {pattern}")
    return paths[0]
