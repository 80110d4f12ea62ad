"""What layers and `quantize_model` call in integrations, of which they know none: lists that these extend on import."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn


class Experts(Protocol):
    """A module whose parameters of three dimensions are the weights of a layer's experts.

    Attributes:
        path: the path of the module in the model.
        module: the module.
        names: the names of the parameters.
        transposed: whether they are [E, K, N] and not [E, N, K].
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]
    transposed: bool

    def check_shapes(self) -> None:
        """Raise a ValueError unless the shapes of the parameters fit each other."""

    def run_quantized(self) -> None:
        """Make the library run the module, whose parameters `Experts4bit` have replaced."""


loaders: list[Callable[[], None]] = []  # called by load_integrations()
check_loaded: list[Callable[[], None]] = []  # called when PEFT reads the codes of a layer
check_model: list[Callable[[nn.Module, set[int]], None]] = []  # may the weights with these ids be quantized?
find_experts: list[Callable[[nn.Module], Iterable[Experts]]] = []
adopt_model: list[Callable[[nn.Module], None]] = []  # called after layers of a model have been quantized


def load_integrations() -> None:
    """Load the integrations, before a layer is made or loaded, and before a model is quantized."""
    for load in loaders:
        load()
