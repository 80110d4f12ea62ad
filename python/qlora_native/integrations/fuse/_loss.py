"""`fuse_loss(model)`: causal language models of transformers compute their loss without making logits.

    fuse_loss(model)                        # then train as before: Trainer, or any loop that reads outputs.loss

transformers passes a model's logits and labels to its loss function. While the model trains, its head returns a
`DeferredLogits` in place of logits, which holds the input of the head, and the loss function that is set here computes
the loss from it by `qlora_native.functional.linear_cross_entropy`. `DeferredLogits` records what a model family does to
its logits: a factor (Granite, Cohere) or a soft cap (Gemma 2), and that they are widened to fp32, which models do and
accelerate does for mixed precision. Any other use, such as `outputs.logits` in a user's
loop, computes the logits. TRL's SFTTrainer has a loss of its own without logits, and does not call the loss function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..._core.errors import FLOAT_DTYPES
from ..._layers.adapters import dropout_of
from ..._layers.hooks import has_hooks
from ...functional import linear_cross_entropy
from ...nn import Linear4bit
from ._deferred import Deferred


class DeferredLogits(Deferred):
    """z = c * tanh(s * l / c), or s * l, of the logits l of a head, computed when anything but the loss reads it.

    Attributes:
        head: the module that makes them.
        hidden: [..., K], what it multiplies.
        operands: of the head, as `linear_cross_entropy` takes them.
        scale, softcap: s, and c or None.
        dtype: of z.
    """

    def __init__(self, head: nn.Module, hidden: Tensor, operands: tuple[Any, ...]) -> None:
        """Defer the logits of `hidden`."""
        super().__init__()
        self.head, self.hidden, self.operands = head, hidden, operands
        self.scale, self.softcap = 1.0, None
        device = hidden.device.type
        # What is read after the model's forward pass is computed as it would have been there.
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = self._made_in = self._autocast or hidden.dtype
        tensors = (each for each in operands if isinstance(each, Tensor))
        self._versions = [(each, each._version) for each in tensors if not each.is_inference()]

    @property
    def device(self) -> torch.device:
        """The device of z."""
        return self.hidden.device

    def compute(self) -> Tensor:
        """The logits, as the model would have made them.

        Raises:
            RuntimeError: the head has changed since.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "logits: the output layer has changed since the forward pass, in which fuse_loss made none; read "
                "outputs.logits before optimizer.step()"
            )
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            logits = type(self.head).forward(self.head, self.hidden)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(self.scale / self.softcap * logits)
            elif self.scale != 1.0:
                logits = self.scale * logits
        return logits.to(self.dtype)

    def _changed(self, **changes: Any) -> DeferredLogits:
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """z in fp32, or what else a tensor's `to` makes."""
        if self.computed is None and args == (torch.float32,) and not kwargs:
            return self.float()
        return self.tensor().to(*args, **kwargs)

    def float(self) -> Any:
        """z in fp32, in which the loss is computed anyway."""
        return self._changed(dtype=torch.float32) if self.computed is None else self.tensor().float()

    def __mul__(self, factor: Any) -> Any:
        """z times a factor of the family's, which is not widened before it."""
        known = isinstance(factor, int | float) and math.isfinite(factor) and factor > 0
        if known and self.computed is None and self.dtype == self._made_in:
            # factor * c * tanh(s * l / c) has the cap factor * c, and s grows with it.
            softcap = None if self.softcap is None else self.softcap * factor
            return self._changed(scale=self.scale * factor, softcap=softcap)
        return self.tensor() * factor

    def __truediv__(self, divisor: Any) -> Any:
        """The same, as a divisor."""
        return self * (1 / divisor) if isinstance(divisor, int | float) and divisor else self.tensor() / divisor

    def tanh(self) -> Any:
        """A soft cap's: tanh(s * l) has the cap 1."""
        if self.computed is None and self.softcap is None and self.dtype == self._made_in:
            return self._changed(softcap=1.0)
        return self.tensor().tanh()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's functions see the logits; but for tanh."""
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return super().__torch_function__(func, types, args, kwargs)

    def __len__(self) -> int:
        """The first dimension, as a tensor's."""
        return self.hidden.shape[0]


