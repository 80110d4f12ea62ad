"""`LoraLinear4bit`, PEFT's LoRA over a `Linear4bit`, and its place in PEFT's registry.

PEFT looks our layers up in its own registry (`LoraConfig._register_custom_module`) before its built-in ones. The
registry is not written into adapter files, so these load anywhere.
"""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

from ..._core.versions import require

require("peft")

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..._core.errors import bad
from ..._core.weight import QuantizedWeight
from ..._layers import callbacks
from ..._layers.adapters import dropout_of
from ..._layers.hooks import has_hooks
from ...nn import Linear4bit
from ._batch import can_be_stacked, distinct, index_of_rows, stacked
from ._dequantized import base_to_merge_into, requantized, run_over_dequantized
from ._dora import RowNorms
from ._experts import ParamWrapper, targeted_experts
from ._methods import check_method, guard_layers, install


def register(lora_config: LoraConfig | None = None) -> LoraConfig | None:
    """Make PEFT put `LoraLinear4bit` around every targeted `Linear4bit`.

    Importing this module has done so for every config; the call makes it explicit for one.

    Args:
        lora_config: a `peft.LoraConfig`, changed in place before it is given to `get_peft_model` or
            `PeftModel.from_pretrained`; None changes none. Other layers than `Linear4bit` stay PEFT's.

    Returns:
        The same `lora_config`.

    Raises:
        TypeError: `lora_config` is not a `peft.LoraConfig`.
    """
    if lora_config is None:
        LoraModel._create_new_module = staticmethod(_create_new_module)
        lora_model.add_lora_tp_hooks_dtensor = _add_tp_hooks
        install()
        return None
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config: expected a peft.LoraConfig, got {type(lora_config).__name__}")
    lora_config._register_custom_module({Linear4bit: LoraLinear4bit})
    return lora_config


_peft_create_new_module = LoraModel._create_new_module


@functools.wraps(_peft_create_new_module)
def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    if Linear4bit not in (lora_config._custom_modules or {}):
        register(lora_config)
    if targeted_experts(target, kwargs.get("parameter_name")):
        return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
    return _peft_create_new_module(lora_config, adapter_name, target, **kwargs)


_peft_add_tp_hooks = lora_model.add_lora_tp_hooks_dtensor


@functools.wraps(_peft_add_tp_hooks)
def _add_tp_hooks(tp_module: nn.Module, *args: Any, base_layer: nn.Module, **kwargs: Any) -> None:
    # PEFT reads the shape of the whole weight from a DTensor. A quantized layer has a part, in codes.
    if isinstance(base_layer, Linear4bit):
        shape = base_layer.out_features, base_layer.in_features
        base_layer = SimpleNamespace(weight=torch.empty(shape, device="meta"))
    _peft_add_tp_hooks(tp_module, *args, base_layer=base_layer, **kwargs)


