"""Live models of transformers whose layers `quantize_model` has replaced: what `save_pretrained` makes of them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .._embedding import Embedding4bit
from .._errors import bad
from .._layer import QuantizedLayer
from .experts import find_experts
from .transformers import FILE_FORMATS, FORMATS, BitsAndBytesConfig, Quantizer, adopt

__all__ = ["adopt_quantized"]


class _Unsaved(Quantizer):
    """The quantizer of a model that no file format holds: saving it raises, before anything is written."""

    def __init__(self, config: BitsAndBytesConfig, error: ValueError) -> None:
        super().__init__(config)
        self.error = error

    def is_serializable(self) -> bool:
        """It is not.

        Raises:
            ValueError: why. transformers' own message would not say.
        """
        raise self.error


def adopt_quantized(model: nn.Module) -> None:
    """Make transformers see `model` as quantized, as if it had loaded it so.

    `save_pretrained` then writes bitsandbytes' format and a quantization_config with which the same layers are
    quantized when it is loaded: what stayed in 16 bits is named in `llm_int8_skip_modules`. Where bitsandbytes has no
    such format, or no such list would say which layers they are, `save_pretrained` raises a ValueError that says so.

    Args:
        model: a `PreTrainedModel` with quantized layers in it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    first = next(iter(layers.values()))
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    dense += [found.path for found in find_experts(model)]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=first.format if first.format in FORMATS else "nf4",
        bnb_4bit_use_double_quant=first.double_quant,
        blocksize=first.blocksize,
        llm_int8_skip_modules=dense,
    )
    error = _why_not_saved(model, layers, dense)
    if error is None:
        adopt(model, Quantizer(config))
        return
    before = getattr(model.config, "quantization_config", None)
    adopt(model, _Unsaved(config, error))
    if before is None:
        del model.config.quantization_config  # it would be of another model
    else:
        model.config.quantization_config = before


def _why_not_saved(model: nn.Module, layers: dict[str, QuantizedLayer], dense: list[str]) -> ValueError | None:
    other: Any = vars(model).get("hf_quantizer")
    if other is not None and not isinstance(other, Quantizer) and getattr(model, "is_quantized", False):
        method = getattr(other.quantization_config.quant_method, "value", other.quantization_config.quant_method)
        return bad("model", "all quantized layers to be ours", f"others, of {method}: no file holds both")
    keep = [*dense, *(model._keep_in_fp32_modules or ())]
    for name, layer in layers.items():
        if layer.format not in FILE_FORMATS:
            return bad(f"{name}: format", "nf4 or fp4, the formats of the files that transformers reads", layer.format)
        if not isinstance(layer, Embedding4bit) and not should_convert_module(name, keep):
            return bad(name, "a layer that llm_int8_skip_modules tells from those in 16 bits", "one that it does not")
    return None


_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    # Where a part of it was quantized, such as model.model, or a layer put in by hand, the whole was not told.
    told = isinstance(vars(self).get("hf_quantizer"), Quantizer)
    if not told and any(isinstance(module, QuantizedLayer) for module in self.modules()):
        adopt_quantized(self)
    _save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save
