"""What transformers and PEFT have to know about our layers, for programs that have imported them.

Both find layers by their class, and `Linear4bit` is an `nn.Linear`: untold, PEFT takes its codes for a weight and
transformers writes a file that nothing reads. Nothing is imported here that the program has not imported itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

_PEFT = "qlora_native.integrations.peft"
_GUARDS = {"peft": _PEFT, "transformers": "qlora_native.integrations.adopt"}


def guard_neighbours() -> None:
    """Load our integrations with what has been imported of the two; called for every layer that is made."""
    for neighbour, integration in _GUARDS.items():
        if neighbour in sys.modules and integration not in sys.modules:
            try:
                importlib.import_module(integration)
            except ImportError:  # an old one, which is no matter until it is used with the layer: it raises again there
                continue


def check_peft_is_guarded() -> None:
    """Called when PEFT asks about a layer.

    Raises:
        RuntimeError: our integration is not there, as PEFT was imported after the layer was made.
        ImportError: PEFT is of another version than we know.
    """
    if "peft" in sys.modules and _PEFT not in sys.modules:
        importlib.import_module(_PEFT)
        raise RuntimeError(
            f"Linear4bit: expected {_PEFT} to be imported before get_peft_model, got a PEFT that was imported after "
            "the layer was made and would take its codes for the weight. Import it, and make the model anew"
        )


def transformers_models(model: nn.Module) -> list[nn.Module]:
    """`model`, or the outermost modules in it, that transformers saves; none where it has not been imported."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in transformers_models(child)]


def find_experts(model: nn.Module) -> list[Any]:
    """The modules of `model` with experts that transformers runs (integrations/experts.py); none without it."""
    if "transformers" not in sys.modules:
        return []
    try:
        from .integrations.experts import find_experts as find
    except ImportError:  # an old one, which keeps experts as modules of their own
        return []
    return list(find(model))


def run_quantized_experts(module: nn.Module) -> None:
    """Let transformers run the quantized experts of `module` (integrations/experts.py)."""
    from .integrations.experts import run_quantized

    run_quantized(module)


def adopt_quantized(model: nn.Module) -> None:
    """Make transformers see one of its models, in which layers are ours now, as quantized (integrations/adopt.py)."""
    from .integrations.adopt import adopt_quantized as adopt

    adopt(model)
