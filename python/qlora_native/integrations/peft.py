"""LoRA of PEFT on `Linear4bit`: adapter and quantized weight run as one fused product.

    config = register(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model = get_peft_model(quantized_model, config)
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(quantized_model, folder, config=config)

The dispatch is PEFT's own (`LoraConfig._register_custom_module`, asked before its built-in layers). It is not written
into adapter files, so that these load anywhere; loading one here takes a registered config again, as above.

**The adapter's dtype.** PEFT makes adapters in the base layer's `compute_dtype` and then, by default
(`autocast_adapter_dtype=True`), in fp32. Leave it so for training: AdamW's steps are about `lr` in size, and bf16
with its 8 bits of precision rounds away every step smaller than 1/512 of the weight it is added to. The fused op reads
fp32 adapters beside bf16 activations, so unlike PEFT's own layers it casts no activation to fp32 and back.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from .. import functional
from ..nn import Linear4bit

__all__ = ["LoraLinear4bit", "register"]


def register(lora_config: LoraConfig) -> LoraConfig:
    """Make PEFT put `LoraLinear4bit` around every targeted `Linear4bit`.

    Args:
        lora_config: changed in place, before it is given to `get_peft_model` or `PeftModel.from_pretrained`.

    Returns:
        The same `lora_config`.

    Raises:
        TypeError: `lora_config` is not a `peft.LoraConfig`.
    """
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config: expected a peft.LoraConfig, got {type(lora_config).__name__}")
    lora_config._register_custom_module({Linear4bit: LoraLinear4bit})
    return lora_config


class LoraLinear4bit(PeftLoraLinear):
    """PEFT's LoRA linear over a `Linear4bit` base layer.

    With exactly one plain adapter active, forward and backward are `qlora_native.functional.linear` with the adapter
    inside the product. Everything else that PEFT offers (several adapters, DoRA and the other variants, `lora_bias`,
    `adapter_names`, disabled adapters, hooks on the inner layers) takes PEFT's own way around the same base layer.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base layer and adapters applied to `x` [..., in_features], giving [..., out_features] in the dtype of x."""
        adapter = None if args or kwargs else self._fusable_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        base = self.base_layer
        return functional.linear(
            x,
            base.quantized_weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            lora_scaling=self.scaling[adapter],
            lora_dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _fusable_adapter(self) -> str | None:
        """The name of the one active adapter if the fused product can compute it, else None."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1:
            return None
        name = active[0]
        # A variant, another base layer (two tuners stacked) or an inner module that is not what PEFT makes for a plain
        # adapter would compute something else; a hook on an inner module expects that module to be called.
        inner = (self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name])
        plain = (
            name not in self.lora_variant
            and not self.lora_bias[name]
            and not self.fan_in_fan_out
            and isinstance(self.base_layer, Linear4bit)
            and type(self.lora_A[name]) is nn.Linear
            and type(self.lora_B[name]) is nn.Linear
            and isinstance(self.lora_dropout[name], (nn.Dropout, nn.Identity))
            and not any(_has_hooks(module) for module in inner)
        )
        return name if plain else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not available: raises NotImplementedError, and leaves weight and adapters as they are."""
        raise NotImplementedError(
            "merging an adapter into a 4-bit weight is not available in qlora_native yet: the weight would have to be "
            "quantized again. Keep the adapter beside it, or merge it into the 16-bit model that was quantized"
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
