"""transformers: quantize a model while it loads, and read and write bitsandbytes' 4-bit files.

    from qlora_native.integrations.transformers import BitsAndBytesConfig      # instead of transformers' own

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)               # bitsandbytes' file format, which stock transformers loads too

Each weight is quantized as soon as it has been read, so memory holds the 4-bit model and one tensor of the checkpoint.
A checkpoint that bitsandbytes has quantized keeps its bytes. It is read by this module if `from_pretrained` gets this
config, or if bitsandbytes is not installed and this module has been imported.

transformers' public registry lists the quantizer as "qlora_native". A file calls the method "bitsandbytes", because it
has bitsandbytes' format.
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
from .._sizes import has_reason, linears_of_routers, note_reason, size_report, unquantized_parameters
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


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """The quantizer: puts `Linear4bit` into a model that transformers loads, and saves it in bitsandbytes' format."""

    requires_calibration = False
    quantization_config: BitsAndBytesConfig
    # The entries of a weight in bitsandbytes' files, which transformers collects for one operation.
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
        """Make the quantizer. In files with experts in MXFP4 all other weights are in 16 bits and are quantized.

        Args:
            quantization_config: the config.
            kwargs: as in transformers.
        """
        super().__init__(quantization_config, **kwargs)
        if quantization_config.experts_in_mxfp4:
            self.pre_quantized = False

    def is_serializable(self) -> bool:
        """True, or an error with the reason, which transformers' own message would not give.

        Raises:
            ValueError: bitsandbytes' files do not have the format.
        """
        if self.quantization_config.experts_in_mxfp4:
            raise bad("experts", "nf4 or fp4, the formats of the files that transformers reads", "mxfp4")
        format = self.quantization_config.bnb_4bit_quant_type
        if format not in FILE_FORMATS:
            raise bad("bnb_4bit_quant_type", "nf4 or fp4, the formats of the files that transformers reads", format)
        return True

    @property
    def is_trainable(self) -> bool:
        """True: transformers asks whether adapters can be trained beside the weights."""
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """As in bitsandbytes, put the model on a GPU that can be used, or else on the CPU, unless a map was given."""
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
            if type(module) is nn.Linear and name not in linears and not has_reason(module):
                note_reason(module, "named in llm_int8_skip_modules, tied, or kept in fp32")
        quantized = planned | _weights_of_experts(model)
        unknown = [each for each in unquantized_parameters(model, quantized) if each.unknown_use]
        if unknown and config.strict:
            raise bad("strict", "weights whose use is known", "; ".join(map(str, unknown)))
        for each in unknown:
            if each.is_stack:
                logger.warning(str(each))
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
        """Change the conversions of a checkpoint so that experts are quantized one by one."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        return read_conversions(conversions, model, self.quantization_config.experts_in_mxfp4, self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_tied(model, self.quantization_config)
        missing = [path for path, layer in experts_by_path(model).items() if not getattr(layer, "was_read", False)]
        if missing:
            raise bad("the checkpoint", f"the experts {missing[0]}", f"none, and {len(missing) - 1} more are missing")
        # Saving does not need them: get_state_dict_and_metadata returns the names of the files.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _has_operation(c, ReadQuantized)]
        adopt(model, self)
        logger.info("\n%s", size_report(model))
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is part of a quantized weight, so that its shape differs between file and model."""
        module, _, name = param_name.rpartition(".")
        return name != "bias" and isinstance(model.get_submodule(module), QuantizedLayer)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation on each 16-bit weight that has been read."""
        return QuantizeWeight(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """The operation on each weight of a file that bitsandbytes has quantized."""
        return {"deserialize": ReadQuantized}

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict and the metadata to save, with quantized weights in bitsandbytes' entries."""
        state = model.state_dict()
        of_embeddings = codes_of_embeddings(model)  # a layer that shares them has no entries of its own
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
        weights: dict[int, nn.Parameter] = {}  # by the id of the codes, so that tied weights stay tied
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
    """The operation that quantizes a weight of the checkpoint."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Convert {"a.b.weight": W} to {"a.b.weight": codes, "a.b.absmax": ..., ...}."""
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
    """The operation that reads the entries that bitsandbytes has written for a weight."""

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
        """Convert {"weight": [codes], "weight.absmax": [...], ...} to {"a.b.weight": codes, "a.b.absmax": ..., ...}."""
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
        if missing_keys is not None:  # only the file says whether scales are double-quantized
            missing_keys.difference_update(f"{path}.{name}" for name in expected)
        return {f"{path}.{name}": tensor for name, tensor in layer.weight_tensors().items()}


def modules_to_quantize(model: nn.Module, skip: list[str] | None = None) -> list[str]:
    """The paths of the layers that transformers would give to bitsandbytes: nn.Linear and Conv1D, without `skip`.

    Args:
        model: a `PreTrainedModel`, on any device.
        skip: names as in `llm_int8_skip_modules`; None skips the output layer and tied weights.
    """
    keep = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    ]


def adopt(model: nn.Module, quantizer: Quantizer) -> None:
    """Make transformers, PEFT and TRL treat a model, whose layers are ours, as quantized.

    Args:
        model: the model, changed in place.
        quantizer: the quantizer that saves it.
    """
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
    if experts_by_path(model):
        model._weight_conversions = saved_conversions(model)
    # PEFT's prepare_model_for_kbit_training recognises a model whose layers have W_q and dequantize() by this
    # attribute: it turns checkpointing on and casts nothing. (is_loaded_in_4bit would make num_parameters() import
    # bitsandbytes.)
    model.hqq_quantized = True
    if is_peft_available():
        from . import peft

        peft.register()


def _weights_of_experts(model: nn.Module) -> set[int]:
    """The ids of the tensors of quantized experts."""
    return {id(tensor) for experts in experts_by_path(model).values() for tensor in experts.parameters()}


def _has_operation(conversion: Any, operation: type) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(op, operation) for op in conversion.operations)


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
