"""Check the text that a model is calibrated by."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._core.errors import bad, bad_type

ENOUGH = 16  # This many tokens for each column of the widest weight are enough; docs/quality.md has what fewer cost.


def mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The rows of a batch that are not padding, bool [B, T]; None if all are, or if it is not said."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None


def check_tokens(batches: list[dict[str, Any]], widest: int) -> None:
    """Raise ValueError if the batches have fewer tokens than the widest weight has columns."""
    tokens = 0
    for batch in batches:
        mask, ids = mask_of(batch), batch.get("input_ids")
        if mask is None and not isinstance(ids, Tensor):
            return  # it is unknown how many rows such a batch makes
        tokens += ids.numel() if mask is None else int(mask.sum())
    if tokens < widest:
        raise bad("batches", f"at least {widest} tokens ({ENOUGH * widest} are enough)", tokens)


def checked_batches(model: nn.Module, batches: Any) -> list[dict[str, Any]]:
    """The keyword arguments of the model's calls, with a check of token ids.

    Args:
        model: the model.
        batches: tensors of token ids [B, T], or mappings with the arguments of the model's `forward`.

    Raises:
        TypeError: a batch is neither.
        ValueError: there is none, or ids lie outside the model's vocabulary.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise bad_type("batches", "an iterable of tensors or mappings", type(batches).__name__)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's forward hides its arguments
    takes = inspect.signature(base.forward).parameters
    vocabulary = _vocabulary(base)
    made = []
    for number, batch in enumerate(batches):
        name = f"batches[{number}]"
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        elif not isinstance(batch, Mapping):
            raise bad_type(name, "a tensor or a mapping", type(batch).__name__)
        arguments = dict(batch)
        arguments.pop("labels", None)
        ids = arguments.get("input_ids")
        if isinstance(ids, Tensor):
            if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2 or not ids.numel():
                expected = "int32 or int64 [B, T] that is not empty"
                raise bad(f"{name}: input_ids", expected, f"{ids.dtype} {list(ids.shape)}")
            low, high = (end.item() for end in ids.aminmax())
            if vocabulary is not None and not 0 <= low <= high < vocabulary:
                got = f"{low if low < 0 else high}: the tokenizer is another model's"
                raise bad(f"{name}: input_ids", f"ids of the model's vocabulary, 0 ... {vocabulary - 1}", got)
        if "use_cache" in takes:
            arguments["use_cache"] = False
        made.append(arguments)
    if not made:
        raise bad("batches", "at least one batch of the model's own text", "none")
    return made


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model has, or None if it has no embedding of tokens."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
