"""`DequantizedLinear`, a quantized layer whose decoded weight PEFT's tuners can read and merge into (_methods.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..._core.errors import bad
from ..._core.quantize import quantized_like
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ...nn import Linear4bit, Linear8bit


class WeightWritten(NotImplementedError):
    """Code wrote to the decoded weight of a quantized layer, which would have had no effect."""


class _DequantizedWeight(nn.Parameter):
    """A decoded weight [N, K]. It is a copy, so assigning to it raises: the values would be lost."""

    @property
    def data(self) -> Tensor:
        """The values, as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise WeightWritten("Linear4bit.weight: expected to be read, got values to put in its place: it has 4 bits")


class DequantizedLinear(Linear4bit):
    """A layer for PEFT: reading `weight` [out_features, in_features] decodes it.

    Parameters, buffers, state dict and forward pass are those of `Linear4bit`, and `W_q` is the codes. A layer turns
    into one of the two classes below, and back, by `make_readable` and `make_plain`.
    """

    @property
    def weight(self) -> nn.Parameter:
        """The decoded weight, a new frozen parameter at each call."""
        codes = self._parameters.get("weight")
        if codes is None:
            raise AttributeError("weight")
        return _DequantizedWeight(self.dequantize(), requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, as in any module; but `weight` can only be set to codes."""
        if name == "weight" and getattr(value, "dtype", None) != torch.uint8:
            raise WeightWritten("Linear4bit.weight: expected codes, got a weight: it has 4 bits. Use replace_weight")
        super().__setattr__(name, value)


class DequantizedLinear4bit(DequantizedLinear):
    """A `Linear4bit` whose weight PEFT reads."""


class DequantizedLinear8bit(DequantizedLinear, Linear8bit):
    """A `Linear8bit` whose weight PEFT reads."""


_READABLE: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: DequantizedLinear4bit,
    Linear8bit: DequantizedLinear8bit,
}


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is of one of this library's own classes, whose weight PEFT does not read."""
    return type(layer) in _READABLE


def make_readable(layer: nn.Module) -> None:
    """Let PEFT read the weight of a plain layer."""
    layer.__class__ = _READABLE[type(layer)]


def make_plain(layer: nn.Module) -> None:
    """Turn a layer whose weight PEFT has read back into what it was."""
    layer.__class__ = next(plain for plain, readable in _READABLE.items() if readable is type(layer))


def base_to_merge_into(layer: BaseTunerLayer) -> Linear4bit:
    """The quantized layer directly below `layer`.

    A layer of another method in between would have merged into the same weight and would restore it out of order.
    """
    base = layer.base_layer
    if not isinstance(base, Linear4bit):
        raise NotImplementedError(
            f"{_name(layer)} over {_name(base)} over Linear4bit: expected one method on a layer to merge, got two. "
            "merge_and_unload of the model takes them one after the other"
        )
    return base


def run_over_dequantized(layer: BaseTunerLayer, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run PEFT's `merge` or `unmerge` on an `nn.Linear` with the decoded weight, and quantize the result.

    The weight and bias from before the first `merge` are kept and restored when nothing is merged any more.

    Raises:
        NotImplementedError: two layers of PEFT are stacked over the quantized one.
        ValueError: the merged weight has NaN or Inf. Nothing is changed.
    """
    base = base_to_merge_into(layer)
    kept = layer.__dict__.get("_before_merge")
    bias = None if base.bias is None else base.bias.data.clone()
    before, merged = (base.quantized_weight, bias), list(layer.merged_adapters)
    layer.base_layer = dense = _dense(base)
    try:
        method(layer, *args, **kwargs)
        if layer.merged_adapters == merged:
            return
        weight, bias = kept if kept and not layer.merged_adapters else (requantized(dense.weight, before[0]), None)
    except BaseException as error:
        layer.merged_adapters[:] = merged
        if bias is not None:
            base.bias.data = bias
        if isinstance(error, NotImplementedError) and not str(error):  # PEFT's error has no text
            raise NotImplementedError(f"{_name(layer)}: PEFT does not {method.__name__} this method") from None
        raise
    finally:
        layer.base_layer = base
    base.replace_weight(weight.to(before[0].device))
    base.bias = dense.bias
    if bias is not None:
        base.bias.data = bias.to(base.bias)
    layer.__dict__["_before_merge"] = (kept or before) if layer.merged_adapters else None


def _name(layer: nn.Module) -> str:
    """The method and the class of a layer of PEFT: "ia3.Linear"."""
    return ".".join((*type(layer).__module__.split(".")[-2:-1], type(layer).__name__))


def _dense(base: Linear4bit) -> nn.Linear:
    """The layer in 16 bits: its decoded weight, and its own bias, not a copy."""
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(base.dequantize(), requires_grad=False)
    dense.bias = base.bias
    return dense


def requantized(weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantize `weight` to the format of `like`.

    Raises:
        ValueError: weights are not quantized to this format, but read from files.
    """
    _check_quantizes(like)
    return quantized_like(like, weight.detach())


def _check_quantizes(like: QuantizedWeight) -> None:
    if not like.layout.quantizes:
        raise bad(
            "merge",
            "a weight in a format that weights are quantized to",
            f"{like.format}, the bytes of a file: use the adapter beside that file, or merge it into the model that "
            "dequantize() of the model without adapters returns",
        )


def check_merge(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise what merging adapters into a layer of `model` would raise for its format, before one is merged.

    Args:
        model: a model with layers of PEFT.
        adapter_names: the adapters; None is the active ones of each layer.

    Raises:
        ValueError: a weight is the bytes of a file.
    """
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            names = layer.active_adapters if adapter_names is None else adapter_names
            if not layer._get_available_adapters().isdisjoint(names):
                base = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer()
                if isinstance(base, QuantizedLayer):
                    _check_quantizes(base.quantized_weight)
