"""Layers whose weight keeps the bytes of a file, before and while it is read.

What is kept is decided on the model without values, before anything is read. Each such layer becomes a `Pending`, which
has no weight, so that transformers reads everything else; then each weight is read, and its layer takes the place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.accelerate import get_device
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..._core.errors import bad
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import is_linear, kept_by_models
from ..._layers.experts import Experts4bit
from ..._layers.linear import linear_class
from ._embeddings import embedding_like
from ._experts import find_experts, run_quantized

_SHOWN = 8  # names in an error
NO_LAYER = "which no linear layer, embedding or stack of experts has, or whose dtype the model reads"


@dataclass(frozen=True)
class Target:
    """A place in a model where a quantized weight can be.

    Attributes:
        path: of the linear layer, the embedding or the parameter of experts.
        shape: (N, K), or (E, N, K) of experts.
        dtype: of the parameter that it replaces.
        make: makes the layer over a weight.
        transposed: whether the parameter is [K, N], or [E, K, N].
        bias: of the layer, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[QuantizedWeight], QuantizedLayer]
    transposed: bool = False
    bias: nn.Parameter | None = None


@dataclass(frozen=True)
class Kept:
    """A weight of a file that keeps its bytes.

    Attributes:
        target: where it belongs.
        names: the tensors that it is made of, for errors.
        nbytes: about as many as it will have.
        read: reads it.
    """

    target: Target
    names: tuple[str, ...]
    nbytes: int
    read: Callable[[], QuantizedWeight]


@dataclass(frozen=True)
class Decoded:
    """A weight of a file that is decoded.

    Attributes:
        name: of the parameter.
        names: the tensors that it is made of, for errors.
        transposed: whether the parameter is [K, N], or [E, K, N].
        read: reads it.
    """

    name: str
    names: tuple[str, ...]
    transposed: bool
    read: Callable[[], QuantizedWeight]


@dataclass(frozen=True)
class Plan:
    """What becomes of the tensors of a file, or of a folder's files.

    Attributes:
        source: the file or the folder, for errors.
        kept: the weights that keep their bytes.
        refused: {a quantized weight: why it can only be decoded}.
        dense: {name: tensor} for transformers to read, or None where it reads the files.
        conversions: what transformers does to names and tensors, or None if it is as for any files of the model.
        decoded: the weights of `refused` that transformers cannot read.
        consumed: the names of the tensors of quantized weights, as transformers renames them.
    """

    source: str
    kept: list[Kept]
    refused: dict[str, str]
    dense: dict[str, Any] | None = None
    conversions: list[Any] | None = None
    decoded: list[Decoded] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)


class CannotBeKept(ValueError):
    """The reason why a quantized weight of a file can only be a weight in 16 bits."""


def converted(
    tensors: dict[str, Any], operation: ConversionOps, converter: WeightConverter, name: str, model: nn.Module
) -> dict[str, Any]:
    """Run one operation of transformers' converter of the parameter `name`."""
    return operation.convert(
        tensors,
        source_patterns=converter.source_patterns,
        target_patterns=converter.target_patterns,
        full_layer_name=name,
        model=model,
        config=model.config,
    )


def checked_order(name: str, order: Tensor, rows: int) -> Tensor:
    """The numbers of rows that a conversion has moved, flat, if that is all that it does."""
    order = order.reshape(-1)
    if not torch.equal(order.sort().values, torch.arange(rows)):
        raise CannotBeKept(f"{name}, whose values transformers changes")
    return order


