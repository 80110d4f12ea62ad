"""PEFT's LoRA on quantized experts, which `target_parameters` names. Adapters run inside the product.

    config = LoraConfig(r=8, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(quantized_model, config)

For a parameter of three dimensions PEFT computes parameter + adapter, in 16 bits, at every step. Here the A and B of
each expert are part of the product with its 4-bit weight. Adapters have PEFT's own shapes and names, so their files can
be exchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..._core.weight import QuantizedWeight
from ..._layers.experts import Experts4bit
from ._dequantized import requantized


class ParamWrapper(PeftParamWrapper):
    """PEFT's layer over one parameter of a module, for quantized experts. PEFT recognises it by this class name."""

    _unmerged: QuantizedWeight | None = None  # the weight from before `merge`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module, with the active adapters in its product with this parameter."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        plain = self.disable_adapters or self.merged
        names = [] if plain else [name for name in self.active_adapters if name in self.lora_A]
        experts = self.get_param()
        before, experts.adapters = experts.adapters, [self._adapter(name) for name in names]
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            experts.adapters = before

    def _adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        """The A [E, r, K], B [E, N, r] and scaling of an adapter, which PEFT stores as [r * E, K] and [N, E * r]."""
        E = self.num_experts
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        a = first.reshape(E, -1, first.shape[-1])
        b = second.reshape(second.shape[0], -1, E).permute(2, 0, 1)
        # If the parameter is transposed and its module does not say so (Llama 4), PEFT's A and B are exchanged.
        if self._did_swap_in_out_features == self.get_param().transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a, b, self.scaling[name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the decoded weights, and quantize the sum. It needs memory for the weights of one layer.

        Args:
            safe_merge: no effect: merged weights with NaN or Inf are always refused.
            adapter_names: the adapters to merge; None merges the active ones.

        Raises:
            ValueError: the merged weights are not finite. Nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        experts = self.get_param()
        original = self._unmerged or experts.quantized_weight
        weight = original.dequantize(torch.float32)
        for name in names:
            a, b, scaling = self._adapter(name)
            for e in range(self.num_experts):
                weight[e].addmm_(b[e].float(), a[e].float(), alpha=scaling)
        if not weight.isfinite().all():
            raise ValueError(f"adapters {names}: expected finite merged weights, got NaN or Inf")
        experts.replace_weight(requantized(weight, original))
        self._unmerged = original
        self.merged_adapters[:] = names
        warnings.warn("merging into 4-bit weights rounds the sum to 4 bits again", stacklevel=2)

    def unmerge(self) -> None:
        """Restore the weights from before `merge`, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        experts = self.get_param()
        experts.replace_weight(self._unmerged.to(experts.device))
        self._unmerged = None
        self.merged_adapters.clear()


def targeted_experts(target: nn.Module, parameter: str | None) -> bool:
    """Whether `parameter` of a module, or of the module below a layer of PEFT, is quantized experts."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return parameter is not None and isinstance(base._modules.get(parameter), Experts4bit)


def check_experts_config(method: str, config: PeftConfig) -> None:
    """Refuse a config that cannot work over quantized experts, before PEFT makes a layer."""
    if method != "LORA":
        raise NotImplementedError(f"{method}, target_parameters: expected LoRA over quantized experts")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() != "gaussian":
        raise NotImplementedError(
            f"LoRA with init_lora_weights={start!r} over quantized experts: expected True, False or 'gaussian', for "
            "the others start from the weights in 16 bits"
        )


@contextmanager
def experts_as_parameters(model: nn.Module) -> Iterator[None]:
    """While PEFT looks for its targets, make it find quantized experts under the names of their old parameters."""
    holders = [m for m in model.modules() if any(isinstance(child, Experts4bit) for child in m.children())]
    patched = [m for m in dict.fromkeys((model, *holders)) if "named_parameters" not in vars(m)] if holders else []
    for module in patched:
        vars(module)["named_parameters"] = _with_experts(module)
    try:
        yield
    finally:
        for module in patched:
            del vars(module)["named_parameters"]


def _with_experts(module: nn.Module) -> Any:
    named_parameters = module.named_parameters

    def named(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        yield from named_parameters(prefix, recurse, remove_duplicate)
        for name, child in module.named_modules() if recurse else module.named_children():
            if isinstance(child, Experts4bit):  # PEFT uses only the name
                yield f"{prefix}.{name}" if prefix else name, child._parameters["weight"]

    return named
