"""PEFT's methods other than LoRA, and LoRA's variants, over `Linear4bit`. docs/peft.md lists what each of them does.

PEFT finds layers by their class, and `Linear4bit` is an `nn.Linear`. So each of its tuners treats it as a layer whose
`weight` it may read, add to and replace. There are more than forty tuners, written in many styles. This module
therefore has no code for a single tuner, but intercepts the three things that they do to a layer:

- **Reading.** While PEFT makes its layers, and as long as a tuner stands over it, a `Linear4bit` is a
  `DequantizedLinear`, with the same tensors, but a `weight` that decodes. Its forward pass stays the 4-bit product.
  (Plain LoRA and DoRA do not read the weight, so a layer under them becomes a `Linear4bit` again.)
- **Merging.** `merge` and `unmerge` of a tuner's layer run over an `nn.Linear` with the decoded weight, and the result
  is quantized to the format of the weight. The old weight is kept, and `unmerge` restores it bit for bit.
- **Writing** anywhere else raises. A method that first changes the weight (PiSSA, OLoRA, ...) is refused before
  anything is changed: the changed weight would have to be rounded to 4 bits, and the model would no longer be the same.

A tuner that is not in `METHODS` has not been tested and is refused, so a new PEFT cannot give unknown results.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, save_and_load
from torch import nn

from ..._layers.base import QuantizedLayer
from ..._layers.eligible import is_router
from ...nn import Embedding4bit, Experts4bit, Linear4bit
from ._dequantized import (
    DequantizedLinear,
    WeightWritten,
    check_merge,
    is_plain,
    make_plain,
    make_readable,
    run_over_dequantized,
)
from ._experts import check_experts_config, experts_as_parameters, targeted_experts

# The PEFT types that may stand over a Linear4bit. tests/test_peft_methods.py runs each of them.
METHODS = frozenset(
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LOHA LOKR LORA MISS OFT "
    "OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT XLORA".split()
)
# Prefixes of init_lora_weights, and fields of a LoraConfig, with which LoRA starts by changing the weight.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
CHANGES_BASE_FIELDS = ("kasa_config",)


# ---- what PEFT calls -------------------------------------------------------------------------------------------------


def install() -> None:
    """Wrap the functions by which PEFT makes, merges and unloads its layers. A second call does nothing."""
    if getattr(BaseTuner.inject_adapter, "_qlora_native", False):
        return
    for name, wrapper in (
        ("__init__", _makes_layers),
        ("inject_adapter", _makes_layers),
        ("merge_and_unload", _unloaded),
        ("merge_and_unload", _merges),
        ("merge_adapter", _merges),
        ("unload", _unloaded),
    ):
        wrapped = wrapper(getattr(BaseTuner, name))
        wrapped._qlora_native = True
        setattr(BaseTuner, name, wrapped)
    save_and_load.get_embedding_layer_name = _unless_quantized(save_and_load.get_embedding_layer_name)


def _makes_layers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap BaseTuner's `__init__` or `inject_adapter`, which take the model first and make layers."""

    @functools.wraps(method)
    def wrapped(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
            return method(self, model, *args, **kwargs)
        for config in vars(self).get("peft_config", {}).values():
            _check_modules_to_save(model, config)
            _leave_out_routers(model, config)
        with _dequantized(model), experts_as_parameters(model), _checked(self):
            return method(self, model, *args, **kwargs)

    return wrapped


@contextmanager
def _checked(tuner: BaseTuner) -> Iterator[None]:
    """While `tuner` makes layers, refuse each one over a quantized layer whose method is refused, before it is made."""
    if "_create_and_replace" in vars(tuner):  # `__init__` has called `inject_adapter`
        yield
        return
    method = tuner._create_and_replace

    @functools.wraps(method)
    def create(config: PeftConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        name = getattr(config.peft_type, "value", config.peft_type)
        if isinstance(base, Experts4bit):  # named as a module, which it would not be in 16 bits
            key = kwargs.get("current_key", args[-1] if args else "experts")
            warnings.warn(f"target_modules: {key} are experts, left as they are: see target_parameters", stacklevel=2)
            return None
        if isinstance(base, Embedding4bit):
            raise NotImplementedError(f"{name} over Embedding4bit: expected an embedding in 16 bits (name it in skip)")
        if targeted_experts(target, kwargs.get("parameter_name")):
            check_experts_config(name, config)
            if getattr(target, "_is_expert_parallel", False):
                raise NotImplementedError("target_parameters: expected all experts in this process, got a part of them")
        if not isinstance(base, Linear4bit):
            return method(config, adapter_name, target, *args, **kwargs)
        if not isinstance(base, DequantizedLinear) and name != "LORA":
            raise NotImplementedError(f"{name} over {type(base).__name__}: expected a Linear4bit, got a subclass")
        if base.is_part and name != "LORA":
            raise NotImplementedError(f"{name}: expected LoRA over a layer in tensor parallelism")
        _check_config(name, config, kwargs.get("parameter_name"))
        _switch_fan_in_fan_out_off(config)
        try:
            return method(config, adapter_name, target, *args, **kwargs)
        except WeightWritten as error:
            raise WeightWritten(f"{name}: {error}") from None

    vars(tuner)["_create_and_replace"] = create
    try:
        yield
    finally:
        del vars(tuner)["_create_and_replace"]


def _check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a quantized layer among the modules of which all weights, or some rows, are to be trained."""
    wanted = getattr(config, "modules_to_save", None) or ()
    if getattr(config, "trainable_token_indices", None) and any(isinstance(m, Embedding4bit) for m in model.modules()):
        raise NotImplementedError("trainable_token_indices: expected an embedding in 16 bits, got Embedding4bit")
    for name, module in model.named_modules():
        quantized = isinstance(module, (Linear4bit, Embedding4bit)) or any(
            isinstance(m, Experts4bit) for m in (module, *module.children())
        )
        if quantized and any(name == key or name.endswith(f".{key}") for key in wanted):
            raise NotImplementedError(f"modules_to_save: expected modules that are not quantized, got {name}")


def _leave_out_routers(model: nn.Module, config: PeftConfig) -> None:
    """Exclude from "all-linear" the routers that are subclasses of nn.Linear, as those of Llama 4 and PhiMoE are.

    Their forward returns a tuple, at which a layer of PEFT fails, over 16 bits too.
    """
    targets = getattr(config, "target_modules", None)
    routers = (
        [name for name, m in model.named_modules() if is_router(m) and isinstance(m, nn.Linear)] if targets else []
    )
    all_linear = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if all_linear and routers and hasattr(config, "exclude_modules"):
        named = config.exclude_modules
        if isinstance(named, str):
            config.exclude_modules = "|".join((f"(?:{named})", *map(re.escape, routers)))
        else:
            config.exclude_modules = {*(named or ()), *routers}
        return
    for name in routers:
        if all_linear or check_target_module_exists(config, name):
            remedy = "name it in exclude_modules" if hasattr(config, "exclude_modules") else "list the others by name"
            kind = type(model.get_submodule(name)).__name__
            raise NotImplementedError(
                f"target_modules: expected layers that return a tensor, got {name}, a {kind}, which returns a tuple: "
                f"{remedy}"
            )


def _check_config(method: str, config: PeftConfig, parameter: str | None) -> None:
    """Refuse a config that cannot work over quantized layers.

    Args:
        method: PEFT's name of the method.
        config: the config that was given to PEFT.
        parameter: the parameter of the layer that `target_parameters` names, or None if the layer itself is targeted.
    """
    if parameter not in (None, "weight"):
        raise NotImplementedError(f"{method}, target_parameters: expected weight of a Linear4bit, got {parameter}")
    if method not in METHODS:
        raise _not_tried(method)
    start = getattr(config, "init_lora_weights", None)
    field = next((name for name in CHANGES_BASE_FIELDS if getattr(config, name, None)), None)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        field = f"init_lora_weights={start!r}"
    if method == "LORA" and field is not None:
        raise NotImplementedError(
            f"LoRA with {field} over Linear4bit: it starts by changing the weight, and what is left would be rounded "
            "to 4 bits once more. Start it over the model in 16 bits, or use initialize_loftq of "
            "qlora_native.integrations.loftq"
        )


def check_method(name: str, layer: BaseTunerLayer) -> None:
    """Refuse the layer `name` of PEFT if its method has not been tried over quantized layers."""
    tuners = (tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if kind.value in METHODS)
    # X-LoRA has no layers of its own, but those of LoRA.
    if not isinstance(layer, tuple(tuner.tuner_layer_cls for tuner in tuners if hasattr(tuner, "tuner_layer_cls"))):
        raise _not_tried(f"{name}, {type(layer).__module__}.{type(layer).__name__}")


def _not_tried(method: str) -> NotImplementedError:
    return NotImplementedError(
        f"{method} over Linear4bit: expected one of the methods in docs/peft.md, got one that has not been tried"
    )


def _switch_fan_in_fan_out_off(config: PeftConfig) -> None:
    """Set `fan_in_fan_out`, which says that a weight is [in, out], to False, with a warning, as PEFT does for linears.

    Recipes for GPT-2 have it, for its Conv1D. A `Linear4bit` in the place of one has a weight [out, in], and with this
    field PEFT would merge the transpose.
    """
    if getattr(config, "fan_in_fan_out", False):
        warnings.warn(
            "fan_in_fan_out is set to True but the target module is Linear4bit, whose weight is [out, in]. Setting "
            "fan_in_fan_out to False.",
            stacklevel=2,
        )
        config.fan_in_fan_out = False


def _unloaded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes PEFT's layers out of a model; PEFT restores weights, which needs plain layers."""

    @functools.wraps(method)
    def wrapped(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.model.modules() if isinstance(module, DequantizedLinear)]
        for layer in layers:
            make_plain(layer)
        try:
            return method(self, *args, **kwargs)
        finally:
            for layer in layers:
                make_readable(layer)
            _restore_plain(self.model, layers)  # all of them, unless PEFT has failed

    return wrapped


def _merges(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that merges adapters into all layers, so that it is refused before the first is changed."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapped(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        check_merge(self.model, signature.bind(self, *args, **kwargs).arguments.get("adapter_names"))
        return method(self, *args, **kwargs)

    return wrapped


def _unless_quantized(method: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap PEFT's name of an embedding or an output layer whose weight it saves beside an adapter.

    A quantized one has none, for its tensors are those of the base: over 16 bits PEFT would read codes as weights.
    """

    @functools.wraps(method)
    def wrapped(model: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> str | None:
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        return None if isinstance(base, QuantizedLayer) else method(model, layer, *args, **kwargs)

    return wrapped


@contextmanager
def _dequantized(model: nn.Module) -> Iterator[None]:
    """Turn the quantized layers of `model` into `DequantizedLinear` while PEFT makes its layers; some stay so.

    PEFT makes adapters in the `compute_dtype` of a layer. Where none is set it gets the dtype that the weight had, as
    over an `nn.Linear`.
    """
    plain = [module for module in model.modules() if is_plain(module)]
    for layer in plain:
        make_readable(layer)
    unset = [each for each in model.modules() if isinstance(each, QuantizedLayer) and each.compute_dtype is None]
    for layer in unset:
        layer.compute_dtype = layer.dtype
    try:
        yield
        guard_layers(model)
    finally:
        for layer in unset:
            layer.compute_dtype = None
        _restore_plain(model, plain)


def guard_layers(model: nn.Module) -> None:
    """Make the layers of PEFT in `model` read and merge into the decoded weights of quantized layers.

    Called after PEFT has made its layers, and after quantized layers were put below layers of PEFT.
    """
    for holder in model.modules():
        if _reads_weight(holder):
            base = holder.get_base_layer()
            if is_plain(base):
                make_readable(base)
            _guard_merges(type(holder))


def _restore_plain(model: nn.Module, layers: list[nn.Module]) -> None:
    """Turn each of `layers` back into a plain `Linear4bit`, unless something in `model` reads its weight."""
    read = {id(holder.get_base_layer()) for holder in model.modules() if _reads_weight(holder)}
    for layer in layers:
        if isinstance(layer, DequantizedLinear) and id(layer) not in read:
            make_plain(layer)


def _reads_weight(holder: nn.Module) -> bool:
    """Whether `holder` is a layer of PEFT over a quantized one and may read its weight; LoRA and DoRA do not."""
    if not isinstance(holder, BaseTunerLayer) or not isinstance(holder.get_base_layer(), Linear4bit):
        return False
    if not getattr(holder, "merges_by_itself", False):
        return True
    return not all(isinstance(variant, DoraLinearVariant) for variant in holder.lora_variant.values())


# ---- merging ---------------------------------------------------------------------------------------------------------


def _guard_merges(cls: type) -> None:
    """Make `merge` and `unmerge` of a class of PEFT's layers run over decoded weights if the base is quantized."""
    for name in ("merge", "unmerge"):
        method = getattr(cls, name)
        if getattr(cls, "merges_by_itself", False) or getattr(method, "_qlora_native", False):
            continue
        guarded = _merges_over_dequantized(method)
        guarded._qlora_native = True
        setattr(cls, name, guarded)


def _merges_over_dequantized(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def guarded(self: BaseTunerLayer, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.get_base_layer(), Linear4bit):
            return run_over_dequantized(self, method, *args, **kwargs)
        return method(self, *args, **kwargs)

    return guarded