class LoraLinear4bit(PeftLoraLinear):
    """PEFT's LoRA linear over a `Linear4bit` base layer.

    If exactly one adapter is active, plain or DoRA, `qlora_native.functional.linear` computes it inside the product.
    With `adapter_names` of plain adapters that share a dtype and a dropout, `linear_grouped` computes all of them
    inside. In all other cases (several active adapters, other variants, `lora_bias`, disabled adapters, hooks on the
    inner layers) PEFT's own forward runs around the same base layer.
    """

    merges_by_itself = True  # tells _methods.py not to wrap `merge` and `unmerge`
    _row_norms: RowNorms | None = None
    _unmerged: tuple[QuantizedWeight, Tensor | None] | None = None  # (weight, bias) from before `merge`

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """Choose PEFT's implementation of a variant, as PEFT does. In tensor parallelism only plain LoRA works."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None and getattr(self.get_base_layer(), "is_part", False):
            name = variant if isinstance(variant, type) else type(variant)
            raise NotImplementedError(f"{name.__name__}: expected plain LoRA over a layer in tensor parallelism")
        return variant

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the base layer and the adapters.

        Args:
            x: [..., in_features].
            args, kwargs: as in PEFT's forward, `adapter_names` among them.

        Returns:
            [..., out_features] in the dtype of x.
        """
        if (names := kwargs.get("adapter_names")) is not None and not args and len(kwargs) == 1:
            return self._batch(x, names)
        adapter = None if args or kwargs else self._fusable_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        lora = (self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])
        dropout = dropout_of(self, adapter)
        if adapter in self.lora_variant:
            return self._dora(x, adapter, lora, self.lora_dropout[adapter] if dropout > 0 else None)
        return self.base_layer(x, *lora, lora_dropout=dropout)

    def _batch(self, x: Tensor, sample_names: list[str]) -> Tensor:
        """Apply the layer to x [samples, ..., in_features]; `sample_names` has the adapter of each sample."""
        self._check_forward_args(x, adapter_names=sample_names)
        names = distinct(sample_names, self)
        fuses = not self.disable_adapters and names and all(map(self._is_plain, names)) and can_be_stacked(self, names)
        if not fuses or any(name in self.lora_variant for name in names):
            return super().forward(x, adapter_names=sample_names)
        index, dropout = index_of_rows(x, sample_names, names), dropout_of(self, names[0])
        return self.base_layer(x, *stacked(self, names), lora_dropout=dropout, adapter_index=index)

    def _dora(self, x: Tensor, adapter: str, lora: tuple[Tensor, Tensor, float], dropout: nn.Module | None) -> Tensor:
        """Compute DoRA: y = f (W + s B A) x + b, with b the bias and f = magnitude / norm, which PEFT takes for
        constant.

        PEFT applies dropout only to what the magnitude acts on: y = f (W + s B A) d + W (x - d) + b for d = dropout(x).
        """
        base = self.base_layer
        if self._row_norms is None:
            self._row_norms = RowNorms()
        factor = self.lora_magnitude_vector[adapter].weight / self._row_norms(base, *lora)
        dropped = x if dropout is None else dropout(x)
        product = base(dropped, *lora)
        y = factor * product
        if base.bias is not None:  # each product of `base` includes it
            y = y - (factor - 1 if dropout is None else factor) * base.bias
        return (y if dropout is None else y + base(x - dropped)).to(product.dtype)

    def _fusable_adapter(self) -> str | None:
        """The name of the only active adapter if the fused product can compute it, else None."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1:
            return None
        return active[0] if self._is_plain(active[0]) else None

    def _is_plain(self, name: str) -> bool:
        """Whether the fused product can compute the adapter, which is plain, or DoRA, of which it computes a part."""
        # A variant, another base layer (of two stacked tuners) or an unusual inner module computes something else. A
        # hook on an inner module expects that module to be called.
        inner = (self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name])
        return (
            (name not in self.lora_variant or self._is_dora(name))
            and not self.lora_bias[name]
            and isinstance(self.base_layer, Linear4bit)
            and not self.base_layer.is_part  # the processes exchange what is between A and B
            and type(self.lora_A[name]) is nn.Linear
            and type(self.lora_B[name]) is nn.Linear
            and isinstance(self.lora_dropout[name], (nn.Dropout, nn.Identity))
            and not any(has_hooks(module) for module in inner)
            and self.lora_A[name].weight.device.type != "meta"  # else accelerate brings it when the module is called
        )

    def _is_dora(self, name: str) -> bool:
        """Whether the adapter is DoRA and can be fused. In a trace it cannot: the norms read the weight's address."""
        vector = self.lora_magnitude_vector[name] if name in self.lora_magnitude_vector else None
        return (
            type(self.lora_variant[name]) is DoraLinearVariant
            and type(vector) is DoraLinearLayer
            and not has_hooks(vector)
            and not torch.compiler.is_compiling()
        )

    def _needs_peft_to_merge(self, names: list[str]) -> bool:
        """Whether an adapter has a variant whose merged weight only PEFT can compute."""
        return any(not isinstance(self.lora_variant.get(name), DoraLinearVariant | None) for name in names)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight in fp32, and quantize the sum to the format of the weight.

        It needs memory for one fp32 weight. Several adapters are added before the sum is rounded, once. The old weight
        is kept for `unmerge`.

        Args:
            safe_merge: as in PEFT; but a merged weight with NaN or Inf is always refused.
            adapter_names: the adapters to merge; None merges the active ones.

        Raises:
            NotImplementedError: PEFT cannot merge the variant of an adapter, or a layer of another method is in
                between.
            ValueError: the merged weight is not finite, or `lora_bias` needs a bias that the layer does not have.
                Nothing is changed.
        """
        if type(self.base_layer) is nn.Linear:  # dequantize() of the model has put it there
            return super().merge(safe_merge, adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if getattr(self.get_base_layer(), "is_part", False):
            raise NotImplementedError("merge: expected a layer that this process has all of, got tensor parallelism")
        if self._needs_peft_to_merge([*self.merged_adapters, *names]):
            if self._unmerged is not None:
                raise NotImplementedError(f"adapters {names}: merge them together with {self.merged_adapters}")
            return run_over_dequantized(self, PeftLoraLinear.merge, safe_merge, names)
        base = base_to_merge_into(self)
        original = self._unmerged or (base.quantized_weight, None if base.bias is None else base.bias.data.clone())
        names = [*self.merged_adapters, *names]
        weight, bias = self._merged(*original, names)
        self._unmerged = original
        self._set_base(weight, bias)
        self.merged_adapters[:] = names
        warnings.warn("merging into a 4-bit weight rounds the sum to 4 bits again", stacklevel=2)

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if type(self.base_layer) is nn.Linear:
            return super().unmerge()
        if self._unmerged is None:
            return run_over_dequantized(self, PeftLoraLinear.unmerge)
        weight, bias = self._unmerged
        self._set_base(weight.to(self.get_base_layer().weight.device), bias)
        self._unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _merged(self, q: QuantizedWeight, bias: Tensor | None, names: list[str]) -> tuple[QuantizedWeight, Any]:
        """Compute (weight, bias) with the adapters `names` merged in."""
        original = q.dequantize(torch.float32)
        weight = original.clone()
        for name in names:
            delta = self.get_delta_weight(name).float()
            variant = self.lora_variant.get(name)
            if isinstance(variant, DoraLinearVariant):
                # As in PEFT's forward pass, the norm is that of the base with this adapter alone.
                norm = torch.linalg.norm(original + delta, dim=1)
                weight = (self.lora_magnitude_vector[name].weight / norm)[:, None] * (weight + delta)
            else:
                weight += delta
            if self.lora_bias[name]:
                if bias is None:
                    raise ValueError(f"adapter {name!r}: expected a layer with a bias for lora_bias, got one without")
                bias = bias + self.lora_B[name].bias * self.scaling[name]
        if not weight.isfinite().all():
            raise ValueError(f"adapters {names}: expected finite merged weights, got NaN or Inf")
        return requantized(weight, q), bias

    def _set_base(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        base.replace_weight(weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias)

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        """Refuse PEFT's LoftQ, which would take the codes for the weight; the error names ours."""
        raise NotImplementedError(
            "init_lora_weights='loftq': the weight is quantized already. Make the adapter, then call "
            "qlora_native.integrations.loftq.initialize_loftq(model, folder_of_the_16_bit_model)"
        )


