"""How PEFT's modules stand in a model. They are recognised by their classes, so PEFT need not be imported."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# The attributes in which PEFT's modules hold what they wrap. The last one is for modules that PEFT trains a copy of.
_WRAPPED = ("base_model", "model", "lora_model", "base_layer", "original_module")


def is_of_peft(module: nn.Module) -> bool:
    """Whether a class of PEFT, or one that inherits from it, wraps a layer or a model."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def added_by_peft(model: nn.Module) -> set[int]:
    """The ids of the modules of `model` that stay as they are because PEFT trains them or reads their weights.

    These are adapters, prompt encoders, both copies of a module in `modules_to_save`, and embeddings below an adapter.
    The layers that adapters stand over are not among them.
    """
    return {
        id(module)
        for wrapper in model.modules()
        if is_of_peft(wrapper)
        for name, child in wrapper.named_children()
        if name not in _WRAPPED[:-1] or isinstance(child, nn.Embedding)
        for module in child.modules()
    }


def dropout_of(layer: nn.Module, name: str) -> float:
    """The dropout probability of a LoRA adapter of PEFT's `layer`, which is 0 in evaluation."""
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def modules_without_peft(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model`, with their paths, that it has if PEFT's are taken out."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        wraps = is_of_peft(module)
        if not wraps:
            yield path, module
        for name, child in module.named_children():
            if not wraps:
                yield from walk(f"{path}.{name}" if path else name, child)
            elif name in _WRAPPED:
                yield from walk(path, child)

    yield from walk("", model)
