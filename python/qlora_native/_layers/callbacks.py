"""Load the integrations with transformers and PEFT in programs that have imported those libraries.

Both find layers by their class, and `Linear4bit` is an `nn.Linear`. Without the integrations PEFT would take the codes
for a weight, and transformers would write a file that no library reads. A library that the program has not imported is
not imported here either.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_PEFT = "qlora_native.integrations.peft"
_GUARDS = {"peft": _PEFT, "transformers": "qlora_native.integrations.transformers"}


def guard_neighbours() -> None:
    """Load the integration of each of the two libraries that has been imported. Called whenever a layer is made."""
    for neighbour, integration in _GUARDS.items():
        if neighbour in sys.modules and integration not in sys.modules:
            try:
                importlib.import_module(integration)
            except ImportError:  # an old version: the error is raised again when it is used with a layer
                continue


def check_peft_is_guarded() -> None:
    """Check that the integration with PEFT is loaded. Called when PEFT asks about a layer.

    Raises:
        RuntimeError: PEFT was imported after the layer was made, so the integration was not loaded.
        ImportError: this version of PEFT is not supported.
    """
    if "peft" in sys.modules and _PEFT not in sys.modules:
        importlib.import_module(_PEFT)
        raise RuntimeError(
            f"Linear4bit: expected {_PEFT} to be imported before get_peft_model, got a PEFT that was imported after "
            "the layer was made and would take its codes for the weight. Import it, and make the model anew"
        )


def is_of_peft(module: nn.Module) -> bool:
    """Whether a class of PEFT, or one that inherits from it, wraps a layer or a model. PEFT need not be imported."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


# The attributes in which PEFT's modules hold what they wrap. The last one is for modules that PEFT trains a copy of.
_WRAPPED = ("base_model", "model", "lora_model", "base_layer", "original_module")


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


def check_layers_of_peft(model: nn.Module, weights: set[int]) -> None:
    """Check that PEFT's layers over the weights with these ids work over quantized ones.

    Raises:
        ValueError, NotImplementedError: one does not; the message names it.
    """
    if any(map(is_of_peft, model.modules())):
        from ..integrations.peft._lora import check_layers

        check_layers(model, weights)


def adopt_layers_of_peft(model: nn.Module) -> None:
    """Make PEFT's layers over layers that have just been quantized read these."""
    if any(map(is_of_peft, model.modules())):
        from ..integrations.peft._lora import adopt_layers

        adopt_layers(model)


def transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of `model` that transformers can save; none if transformers has not been imported."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in transformers_models(child)]


def find_experts(model: nn.Module) -> list[Any]:
    """The modules of `model` whose experts transformers runs; none without transformers."""
    if "transformers" not in sys.modules:
        return []
    try:
        from ..integrations.transformers._experts import find_experts as find
    except ImportError:  # an old version, which keeps each expert in a module of its own
        return []
    return list(find(model))


def run_quantized_experts(module: nn.Module) -> None:
    """Make transformers run the quantized experts of `module`."""
    from ..integrations.transformers._experts import run_quantized

    run_quantized(module)


def adopt_quantized(model: nn.Module) -> None:
    """Register a model of transformers that has layers of ours as quantized."""
    from ..integrations.transformers._save import adopt_quantized as adopt

    adopt(model)
