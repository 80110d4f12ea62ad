"""Hooks of a module that a quantized layer, or a product, takes the place of."""

from __future__ import annotations

from torch import nn

# Attributes of nn.Module that the new layer takes over from the old one. A handle that a user has removes its hook from
# the dictionaries themselves, so they are shared.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with the module, of which a product that computes its part would not know."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def take_over_hooks(layer: nn.Module, replaced: nn.Module) -> None:
    """Give `layer` the hooks of the module that it replaces, accelerate's for models on several devices included."""
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(replaced, hooks))
    if hasattr(replaced, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, replaced._hf_hook)
