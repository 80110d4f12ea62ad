"""Lazy tensors: what a module returns is computed only if anything but the op that is meant to follow reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Deferred:
    """Stands for a tensor, which any use computes but for the operations that a subclass defers, too.

    Whoever reads it first, as a hook may under `torch.no_grad`, its graph is that of the place where it was made.
    """

    computed: Tensor | None = None

    def __init__(self) -> None:
        """Note whether gradients are recorded here."""
        self._records_gradients = torch.is_grad_enabled()

    def compute(self) -> Tensor:
        """The tensor that this stands for."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """The same, computed once."""
        if self.computed is None:
            # Outside of inference mode gradients are recorded.
            with torch.inference_mode(False) if self._records_gradients else torch.no_grad():
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

    def __rmul__(self, other: Any) -> Any:
        """The product, which a subclass may know better."""
        return self * other

    __hash__ = object.__hash__  # with __eq__, which compares elements, there would be none
    __array_priority__ = 1000  # that of a tensor: NumPy's numbers leave the operation to it


def _operator(name: str) -> Callable[..., Any]:
    """A tensor's method `name`, on the computed tensor."""

    def operate(self: Deferred, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    operate.__name__ = name
    return operate


# Python looks for operators on the type, where __getattr__ does not apply. Those in place are left out: Python then
# takes the others, and binds the name anew.
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_OTHERS = "lt le gt ge eq ne neg pos abs invert bool int float complex index len iter contains getitem setitem array"
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS.split()):
    if (_method := f"__{_name}__") not in vars(Deferred):
        setattr(Deferred, _method, _operator(_method))


def is_plain(*tensors: Any) -> bool:
    """Whether they are tensors of torch's own, and nobody traces or compiles what happens to them."""
    for tensor in tensors:  # all() over a generator costs a microsecond more, in every block for every token
        if type(tensor) not in _PLAIN:
            return False
    return not torch.compiler.is_compiling()
