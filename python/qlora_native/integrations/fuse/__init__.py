"""Let a model compute attention, blocks and the loss by the ops of this library: `fuse`, or one of its three parts.

    import qlora_native as qn

    print(qn.fuse(model))       # then train, or generate, as before

Attention and the loss are those of models of transformers, which this package imports only for them.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

from torch import nn

from ..._core.errors import bad_type
from ._blocks import replace_blocks

__all__ = ["FuseReport", "fuse", "fuse_attention", "fuse_blocks", "fuse_loss"]


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` replaced in a model, and what it left. `print` shows it as text.

    Attributes:
        loss: whether the loss is computed without logits.
        attention: whether attention is computed by `qlora_native.functional.attention`.
        blocks: how many gated activations and norms were replaced by this call.
        left: a sentence for each part that computes as before, with the reason.
    """

    loss: bool
    attention: bool
    blocks: int
    left: tuple[str, ...]

    def __str__(self) -> str:
        """Two lines or more: what was replaced, and each thing that was left."""
        parts = ["the loss"] * self.loss + ["attention"] * self.attention
        parts += [f"{self.blocks} activations and norms"] * (self.blocks > 0)
        return "\n".join([f"fused: {', '.join(parts) or 'nothing'}", *(f"left: {each}" for each in self.left)])


def fuse(model: nn.Module) -> FuseReport:
    """Do `fuse_loss`, `fuse_blocks` and `fuse_attention`, each as far as the model allows.

    Results change only by rounding. A second call changes nothing. Call it after `get_peft_model`.

    Args:
        model: loaded, with its weights: of transformers, PEFT's model of one, or any other; it is changed in place.

    Returns:
        What was replaced, and what was left and why. Nothing is warned of.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    blocks, reason = replace_blocks(model)
    left = [reason] if reason else []
    loss = attention = False
    causal = None
    if "transformers" in sys.modules:  # else the model is none of its models
        from ._attention import models_within, replace_attention
        from ._loss import replace_loss, with_loss

        if (causal := with_loss(model)) is not None:
            reason = replace_loss(causal)
            loss = reason is None
            left += [reason] if reason else []
        if models_within(model):
            attention, remarks = replace_attention(model)
            left += remarks
    if causal is None:
        left.append(f"{type(model).__name__} is no language model of transformers, whose loss could be replaced")
    return FuseReport(loss, attention, blocks, tuple(left))


def fuse_loss(model: nn.Module) -> bool:
    """Make a causal language model compute its training loss without making logits.

    The loss and the gradients change only by rounding: logits are rounded to the dtype of the model as before, and each
    loss is added up in fp32. While the model trains with labels, `outputs.logits` is a `DeferredLogits`. A second call
    changes nothing. It also works under DDP and FSDP2; but a head whose FSDP2 unit reshards after the forward pass
    makes its logits, because its weight is in parts again by the time the loss is computed.

    Args:
        model: a causal language model of transformers, or PEFT's model of one; it is changed in place.

    Returns:
        Whether the loss was fused. If not, the model is unchanged, and a warning says why: its loss is not that of
        causal language models, or its head is not an `nn.Linear` or `Linear4bit` with at most one plain LoRA adapter.

    Raises:
        TypeError: `model` is not a model of transformers.
    """
    from ._loss import replace_loss, with_loss

    causal = with_loss(model)
    if causal is None:
        raise bad_type("model", "a model of transformers", type(model).__name__)
    reason = replace_loss(causal)
    if reason is not None:
        warnings.warn(f"fuse_loss: {reason}", stacklevel=2)
    return reason is None


def fuse_blocks(model: nn.Module) -> int:
    """Let the gated activations and RMS norms of a model be one op each, in training and without.

    A norm is any module with one parameter, `weight` [N], and an epsilon, which gives what `functional.rms_norm` does,
    with or without the shift of Gemma's. An activation is `act_fn` or `activation_fn` of a module that has gate_proj
    and up_proj, or gate_up_proj, and computes SiLU or the tanh of GELU; a mixture's experts too. Results differ from
    those before by rounding: each is computed in fp32 and rounded once. For tensors of other kinds, for a norm whose
    dtype is not its input's, and under torch.compile, which fuses by itself, modules compute as before.

    Args:
        model: loaded, with its weights; transformers' or PEFT's, or any other.

    Returns:
        How many modules were changed. Calling it again changes none.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    changed, reason = replace_blocks(model)
    if reason is not None:
        warnings.warn(f"fuse_blocks: {reason}", stacklevel=2)
    return changed


def fuse_attention(model: nn.Module) -> bool:
    """Let the attention of a model be `qlora_native.functional.attention` wherever that computes the same.

    The rotation of positions before it becomes `rotary_embedding` where a model rotates as Llama does.

    Results change only by rounding, gradients too. The model and those within it, such as the encoder of images beside
    a language model, are changed where their implementation is "sdpa", which is transformers' default; another one is
    the user's choice and stays. `model.set_attn_implementation("sdpa")` undoes it. Saved configs do not name the
    implementation, so files are as before. A second call changes nothing.

    On a GPU, under torch.compile, with dropout of probabilities in training, with a position bias, and where a mask
    leaves holes between the keys that a query sees, transformers' own function computes as before.

    Args:
        model: a model of transformers, PEFT's model of one, or any module that holds some; it is changed in place.

    Returns:
        Whether any attention was fused. A warning says what was not, and why.

    Raises:
        TypeError: there is no model of transformers in `model`.
    """
    from ._attention import models_within, replace_attention

    if not models_within(model):
        raise bad_type("model", "a model of transformers", type(model).__name__)
    replaced, remarks = replace_attention(model)
    for remark in remarks:
        warnings.warn(f"fuse_attention: {remark}", stacklevel=2)
    return replaced


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", type(model).__name__)
