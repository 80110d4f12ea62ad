"""transformers: quantize a model while it loads, and read and write the 4-bit files of bitsandbytes.

    from qlora_native.integrations.transformers import BitsAndBytesConfig      # instead of transformers' own

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)               # bitsandbytes' file format: stock transformers loads it too

A weight is quantized as soon as it has been read, so memory holds the 4-bit model and one tensor of the checkpoint. A
checkpoint that bitsandbytes has quantized is read with its very bytes: with this config given to `from_pretrained`,
or with none where bitsandbytes is not installed and this module is imported.

The quantizer is registered under transformers' public registration as "qlora_native". In a file the method is called
"bitsandbytes", because that is what the file's format is.
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
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available, is_peft_available

from .. import _C, functional
from .._errors import bad, bad_type, chosen_blocksize
from .._layer import QuantizedLayer
from .._microscaling import MICROSCALED
from .._sizes import has_note, left_alone, linears_of_routers, note_left, size_report
from .._weight import QuantizedWeight
from ..nn import Embedding4bit, Experts4bit, Linear4bit
from .embeddings import codes_of_embeddings, replace_embeddings, replace_tied
from .expert_files import (
    experts_by_path,
    names_in_files,
    read_conversions,
    replace_experts,
    saved_conversions,
    saved_entries,
)

__all__ = ["BitsAndBytesConfig", "Quantizer", "modules_to_quantize"]

METHOD = "qlora_native"
logger = transformers.logging.get_logger(__name__)
FILE_FORMATS = ("nf4", "fp4")  # of bitsandbytes, whose files ours are
FORMATS = (*FILE_FORMATS, *MICROSCALED)
_FIELDS = tuple(inspect.signature(transformers.BitsAndBytesConfig).parameters)[:-1]  # the last one is **kwargs


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """transformers' `BitsAndBytesConfig` with the same fields, for our layers; `blocksize` comes on top.

    Attributes:
        load_in_4bit: True. LLM.int8() (`load_in_8bit`) is not ours.
        bnb_4bit_quant_type: "nf4", "fp4" (transformers' default), "mxfp4" or "nvfp4", of which bitsandbytes has no
            files: `save_pretrained` refuses them. Other formats: `qlora_native.nn.quantize_model`.
        bnb_4bit_use_double_quant: keep the scales in 8 bits (QLoRA, section 3), as "mxfp4" and "nvfp4" always do.
        bnb_4bit_compute_dtype: what activations are cast to for the product. float32, the default, leaves them alone:
            sums are fp32 in any case.
        llm_int8_skip_modules: modules to leave in 16 bits, by name; by default the output layer and what is tied. With
            an empty list embeddings are quantized, too, and an output layer that is tied to one over the same bytes.
            bitsandbytes has no 4-bit embedding in its files: only this library reads such a model.
        blocksize: elements that share a scale, as `qlora_native.quantize`; after construction it is never None.
        strict: refuse a model with weights of which it is not known how they are multiplied by; not written to files.
        experts_in_mxfp4: the files have experts in MXFP4, whose bytes are kept: set where a file of gpt-oss is read.
    """

    experts_in_mxfp4 = False

    def __init__(self, *args: Any, blocksize: int | None = None, strict: bool = False, **kwargs: Any) -> None:
        """Take the fields, as transformers' own does.

        Raises:
            ValueError, TypeError: a field has a value that we do not have, or there is no such field.
        """
        for name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):  # of a file; not fields
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
        """format, blocksize and double_quant, as `qlora_native.quantize` takes them."""
        return {
            "format": self.bnb_4bit_quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.bnb_4bit_use_double_quant,
        }

    @property
    def product_dtype(self) -> torch.dtype | None:
        """`Linear4bit.product_dtype`: None leaves activations as they are."""
        return None if self.bnb_4bit_compute_dtype == torch.float32 else self.bnb_4bit_compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """The fields as a file has them: with bitsandbytes as the method, which is the format of the weights."""
        fields = {**super().to_dict(), "quant_method": "bitsandbytes"}
        return {name: value for name, value in fields.items() if name not in ("strict", "experts_in_mxfp4")}

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields: those of transformers' own are not enough to tell what differs."""
        return self.to_dict()


# Not as a decorator, which to a type checker returns transformers' base class and not ours.
register_quantization_config(METHOD)(BitsAndBytesConfig)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts `Linear4bit` into a model that transformers loads, and writes it in bitsandbytes' file format."""

    requires_calibration = False
    quantization_config: BitsAndBytesConfig
    # A weight in a file of bitsandbytes, and what stands beside it (transformers collects these for one operation).
    serialized_names = {
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
        ]
    }

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        """As transformers' own. Of files with experts in MXFP4 the rest is in 16 bits, and is quantized."""
        super().__init__(quantization_config, **kwargs)
        if quantization_config.experts_in_mxfp4:
            self.pre_quantized = False

    def is_serializable(self) -> bool:
        """It is: `get_state_dict_and_metadata` says how.

        Raises:
            ValueError: bitsandbytes' files have no such format. transformers' own message would not say.
        """
        if self.quantization_config.experts_in_mxfp4:
            raise bad("experts", "nf4 or fp4, the formats of the files that transformers reads", "mxfp4")
        format = self.quantization_config.bnb_4bit_quant_type
        if format not in FILE_FORMATS:
            raise bad("bnb_4bit_quant_type", "nf4 or fp4, the formats of the files that transformers reads", format)
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside it are, which is what transformers means."""
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """The GPU where there is one that we can use, as bitsandbytes does it; else the CPU."""
        if device_map is None and torch.cuda.is_available() and not _C.cuda_unavailable_reason():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        keep = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        with_embeddings = config.llm_int8_skip_modules == []
        if not self.pre_quantized and (routers := linears_of_routers(model)):
            keep = config.llm_int8_skip_modules = sorted({*keep, *routers})
        in_files = names_in_files(checkpoint_files, model) if self.pre_quantized else None
        replace_experts(model, config, keep, in_files)
        tied = replace_embeddings(model, config, with_embeddings, in_files)
        linears = [name for name in modules_to_quantize(model, config.llm_int8_skip_modules) if name not in tied]
        planned = {id(model.get_submodule(name).weight) for name in linears}
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name not in linears and not has_note(module):
                note_left(module, "named in llm_int8_skip_modules, tied, or kept in fp32")
        unknown = [left for left in left_alone(model, planned | _weights_of_experts(model)) if left.unknown]
        if unknown and config.strict:
            raise bad("strict", "weights that are known how to be multiplied by", "; ".join(map(str, unknown)))
        for left in unknown:
            if left.is_stack:
                logger.warning(str(left))
        for name in linears:
            linear = model.get_submodule(name)
            transposed = isinstance(linear, Conv1D)
            in_features, out_features = reversed(linear.weight.shape) if not transposed else linear.weight.shape
            layer = Linear4bit(
                in_features,
                out_features,
                linear.bias is not None,
                "meta",
                linear.weight.dtype,
                **config.quantize_options,
            )
            layer.product_dtype = config.product_dtype
            layer.transposed_source = transposed
            model.set_submodule(name, layer)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """What is done with the tensors of a checkpoint: experts are quantized one by one."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        return read_conversions(conversions, model, self.quantization_config.experts_in_mxfp4, self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_tied(model, self.quantization_config)
        missing = [path for path, layer in experts_by_path(model).items() if not getattr(layer, "was_read", False)]
        if missing:
            raise bad("the checkpoint", f"the experts {missing[0]}", f"none, and {len(missing) - 1} more are missing")
        # Not kept for saving: what is written is what get_state_dict_and_metadata gives, which has the files' names.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _has_operation(c, ReadQuantized)]
        adopt(model, self)
        logger.info("\n%s", size_report(model))
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether it is part of a quantized weight: its shape in the file is another than in the model."""
        module, _, name = param_name.rpartition(".")
        return name != "bias" and isinstance(model.get_submodule(module), QuantizedLayer)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with each weight that has been read."""
        return QuantizeWeight(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """What is done with each weight of a file that bitsandbytes has quantized."""
        return {"deserialize": ReadQuantized}

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's state dict with quantized weights as bitsandbytes writes them."""
        state = model.state_dict()
        of_embeddings = codes_of_embeddings(model)  # a layer that is tied to one has no entries of its own
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, (Linear4bit, Embedding4bit)):
                prefix = f"{name}." if name else ""
                for own in module.weight_names():
                    del state[prefix + own]
                if isinstance(module, Embedding4bit) or id(module._parameters["weight"]) not in of_embeddings:
                    state.update(module.quantized_weight.to_bitsandbytes(prefix))
            elif isinstance(module, Experts4bit):
                for own in module.weight_names():
                    del state[f"{name}.{own}"]
                state.update(saved_entries(name, module))
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        weights: dict[int, nn.Parameter] = {}  # by id of the codes: what was tied stays so
        for name, module in list(model.named_modules()):
            if not isinstance(module, (Linear4bit, Embedding4bit)):
                continue
            if isinstance(module, Linear4bit):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
                dense.bias = module.bias
            else:
                dense = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            codes = id(module._parameters["weight"])
            if codes not in weights:
                weights[codes] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            dense.weight = weights[codes]
            model.set_submodule(name, dense.train(module.training))
        for path, experts in experts_by_path(model).items():
            parent, _, own = path.rpartition(".")
            module = model.get_submodule(parent)
            del module._modules[own]
            setattr(module, own, nn.Parameter(experts.parameter(dtype), requires_grad=False))
        return model


