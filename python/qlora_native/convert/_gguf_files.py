"""GGUF files: llama.cpp's names of architectures, tensors and types, and a writer that streams tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .._core.versions import require

require("transformers")
require("gguf")

import gguf
import numpy as np
import torch
from torch import Tensor

from .._core.errors import bad
from .._core.progress import Progress
from ._report import Report
from ._skeleton import Skeleton
from ._staging import new_file

GGMLType = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers and its counterpart in llama.cpp."""

    arch: gguf.MODEL_ARCH
    rotates_adjacent: bool  # RoPE rotates adjacent elements, so the rows of q_proj and k_proj are reordered
    biases: bool = True  # whether llama.cpp reads biases

    @property
    def name(self) -> str:
        """The value of general.architecture."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(gguf.MODEL_ARCH.LLAMA, rotates_adjacent=True),
    "MistralForCausalLM": Architecture(gguf.MODEL_ARCH.LLAMA, rotates_adjacent=True),
    "Qwen2ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN2, rotates_adjacent=False),
    "Qwen3ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN3, rotates_adjacent=False, biases=False),
}

DTYPES = {torch.float32: GGMLType.F32, torch.float16: GGMLType.F16, torch.bfloat16: GGMLType.BF16}
# The types that the package gguf can write; llama-quantize makes others (q4_k, iq4_nl, ...) from a bf16 file.
MODEL_TYPES = {
    kind.name.lower(): kind
    for kind in (*DTYPES.values(), GGMLType.Q8_0, GGMLType.Q5_1, GGMLType.Q5_0, GGMLType.Q4_1, GGMLType.Q4_0)
}
ADAPTER_TYPES = {kind.name.lower(): kind for kind in DTYPES.values()}
FILE_TYPES = {kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in MODEL_TYPES.values() if kind != GGMLType.F32}
FILE_TYPES[GGMLType.F32] = gguf.LlamaFileType.ALL_F32


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file. `shape` is in torch's order; GGUF lists the innermost dimension first."""

    name: str
    shape: list[int]
    kind: GGMLType
    values: Callable[[], Tensor]


class Layout:
    """How llama.cpp names and lays out the tensors of a model of transformers.

    Attributes:
        skeleton: the model without its weights.
        architecture: its counterpart in llama.cpp.
        head_dim: the elements of an attention head.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        """Look up the architecture."""
        self.skeleton, config = skeleton, skeleton.config
        if skeleton.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise bad("config.json: architectures", f"one of {known} for GGUF", skeleton.architecture)
        self.architecture = ARCHITECTURES[skeleton.architecture]
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.head_dim % 2:
            raise bad("config.json: head_dim", "an even number", self.head_dim)
        self._names = gguf.get_tensor_name_map(self.architecture.arch, config.num_hidden_layers)

    def name_of(self, own: str) -> str:
        """llama.cpp's name of the model's tensor `own`."""
        found = self._names.get_name(own, try_suffixes=(".weight", ".bias"))
        if found is None or (own.endswith(".bias") and not self.architecture.biases):
            raise bad(own, f"a tensor that llama.cpp has for {self.skeleton.architecture}", "another")
        return found

    def reordered(self, own: str, tensor: Tensor) -> Tensor:
        """Reorder the rows of the model's tensor `own` for llama.cpp: in each head, the two halves are interleaved.

        The tensor is a weight [out, in], a bias [out], or the B [out, rank] of an adapter.
        """
        if not self.architecture.rotates_adjacent or own.split(".")[-2] not in ("q_proj", "k_proj"):
            return tensor
        rest = tensor.shape[1:]
        return tensor.reshape(-1, 2, self.head_dim // 2, *rest).transpose(1, 2).reshape(-1, *rest)


@contextmanager
def gguf_writer(out: str | Path, architecture: str, kind: GGMLType) -> Iterator[tuple[gguf.GGUFWriter, Callable]]:
    """Open the new file `out`. Yields a writer, for metadata, and a function that then writes all entries."""
    with new_file(out) as path:
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        def write(entries: list[Entry], report: Report, progress: bool) -> None:
            for entry in entries:
                row = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), int(np.prod(row)), entry.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in Progress(len(entries), progress, "export", "tensor").over(entries):
                stored = _stored(entry, report)
                report.bytes += stored.nbytes
                try:
                    writer.write_tensor_data(stored)
                except OSError as error:
                    raise OSError(f"{out}: cannot be written: {error}") from None

        try:
            yield writer, write
        finally:
            writer.close()


def _stored(entry: Entry, report: Report) -> np.ndarray:
    """Convert a tensor to the bytes of its type. `report` gets the error of rounding to fewer than 16 bits."""
    tensor = entry.values()
    dtype = next((dtype for dtype, kind in DTYPES.items() if kind == entry.kind), None)
    if dtype is not None:
        rounded = tensor.to(dtype).contiguous()
        if not rounded.isfinite().all():
            raise bad(entry.name, f"finite values within {entry.kind.name}", "NaN, Inf or a larger one")
        return (rounded.view(torch.uint16) if dtype == torch.bfloat16 else rounded).numpy()
    weight = tensor.float().contiguous()
    stored = gguf.quantize(weight.numpy(), entry.kind)
    rounded = torch.from_numpy(gguf.dequantize(stored, entry.kind))
    if not rounded.isfinite().all():
        raise bad(entry.name, f"finite values within {entry.kind.name}", "NaN, Inf or a larger one")
    report.add_rounding(entry.name, rounded, weight)
    return stored
