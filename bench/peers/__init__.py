"""Adapters: one file for each contestant, with the same few functions.

NAME                          its name in the table
missing() -> str | None       the reason why it cannot run here, or None
supports(case) -> bool        whether it takes part in a case
hold(weight, dense, dtype)    its resident form of `weight` [N, K] bf16; `dense` is the same weight after our
                              quantization, decoded to the dtype of the activations
copy(held)                    a copy in other memory
nbytes(held)                  the bytes of the weight, which decide on the number of copies
quantize(weight)              weight [N, K] -> something
dequantize(held, dtype)       -> [N, K]
forward(held, x)              x [M, K] -> [M, N], differentiable in x
backward_input(held, dy)      dy [M, N] -> [M, K]
attach(held, **lora)          held with an adapter, from the arguments of qn.linear; only for contestants of such cases
ERROR                         the allowed relative error of its results from those of our codes (default: checks.py)
"""

from __future__ import annotations

import importlib
from types import ModuleType

DEFAULT = {
    "cpu": ("torch_dense", "bitsandbytes", "bitsandbytes_packed", "torchao", "peft_unfused"),
    "cuda": ("torch_dense", "bitsandbytes", "peft_unfused"),
}


def load(names: tuple[str, ...] | list[str]) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Load adapters: ({name: adapter}, {name: the reason why it is missing}).

    Raises:
        ValueError: there is no such adapter.
    """
    found, missing = {}, {}
    for name in names:
        try:
            adapter = importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name == f"{__name__}.{name}":
                raise ValueError(f"peers: expected a file of bench/peers, got {name!r}") from None
            raise
        reason = adapter.missing()
        if reason is None:
            found[name] = adapter
        else:
            missing[name] = reason
    return found, missing
