"""Checkpoint folders of safetensors files: check them, read them tensor by tensor, write them shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._core.errors import bad, dtype_name
from .._core.json import parse_object
from .._core.quant_state import QUANT_STATE, STATE_SUFFIXES, read_quant_state
from .._core.weight import QuantizedWeight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def repository_of(folder: Path) -> Path | None:
    """The folder of a repository in the Hugging Face cache if `folder`, which is resolved, is a snapshot of it."""
    return folder.parent.parent if folder.parent.name == "snapshots" else None


def file_inside(folder: Path, name: Any) -> Path:
    """The path of the file `name` in a folder that nobody has checked.

    A link may lead to another file of the folder, or, in a snapshot of the Hugging Face cache, to the cache's blobs of
    the same model. Other links are refused, because the file that they lead to would be copied into a folder that may
    be published.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
        raise bad(str(folder), "the name of a file in it", repr(name))
    home = folder.resolve()
    repository = repository_of(home)
    roots = [home] if repository is None else [home, repository / "blobs"]
    try:
        target = (folder / name).resolve(strict=True)
    except RuntimeError:  # a loop of links, in Python 3.10 ... 3.12
        raise bad(str(folder / name), "a file", "links that lead in a circle") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise bad(str(folder / name), "a file of this folder", f"a link to {target}")
    if not target.is_file():
        raise FileNotFoundError(f"{folder / name}: expected a file, got something else")
    return folder / name


def open_safetensors(path: Path) -> safe_open:
    """Map a file into memory. The safetensors library checks that its header fits its size."""
    path.open("rb").close()  # its error has the reason; safetensors says of each "No such file or directory"
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise bad(str(path), "a whole safetensors file", f"another, or a part of one ({error})") from None


