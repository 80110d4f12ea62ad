"""Checkpoint folders of safetensors files: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._weight import QuantizedWeight

__all__ = ["Checkpoint", "new_folder", "write_shards"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANT_STATE = ".quant_state.bitsandbytes__"


class Checkpoint:
    """The tensors of a model's folder by name; files are mapped, not read.

    Weights that bitsandbytes has quantized count as one name, `x.weight`, with its companions left out of `shards`.

    Attributes:
        shards: {file name: [names]}, in the order of the files. A quantized weight is where its codes are.
    """

    def __init__(self, folder: str | Path) -> None:
        """Find the files.

        Raises:
            FileNotFoundError: there is no folder, or no safetensors file in it.
        """
        self.folder = Path(folder)
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")
        self._open: tuple[str, safe_open] | None = None
        self._quantized = {name.partition(QUANT_STATE)[0] for name in self._file_of if QUANT_STATE in name}
        self.shards: dict[str, list[str]] = {file: [] for file in sorted(set(self._file_of.values()))}
        for name in self._file_of:
            owner = name.partition(".weight.")[0] + ".weight"
            if owner == name or owner not in self._quantized:
                self.shards[self._file_of[name]].append(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is in the file."""
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        return self._open[1].get_tensor(name)

    def quantized(self, name: str) -> bool:
        """Whether `name` is a weight that bitsandbytes has quantized."""
        return name in self._quantized

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """That weight."""
        entries = {key: self[key] for key in self._file_of if key == name or key.startswith(f"{name}.")}
        return QuantizedWeight.from_bitsandbytes(entries, name.removesuffix("weight"))

    def dense(self, name: str) -> Tensor:
        """The tensor, decoded to fp32 if it is quantized: then exactly what the 4 bits mean."""
        return self.quantized_weight(name).dequantize(torch.float32) if self.quantized(name) else self[name]


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` by a rename when all has ended well.

    What an interruption leaves is called `.<out>.partial-<process>`, or nothing.

    Raises:
        FileExistsError: `out` is there and not an empty folder.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.parent / f".{out.name}.partial-{os.getpid()}"
    staged.mkdir()
    try:
        yield staged
        for path in staged.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(staged, out)  # an empty folder of that name gives way
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def write_shards(folder: Path, shards: Iterator[tuple[str, dict[str, Tensor]]]) -> int:
    """Write each shard as it comes, {file name: tensors}, then the index if there are several.

    Returns:
        Bytes of all tensors.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in shards:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total
