"""Load the integrations with transformers and PEFT in programs that have imported those libraries.

Both find layers by their class, and `Linear4bit` is an `nn.Linear`. Without the integrations PEFT would take the codes
for a weight, and transformers would write a file that no library reads. A library that the program has not imported is
not imported here either.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

_PEFT = "qlora_native.integrations.peft"
_GUARDS = {"peft": _PEFT, "transformers": "qlora_native.integrations.adopt"}


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


def transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of `model` that transformers can save; none if transformers has not been imported."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in transformers_models(child)]


def find_experts(model: nn.Module) -> list[Any]:
    """The modules of `model` whose experts transformers runs (integrations/experts.py); none without transformers."""
    if "transformers" not in sys.modules:
        return []
    try:
        from .integrations.experts import find_experts as find
    except ImportError:  # an old version, which keeps each expert in a module of its own
        return []
    return list(find(model))


def run_quantized_experts(module: nn.Module) -> None:
    """Make transformers run the quantized experts of `module` (integrations/experts.py)."""
    from .integrations.experts import run_quantized

    run_quantized(module)


def adopt_quantized(model: nn.Module) -> None:
    """Register a model of transformers that has layers of ours as quantized (integrations/adopt.py)."""
    from .integrations.adopt import adopt_quantized as adopt

    adopt(model)
