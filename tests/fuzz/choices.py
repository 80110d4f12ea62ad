"""A fuzzer's bytes as choices: the same bytes always make the same input, and similar bytes make a similar one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
DTYPES = [
    getattr(torch, name)
    for name in "uint8 int8 int32 int64 bool float16 bfloat16 float32 float64 complex64 float8_e4m3fn".split()
]
POWERS = [2**exponent + more for exponent in (4, 5, 6, 8, 12, 31, 32, 53, 62, 63, 64) for more in (-1, 0, 1)]
FLOATS = [0.5, -0.0, 1e-45, 1e38, 1e308, float("inf"), float("nan")]
NUMBERS = [0, 1, -1, 2, 3, 96, *POWERS, -(2**31), -(2**63), 10**400, *FLOATS]


class Choices:
    """Reads numbers from bytes, and zeros when these are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """A number in [0, count)."""
        size = max(1, (count - 1).bit_length() + 7 >> 3)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % count

    def of(self, values: Sequence[T]) -> T:
        """One of them."""
        return values[self.below(len(values))]

    def one_in(self, count: int) -> bool:
        """True with a probability of 1 / count; False where bytes are used up, unless the count is 1."""
        return self.below(count) == count - 1

    def value(self, depth: int = 2) -> Any:
        """Anything that JSON can hold, and a little more."""
        kind = self.below(8 if depth else 6)
        if kind < 3:
            return self.of(NUMBERS)
        if kind < 6:
            return self.of(("", "nf4", "fp4", "float16", "bfloat16", "../x", "x" * 300, None, True, False))
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        return {str(self.of(("a", "shape", "blocksize", 0))): self.value(depth - 1) for _ in range(self.below(3))}

    def text(self, text: str) -> str:
        """`text` with a character or two changed, or a value in the place of one of its own."""
        if self.one_in(2):
            try:
                return json.dumps(self.edited(json.loads(text)))
            except ValueError:
                return text
        for _ in range(1 + self.below(2)):
            at = self.below(len(text) + 1)
            changed = self.of(('"', "{", "}", "[", "]", ",", ":", "-", "9", "e", "\\", "\0", "é", ""))
            text = text[:at] + changed + text[at + 1 :]
        return text

    def edited(self, value: Any) -> Any:
        """A JSON value with something in it dropped or replaced."""
        if isinstance(value, dict) and value and not self.one_in(8):
            key = self.of(sorted(value))
            if self.one_in(4):
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: self.edited(value[key])}
        if isinstance(value, list) and value and not self.one_in(4):
            at = self.below(len(value))
            return [*value[:at], self.edited(value[at]), *value[at + 1 :]]
        return self.value()

    def tensor(self, like: torch.Tensor) -> Any:
        """A tensor that is not `like`: of another dtype, shape, layout or content, without memory, or none at all."""
        kind = self.below(12)
        if like.layout is not torch.strided or not (like.is_meta or _has_memory(like)):
            return like  # changed before, into something of which torch itself can make nothing
        if kind == 0:
            return self.of((None, 1.0, [1.0], "x", b"x"))
        if kind == 1:
            return like.to(self.of(DTYPES))
        if kind == 2:
            return like.reshape(-1)[: self.below(like.numel() + 1)]
        if kind == 3:
            return torch.zeros([self.below(5) for _ in range(self.below(4))], dtype=self.of(DTYPES))
        if kind == 4:  # another layout of as many elements
            other = like.t() if like.dim() == 2 else like[None]
            return torch.stack((like, like), -1)[..., 0] if self.one_in(2) else other
        if kind == 5:  # one element everywhere
            return like.reshape(-1)[0].expand(like.shape) if like.numel() else like
        if kind == 6:
            return like.to("meta")
        if kind == 7:  # freed, or cut short; of another dtype or layout, so that something may want to copy it
            freed = like.to(self.of(DTYPES)) if self.one_in(3) else like.clone()
            freed = torch.stack((freed, freed), -1)[..., 0] if self.one_in(3) else freed.clone()
            storage = freed.untyped_storage()
            storage.resize_(self.below(storage.nbytes() + 1) if self.one_in(2) else 0)
            return freed
        if kind == 8:
            changed = like.clone(memory_format=torch.contiguous_format)
            if changed.numel():
                bits = changed.view(-1).view(torch.uint8)
                bits[self.below(bits.numel())] = self.below(256)
            return changed
        if kind == 9:
            changed = like.clone(memory_format=torch.contiguous_format)
            if changed.is_floating_point() and changed.numel():
                value = self.of((float("nan"), float("inf"), -1e38, 1e-45, -0.0))
                changed.view(-1)[self.below(changed.numel())] = value
            return changed
        if kind == 10:
            return torch.tensor(self.of((0, -1, 2**33, 2**62)), dtype=torch.int64)
        if like.is_floating_point():
            return torch.nn.Parameter(like.clone())
        return like if like.is_meta or like.dim() == 0 else like.to_sparse()

    def overlapping(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors, with their values, in one memory: the second begins in the first, or right after it.

        They stay as they are where torch could not copy them.
        """
        if any(t.layout is not torch.strided or t.is_meta or not _has_memory(t) for t in (first, second)):
            return first, second
        at = 8 * self.below(-(-first.nbytes // 8) + 1)
        memory = torch.zeros(at + 8 + first.nbytes + second.nbytes, dtype=torch.uint8)

        def placed(tensor: torch.Tensor, begin: int) -> torch.Tensor:
            place = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            return place.copy_(tensor.detach())

        return placed(first, 0), placed(second, at)


def _has_memory(tensor: torch.Tensor) -> bool:
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()
