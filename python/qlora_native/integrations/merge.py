"""Checkpoints for deployment: merge a LoRA adapter into its base, quantize, shard by shard.

    python -m qlora_native merge --base DIR --adapter DIR --out DIR [--to bf16|nf4]
    python -m qlora_native quantize --model DIR --out DIR

Memory holds one shard of the result and two weights in fp32, so a model that fits on the disk can be merged. The base
may be in 16 bits or in 4 (bitsandbytes' format); W + scaling * B A is formed in fp32 and rounded once. What is written
is an ordinary checkpoint that transformers loads, in 4 bits in bitsandbytes' format.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ._versions import require

require("transformers")

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .. import functional
from .._errors import bad
from .._json import parse_object
from .adapters import Adapter
from .checkpoints import Checkpoint, file_inside, new_folder, write_shards
from .skeleton import Skeleton
from .transformers import BitsAndBytesConfig

__all__ = ["TARGETS", "Report", "convert"]

# What --to takes: a dtype, or a 4-bit format.
TARGETS: dict[str, torch.dtype | str] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "nf4": "nf4",
    "fp4": "fp4",
}

ROWS = 64  # of a weight, whose norm is taken: at most a few MB of memory


@dataclass
class Report:
    """What was done, and what rounding to 4 bits cost.

    Attributes:
        merged, quantized: how many layers.
        bytes: of all tensors written.
        errors: {layer: |Q(W) - W| / |W|} of each quantized layer, Frobenius norms, W being what was to be rounded.
    """

    merged: int = 0
    quantized: int = 0
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "weight": 0.0, "delta": 0.0})

    @property
    def error(self) -> float:
        """|Q(W) - W| / |W| over all quantized layers together."""
        return math.sqrt(self.squares["error"] / max(self.squares["weight"], 1e-300))

    @property
    def error_of_delta(self) -> float | None:
        """|Q(W) - W| over the norm of what the adapter added, all layers together; None where it added nothing."""
        delta = self.squares["delta"]
        return math.sqrt(self.squares["error"] / delta) if delta else None

    def __str__(self) -> str:
        """A few lines for a terminal."""
        done = [f"{verb} {n} layers" for verb, n in (("merged", self.merged), ("quantized", self.quantized)) if n]
        text = ", ".join([*(done or ["changed no layer"]), f"wrote {self.bytes:,} bytes"])
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += f"\nerror of rounding to 4 bits, relative to the weights: {self.error:.4f} in all, "
            text += f"{self.errors[worst]:.4f} in {worst}"
        if self.error_of_delta is not None:
            text += f"\nthe same, relative to what the adapter added: {self.error_of_delta:.3f}"
        return text


def convert(
    base: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    to: str = "bf16",
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool = True,
) -> Report:
    """Write the model of `base`, with `adapter` merged into it, to the new folder `out`.

    Args:
        base: folder of a checkpoint in safetensors files, in 16 or 32 bits or in bitsandbytes' 4; or the id of a
            model of the hub that is in the Hugging Face cache.
        out: must not exist, or be empty. It appears when it is complete.
        adapter: folder of a LoRA adapter that PEFT saved, or None.
        to: a key of TARGETS. In 4 bits, the layers that transformers would give to bitsandbytes are quantized.
        blocksize, double_quant: as `qlora_native.quantize`, for 4 bits.
        progress: show a progress bar, where tqdm is installed.

    Raises:
        FileNotFoundError, FileExistsError: a folder lacks its files; `out` is taken.
        TypeError, ValueError: the files are damaged, or lack what the model has; the adapter is not one that can be
            merged, or does not fit the base. Nothing is written.
    """
    if to not in TARGETS:
        raise bad("to", "one of " + ", ".join(TARGETS), repr(to))
    checkpoint = Checkpoint(base)
    quantization = None
    if isinstance(TARGETS[to], str):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=to, bnb_4bit_use_double_quant=double_quant, blocksize=blocksize
        )
    lora = None if adapter is None else Adapter(adapter)
    conversion = _Conversion(checkpoint, Skeleton(checkpoint), lora, TARGETS[to], quantization)
    conversion.check()

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        bar = _Progress(sum(map(len, checkpoint.shards.values())), progress)
        for file, names in checkpoint.shards.items():
            yield file, {key: tensor for name in bar.over(names) for key, tensor in conversion.tensors(name).items()}

    with new_folder(out) as folder:
        conversion.report.bytes = write_shards(folder, shards())
        for path in conversion.others:
            shutil.copy2(path, folder / path.name)
        path = checkpoint.folder / "config.json"
        config = parse_object(path.read_bytes(), str(path))
        config.pop("quantization_config", None)
        if quantization is not None:
            config["quantization_config"] = quantization.to_dict()
        else:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(TARGETS[to]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return conversion.report


@dataclass
class _Conversion:
    """One checkpoint on its way to another: what becomes of each tensor."""

    checkpoint: Checkpoint
    model: Skeleton
    lora: Adapter | None
    target: torch.dtype | str
    quantization: BitsAndBytesConfig | None
    report: Report = field(default_factory=Report)
    others: list[Path] = field(default_factory=list)  # what is copied: tokenizer, generation config, ...

    def check(self) -> None:
        """Raise ValueError unless the files have what the model has, and the adapter changes nothing else."""
        there = self._check_names() & self.model.names()
        missing = sorted(self.lora.names() - there) if self.lora is not None else []
        if missing:
            raise bad("adapter", "changes to tensors that the base has", f"{missing[0]}, which it has not")
        for name, tensor in self.lora.replaced.items() if self.lora is not None else ():
            if list(tensor.shape) != self.model.shape(name):
                raise bad(f"adapter, {name}", f"the base's shape {self.model.shape(name)}", list(tensor.shape))
        self.others = _others(self.checkpoint.folder)

    def _check_names(self) -> set[str]:
        """The model's names of all tensors. Raise ValueError if one is missing, there twice, or of another shape."""
        file_names: dict[str, str] = {}
        there: set[str] = set()
        for name in (name for names in self.checkpoint.shards.values() for name in names):
            own = self.model.name_of(name)
            if own in file_names:
                raise bad(str(self.checkpoint.folder), f"{own} once", f"{file_names[own]} and {name}")
            file_names[own] = name
            there.add(own)
            there.update(self.model.names_made_of(name))
            self.model.check_shape(name, self.checkpoint.shape(name), self.checkpoint.quantized(name))
        if missing := sorted(self.model.needed(there) - there):
            raise bad(
                str(self.checkpoint.folder),
                f"all tensors of a {self.model.architecture}",
                f"no {missing[0]}" + (f", and {len(missing) - 1} more are missing" if missing[1:] else ""),
            )
        return there

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The entries that take the place of the file's tensor `name`."""
        own = self.model.name_of(name)
        path, _, kind = own.rpartition(".")
        adapted = self.lora is not None and path in self.lora.layers
        replaced = None if self.lora is None else self.lora.replaced.get(own)
        if kind == "weight" and (adapted or path in self.model.linears or self.checkpoint.quantized(name)):
            return self._weight(name, path, adapted, replaced)
        tensor = self.checkpoint[name] if replaced is None else replaced
        dtype = self.target if isinstance(self.target, torch.dtype) else tensor.dtype
        if kind == "bias" and adapted:
            tensor = self.lora.merged_bias(path, tensor)
        return {name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()}

    def _weight(self, name: str, path: str, adapted: bool, replaced: Tensor | None) -> dict[str, Tensor]:
        """The entries for the weight `name` of the layer `path`. `replaced`: what the adapter puts in its place."""
        quantized = replaced is None and self.checkpoint.quantized(name)
        quantize = self.quantization is not None and path in self.model.linears
        if quantize and quantized and not adapted:
            q = self.checkpoint.quantized_weight(name)
            if (q.format, q.blocksize, q.nested_absmax is not None) == self._options():
                return q.to_bitsandbytes(name.removesuffix("weight"))  # the same bytes
        stored = self.checkpoint.dense(name) if replaced is None else replaced
        # Conv1D has its weight [in, out]; in 4 bits it is stored as nn.Linear has it.
        transposed = isinstance(self.model.module(path), Conv1D)
        weight = stored.t() if transposed and not quantized else stored
        if adapted:
            merged = self.lora.merged_weight(path, weight)
            self.report.merged += 1
            self.report.squares["delta"] += _square(merged, weight)
            weight = merged
        if not quantize:
            weight = weight.t() if transposed else weight
            return {
                name: weight.to(self.target if isinstance(self.target, torch.dtype) else self.model.dtype).contiguous()
            }
        q = functional.quantize(weight, *self._options())
        error, norm = _square(q.dequantize(torch.float32), weight), _square(weight)
        self.report.quantized += 1
        self.report.errors[path] = math.sqrt(error / max(norm, 1e-300))
        self.report.squares["error"] += error
        self.report.squares["weight"] += norm
        dtype = self.model.dtype if adapted or quantized else stored.dtype
        return replace(q, dtype=dtype).to_bitsandbytes(name.removesuffix("weight"))

    def _options(self) -> tuple[str, int, bool]:
        config = self.quantization
        return config.bnb_4bit_quant_type, config.blocksize, config.bnb_4bit_use_double_quant


def _square(tensor: Tensor, other: Tensor | None = None) -> float:
    """The sum of squares, of `tensor` or of its difference from `other`: float64 from row to row, ROWS at a time."""
    total = 0.0
    for start in range(0, len(tensor), ROWS):
        rows = tensor[start : start + ROWS].float()
        if other is not None:
            rows = rows - other[start : start + ROWS].float()
        total += rows.square().sum(dim=-1).double().sum().item()
    return total


def _others(folder: Path) -> list[Path]:
    """Tokenizer, generation config and whatever else lies beside the weights and is no weights of another format."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(weights)]
    return [file_inside(folder, name) for name in names if name != "config.json"]


class _Progress:
    """A bar over several lists, where tqdm is installed and it is wanted."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar = None
        if wanted:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit="tensor")

    def over(self, names: Iterable[Any]) -> Iterator[Any]:
        """`names`, counted."""
        for name in names:
            yield name
            if self._bar is not None:
                self._bar.update()
