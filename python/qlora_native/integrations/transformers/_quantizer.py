"""The quantizer that transformers calls while it loads and saves a model.

transformers' public registry lists the quantizer as "qlora_native". A file calls the method "bitsandbytes" if it has
bitsandbytes' format, and "qlora_native" if it has MXFP4 or NVFP4 (_weight_files.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_peft_available

from ... import _C, functional
from ..._core.errors import bad, named
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import (
    has_reason,
    is_linear,
    kept_by_models,
    layers_read,
    linears_of_routers,
    note_reason,
    unquantized_parameters,
)
from ..._layers.sizes import size_report, why_nothing
from ...nn import Embedding4bit, Experts4bit, Linear4bit, MappedWeights
from ._config import METHOD, BitsAndBytesConfig
from ._dense import dense_of
from ._embeddings import codes_of_embeddings, replace_embeddings, replace_tied
from ._expert_files import experts_by_path, read_conversions, replace_experts, saved_conversions
from ._new_layers import check_devices
from ._parallel import Parts, parallelism
from ._weight_files import SUFFIXES, check_weights_are_dense, names_in_files, read_weight, why_not_saved, written_weight

logger = transformers.logging.get_logger(__name__)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """The quantizer: puts `Linear4bit` into a model that transformers loads, and saves it (_weight_files.py)."""

    requires_calibration = False
    quantization_config: BitsAndBytesConfig
    # The tensors of a weight in a file, which transformers collects for one operation.
    serialized_names = {"weight": [f"weight{suffix}" for suffix in SUFFIXES]}
    unsaved: ValueError | None = None  # why the model cannot be saved
    parts: Parts | None = None  # what this process has of each weight, if transformers shards the model

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        """Make the quantizer. In files with experts in MXFP4 all other weights are in 16 bits and are quantized."""
        # A copy, because it gets the names of the layers of this model that stay.
        super().__init__(copy.copy(quantization_config), **kwargs)
        if quantization_config.experts_in_mxfp4:
            self.pre_quantized = False

    def is_serializable(self) -> bool:
        """True, or an error with the reason, which transformers' own message would not give."""
        if self.unsaved is not None:
            raise self.unsaved
        return True

    @contextlib.contextmanager
    def saving_adapters(self) -> Iterator[None]:
        """While this lasts, let `save_pretrained` save the adapters of a model that cannot be saved itself."""
        unsaved, self.unsaved = self.unsaved, None
        try:
            yield
        finally:
            self.unsaved = unsaved

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a map of devices that leaves modules on the disk, before anything is read."""
        check_devices(device_map)

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained beside the weights."""
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
        if config.mapped and not self.pre_quantized:
            raise bad("mapped", "a folder in 4 bits (python -m qlora_native quantize writes one)", "one in 16 bits")
        keep = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept_by_models(model))
        with_embeddings = config.llm_int8_skip_modules == []
        if not self.pre_quantized and (staying := linears_of_routers(model) + layers_read(model)):
            keep = config.llm_int8_skip_modules = sorted({*keep, *staying})
        in_files = names_in_files(checkpoint_files, model) if self.pre_quantized else None
        replace_experts(model, config, keep, in_files)
        tied = replace_embeddings(model, config, with_embeddings, in_files)
        linears = [name for name in modules_to_quantize(model, config.llm_int8_skip_modules) if name not in tied]
        if not self.pre_quantized:
            check_weights_are_dense(checkpoint_files, model, set(linears), config.experts_in_mxfp4)
        planned = {id(model.get_submodule(name).weight) for name in linears}
        for name, module in model.named_modules():
            if is_linear(module) and name not in linears and not has_reason(module):
                note_reason(module, "named in llm_int8_skip_modules, tied, or kept by the model")
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
            layer.compute_dtype = config.compute_dtype
            layer.transposed_source = transposed
            model.set_submodule(name, layer)
        if (distributed := parallelism(model)) is not None:
            self.parts = Parts(model, distributed)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Let transformers leave the tensors of quantized weights alone, which are cut when they have been read."""
        if self.parts is not None:
            self.parts.leave_whole(model, plan)

    def put_weight(
        self, path: str, layer: QuantizedLayer, q: QuantizedWeight, model: nn.Module, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        """Give a layer its weight, or the part of it that this process has.

        Args:
            path, layer: the layer and its path.
            q: the whole weight.
            model: the model that is loaded.
            missing_keys: the names that have no tensors yet, or None. Those of the layer are taken out here,
                because a file, or a part of it, decides whether scales are nested, and so which tensors there are.

        Returns:
            The tensors of the layer, by name.
        """
        if missing_keys is not None:
            missing_keys.difference_update(f"{path}.{name}" for name in layer.weight_names())
        if self.parts is None:
            layer.replace_weight(q)
        else:
            self.parts.put_weight(path, layer, q, model._mesh_manager)
        return {f"{path}.{name}": tensor for name, tensor in layer.weight_tensors().items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Change the conversions of a checkpoint so that experts are quantized one by one."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        return read_conversions(conversions, model, self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_tied(model, self.quantization_config)
        missing = [path for path, layer in experts_by_path(model).items() if not getattr(layer, "was_read", False)]
        if missing:
            raise bad("the checkpoint", f"the experts {missing[0]}", f"none, and {len(missing) - 1} more are missing")
        # Saving does not need them: get_state_dict_and_metadata returns the names of the files.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _has_operation(c, ReadQuantized)]
        adopt(model, self, self.parts and self.parts.unsaved())
        if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
            logger.warning(f"qlora_native: nothing of {type(model).__name__} is quantized; {why_nothing(model)}")
        logger.info("\n%s", size_report(model))
        if self.quantization_config.mapped:
            MappedWeights(model)
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
        """The state dict and the metadata to save, with quantized weights as files have them."""
        if has_adapters(model):
            return model.state_dict(), {}  # of which transformers saves the adapters alone
        self.quantization_config.note_layers(model)  # which may have been cast since it was adopted
        state = model.state_dict()
        of_embeddings = codes_of_embeddings(model)  # a layer that shares them has no entries of its own
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, (Linear4bit, Embedding4bit)):
                prefix = f"{name}." if name else ""
                for own in module.weight_names():
                    del state[prefix + own]
                if isinstance(module, Embedding4bit) or id(module._parameters["weight"]) not in of_embeddings:
                    state.update(written_weight(f"{prefix}weight", module))
            elif isinstance(module, Experts4bit):
                for own in module.weight_names():
                    del state[f"{name}.{own}"]
                state.update(written_weight(name, module))
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        if self.parts is not None:
            raise self.parts.unsaved()
        weights: dict[int, nn.Parameter] = {}  # by the id of the codes, so that tied weights stay tied
        for name, module in list(model.named_modules()):
            if not isinstance(module, (Linear4bit, Embedding4bit)):
                continue
            dense = dense_of(module)
            codes = id(module._parameters["weight"])
            if codes not in weights:
                weight = module.dequantize(dtype)
                weight = weight.t().contiguous() if module.transposed_source else weight
                weights[codes] = nn.Parameter(weight, requires_grad=False)
            dense.weight = weights[codes]
            model.set_submodule(name, dense)
        for path, experts in experts_by_path(model).items():
            parent, _, own = path.rpartition(".")
            module = model.get_submodule(parent)
            del module._modules[own]
            setattr(module, own, nn.Parameter(experts.parameter(dtype), requires_grad=False))
        vars(model).pop("hqq_quantized", None)  # what adopt() set, and the base class leaves
        for config in _configs(model):
            vars(config).pop("_is_quantized", None)
        return model


class QuantizeWeight(ConversionOps):
    """The operation that quantizes a weight of the checkpoint."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Convert {"a.b.weight": W} to {"a.b.weight": codes, "a.b.absmax": ..., ...}."""
        result: dict[str, Tensor] = {}
        for full_name, values in input_dict.items():
            weight = values[0] if isinstance(values, list) else values
            path = full_name.removesuffix(".weight")
            layer = model.get_submodule(path)
            config = self.hf_quantizer.quantization_config
            with named(f"{path}."):
                q = functional.quantize(weight.t() if layer.transposed_source else weight, **config.quantize_options)
            if q.shape != layer._shape:
                raise bad(full_name, f"{list(layer._shape)}, as config.json says", list(q.shape))
            result.update(self.hf_quantizer.put_weight(path, layer, q, model, missing_keys))
        return result


