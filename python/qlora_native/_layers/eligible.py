"""Which weights may be quantized: what counts as a linear layer or a router, and why a parameter is left as it is."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .adapters import added_by_peft, is_of_peft

_REASON = "_why_not_quantized"  # the attribute in which a module keeps the reason
# Subclasses of nn.Linear that compute x @ W.T + bias in so many words, and nothing else.
_SPELLED_OTHERWISE = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})

# {class of a module: linear layers below it whose weight it multiplies by, or changes, by itself}.
_READ = {
    "MambaMixer": ("dt_proj",),
    "MambaForCausalLM": ("lm_head",),
    "Mamba2ForCausalLM": ("lm_head",),
    "FalconMambaForCausalLM": ("lm_head",),
    "xLSTMForCausalLM": ("lm_head",),
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "DisentangledSelfAttention": ("in_proj",),  # of DeBERTa
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LSHSelfAttention": ("query_key", "value"),  # of Reformer
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "TDNNLayer": ("kernel",),  # of models of speech
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}

# How a module reads the dtype of a weight below it, but not how it asks first whether that dtype is a floating one.
_DTYPE_READ = re.compile(r"\bself\.([\w.]+)\.weight\.dtype\b(?!\)\.is_floating_point)")
_ASKED_FIRST = ("torch.uint8", "_is_quantized")  # what code names that expects codes in the place of a weight


def kept_by_models(model: nn.Module) -> list[str]:
    """The names of layers that `model`, or one that it is made of, keeps in fp32 or whose weight it reads itself.

    A name that ends with "$" is a whole path, as in the patterns of transformers.
    """
    return [*_kept_in_fp32(model), *layers_read(model)]


def _kept_in_fp32(model: nn.Module) -> list[str]:
    names = [name for module in model.modules() for name in getattr(module, "_keep_in_fp32_modules", None) or ()]
    return list(dict.fromkeys(names))


def layers_read(model: nn.Module) -> list[str]:
    """The paths, with "$" at the end, of linear layers whose weight a module above reads.

    It multiplies by the weight itself, where codes are none, or casts the layer's input to the weight's dtype, which is
    uint8 of codes. Layers that the model keeps in fp32 are left out.
    """
    kept, found = _kept_in_fp32(model), []
    for path, module in model.named_modules():
        for name in (*_READ.get(type(module).__name__, ()), *_read_for_its_dtype(type(module))):
            try:
                name, child = _below_peft(name, module.get_submodule(name))
            except AttributeError:  # a layer that this model goes without
                continue
            full = f"{path}.{name}" if path else name
            if is_linear(child) and not any(f".{each}." in f".{full}." for each in kept):
                found.append(f"{full}$")
    return list(dict.fromkeys(found))


@functools.cache
def _read_for_its_dtype(cls: type) -> tuple[str, ...]:
    """The names, below a module of `cls`, of what has a weight whose dtype the code of `cls` reads."""
    names: list[str] = []
    for function in vars(cls).values():
        code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
        if code is None or not {"weight", "dtype"} <= set(code.co_names):
            continue
        try:
            source = inspect.getsource(code)
        except OSError:  # it was not read from a file
            continue
        if not any(word in source for word in _ASKED_FIRST):
            names += _DTYPE_READ.findall(source)
    for base in cls.__bases__:
        if issubclass(base, nn.Module) and base is not nn.Module:
            names += _read_for_its_dtype(base)
    return tuple(dict.fromkeys(names))


def _below_peft(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The layer itself where PEFT has put its own layers above it, and its name there."""
    while is_of_peft(module) and hasattr(module, "base_layer"):
        name, module = f"{name}.base_layer", module.base_layer
    return name, module


@dataclass(frozen=True)
class Unquantized:
    """A parameter that is not quantized.

    Attributes:
        name, tensor: the parameter.
        reason: why it is not quantized.
        unknown_use: it is a weight, but how its module multiplies by it is unknown.
    """

    name: str
    tensor: Tensor
    reason: str
    unknown_use: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it may hold the weights of several experts: it has three dimensions, none of them 1."""
        return self.tensor.dim() == 3 and min(self.tensor.shape) > 1

    def __str__(self) -> str:
        """A sentence with the name, the size and the reason."""
        return f"{self.name}, {self.tensor.nbytes:,} bytes, is left as it is: {self.reason}"


def note_reason(module: nn.Module, reason: str) -> None:
    """Store in `module` the reason why its weights are not quantized, for the report."""
    setattr(module, _REASON, reason)


def has_reason(module: nn.Module) -> bool:
    """Whether `module` has stored a reason why its weights are not quantized."""
    return _REASON in vars(module)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an `nn.Linear`, or of a subclass that is known to compute the same and to hold nothing else.

    Another subclass may be more than it computes: torch's MultiheadAttention reads the weight of one, and the forward
    pass of another may multiply in fp32.
    """
    cls = type(module)
    return cls is nn.Linear or f"{cls.__module__}.{cls.__qualname__}" in _SPELLED_OTHERWISE


def is_router(module: nn.Module) -> bool:
    """Whether `module` chooses experts. It keeps its precision: a small change would send a row to another expert."""
    return any(word in type(module).__name__.lower() for word in ("router", "gating"))


def linears_of_routers(model: nn.Module) -> list[str]:
    """The paths of the linear layers in routers. The reason is stored in each of them."""
    found = []
    for path, router in model.named_modules():
        for name, child in router.named_children() if is_router(router) else ():
            name, child = _below_peft(name, child)
            if is_linear(child):
                note_reason(child, "a router")
                found.append(f"{path}.{name}" if path else name)
    return found


def unquantized_parameters(model: nn.Module, quantized: set[int]) -> Iterator[Unquantized]:
    """The parameters of `model` whose id is not in `quantized`, each with the reason why it is not quantized."""
    seen: set[int] = set()
    of_peft = added_by_peft(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in quantized and id(parameter) not in seen:
                seen.add(id(parameter))
                if id(module) in of_peft or is_of_peft(module):
                    yield Unquantized(name, parameter, "an adapter, or kept by PEFT")
                else:
                    yield Unquantized(name, parameter, *_reason(name, parameter, module))


def _reason(name: str, parameter: Tensor, module: nn.Module) -> tuple[str, bool]:
    """The reason why a parameter is not quantized, and whether the reason is that its use is unknown."""
    kind = type(module).__name__
    if parameter.dim() < 2 or name.endswith("bias"):
        return "a vector", False
    if not parameter.is_floating_point():
        return f"{parameter.dtype} already", False
    if isinstance(module, nn.Embedding):
        return "an embedding", False
    if has_reason(module):
        return vars(module)[_REASON], False
    if is_router(module):
        return "a router", False
    if isinstance(module, _ConvNd):
        return "a convolution", False
    if is_linear(module):
        return "a linear layer", True
    if isinstance(module, nn.Linear):
        return f"a subclass of nn.Linear, {kind}", True
    return f"a parameter of {kind}, whose use is not known", parameter.dim() == 2 or min(parameter.shape) > 1
