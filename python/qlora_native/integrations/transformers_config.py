"""transformers' config for our layers: `BitsAndBytesConfig`, and how it is merged with that of a file.

`integrations.transformers` has the class for users.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from typing import Any

from ._versions import require

require("transformers")

import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config
from transformers.utils import is_bitsandbytes_available

from .._errors import bad, bad_type, chosen_blocksize
from .._microscaling import MICROSCALED

METHOD = "qlora_native"
FILE_FORMATS = ("nf4", "fp4")  # the formats of bitsandbytes' files, which we write too
FORMATS = (*FILE_FORMATS, *MICROSCALED)
_FIELDS = tuple(inspect.signature(transformers.BitsAndBytesConfig).parameters)[:-1]  # the last one is **kwargs


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """transformers' `BitsAndBytesConfig` for our layers: the same fields, and a few more.

    Attributes:
        load_in_4bit: True. LLM.int8() (`load_in_8bit`) is not supported.
        bnb_4bit_quant_type: "nf4", "fp4" (transformers' default), "mxfp4" or "nvfp4". `save_pretrained` refuses the
            last two, for which bitsandbytes has no files. `qlora_native.nn.quantize_model` has further formats.
        bnb_4bit_use_double_quant: keep the scales in 8 bits (QLoRA, section 3), as "mxfp4" and "nvfp4" always do.
        bnb_4bit_compute_dtype: the dtype that activations are cast to for the product. float32, the default, does not
            cast them; sums are fp32 in any case.
        llm_int8_skip_modules: names of modules that stay in 16 bits; by default the output layer and tied weights. An
            empty list also quantizes embeddings, and an output layer tied to one shares its bytes. Only this library
            reads such a model, because bitsandbytes has no 4-bit embedding in its files.
        blocksize: elements that share a scale, as in `qlora_native.quantize`; after construction it is never None.
        strict: refuse a model with weights whose use is unknown; not written to files.
        experts_in_mxfp4: the files have experts in MXFP4, whose bytes are kept. Set when a file of gpt-oss is read.
    """

    experts_in_mxfp4 = False

    def __init__(self, *args: Any, blocksize: int | None = None, strict: bool = False, **kwargs: Any) -> None:
        """Make a config.

        Args:
            args, kwargs: the fields of transformers' own config, by position or by name.
            blocksize, strict: see the class.

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
        self.blocksize = chosen_blocksize(blocksize, self.bnb_4bit_quant_type)
        self.quant_method = METHOD
        self.strict = strict
        for name, value in (
            ("load_in_8bit", False),
            ("load_in_4bit", True),
            ("llm_int8_enable_fp32_cpu_offload", False),
            ("bnb_4bit_quant_storage", torch.uint8),
        ):
            if getattr(self, name) != value:
                raise bad(name, f"{value}, as qlora_native has no other", getattr(self, name))
        if self.bnb_4bit_quant_type not in FORMATS:
            raise bad("bnb_4bit_quant_type", "one of " + ", ".join(FORMATS), repr(self.bnb_4bit_quant_type))

    @property
    def quantize_options(self) -> dict[str, Any]:
        """The arguments format, blocksize and double_quant of `qlora_native.quantize`."""
        return {
            "format": self.bnb_4bit_quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.bnb_4bit_use_double_quant,
        }

    @property
    def product_dtype(self) -> torch.dtype | None:
        """The `product_dtype` of the layers; None does not cast activations."""
        return None if self.bnb_4bit_compute_dtype == torch.float32 else self.bnb_4bit_compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """The fields for a file, where the method is "bitsandbytes", the format of the weights."""
        fields = {**super().to_dict(), "quant_method": "bitsandbytes"}
        return {name: value for name, value in fields.items() if name not in ("strict", "experts_in_mxfp4")}

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields, because transformers compares only those of its own config."""
        return self.to_dict()


# Not used as a decorator: a type checker would see transformers' base class in place of ours.
register_quantization_config(METHOD)(BitsAndBytesConfig)


# transformers merges the config of the file with that of the caller in this function. It is wrapped to choose our
# quantizer for bitsandbytes' files, because transformers cannot register a second quantizer for a method that it knows.
_merge_quantization_configs = AutoHfQuantizer.merge_quantization_configs


@functools.wraps(_merge_quantization_configs)
def _merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
    ours = isinstance(quantization_config_from_args, BitsAndBytesConfig)
    if ours and isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "mxfp4":
        config = copy.copy(quantization_config_from_args)
        config.experts_in_mxfp4 = True
        return config
    in_file = isinstance(quantization_config, dict) and quantization_config.get("load_in_4bit", False)
    if not in_file or not (ours or (quantization_config_from_args is None and not is_bitsandbytes_available())):
        return _merge_quantization_configs(quantization_config, quantization_config_from_args)
    # The file decides how weights are stored, and the caller in which dtype to multiply.
    known = {*_FIELDS, "blocksize"} - {"bnb_4bit_quant_storage"}  # a file may have fields of a later version
    fields = {name: value for name, value in quantization_config.items() if name in known}
    config = BitsAndBytesConfig(**fields)
    if ours and quantization_config_from_args.product_dtype is not None:
        config.bnb_4bit_compute_dtype = quantization_config_from_args.product_dtype
    return config


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)
