"""Let `save_pretrained` of transformers save live models whose layers `quantize_model` has replaced."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..._core.errors import bad
from ..._layers import callbacks
from ..._layers.adapters import modules_without_peft
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import is_linear, kept_by_models
from ..._layers.embedding import Embedding4bit
from ._config import FORMATS
from ._experts import find_experts
from ._new_layers import names_to_skip
from ._quantizer import BitsAndBytesConfig, Quantizer, adopt, has_adapters


def _adopt_quantized_models(model: nn.Module) -> None:
    """Make transformers treat the outermost models in `model` that it can save as quantized."""
    if isinstance(model, PreTrainedModel):
        adopt_quantized(model)
        return
    for child in model.children():
        _adopt_quantized_models(child)


def adopt_quantized(model: nn.Module) -> None:
    """Make transformers treat a model as quantized, as if it had been loaded quantized.

    `save_pretrained` then writes files (_weight_files.py) with a quantization_config by which the same layers are
    quantized when the model is loaded: its `llm_int8_skip_modules` names the layers that stayed in 16 bits. If there
    are no files of a format, or no such list can tell the layers apart, `save_pretrained` raises a ValueError that says
    so.
    """
    # Files are written without adapters, so the config names layers as they are called without PEFT's around them.
    modules = list(modules_without_peft(model))
    layers = {name: module for name, module in modules if isinstance(module, QuantizedLayer)}
    if not layers:
        return
    first = next(iter(layers.values()))
    experts = {id(found.module) for found in find_experts(model)}
    dense = names_to_skip(
        (name for name, m in modules if is_linear(m) or isinstance(m, Conv1D) or id(m) in experts), layers
    )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=first.format if first.format in FORMATS else "nf4",
        bnb_4bit_use_double_quant=first.double_quant,
        blocksize=first.blocksize,
        llm_int8_skip_modules=dense,
    )
    error = _why_not_saved(model, layers, dense)
    before = getattr(model.config, "quantization_config", None)
    quantizer = Quantizer(config)
    adopt(model, quantizer, error)
    if quantizer.unsaved is None:
        return
    if before is None:
        del model.config.quantization_config  # it describes the model before it was quantized
    else:
        model.config.quantization_config = before


def _why_not_saved(model: nn.Module, layers: dict[str, QuantizedLayer], dense: list[str]) -> ValueError | None:
    other: Any = vars(model).get("hf_quantizer")
    if other is not None and not isinstance(other, Quantizer) and getattr(model, "is_quantized", False):
        method = getattr(other.quantization_config.quant_method, "value", other.quantization_config.quant_method)
        return bad("model", "all quantized layers to be ours", f"others, of {method}: no file holds both")
    keep = [*dense, *kept_by_models(model)]
    for name, layer in layers.items():
        if not isinstance(layer, Embedding4bit) and not should_convert_module(name, keep):
            return bad(name, "a layer that llm_int8_skip_modules tells from those in 16 bits", "one that it does not")
    return None


_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    # If only a part of the model was quantized, such as model.model, or a layer was put in by hand, adopt_quantized has
    # not seen the whole, or not since: a part shares its config with the whole.
    quantizer, described = vars(self).get("hf_quantizer"), getattr(self.config, "quantization_config", None)
    adopted = isinstance(quantizer, Quantizer)
    if adopted and isinstance(described, BitsAndBytesConfig):
        adopted = described is quantizer.quantization_config
    if not adopted and any(isinstance(module, QuantizedLayer) for module in self.modules()):
        adopt_quantized(self)
        quantizer = vars(self).get("hf_quantizer")
    saving = quantizer.saving_adapters() if isinstance(quantizer, Quantizer) and has_adapters(self) else nullcontext()
    with saving:
        _save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save
callbacks.adopt_model.append(_adopt_quantized_models)
