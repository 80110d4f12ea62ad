"""`quantize_model`: find the weights of a model that can be quantized, quantize them, and put layers in their place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import functional
from .._core.errors import bad, bad_type, weight_named
from .._core.progress import Progress
from .._core.weight import QuantizedWeight
from . import callbacks
from .adapters import added_by_peft
from .base import QuantizedLayer
from .callbacks import Experts
from .eligible import (
    Unquantized,
    is_linear,
    kept_by_models,
    linears_of_routers,
    note_reason,
    unquantized_parameters,
)
from .embedding import Embedding4bit, can_be_quantized
from .experts import Experts4bit
from .hooks import take_over_hooks
from .linear import linear_class
from .sizes import size_report, why_nothing


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    format: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
    codebook: Tensor | Sequence[float] | None = None,
    progress: bool = True,
    strict: bool = False,
    embeddings: bool = False,
) -> nn.Module:
    """Replace every `nn.Linear` in a model, in place, by a `Linear4bit` over its quantized weight.

    With `format="int8"` it is a `Linear8bit`.

    These layers are not quantized: subclasses of nn.Linear, but for Falcon's, which computes the same; layers that
    share their weight with a module that is not quantized, such as an output layer tied to the embedding; layers that a
    model of transformers keeps in fp32, or whose weight it reads itself (LongT5 casts an input to the weight's dtype);
    and routers, which choose experts, with the linear layers in them.

    A model may have adapters of PEFT. They stay as they are, the layers below them are quantized, and LoRA is fused as
    if the model had been quantized first. Modules in `modules_to_save`, and embeddings below an adapter, stay too.

    With `embeddings=True` every plain `nn.Embedding` becomes an `Embedding4bit`. If it is tied to the output layer, it
    needs `skip=()` too, and the output layer becomes a `Linear4bit` over the same bytes.

    The experts of a mixture, which transformers keeps as parameters of three dimensions, become `Experts4bit`; the
    implementation "qlora_native" of transformers' registry of experts runs them.

    A module or weight that appears several times is quantized once and stays shared. Layers are replaced only after
    every one has been quantized, so an error leaves the model as it was. `size_report(model)` lists what was quantized,
    and what was not and why.

    transformers then treats its model as quantized: `save_pretrained`, also of a larger model that contains `model`,
    writes bitsandbytes' format (or, with "mxfp4" and "nvfp4", one that only this library reads) with a
    quantization_config, or raises a ValueError that names the format it cannot write.

    Args:
        model: any module but a linear layer, which cannot be replaced in place.
        skip: names of modules that stay as they are, with everything in them: "lm_head", "layers.0", "mlp.down_proj". A
            name matches wherever its dotted parts appear in the path of a module. The experts of one layer are skipped
            together.
        format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.
        progress: show the progress on stderr, and then the table of bytes. On a terminal the progress is a bar, if tqdm
            is installed; in a log file it is a line now and then.
        strict: refuse a model that has weights whose use is unknown. Otherwise they stay in 16 bits, with a warning if
            they may be experts.
        embeddings: quantize embeddings too.

    Returns:
        `model`. Warns if it has nothing to quantize, and says what was left, and why.

    Raises:
        TypeError: `model` is not a module, `skip` is a string, or `embeddings` is no bool.
        ValueError: `model` is a linear layer; `strict`, and there are weights whose use is unknown; or the experts of a
            layer differ in shape; or an adapter is merged into a layer.
        NotImplementedError: a method of PEFT over a layer has not been tried over quantized ones.
        TypeError, ValueError: `qlora_native.quantize` refuses a weight or an argument; the message names the layer.
    """
    check_model(model, skip)
    if not isinstance(embeddings, bool):
        raise bad_type("embeddings", "a bool", type(embeddings).__name__)
    callbacks.load_integrations()
    found = find(model, tuple(skip), strict, embeddings)
    if not found.names and not found.experts:
        warnings.warn(f"quantize_model: found no nn.Linear to quantize; {why_nothing(model)}", stacklevel=2)
    layers = _quantize(model, found, (format, blocksize, double_quant, codebook), progress)
    _replace(model, found, layers)
    for each in found.unknown:
        if each.is_stack:
            warnings.warn(f"quantize_model: {each}", stacklevel=2)
    if layers and progress:
        sys.stderr.write(f"{size_report(model)}\n")
    return model


def check_model(model: Any, skip: Any) -> None:
    """Raise unless `model` is a module whose layers can be replaced, and `skip` is not a single name."""
    if not isinstance(model, nn.Module):
        raise bad_type("model", "an nn.Module", type(model).__name__)
    if isinstance(model, nn.Linear):
        raise bad("model", "a module that contains nn.Linear layers", "a linear layer: use Linear4bit.from_linear")
    if isinstance(skip, str):
        raise bad_type("skip", "a sequence of names", "a string")


@dataclass(frozen=True)
class Found:
    """What a model has to be quantized.

    Attributes:
        names: the paths of linear layers and embeddings. A shared module has several.
        experts: the modules with experts.
        unknown: weights that stay because their use is unknown.
    """

    names: list[str]
    experts: list[Experts]
    unknown: list[Unquantized]


def find(model: nn.Module, skip: tuple[str, ...], strict: bool, embeddings: bool) -> Found:
    """Find what is to be quantized, and check what can be checked before memory is taken."""
    skip += tuple(kept_by_models(model))
    names = _to_quantize(model, skip, embeddings)
    experts = [each for find in callbacks.find_experts for each in find(model) if not _skipped(each, skip)]
    for each in experts:
        each.check_shapes()
    weights = {id(model.get_submodule(name).weight) for name in names}
    weights |= {id(getattr(each.module, name)) for each in experts for name in each.names}
    unknown = [each for each in unquantized_parameters(model, weights) if each.unknown_use]
    if unknown and strict:
        raise bad("model", "weights whose use is known", "; ".join(map(str, unknown)))
    for check in callbacks.check_model:
        check(model, weights)
    return Found(names, experts, unknown)


def _quantize(
    model: nn.Module, found: Found, options: tuple[Any, ...], progress: bool
) -> dict[int | tuple[int, str], QuantizedLayer]:
    """Make the layers, by the id of the module, or for experts by (id of the module, name of the parameter)."""
    weights: dict[int, QuantizedWeight] = {}  # by the id of the weight

    def quantized(path: str, weight: Tensor, transposed: bool = False) -> QuantizedWeight:
        if id(weight) not in weights:
            with weight_named(path):
                weights[id(weight)] = functional.quantize(weight.transpose(1, 2) if transposed else weight, *options)
        return weights[id(weight)]

    layers: dict[int | tuple[int, str], QuantizedLayer] = {}

    def add(key: int | tuple[int, str], weight: Tensor, layer: QuantizedLayer, module: nn.Module) -> None:
        layers[key] = layer.train(module.training)
        weights[id(weight)] = layer.quantized_weight  # so that a layer tied to this one shares its parameters

    items = [*found.names, *found.experts]
    for item in Progress(len(items), progress, "quantize", "layer").over(items):
        if isinstance(item, str):
            dense = model.get_submodule(item)
            if id(dense) in layers:
                continue
            q = quantized(f"{item}.", dense.weight)
            if isinstance(dense, nn.Embedding):
                add(id(dense), dense.weight, Embedding4bit.from_quantized(q, dense.padding_idx), dense)
            else:
                add(id(dense), dense.weight, linear_class(q).from_quantized(q, dense.bias), dense)
            continue
        for name in item.names:
            if (id(item.module), name) not in layers:
                weight = getattr(item.module, name)
                q = quantized(f"{item.path}.{name}, ", weight, item.transposed)
                layer = Experts4bit.from_quantized(q, item.transposed)
                add((id(item.module), name), weight, layer, item.module)
    return layers


def _replace(model: nn.Module, found: Found, layers: dict[int | tuple[int, str], QuantizedLayer]) -> None:
    """Put the layers into the model."""
    for name in found.names:
        parent, _, child = name.rpartition(".")
        dense = model.get_submodule(name)
        take_over_hooks(layers[id(dense)], dense)
        setattr(model.get_submodule(parent), child, layers[id(dense)])
    for each in found.experts:
        for name in each.names:
            each.module._parameters.pop(name, None)
            setattr(each.module, name, layers[id(each.module), name])
        each.run_quantized()
    if layers:
        for adopt in callbacks.adopt_model:
            adopt(model)


def _is_named(skip: tuple[str, ...], path: str) -> bool:
    """Whether one of the names to skip appears in `path`, or is `path` and a "$"."""
    return any(f".{part}." in f".{path}." or part == f"{path}$" for part in skip)


def _skipped(found: Experts, skip: tuple[str, ...]) -> bool:
    """Whether `skip` names the experts of a module. If so, the reason is stored there for the report."""
    skipped = any(_is_named(skip, f"{found.path}.{name}") for name in found.names)
    if skipped:
        note_reason(found.module, "named in skip")
    return skipped


def _to_quantize(model: nn.Module, skip: tuple[str, ...], embeddings: bool) -> list[str]:
    """The paths of the linear layers and embeddings to replace. A shared module has several."""
    modules = list(model.named_modules(remove_duplicate=False))
    routers = {id(model.get_submodule(name)) for name in linears_of_routers(model)}
    skipped = {id(module) for name, module in modules if _is_named(skip, name)} - routers
    staying_modules = skipped | routers | added_by_peft(model)
    found = [
        (name, module)
        for name, module in modules
        if (is_linear(module) or (embeddings and can_be_quantized(module))) and id(module) not in staying_modules
    ]
    chosen = {id(module) for _, module in found}
    staying = {
        id(parameter)
        for module in model.modules()
        if id(module) not in chosen
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        if not is_linear(module) or id(module) in routers:
            continue
        if id(module) in skipped:
            note_reason(module, "named in skip, or kept by the model")
        elif id(module.weight) in staying:
            note_reason(module, "tied to a weight that stays")
    return [name for name, module in found if id(module.weight) not in staying]
