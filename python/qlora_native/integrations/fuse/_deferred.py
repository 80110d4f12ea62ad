"""Results of a module that are computed only if anything but the step that follows reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Deferred:
    """A tensor for everything but what a subclass knows better: any use of it computes the tensor."""

    computed: Tensor | None = None

    def compute(self) -> Tensor:
        """The tensor that this stands for."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """The same, computed once."""
        if self.computed is None:
            self.computed = self.compute()
        return self.computed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's functions see the tensor."""
        args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Deferred) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Everything else that a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        """Some of its elements."""
        return self.tensor()[index]

    def __len__(self) -> int:
        """The first dimension, as a tensor's."""
        return len(self.tensor())

    # Python looks for operators on the type, where __getattr__ does not apply.
    def __add__(self, other: Any) -> Any:
        return self.tensor() + other

    def __sub__(self, other: Any) -> Any:
        return self.tensor() - other

    def __neg__(self) -> Tensor:
        return -self.tensor()

    def __matmul__(self, other: Any) -> Any:
        return self.tensor() @ other

    def __mul__(self, other: Any) -> Any:
        return self.tensor() * other

    def __truediv__(self, other: Any) -> Any:
        return self.tensor() / other

    def __radd__(self, other: Any) -> Any:
        return other + self.tensor()

    def __rmul__(self, other: Any) -> Any:
        return self * other


def is_plain(*tensors: Any) -> bool:
    """Whether they are tensors of torch's own, and nobody traces or compiles what happens to them."""
    for tensor in tensors:  # all() over a generator costs a microsecond more, in every block for every token
        if type(tensor) not in _PLAIN:
            return False
    return not torch.compiler.is_compiling()