class QuantizeWeight(ConversionOps):
    """A weight of the checkpoint to the tensors of its `Linear4bit`."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """{"a.b.weight": W} to {"a.b.weight": codes, "a.b.absmax": ..., ...}."""
        result: dict[str, Tensor] = {}
        for full_name, values in input_dict.items():
            weight = values[0] if isinstance(values, list) else values
            path = full_name.removesuffix(".weight")
            layer = model.get_submodule(path)
            config = self.hf_quantizer.quantization_config
            try:
                q = functional.quantize(weight.t() if layer.transposed_source else weight, **config.quantize_options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}.{error}") from None
            layer.replace_weight(q)
            result.update({f"{path}.{name}": tensor for name, tensor in layer.weight_tensors().items()})
        return result


class ReadQuantized(ConversionOps):
    """The entries that bitsandbytes wrote for a weight to the tensors of its `Linear4bit`."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """{"weight": [codes], "weight.absmax": [...], ...} to {"a.b.weight": codes, "a.b.absmax": ..., ...}."""
        entries = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        path = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(path) if full_layer_name.endswith(".weight") else None
        if not isinstance(layer, (Linear4bit, Embedding4bit)):
            return input_dict
        if len(entries) == 1:
            raise bad(full_layer_name, "a weight that bitsandbytes has quantized", "one that is not (skip it?)")
        expected = layer.weight_names()
        q = QuantizedWeight.from_bitsandbytes(
            {f"{path}.{name}": tensor for name, tensor in entries.items()}, f"{path}."
        )
        if q.shape != layer.quantized_weight.shape:
            raise bad(full_layer_name, f"{list(layer.quantized_weight.shape)}, as config.json says", list(q.shape))
        layer.replace_weight(q)
        if missing_keys is not None:  # the file knows whether scales are double-quantized; the skeleton had guessed
            missing_keys.difference_update(f"{path}.{name}" for name in expected)
        return {f"{path}.{name}": tensor for name, tensor in layer.weight_tensors().items()}


def modules_to_quantize(model: nn.Module, skip: list[str] | None = None) -> list[str]:
    """Paths of the layers that transformers would give to bitsandbytes: nn.Linear and Conv1D, but not `skip`.

    Args:
        model: a `PreTrainedModel`, on any device.
        skip: names as `llm_int8_skip_modules` has them; None leaves out the output layer and tied weights.
    """
    keep = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    ]


def adopt(model: nn.Module, quantizer: Quantizer) -> None:
    """Make transformers, PEFT and TRL see `model`, whose layers are ours, as one of `quantizer`."""
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
    if experts_by_path(model):
        model._weight_conversions = saved_conversions(model)
    # By this name PEFT's prepare_model_for_kbit_training knows a model whose layers have W_q and dequantize(): it turns
    # checkpointing on and casts nothing. (is_loaded_in_4bit would make num_parameters() import bitsandbytes.)
    model.hqq_quantized = True
    if is_peft_available():
        from . import peft

        peft.register()


def _weights_of_experts(model: nn.Module) -> set[int]:
    """Ids of the tensors of quantized experts."""
    return {id(tensor) for experts in experts_by_path(model).values() for tensor in experts.parameters()}


def _has_operation(conversion: Any, operation: type) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(op, operation) for op in conversion.operations)


# Which quantizer reads a file of bitsandbytes is settled here, where transformers brings together the config of the
# file and that of the caller: it has no registration for a method that it knows already.
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
    # How the weights are stored is the file's to say. In which dtype to multiply is the caller's.
    known = {*_FIELDS, "blocksize"} - {"bnb_4bit_quant_storage"}  # a file may have fields of a later version
    fields = {name: value for name, value in quantization_config.items() if name in known}
    config = BitsAndBytesConfig(**fields)
    if ours and quantization_config_from_args.product_dtype is not None:
        config.bnb_4bit_compute_dtype = quantization_config_from_args.product_dtype
    return config


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)