class Checkpoint:
    """The tensors of a model's folder, by name. Files are mapped into memory, not read.

    A weight that bitsandbytes has quantized is one name, `x.weight`; its scales and tables have none of their own.

    Attributes:
        folder: where it is.
        config: the object in config.json.
        shards: {file name: [names]}, in the order of the files. A quantized weight is listed where its codes are.
    """

    def __init__(self, folder: str | Path) -> None:
        """Find the files, and check that files and index name the same tensors, each once.

        Args:
            folder: a folder, or the id of a model of the hub that is in the Hugging Face cache.
        """
        self.folder = _folder_of(folder)
        if (self.folder / INDEX).exists():
            self._file_of = _read_index(self.folder)
        elif (self.folder / SINGLE).exists():
            with open_safetensors(file_inside(self.folder, SINGLE)) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")
        path = file_inside(self.folder, "config.json")
        self.config = parse_object(path.read_bytes(), str(path))
        _check_quantization(self.config.get("quantization_config"), str(path))
        self._open: tuple[str, safe_open] | None = None
        states = (name for name in self._file_of if name.endswith(STATE_SUFFIXES) and QUANT_STATE in name)
        self._state_of = {name.partition(QUANT_STATE)[0]: name for name in states}
        if without_codes := sorted(self._state_of.keys() - self._file_of.keys()):
            raise bad(str(self.folder), f"the tensor {without_codes[0]}, whose quant_state is there", "none")
        belonging = {name + suffix for name in self._state_of for suffix in STATE_SUFFIXES}
        self.shards: dict[str, list[str]] = {file: [] for file in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in belonging:
                self.shards[file].append(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is stored. Its values are read when they are used."""
        file = self._file(name)
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise bad(self.describe(name), "a tensor of a dtype that torch has", f"another ({error})") from None

    def describe(self, name: str) -> str:
        """The file and the name of a tensor, for errors."""
        return f"{self.folder / self._file_of[name]}: {name}"

    def shape(self, name: str) -> list[int]:
        """The stored shape of the tensor, or (N, K) of a quantized weight. No values are read."""
        return self._state(name)["shape"] if self.quantized(name) else self._file(name).get_slice(name).get_shape()

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of the tensor, or the one that a quantized weight had before. No values are read."""
        return getattr(torch, self._state(name)["dtype"]) if self.quantized(name) else self[name].dtype

    def quantized(self, name: str) -> bool:
        """Whether `name` is a weight that bitsandbytes has quantized."""
        return name in self._state_of

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """The quantized weight `name`."""
        names = (name + suffix for suffix in ("", *STATE_SUFFIXES))
        entries = {key: self[key] for key in names if key in self._file_of}
        return QuantizedWeight.from_bitsandbytes(entries, name.removesuffix("weight"))

    def dense(self, name: str) -> Tensor:
        """The tensor; a quantized one is decoded to fp32, which holds its values exactly."""
        return self.quantized_weight(name).dequantize(torch.float32) if self.quantized(name) else self[name]

    def _state(self, name: str) -> dict[str, Any]:
        key = self._state_of[name]
        return read_quant_state(key, self[key], f"{name}.nested_absmax" in self)

    def _file(self, name: str) -> safe_open:
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, open_safetensors(self.folder / file))
        return self._open[1]


def _folder_of(name: str | Path) -> Path:
    """The folder `name`, or the folder of a model in the Hugging Face cache. Nothing is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    expected = "expected the folder of a checkpoint"
    if Path(name).is_file():
        raise NotADirectoryError(
            f"{name}: {expected}, got a file. Only `export --base` takes one in GGUF; dequantize() of a model that "
            "KeepQuantized has loaded, and save_pretrained of what it returns, make such a folder"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name), local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            expected += f", or a model that is in the Hugging Face cache (hf download {name})"
    raise FileNotFoundError(f"{name}: {expected}, found none")


def _check_quantization(described: Any, path: str) -> None:
    """Raise ValueError unless the quantization_config of config.json is none, or that of bitsandbytes' 4 bits.

    A weight in another format is not what its tensor says: FP8 and int8 have scales beside it.
    """
    if described is None:
        return
    if not isinstance(described, dict):
        raise bad(f"{path}: quantization_config", "an object", type(described).__name__)
    method = described.get("quant_method", "bitsandbytes" if "load_in_4bit" in described else None)
    if method != "bitsandbytes" or described.get("load_in_4bit") is not True:
        expected = "weights in 16 or 32 bits, or nf4 and fp4 of the method 'bitsandbytes', as nothing else is read here"
        got = f"the method {method!r}" + (", in 8 bits (LLM.int8)" if described.get("load_in_8bit") else "")
        raise bad(f"{path}: quantization_config", expected, got)


def _read_index(folder: Path) -> dict[str, str]:
    """Read the index of a folder, {tensor: file}, and check that it lists exactly the tensors of the files."""
    path = file_inside(folder, INDEX)
    file_of = parse_object(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise bad(f"{path}: weight_map", "an object of tensor and file names", type(file_of).__name__)
    for file in sorted(set(map(str, file_of.values()))):
        if not file.endswith(".safetensors"):
            raise bad(f"{path}: weight_map", "names of safetensors files", repr(file))
        with open_safetensors(file_inside(folder, file)) as opened:
            there = set(opened.keys())
        listed = {name for name, of in file_of.items() if of == file}
        if missing := sorted(listed - there):
            raise bad(str(folder / file), f"the tensor {missing[0]}, which the index names", "none")
        for name in sorted(there - listed):
            if name in file_of:
                raise bad(f"{folder}: {name}", "one tensor of that name", f"one in {file_of[name]} and one in {file}")
            raise bad(f"{path}: weight_map", f"the tensor {name}, which {file} has", "none")
    return file_of


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to `dtype`. NaN and infinities are kept."""
    made = tensor.to(dtype).contiguous()
    if made.dtype != tensor.dtype and made.numel() and not all(end.isfinite() for end in made.aminmax()):
        lost = tensor[made.isinf() & tensor.isfinite()]
        if len(lost):
            larger = "fp32" if dtype == torch.bfloat16 else "bf16 or fp32"
            largest = f"values of at most {torch.finfo(dtype).max:g}, as {dtype_name(dtype)} has"
            raise bad(name, f"{largest} (convert to {larger})", f"{lost[0].item():g}")
    return made


def other_files(folder: Path) -> list[Path]:
    """The other files of a folder, such as the tokenizer, but not weights in another format."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(weights)]
    return [file_inside(folder, name) for name in names if name != "config.json"]


def other_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, such as further chat templates, but not hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def write_shards(folder: Path, shards: Iterator[tuple[str, dict[str, Tensor]]]) -> int:
    """Write each (file name, {name: tensor}), one after another, and then the index if there are several files.

    Returns:
        The bytes of all tensors.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in shards:
        first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
        own = {  # safetensors refuses tensors that share memory, as those do that an adapter has replaced together
            name: tensor if first[tensor.data_ptr()] == name else tensor.clone() for name, tensor in tensors.items()
        }
        try:
            save_file(own, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: cannot be written: {error}") from None
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total
