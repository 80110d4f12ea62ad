"""Layers that a checkpoint does not have, such as a new classification head: they stay in 16 bits.

transformers puts quantized layers into a model before it reads the files, and gives random values to what they lack.
Codes are no weights that could get such values. So between the two, each layer that the files lack becomes what it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, __version__
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..._core.errors import bad
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import note_reason
from ...nn import Embedding4bit, Linear4bit
from ._config import BitsAndBytesConfig, KeepQuantized
from ._dense import dense_of


def restore_missing(model: PreTrainedModel, config: BitsAndBytesConfig, missing: set[str]) -> None:
    """Replace each quantized layer whose weight is missing by one in 16 bits, without values.

    Args:
        model: a model that has been read from files, before missing weights are initialized.
        config: its config, whose `llm_int8_skip_modules` gets the names of these layers.
        missing: the names of the tensors that the files lack; changed in place to those of the new model.
    """
    new = []
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for path, layer in list(model.named_modules()):
        weight = f"{path}.weight"
        if not isinstance(layer, (Linear4bit, Embedding4bit)) or weight not in missing or weight in tied:
            continue
        missing.difference_update(f"{path}.{name}" for name in layer.weight_names())
        missing.add(weight)
        dense = dense_of(layer)
        note_reason(dense, "new: the files do not have it")
        model.set_submodule(path, dense)
        new.append(path)
    if new:
        keep = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
        quantized = [path for path, module in model.named_modules() if isinstance(module, QuantizedLayer)]
        config.llm_int8_skip_modules = sorted({*keep, *names_to_skip(new, quantized)})


def names_to_skip(dense: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The entries of `llm_int8_skip_modules` for the layers `dense`, by which the layers `quantized` are not skipped.

    An entry is a pattern, or the end of a name: "dense" would skip "layers.0.attention.dense" too.
    """
    quantized = list(quantized)
    return [
        name if all(should_convert_module(other, [name]) for other in quantized) else f"^{re.escape(name)}$"
        for name in dense
    ]


def check_devices(device_map: Any) -> None:
    """Refuse a map of devices that leaves a part of a model on the disk."""
    parts = [part for part, device in device_map.items() if device == "disk"] if isinstance(device_map, dict) else []
    if parts:
        raise NotImplementedError(
            f"device_map: expected a device for every module, got 'disk' for {parts[0] or 'the model'}: a model in 4 "
            "bits is not offloaded to disk. Give it more memory (max_memory), or a larger device"
        )


def _check_keys(unexpected: Iterable[str]) -> None:
    """Refuse files of a model that was saved with PEFT's layers in it."""
    if wrapped := sorted(key for key in unexpected if ".base_layer." in key):
        raise bad(
            "the checkpoint",
            f"{wrapped[0].replace('.base_layer', '')}",
            f"{wrapped[0]}: it was saved while PEFT's layers were in the model. Save the model that unload() or "
            "merge_and_unload() of the PeftModel returns; its save_pretrained saves the adapter",
        )


# HfQuantizer has no method that is called when the files have been read and missing weights have no values yet, so a
# function of transformers itself is extended.
if not hasattr(PreTrainedModel, "_finalize_model_loading"):
    raise ImportError(
        f"qlora_native: expected a transformers with PreTrainedModel._finalize_model_loading, got {__version__}, which "
        "may be newer than this qlora_native supports: pip install --upgrade qlora_native"
    )
_finalize_model_loading = PreTrainedModel._finalize_model_loading


def _finalize(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
    """Check what was found in the files, and restore layers that they lack, before transformers goes on."""
    quantizer = load_config.hf_quantizer
    config = getattr(quantizer, "quantization_config", None)
    if isinstance(config, KeepQuantized):
        check_devices(load_config.device_map)
        missing, unexpected = loading_info.missing_keys, loading_info.unexpected_keys
        quantizer.finish(model, load_config.device_map, missing, unexpected)
    if isinstance(config, BitsAndBytesConfig):
        check_devices(load_config.device_map)
        _check_keys(loading_info.unexpected_keys)
        restore_missing(model, config, loading_info.missing_keys)
    return _finalize_model_loading(model, load_config, loading_info)


PreTrainedModel._finalize_model_loading = staticmethod(_finalize)
