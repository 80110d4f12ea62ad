"""Errors of bad arguments: each names the argument, what was expected and what it got, as qlora_native::Error does."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bad(argument: str, expected: str, got: Any) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def bad_type(argument: str, expected: str, got: Any) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{argument}: expected {expected}, got {got}")


def is_finite(value: float) -> bool:
    """Whether a number is finite. torch.compile(dynamic=True) can trace this, and cannot trace math.isfinite."""
    return abs(value) <= sys.float_info.max


def is_finite_number(value: Any) -> bool:
    """Whether `value` is an int or a float that is finite as a float."""
    return type(value) in (int, float) and is_finite(value)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in files and errors: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Put what a value belongs to in front of an error about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}") from None


@contextmanager
def weight_named(prefix: str) -> Iterator[None]:
    """Put the path of a weight in front of an error about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}" if str(error).startswith("weight") else str(error)) from None


def check_float_dtype(argument: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is fp32, bf16 or fp16."""
    if dtype not in FLOAT_DTYPES:
        raise bad_type(argument, "torch.float32, torch.bfloat16 or torch.float16", dtype)


def check_memory(argument: str, tensor: Any, like: torch.Tensor | None = None) -> None:
    """Raise unless `tensor` is dense and its storage still holds all of its elements.

    FSDP and offloading free a storage while tensors still refer to it. Not checked are what is no tensor, subclasses
    such as DTensor, the wrappers of `torch.func`, which have no storage, and all that `torch.compile` traces. A meta
    tensor passes only if `like` is None or a meta tensor too.
    """
    if type(tensor) not in _PLAIN_TENSORS or torch.compiler.is_compiling():
        return
    if like is not None and tensor.is_meta and not like.is_meta:
        raise bad(argument, "a tensor with values", "one on the meta device")
    _check_storage(argument, tensor)


def _check_storage(argument: str, tensor: torch.Tensor) -> None:
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        if tensor.layout is not torch.strided:
            raise bad_type(argument, "a dense tensor", tensor.layout) from None
        return  # a wrapper of torch.func
    needed = tensor.nbytes
    if not tensor.is_contiguous() and needed > 0:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (last + 1) * tensor.itemsize
    if needed > 0 and tensor.storage_offset() * tensor.itemsize + needed > held:
        raise bad(argument, "a tensor with memory", "one whose storage was freed")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor, by name, as torch.distributed.tensor takes long to import."""
    return type(tensor).__name__ == "DTensor"


def check_local(argument: str, tensor: torch.Tensor) -> None:
    """Raise TypeError if `tensor` is a DTensor: the kernels know only tensors of one process."""
    if is_dtensor(tensor):
        raise bad_type(argument, "a tensor of this process", "a DTensor, of which each process has a part")


def checks_memory(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` check the memory of each tensor among its arguments, in order, before anything reads one.

    torch's casts, comparisons and products do not check it: they end the process, or read what now lies there.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            for name, value in zip(names, args):  # noqa: B905  (the function itself refuses arguments that are too many)
                if type(value) in _PLAIN_TENSORS:
                    _check_storage(name, value)
            for name, value in kwargs.items():
                if type(value) in _PLAIN_TENSORS:
                    _check_storage(name, value)
        return function(*args, **kwargs)

    return checked