class ReadQuantized(ConversionOps):
    """The operation that reads the tensors that a file has for a quantized weight."""

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
        path = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(path) if full_layer_name.endswith(".weight") else None
        if not isinstance(layer, (Linear4bit, Embedding4bit)):
            return input_dict
        if len(input_dict) == 1:
            raise bad(full_layer_name, "a weight that bitsandbytes has quantized", "one that is not (skip it?)")
        found = {name.removeprefix("weight"): v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        q = read_weight(full_layer_name, layer, found)
        return self.hf_quantizer.put_weight(path, layer, q, model, missing_keys)


def modules_to_quantize(model: nn.Module, skip: list[str] | None = None) -> list[str]:
    """The paths of the layers that transformers would give to bitsandbytes, nn.Linear and Conv1D, and of Falcon's.

    `skip` has names as in `llm_int8_skip_modules`; None skips the output layer and tied weights.
    """
    keep = HfQuantizer.get_modules_to_not_convert(model, skip, kept_by_models(model))
    return [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    ]


def adopt(model: nn.Module, quantizer: Quantizer, unsaved: ValueError | None = None) -> None:
    """Make transformers, PEFT and TRL treat a model, whose layers are ours, as quantized.

    `unsaved` is the error of saving it, if its config cannot describe it; a layer that has no files is found here.
    """
    quantizer.unsaved = unsaved or why_not_saved(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
    if isinstance(quantizer.quantization_config, BitsAndBytesConfig):
        quantizer.quantization_config.note_layers(model)
    model._weight_conversions = saved_conversions(model)
    # PEFT's prepare_model_for_kbit_training recognises a model whose layers have W_q and dequantize() by this
    # attribute: it turns checkpointing on and casts nothing. (is_loaded_in_4bit would make num_parameters() import
    # bitsandbytes.)
    model.hqq_quantized = True
    for config in _configs(model):  # where from_pretrained sets it: models that multiply by a weight ask for it
        config._is_quantized = True
    if is_peft_available():
        from ..peft import _lora as peft

        peft.register()


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapter` or `load_adapter` of transformers gave the model adapters, which it then saves alone."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of those that it is made of."""
    return [module.config for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]


def _weights_of_experts(model: nn.Module) -> set[int]:
    """The ids of the tensors of quantized experts."""
    return {id(tensor) for experts in experts_by_path(model).values() for tensor in experts.parameters()}


def _has_operation(conversion: Any, operation: type) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(op, operation) for op in conversion.operations)