def with_loss(model: nn.Module) -> PreTrainedModel | None:
    """The model of transformers that `model` is or that PEFT has wrapped, or None."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner if hasattr(inner, "loss_function") and hasattr(inner, "get_output_embeddings") else None


def replace_loss(causal: PreTrainedModel) -> str | None:
    """Do what `fuse_loss` promises, or say why the model keeps its own loss."""
    if causal.loss_function is _loss:
        return None
    head, reason = causal.get_output_embeddings(), None
    if causal.loss_function is not ForCausalLMLoss:
        reason = f"its loss function is {getattr(causal.loss_function, '__name__', causal.loss_function)}"
    elif head is None or _operands(head) is None:
        reason = f"its head is {type(head).__name__}"
    elif "forward" in vars(head):
        reason = "another library has replaced its head's forward"
    if reason is not None:
        return f"{type(causal).__name__} keeps its own loss: {reason}"
    head._wants_loss = False
    head.forward = partial(_head_forward, head)  # which a copy of the model, or a pickle, has of its own
    causal.register_forward_pre_hook(_before, with_kwargs=True)
    causal.register_forward_hook(_after, always_call=True)
    causal.loss_function = _loss
    return None


def _before(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """Record whether this forward pass computes a loss that will be differentiated."""
    wants_loss = model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
    model.get_output_embeddings()._wants_loss = wants_loss and not torch.compiler.is_compiling()


def _after(model: nn.Module, *_: Any) -> None:
    model.get_output_embeddings()._wants_loss = False


def _head_forward(head: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The new forward of the head: returns a `DeferredLogits` while the model computes a training loss."""
    if head._wants_loss and not args and not kwargs and (operands := _operands(head, x)) is not None:
        return DeferredLogits(head, x, operands)
    return type(head).forward(head, x, *args, **kwargs)


def _loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute what transformers' `ForCausalLMLoss` does; it uses no other arguments either."""
    options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
    if not isinstance(logits, DeferredLogits):
        return ForCausalLMLoss(logits, labels, vocab_size, **options, **kwargs)
    if logits.computed is not None:
        return ForCausalLMLoss(logits.computed, labels, vocab_size, **options, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight, bias, lora_a, lora_b, scaling = logits.operands
    loss = linear_cross_entropy(
        logits.hidden,
        weight,
        shift_labels.to(logits.hidden.device).reshape(logits.hidden.shape[:-1]),
        bias,
        lora_a,
        lora_b,
        scaling,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        logit_scale=logits.scale,
        softcap=logits.softcap,
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _operands(head: nn.Module, x: Tensor | None = None) -> tuple[Any, ...] | None:
    """(weight, bias, lora_a, lora_b, scaling) of a head, or None if `linear_cross_entropy` cannot compute it of `x`."""
    base, lora = head, (None, None, 1.0)
    if hasattr(head, "lora_A"):
        name = _plain_adapter(head)
        if name is None:
            return None
        base = head.base_layer
        if name:
            lora = (head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name])
    if not all(map(_stays_whole, {head, base})):
        return None
    if isinstance(base, Linear4bit):
        casts = x is not None and base.compute_dtype not in (None, x.dtype)
        return None if casts else (base.quantized_weight, base.bias, *lora)
    weight = getattr(base, "weight", None)
    computes_as_linear = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    plain = computes_as_linear and type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOAT_DTYPES
    return (weight, base.bias, *lora) if plain else None


def _stays_whole(module: Any) -> bool:
    """Whether its weight is there after its forward pass, in which FSDP2 gathers that of a unit from all processes.

    From accelerate 1.16 on the last norm and the head are a unit that stays whole until the backward pass.
    """
    if not hasattr(module, "_get_fsdp_state"):
        return True
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return all(group is None or group.post_forward_mesh_info is None for group in groups)


def _plain_adapter(head: Any) -> str | None:
    """The only active LoRA adapter of PEFT's layer; "" if there is none, None if the layer computes anything else."""
    if head.disable_adapters or head.merged:
        return ""
    active = [name for name in head.active_adapters if name in head.lora_A]
    if len(active) != 1:
        return None if active else ""
    name = active[0]
    inner = (head.lora_A[name], head.lora_B[name])
    plain = all(type(each) is nn.Linear and each.bias is None for each in inner) and name not in head.lora_variant
    if any(map(has_hooks, (head.base_layer, head.lora_dropout[name], *inner))):
        return None
    return name if plain and dropout_of(head, name) == 0 and not getattr(head, "fan_in_fan_out", False) else None
