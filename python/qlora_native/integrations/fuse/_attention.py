"""`fuse_attention(model)`: models of transformers compute attention on the CPU by this library's op.

    fuse_attention(model)                   # then train, or generate, as before

transformers looks up the attention of a model by the name of an implementation, and importing this module registers one
more, "qlora_native". For calls that the op does not support, transformers' own "sdpa" computes as before:
on a GPU, with dropout, under torch.compile, and with a mask in which the keys that a query sees are not contiguous.
A mask becomes ranges of keys once, however many layers read it.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..._core.errors import FLOAT_DTYPES, is_finite_number
from ...functional import attention
from ._deferred import is_plain
from ._rotary import fuse_rotary

NAME = "qlora_native"
REPLACED = "sdpa"
_NOT_COMPUTED = ("position_bias", "softcap", "s_aux", "output_attentions")  # arguments of an attention function
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # in configs
# A module that treats sdpa differently from other implementations would take "qlora_native" for one of the others.
_REQUIRES_SDPA = re.compile(r"""_attn_implementation\b.*["']sdpa["']""")


def models_within(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers that a module is or holds."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [each for each in modules if isinstance(each, PreTrainedModel)]


def replace_attention(model: nn.Module) -> tuple[bool, list[str]]:
    """Do what `fuse_attention` promises: whether any attention was replaced, and what was not, and why."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices and devices.isdisjoint(("cpu", "meta")):
        where = ", ".join(sorted(devices))
        return False, [f"{type(model).__name__} keeps its attention: its weights are on {where}"]
    # Models that share a config, such as one with a head and the one within it, share the implementation that it names.
    sharing: dict[int, list[PreTrainedModel]] = {}
    for each in models_within(model):
        sharing.setdefault(id(each.config), []).append(each)
    replaced, remarks = False, []
    for group, found in [(group, group[0].config._attn_implementation) for group in sharing.values()]:
        remark = _replace(group, found)
        if remark is not None:
            remarks.append(f"{type(group[0]).__name__} {remark}")
        replaced = replaced or group[0].config._attn_implementation == NAME
    if replaced:
        fuse_rotary(model)
    return replaced, remarks


def _replace(models: list[PreTrainedModel], found: str) -> str | None:
    """Set the implementation of models that share a config, which had `found`, and say what is not fused, and why."""
    config, wanted, reason = models[0].config, NAME, None
    if found not in (NAME, REPLACED):
        wanted, reason = found, f"its implementation is {found!r}, and {REPLACED!r} is what this replaces"
    elif any(map(_requires_sdpa, models)):
        wanted, reason = REPLACED, f"its code requires {REPLACED!r} by name"
    for each in models:
        # The call of an outer model may have changed this config, where it does not list it. That is set back, too.
        if config._attn_implementation != wanted:
            each.set_attn_implementation({"": wanted})  # of this config alone
    if reason is None and config._attn_implementation != NAME:
        reason = "its code does not take attention from transformers' AttentionInterface"
    if reason is not None:
        return f"keeps its attention: {reason}"
    name = next((name for name in _DROPOUTS if getattr(config, name, None)), None)
    if name is None or found == NAME:
        return None
    return f"computes attention by {REPLACED!r} in training: its {name} is {getattr(config, name)}"


def _requires_sdpa(model: PreTrainedModel) -> bool:
    try:
        return _REQUIRES_SDPA.search(inspect.getsource(sys.modules[type(model).__module__])) is not None
    except (KeyError, OSError, TypeError):
        return False  # of a class without a file, such as one from a notebook


# ---- what transformers calls ----


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what `sdpa_attention_forward` of transformers does, for the same arguments.

    Args:
        module: an attention layer.
        query: [B, H, Tq, D]
        key, value: [B, KV, Tk, D]
        attention_mask: bool [B, 1, Tq, Tk], true where a query sees a key; None if causality is all there is.
        dropout: of probabilities.
        scaling: None is 1 / sqrt(D).
        is_causal: what holds where there is no mask; None reads it from `module`.
        **kwargs: of other implementations.

    Returns:
        [B, Tq, H, D] and None.
    """
    ranges = None
    computed = (
        not dropout and not torch.jit.is_tracing() and not any(_given(kwargs.get(name)) for name in _NOT_COMPUTED)
    )
    if computed and _fit(module, query, key, value, scaling):
        if attention_mask is not None:
            ranges = _ranges_of(attention_mask, query, key)
        if attention_mask is None or ranges is not None:
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            # A single query without a mask is the last token, which sees all keys.
            causal = attention_mask is None and is_causal and query.shape[2] > 1
            out = attention(query, key, value, scale=scaling, is_causal=causal, key_ranges=ranges)
            return out.transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _given(argument: Any) -> bool:
    return argument is not None and argument is not False


def _fit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: Any) -> bool:
    """Whether `attention` takes these operands, and computes what sdpa does."""
    if not (is_plain(query, key, value) and query.is_cpu and key.is_cpu and value.is_cpu):
        return False
    if not (query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled("cpu")):
        return False
    if not (query.dtype in FLOAT_DTYPES and key.dtype in FLOAT_DTYPES and value.dtype in FLOAT_DTYPES):
        return False
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if scaling is not None and not (is_finite_number(scaling) and scaling > 0):
        return False
    (B, H, _, D), groups = query.shape, getattr(module, "num_key_value_groups", 1)
    fit = key.shape == value.shape and key.shape[::3] == (B, D) and key.shape[1] * groups == H
    return fit and query.numel() > 0 and key.numel() > 0


def _ranges_of(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """The ranges of keys that a mask [B, 1, Tq, Tk] leaves, which stay with the mask; None if it leaves others."""
    B, Tq, Tk = query.shape[0], query.shape[2], key.shape[2]
    if not is_plain(mask) or mask.dtype != torch.bool or mask.device != query.device:
        return None
    if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[1:] != (1, Tq, Tk):
        return None
    if mask.is_inference():  # it does not tell whether it was written to since
        return _as_ranges(mask)
    version, ranges = getattr(mask, "_key_ranges", (None, None))
    if version != mask._version:
        ranges = _as_ranges(mask)
        mask._key_ranges = mask._version, ranges  # type: ignore[attr-defined]
    return ranges


def _as_ranges(mask: Tensor) -> Tensor | None:
    """int32 [B, Tq, 2], or [1, Tq, 2] if all sequences have the same mask: what `attention` calls key_ranges."""
    seen = mask[:1, 0] if mask.stride(0) == 0 else mask[:, 0]
    as_bytes = seen.view(torch.uint8)
    count = seen.sum(-1)
    begin = as_bytes.argmax(-1)  # the first of the largest
    end = seen.shape[-1] - as_bytes.flip(-1).argmax(-1)
    end = torch.where(count > 0, end, begin)
    return torch.stack((begin, end), -1).int() if torch.equal(end - begin, count) else None
