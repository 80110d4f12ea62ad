"""Load the integrations with PEFT, transformers and accelerate in programs that have imported these libraries.

PEFT and transformers find layers by their class, and `Linear4bit` is an `nn.Linear`. Without the integrations PEFT
would take the codes for a weight, and transformers would write a file that no library reads. A library that the program
has not imported is not imported here either.
"""

from __future__ import annotations

import sys

from torch import nn

from ._layers import callbacks
from ._layers.adapters import is_of_peft


def _load_peft() -> None:
    from .integrations import peft  # noqa: F401


def _load_transformers() -> None:
    from .integrations import transformers  # noqa: F401


def _load_accelerate() -> None:
    from .integrations import accelerate  # noqa: F401


_LOAD = {"peft": _load_peft, "transformers": _load_transformers, "accelerate": _load_accelerate}


def _is_missing(library: str) -> bool:
    """Whether the program has imported the library, but not yet the integration with it."""
    return library in sys.modules and f"qlora_native.integrations.{library}" not in sys.modules


def _load_integrations() -> None:
    for library, load in _LOAD.items():
        if _is_missing(library):
            try:
                load()
            except ImportError:  # an old version: `_check_model` raises the error again for a model of that library
                continue


def _check_loaded() -> None:
    """Check that the integration with PEFT is loaded.

    Raises:
        RuntimeError: PEFT was imported after the layer was made, so the integration was not loaded.
        ImportError: this version of PEFT is not supported.
    """
    if _is_missing("peft"):
        _load_peft()
        raise RuntimeError(
            "Linear4bit: expected qlora_native.integrations.peft to be imported before get_peft_model, got a PEFT that "
            "was imported after the layer was made and would take its codes for the weight. Import it, and make the "
            "model anew, or load it"
        )


def _check_model(model: nn.Module, weights: set[int]) -> None:
    """Raise the ImportError of an integration that could not be loaded if the model has modules of that library."""
    if _is_missing("peft") and any(map(is_of_peft, model.modules())):
        _load_peft()
    if _is_missing("transformers") and any(map(_is_pretrained, model.modules())):
        _load_transformers()


def _is_pretrained(module: nn.Module) -> bool:
    return isinstance(module, sys.modules["transformers"].PreTrainedModel)


callbacks.loaders.append(_load_integrations)
callbacks.check_loaded.append(_check_loaded)
callbacks.check_model.append(_check_model)