def check_layers(model: nn.Module, weights: set[int]) -> None:
    """Check that PEFT's layers over weights that are to be quantized, or exchanged, can stand over a `Linear4bit`."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if any(id(parameter) in weights for parameter in layer.get_base_layer().parameters(recurse=False)):
            check_method(name, layer)
            if layer.merged_adapters:
                raise bad(name, "adapters that are not merged", f"{layer.merged_adapters}: unmerge them first")


def adopt_layers(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers over layers that are quantized now into ours, and guard those of its other methods.

    The parameters of adapters stay the same objects, so an optimizer that holds them stays valid.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if type(module) is PeftParamWrapper and targeted_experts(module, module.parameter_name):
            module.__class__ = ParamWrapper
        elif isinstance(base, Linear4bit) and _is_plain_lora(module):
            module.__class__ = LoraLinear4bit  # which has the attributes of a lora.Linear and no others
            module.is_target_conv_1d_layer = False
    guard_layers(model)


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is the layer that PEFT makes for LoRA over an nn.Linear, its weight, or bitsandbytes' layer."""
    cls = type(module)  # by name, as PEFT has the last one only where bitsandbytes is installed
    return (cls.__module__, cls.__name__) in (
        ("peft.tuners.lora.layer", "Linear"),
        ("peft.tuners.lora.layer", "ParamWrapper"),
        ("peft.tuners.lora.bnb", "Linear4bit"),
    )


register()
callbacks.check_model.append(check_layers)
callbacks.adopt_model.append(adopt_layers)
