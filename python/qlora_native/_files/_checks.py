"""What all readers check, and how they name what is wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._core.errors import bad, bad_type, check_float_dtype, check_memory, named
from .._core.weight import QuantizedWeight


def tensor_of(name: str, value: Any, *dtypes: torch.dtype, like: Tensor | None = None) -> Tensor:
    """Check that an argument is a tensor with values, of one of `dtypes`, and on the device of `like`."""
    if not isinstance(value, Tensor):
        raise bad_type(name, "a tensor", type(value).__name__)
    if value.dtype not in dtypes:
        raise bad_type(name, " or ".join(map(str, dtypes)), value.dtype)
    check_memory(name, value)
    if value.is_meta:
        raise bad(name, "a tensor with values", "one on the meta device")
    if like is not None and value.device != like.device:
        raise bad(name, f"a tensor on {like.device}", value.device)
    return value.detach()


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...], what: str = "") -> None:
    """Raise ValueError unless the tensor has one of `shapes`. `what` says in the error what they are made of."""
    if tuple(tensor.shape) not in shapes:
        raise bad(name, " or ".join(str(list(shape)) for shape in shapes) + (what and f", {what}"), list(tensor.shape))


def check_number(name: str, value: Any, *values: int) -> None:
    """Raise unless `value` is one of `values`."""
    if type(value) is not int:
        raise bad_type(name, "an int", type(value).__name__)
    if value not in values:
        raise bad(name, " or ".join(map(str, values)), value)


def check_size(name: str, shape: Any) -> tuple[int, ...]:
    """Check the shape of a weight, (N, K) or (E, N, K), and return it as a tuple of ints."""
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
        raise bad_type(name, "a tuple of ints", shape if isinstance(shape, (tuple, list)) else type(shape).__name__)
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) > 1 << 62:
        raise bad(name, "(N, K) or (E, N, K), each at least 1", tuple(shape))
    return tuple(shape)


def weight_of(name: str, dtype: Any, **fields: Any) -> QuantizedWeight:
    """Make a weight, and check its values. An error begins with `name`, the argument that the values come from."""
    check_float_dtype("dtype", dtype)
    fields = {"nested_absmax": None, "nested_code": None, "offset": None, "code": None, **fields}
    with named(f"{name}, "):
        return QuantizedWeight(**fields, dtype=dtype).check_values()