class Pending(nn.Module):
    """Stands in for a layer until its weight is read: it has the layer's bias, and the weight's size."""

    def __init__(self, kept: Kept, training: bool) -> None:
        super().__init__()
        self.kept = kept
        # By its size transformers distributes the layers of a model over devices.
        self.unread = nn.Parameter(torch.empty(kept.nbytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = kept.target.bias
        self.training = training


def ignores(model: nn.Module, name: str) -> bool:
    """Whether a model does not need a tensor of the files: it says so itself, or has another head, or none."""
    if name.startswith(("lm_head.", "output.")) and model.get_output_embeddings() is None:
        return True
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def targets(model: nn.Module) -> dict[str, Target]:
    """Where `model` can have quantized weights: {name of the parameter: the place}."""
    found: dict[str, Target] = {}
    # transformers casts to the dtype of the weights that it keeps in fp32, such as T5's, what it multiplies by them.
    keep = [*kept_by_models(model), "dt_proj"]  # Jamba and Falcon's Mamba read it, too, unless the model is quantized
    for path, module in model.named_modules():
        if not should_convert_module(path, keep):
            continue
        if is_linear(module) or isinstance(module, Conv1D):
            found[f"{path}.weight"] = _linear(path, module)
        elif (make := embedding_like(module)) is not None:
            found[f"{path}.weight"] = Target(path, tuple(module.weight.shape), module.weight.dtype, make)
    for experts in find_experts(model):
        for name, shape in zip(experts.names, experts.shapes, strict=True):
            path = f"{experts.path}.{name}"
            if should_convert_module(path, keep):
                found[path] = _experts(path, experts.module, name, shape, experts.transposed)
    for target, source in model.all_tied_weights_keys.items():
        if target not in found or source not in found:  # one tensor, which one of its uses needs in 16 bits
            found.pop(target, None)
            found.pop(source, None)
    return found


def _linear(path: str, module: nn.Module) -> Target:
    transposed = isinstance(module, Conv1D)
    N, K = reversed(module.weight.shape) if transposed else module.weight.shape

    def make(q: QuantizedWeight) -> QuantizedLayer:
        layer = linear_class(q).from_quantized(q)
        layer.transposed_source = transposed
        return layer

    return Target(path, (N, K), module.weight.dtype, make, transposed, module.bias)


def _experts(path: str, module: nn.Module, name: str, shape: tuple[int, ...], transposed: bool) -> Target:
    def make(q: QuantizedWeight) -> QuantizedLayer:
        run_quantized(module)
        return Experts4bit.from_quantized(q, transposed)

    return Target(path, shape, getattr(module, name).dtype, make, transposed)


def incomplete_experts(kept: dict[str, Kept]) -> list[str]:
    """The names of stacks of experts whose layer has another stack that is not kept: one product runs both."""
    layers: dict[str, list[str]] = {}
    for name, each in kept.items():
        if len(each.target.shape) == 3:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return [names[0] for names in layers.values() if len(names) == 1]


def put_pending(model: nn.Module, weights: Iterable[Kept]) -> None:
    """Replace the layers of `weights` by `Pending`.

    Stacks of experts become children of their module in the order of its parameters, by which PEFT names adapters.
    """
    places = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    for kept in sorted(weights, key=lambda each: places.get(each.target.path, -1)):
        parent, _, name = kept.target.path.rpartition(".")
        module = model.get_submodule(parent)
        was_parameter = module._parameters.pop(name, None) is not None
        training = True if was_parameter else module.get_submodule(name).training
        setattr(module, name, Pending(kept, training))


def pending(model: nn.Module) -> dict[str, Pending]:
    """The layers of `model` whose weight has not been read."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Pending)}


def read_pending(model: nn.Module, plan: Plan, device_map: Any) -> None:
    """Read the weights of all `Pending` layers, one after the other, and put their layers into the model.

    Args:
        model: the model.
        plan: what becomes of the files.
        device_map: where modules go, or None.

    Raises:
        ValueError: bytes of the file are no weight. The message names each tensor.
    """
    wrong = []
    for path, waiting in pending(model).items():
        try:
            layer = _layer(waiting.kept, get_device(device_map, path) if device_map else "cpu")
        except (TypeError, ValueError) as error:
            wrong.append(f"{waiting.kept.names[0]}: {error}")
            continue
        if waiting.bias is not None:
            layer.bias = waiting.bias
        for tensor in layer.weight_tensors().values():
            tensor._is_hf_initialized = True  # tells transformers that it has values
        model.set_submodule(path, layer.train(waiting.training))
    for each in plan.decoded:
        try:
            _decode(model, each, get_device(device_map, each.name) if device_map else "cpu")
        except (TypeError, ValueError) as error:
            wrong.append(f"{each.names[0]}: {error}")
    if wrong:
        raise ValueError(f"{plan.source}: {len(wrong)} of its weights cannot be read: {listed(wrong)}")


def _layer(kept: Kept, device: Any) -> QuantizedLayer:
    q = kept.read()
    if q.shape != kept.target.shape:
        raise bad("its shape", f"{list(kept.target.shape)}, as the model has", list(q.shape))
    return kept.target.make(q.to(device))


def _decode(model: nn.Module, each: Decoded, device: Any) -> None:
    parent, _, name = each.name.rpartition(".")
    module = model.get_submodule(parent)
    old = module._parameters[name]
    weight = each.read().dequantize(old.dtype)
    weight = weight.transpose(-1, -2).contiguous() if each.transposed else weight
    if weight.shape != old.shape:
        raise bad("its shape", f"{list(old.shape)}, as the model has", list(weight.shape))
    module._parameters[name] = nn.Parameter(weight.to(device), requires_grad=False)
    module._parameters[name]._is_hf_initialized = True


def listed(sentences: list[str]) -> str:
    """The first of these, and how many more there are."""
    more = f"; and {len(sentences) - _SHOWN} more" * (len(sentences) > _SHOWN)
    return "; ".join(sentences[:_SHOWN]) + more
