"""transformers' configs for our layers: `BitsAndBytesConfig` and `KeepQuantized`, and how each is merged
with that of a file.

`integrations.transformers` has the class for users.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..._core.blocks import chosen_blocksize
from ..._core.errors import bad, bad_type, check_float_dtype, dtype_name
from ..._core.microscaling import MICROSCALED
from ..._core.quant_state import FILE_FORMATS
from ..._layers.base import QuantizedLayer

METHOD = "qlora_native"
KEEP = f"{METHOD}_keep"
FORMATS = (*FILE_FORMATS, *MICROSCALED)
KEPT_METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "auto-round")  # of folders
_NOT_IN_FILES = ("strict", "mapped", "experts_in_mxfp4", "formats", "layers_dtype")
_FIELDS = tuple(inspect.signature(transformers.BitsAndBytesConfig).parameters)[:-1]  # the last one is **kwargs


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """transformers' `BitsAndBytesConfig` for our layers: the same fields, and a few more.

    Attributes:
        load_in_4bit: True. LLM.int8() (`load_in_8bit`) is not supported.
        bnb_4bit_quant_type: "nf4", "fp4" (transformers' default), "mxfp4" or "nvfp4". bitsandbytes has no files of the
            last two: only this library reads what `save_pretrained` writes. `qlora_native.nn.quantize_model` has
            further formats.
        bnb_4bit_use_double_quant: keep the scales in 8 bits (QLoRA, section 3), as "mxfp4" and "nvfp4" always do.
        bnb_4bit_compute_dtype: the dtype that activations are cast to for the product: fp32, bf16 or fp16. float32, the
            default, does not cast them; accumulators are fp32 in any case. The config of a file then has the model's
            dtype.
        llm_int8_skip_modules: names of modules that stay in 16 bits; by default the output layer and tied weights. An
            empty list also quantizes embeddings, and an output layer tied to one shares its bytes. Only this library
            reads such a model, because bitsandbytes has no 4-bit embedding in its files.
        blocksize: elements that share a scale, as in `qlora_native.quantize`; after construction it is never None.
        strict: refuse a model with weights whose use is unknown; not written to files.
        mapped: the quantized weights of a 4-bit folder stay in its files, which may be larger than the memory, and are
            read before their layers need them: see `qlora_native.nn.MappedWeights`. Not written to files.
        experts_in_mxfp4: the files have experts in MXFP4, whose bytes are kept. Set when a file of gpt-oss is read.
        formats: the formats of the model's weights, from when it has any. With one that bitsandbytes does not have, the
            config of a file has this list as its bnb_4bit_quant_type, and our method; see `to_dict`.
        layers_dtype: the dtype in which the model's layers multiply by default, from when it has any.
    """

    experts_in_mxfp4 = False
    formats: tuple[str, ...] = ()
    layers_dtype: torch.dtype | None = None

    def __init__(
        self, *args: Any, blocksize: int | None = None, strict: bool = False, mapped: bool = False, **kwargs: Any
    ) -> None:
        """Make a config.

        Args:
            args, kwargs: the fields of transformers' own config, by position or by name.
            blocksize, strict, mapped: see the class.

        Raises:
            ValueError, TypeError: a field has a value that is not supported, or the field does not exist.
        """
        for name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):  # in a file, but not fields
            kwargs.pop(name, None)
        for name in kwargs:
            if name not in _FIELDS:
                near = difflib.get_close_matches(name, [*_FIELDS, "blocksize"], 1) or sorted((*_FIELDS, "blocksize"))
                raise bad_type("BitsAndBytesConfig", f"{', '.join(near)}", f"{name!r}, which is no field of it")
        super().__init__(*args, **kwargs)
        check_float_dtype("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        if self.bnb_4bit_quant_type not in FORMATS:
            raise bad("bnb_4bit_quant_type", "one of " + ", ".join(FORMATS), repr(self.bnb_4bit_quant_type))
        self.blocksize = chosen_blocksize(blocksize, self.bnb_4bit_quant_type)
        self.quant_method = METHOD
        self.strict, self.mapped = strict, mapped
        for name, value in (
            ("load_in_8bit", False),
            ("load_in_4bit", True),
            ("llm_int8_enable_fp32_cpu_offload", False),
            ("bnb_4bit_quant_storage", torch.uint8),
        ):
            if getattr(self, name) != value:
                raise bad(name, f"{value}, as qlora_native has no other", getattr(self, name))

    @property
    def quantize_options(self) -> dict[str, Any]:
        """The arguments format, blocksize and double_quant of `qlora_native.quantize`."""
        return {
            "format": self.bnb_4bit_quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.bnb_4bit_use_double_quant,
        }

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The `compute_dtype` of the layers; None does not cast activations."""
        return None if self.bnb_4bit_compute_dtype == torch.float32 else self.bnb_4bit_compute_dtype

    def note_layers(self, model: nn.Module) -> None:
        """Store the formats that a model has, with that of the config first, and the dtype of its products.

        Args:
            model: the model.
        """
        layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
        others = sorted({layer.format for layer in layers} - {self.bnb_4bit_quant_type})
        self.formats = (self.bnb_4bit_quant_type, *others)
        self.layers_dtype = next((layer.compute_dtype or layer.dtype for layer in layers), None)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a file.

        A file whose weights are all in formats of bitsandbytes is one of its method. In another one the method is
        "qlora_native", and the type of the weights is a list: transformers takes every file with `load_in_4bit` for one
        of bitsandbytes, would leave weights out that it does not know, and stops at a type that is not a string.
        """
        fields = {**super().to_dict(), "quant_method": "bitsandbytes"}
        if self.compute_dtype is None and self.layers_dtype is not None:
            fields["bnb_4bit_compute_dtype"] = dtype_name(self.layers_dtype)
        if not set(self.formats) <= set(FILE_FORMATS):
            fields |= {"quant_method": METHOD, "bnb_4bit_quant_type": list(self.formats)}
        return {name: value for name, value in fields.items() if name not in _NOT_IN_FILES}

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields, because transformers compares only those of its own config."""
        return self.to_dict()


# Not used as a decorator: a type checker would see transformers' base class in place of ours.
register_quantization_config(METHOD)(BitsAndBytesConfig)


class KeepQuantized(QuantizationConfigMixin):
    """Loads a quantized file of another library, and keeps its bytes as frozen weights under adapters.

        config = KeepQuantized()
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", quantization_config=config)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    The first reads a GGUF file of any architecture that transformers reads, and the second a folder whose config.json
    names the method gptq, awq, compressed-tensors, fp8 or auto-round. Each weight decodes to the file's values, to the
    bit, before they are rounded to the dtype of the product (docs/formats.md).

    Attributes:
        dequantize_others: decode quantized weights that cannot be kept, to the dtype of the model. Otherwise they are
            an error that names each of them, and why.
        file: the quantization_config of the folder; empty for a GGUF file. transformers fills it in.
    """

    def __init__(self, dequantize_others: bool = False) -> None:
        """Make a config.

        Args:
            dequantize_others: see the class.

        Raises:
            TypeError: it is no bool.
        """
        if not isinstance(dequantize_others, bool):
            raise bad_type("dequantize_others", "a bool", type(dequantize_others).__name__)
        self.quant_method = KEEP
        self.dequantize_others = dequantize_others
        self.file: dict[str, Any] = {}


register_quantization_config(KEEP)(KeepQuantized)


# transformers merges the config of the file with that of the caller in this function. It is wrapped to choose our
# quantizer for bitsandbytes' files, because transformers cannot register a second quantizer for a method that it knows.
_merge_quantization_configs = AutoHfQuantizer.merge_quantization_configs


@functools.wraps(_merge_quantization_configs)
def _merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
    in_file = quantization_config if isinstance(quantization_config, dict) else {}
    given = quantization_config_from_args
    if isinstance(given, KeepQuantized):
        return _of_folder(given, in_file)
    ours, method = isinstance(given, BitsAndBytesConfig), in_file.get("quant_method")
    if ours and method == "mxfp4":
        config = copy.copy(given)
        config.experts_in_mxfp4 = True
        return config
    if method == METHOD and given is not None and not ours:
        got = f"{type(given).__module__}.{type(given).__name__}"
        raise bad_type(
            "quantization_config", f"{BitsAndBytesConfig.__module__}'s, as {METHOD} has written the file", got
        )
    if ours and in_file and not in_file.get("load_in_4bit", False):
        got = f"the method {method!r}" + (", in 8 bits (LLM.int8)" if in_file.get("load_in_8bit", False) else "")
        raise bad("quantization_config", "files in 16 or 32 bits, or in 4 bits of a method that is read here", got)
    takes = ours or method == METHOD or (given is None and not is_bitsandbytes_available())
    if not in_file.get("load_in_4bit", False) or not takes:
        return _merge_quantization_configs(quantization_config, given)
    # The file decides how weights are stored, and the caller in which dtype to multiply.
    known = {*_FIELDS, "blocksize"} - {"bnb_4bit_quant_storage"}  # a file may have fields of a later version
    fields = {name: value for name, value in in_file.items() if name in known}
    if isinstance(types := fields.get("bnb_4bit_quant_type"), list):  # see to_dict
        if not types or any(type not in FORMATS for type in types):
            raise bad("bnb_4bit_quant_type", f"some of {', '.join(FORMATS)}", types)
        fields["bnb_4bit_quant_type"] = types[0]
    if ours and given.compute_dtype is not None:
        fields["bnb_4bit_compute_dtype"] = given.compute_dtype
    return BitsAndBytesConfig(**fields, strict=ours and given.strict, mapped=ours and given.mapped)


def _of_folder(given: KeepQuantized, in_file: dict[str, Any]) -> KeepQuantized:
    """The config for a folder whose config.json has the quantization_config `in_file`."""
    if (method := in_file.get("quant_method")) not in KEPT_METHODS:
        ours = method in ("bitsandbytes", "mxfp4", METHOD)
        got = f"{method!r}" + ": use BitsAndBytesConfig of qlora_native.integrations.transformers" * ours
        raise bad("quant_method of config.json", f"one of {', '.join(KEPT_METHODS)}", got)
    made = copy.copy(given)
    made.file = dict(in_file)
    return made


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)
