"""Find the experts of transformers' models, and run quantized ones.

transformers keeps the experts of a layer as parameters of three dimensions, in modules whose forward is chosen by name
from a registry (`ExpertsInterface`). Such a module has attributes that say whether its weights are transposed and have
biases or a gate, and its `_apply_gate` is its activation. Experts are recognised by these attributes, not by the name
of a model family, and quantized ones are run by an implementation that importing this module registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..._core.errors import FLOAT_DTYPES, bad
from ..._core.linear import Permuted
from ..._layers import callbacks
from ..._layers.experts import Experts4bit

IMPLEMENTATION = "qlora_native"
# The attributes that transformers' decorator `use_experts_implementation` gives to a module.
_CONVENTION = ("config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
# Classes outside the registry that call torch.bmm(x [E, T, K], W [E, K, N]) on rows sorted by expert.
_BATCHED = ("Llama4TextExperts",)


@dataclass(frozen=True)
class Experts:
    """A module with the weights of a layer's experts.

    Attributes:
        path: the path of the module in the model.
        module: the module.
        names: the names of its parameters of three dimensions, of the first product and of the second.
        transposed: whether they are [E, K, N] and not [E, N, K].
    """

    path: str
    module: nn.Module
    names: tuple[str, str]
    transposed: bool

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(E, N, K) of both parameters."""
        first, second = (self._shape(name) for name in self.names)
        halves = 2 if getattr(self.module, "has_gate", True) else 1
        if second != (first[0], first[2], first[1] // halves) or first[1] % halves:
            got = f"{list(first)} and {list(second)}"
            raise bad(self.path, f"experts of one shape, [E, {halves} * I, H] and [E, H, I]", got)
        return first, second

    def check_shapes(self) -> None:
        """Raise a ValueError unless the shapes of both parameters fit each other."""
        _ = self.shapes

    def run_quantized(self) -> None:
        """Choose our implementation for the experts of the module and of all modules that share its config."""
        run_quantized(self.module)

    def _shape(self, name: str) -> tuple[int, int, int]:
        E, *sizes = getattr(self.module, name).shape
        return (E, *(reversed(sizes) if self.transposed else sizes))


def find_experts(model: nn.Module) -> Iterator[Experts]:
    """Find the modules of `model` whose experts can be quantized. A shared module is found by each of its paths."""
    for path, module in model.named_modules(remove_duplicate=False):
        names = names_of_experts(module)
        if names is not None and all(_is_stack(module._parameters.get(name)) for name in names):
            yield Experts(path, module, names, bool(getattr(module, "is_transposed", True)))


def names_of_experts(module: nn.Module) -> tuple[str, str] | None:
    """The names of a module's parameters of experts, or None if it is unknown how it multiplies by them."""
    if type(module).__name__ in _BATCHED:
        return "gate_up_proj", "down_proj"
    if hasattr(type(module).forward, "__wrapped__") and all(hasattr(module, name) for name in _CONVENTION):
        return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    return None


def _is_stack(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and parameter.dtype in FLOAT_DTYPES and parameter.numel() > 0


def run_quantized(module: nn.Module) -> None:
    """Choose our implementation for the experts of `module` and of all modules that share its config."""
    if type(module).__name__ not in _BATCHED:
        module.config._experts_implementation = IMPLEMENTATION


class _Dispatched(torch.autograd.Function):
    """Repeat each row of x [T, H] k times, sorted by expert: row i of the result is x[order[i] // k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        """Return x[order // k], without making k copies of x first."""
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Add up the gradients of each row's copies, in the same order on every device."""
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back).view(-1, ctx.k, gradient.shape[1]).sum(dim=1), None, None, None


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The implementation "qlora_native" of transformers' `ExpertsInterface`.

    It runs quantized experts, and gives others to transformers' "grouped_mm". It sorts the rows by expert without
    waiting for a GPU, and takes every sum in the same order.

    Args:
        self: the module of the experts.
        hidden_states: [T, H].
        top_k_index: [T, k], the experts of each row.
        top_k_weights: [T, k], the weights of these experts; through them gradients reach the router.
        args, kwargs: passed on to "grouped_mm", in case a later version of transformers adds arguments.

    Returns:
        [T, H].
    """
    first = getattr(self, "gate_up_proj" if self.has_gate else "up_proj")
    if not isinstance(first, Experts4bit):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
    if getattr(self, "_is_expert_parallel", False):
        # Where processes share a batch, rows of other processes' experts come with the index E, and the weight 0.
        top_k_index = top_k_index.clamp(max=first.num_experts - 1)
    T, k = top_k_index.shape
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    experts = torch.arange(first.num_experts + 1, device=order.device)
    offsets = torch.searchsorted(top_k_index.reshape(-1)[order], experts)
    bias = self.gate_up_proj_bias if self.has_bias and self.has_gate else self.up_proj_bias if self.has_bias else None
    back = torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=order.device))
    rows = _Dispatched.apply(hidden_states, order, back, k)
    inner = first(rows, offsets, bias)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    y = self.down_proj(inner, offsets, self.down_proj_bias if self.has_bias else None)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = Permuted.apply(y, back, order).view(T, k, -1) * top_k_weights.unsqueeze(-1)
    return y.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
callbacks.find_experts.append(find_experts)
