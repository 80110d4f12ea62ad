"""The container of GGUF: which tensors a file has, of which type and shape, and where their bytes are.

Its layout is that of ggml/include/gguf.h in llama.cpp: "GGUF", the version, counts, keys with values, a table of
tensors, and their data, which begins at a multiple of `general.alignment`.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.errors import bad

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_ALIGNMENT = 32  # where a file does not say otherwise
_STRING, _ARRAY = 8, 9
# {type of a value: its format in `struct`}. Integers of 8, 16, 32 and 64 bits, floats, and a bool of a byte.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: its name.
        shape: as torch has it, with the columns last.
        type: the name of its type in ggml: "F32", "Q4_K".
        begin, end: where its bytes are in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    begin: int
    end: int

    @property
    def rows(self) -> int:
        """The number of rows, of all experts together."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file, which is mapped and not read.

    Attributes:
        path: the file.
        values: its keys with one value: {"general.architecture": "llama", ...}. Those with arrays are left out.
        tensors: {name: tensor}.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the keys and the table of tensors.

        Args:
            path: the file.

        Raises:
            ValueError: it is no GGUF file of version 2 or 3, is big-endian, one of several parts or truncated, or has a
                tensor of an unknown type or an impossible shape. The message names the file and the tensor.
            OSError: it cannot be read.
        """
        self.path = os.fspath(path)
        self.size = os.path.getsize(self.path)
        if self.size < 24:
            raise bad(self.path, "a GGUF file", f"{self.size} bytes")
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.values, self.tensors = _Header(self.path, data).read()
        self._bytes = torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)

    def data(self, tensor: GGUFTensor) -> Tensor:
        """The bytes of a tensor, uint8, which are read from the file when they are used."""
        return self._bytes[tensor.begin : tensor.end]


class _Header:
    """Reads what is in front of the data, and checks each length before it is used."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """The values and the tensors of the file."""
        if self._data[:4] != b"GGUF":
            raise bad(self._path, "a GGUF file, which begins with b'GGUF'", repr(self._data[:4]))
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise bad(self._path, "a little-endian GGUF file", "a big-endian one: convert it on its machine")
            raise bad(self._path, "a GGUF file of version 2 or 3", f"version {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string("the name of a key")
            if (value := self._value(self._number("I"), name)) is not None:
                values[name] = value
        if not isinstance(values.get("general.architecture"), str):
            raise bad(self._path, "the key general.architecture", "none")
        if (parts := values.get("split.count", 1)) not in (0, 1):
            raise bad(self._path, "one file", f"one of {parts} parts: join them by llama-gguf-split --merge")
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise bad(f"{self._path}: general.alignment", "a number above 0", alignment)
        table = [self._entry() for _ in range(tensors)]
        start = -(-self._at // alignment) * alignment
        return values, self._placed(table, start)

    def _placed(self, table: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, GGUFTensor]:
        import gguf

        placed: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in table:
            where = f"{self._path}: {name}"
            if name in placed:
                raise bad(where, "one tensor of this name", "two")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                raise bad(where, "a type that the package gguf knows", f"type {number}") from None
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % elements:
                raise bad(where, f"rows of a multiple of {elements} elements, as {kind.name} has", list(shape))
            begin = start + offset
            end = begin + math.prod(shape) // elements * size
            if end > len(self._data):
                raise bad(where, f"data up to byte {end}", f"a file of {len(self._data)} bytes: it is truncated")
            placed[name] = GGUFTensor(name, shape, kind.name, begin, end)
        return placed

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A row of the table: name, shape, number of the type, and offset."""
        name = self._string("the name of a tensor")
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise bad(f"{self._path}: {name}", f"1 ... {_MAX_DIMENSIONS} dimensions", dimensions)
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if min(shape) < 1:
            raise bad(f"{self._path}: {name}", "sizes above 0", list(shape))
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, name: str) -> Any:
        """The value of a key, or None if it is an array."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string(name)
        if kind != _ARRAY:
            raise bad(f"{self._path}: {name}", "a type of GGUF", kind)
        kind, count = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            self._take(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            raise bad(f"{self._path}: {name}", "an array of numbers or strings", f"one of type {kind}")
        return None

    def _string(self, what: str) -> str:
        begin = self._take(self._number("Q"))
        try:
            return self._data[begin : self._at].decode()
        except UnicodeDecodeError:
            raise bad(self._path, f"UTF-8 in {what}", "other bytes") from None

    def _number(self, kind: str) -> Any:
        begin = self._take(struct.calcsize(kind))
        return struct.unpack_from(f"<{kind}", self._data, begin)[0]

    def _take(self, size: int) -> int:
        """Go past `size` bytes, and return where they begin."""
        begin, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise bad(self._path, f"{self._at} bytes of keys and tables", f"{len(self._data)}: it is truncated")
        return begin
