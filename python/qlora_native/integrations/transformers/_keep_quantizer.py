"""The quantizer that keeps the bytes of quantized files, while transformers loads a model with `KeepQuantized`."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterable
from typing import Any

from ..._core.versions import require

require("transformers")

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils.quantization_config import QuantizationMethod

from ..._core.errors import bad, check_float_dtype
from ..._files.gguf_file import GGUFFile
from ..._layers.base import QuantizedLayer
from ..._layers.hooks import take_over_hooks
from ..._layers.sizes import size_report
from . import _folder_weights, _gguf_config, _gguf_weights
from ._config import KEEP, KEPT_METHODS, KeepQuantized
from ._kept import Plan, Target, listed, put_pending, read_pending, targets
from ._parallel import parallelism
from ._quantizer import Quantizer, adopt, logger


@register_quantizer(KEEP)
class KeepQuantizer(Quantizer):
    """Keeps the quantized weights of a file: `Linear4bit` and its like over the file's own bytes.

    transformers makes the model, and reads all other tensors. In between, `read_pending` reads these (_kept.py).
    """

    quantization_config: KeepQuantized
    serialized_names: dict[str, list[str]] = {}  # transformers is to read none of them

    def __init__(self, quantization_config: KeepQuantized, *, pre_quantized: bool, **kwargs: Any) -> None:
        """Make the quantizer. `pre_quantized` says whether config.json has a quantization_config."""
        HfQuantizer.__init__(self, copy.copy(quantization_config), pre_quantized=True, **kwargs)
        self._file: GGUFFile | None = None
        self._config: PreTrainedConfig | None = None
        self._dtype = torch.get_default_dtype()
        self._plan: Plan | None = None
        self._shared: dict[str, Target] = {}
        if not pre_quantized:  # transformers takes a `gguf_file` with this method alone
            self.quantization_config.quant_method = QuantizationMethod.GGUF

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Note the configuration, which transformers shows here alone before it makes the model of it."""
        self._config = super().update_attn_implementation(config)
        return self._config

    def read_header(self, gguf_file: str) -> None:
        """Read what tensors the file has, and what it says of the model, before transformers makes the model."""
        require("gguf")
        self._file = GGUFFile(gguf_file)
        _gguf_config.complete_config(self._file, self._config)
        self.quantization_config.quant_method = KEEP

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of the model. A GGUF file names none: it is then torch's default."""
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        check_float_dtype("dtype", self._dtype)
        return self._dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        places, config = targets(model), self.quantization_config
        if parallelism(model) is not None:
            raise bad("distributed_config", "none with KeepQuantized", "one: formats of files are not cut into parts")
        with torch.device("cpu"):  # transformers makes the model on the meta device
            if self._file is not None:
                self._plan = _gguf_weights.plan(self._file, model, places, self._dtype)
            elif config.file:
                self._plan = _folder_weights.plan(checkpoint_files or (), model, places, config.file)
            else:
                expected = f"gguf_file, or a config.json that names one of {', '.join(KEPT_METHODS)}"
                raise bad("KeepQuantized", expected, "a model in 16 or 32 bits, or by a method unknown to transformers")
        if self._plan.refused and not config.dequantize_others:
            raise bad(
                self._plan.source,
                "weights that can be kept in their bytes",
                listed([f"{name} ({reason})" for name, reason in self._plan.refused.items()])
                + ". KeepQuantized(dequantize_others=True) decodes them to 16 bits",
            )
        if not self._plan.kept:
            raise bad(self._plan.source, "quantized weights", "none")
        kept = {each.target.path for each in self._plan.kept}
        for name, source in model.all_tied_weights_keys.items():
            if source.removesuffix(".weight") in kept:
                self._shared[name] = places[name]
        put_pending(model, self._plan.kept)

    def get_state_dict(self, checkpoint_file: str, model: nn.Module) -> dict[str, Any]:
        """The tensors of a GGUF file that transformers is to read."""
        return self._plan.dense

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype in which a tensor is read: what is converted is cast afterwards."""
        if self._file is not None and getattr(converter, "operations", None):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """The conversions of the file's tensors; those of the model are for safetensors' files."""
        return weight_conversions if self._plan.conversions is None else self._plan.conversions

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """False: nothing is quantized."""
        return False

    def finish(self, model: nn.Module, device_map: Any, missing: set[str], unexpected: set[str]) -> None:
        """Read the weights that are kept, when transformers has read all else and before it makes up what is missing.

        Args:
            model: the model.
            device_map: where its modules go.
            missing: the names of the parameters that the files lack; changed in place to those of the new model.
            unexpected: the names of tensors that are no parameters; those of quantized weights are taken out.
        """
        missing.difference_update({name for name in missing if name.endswith(".unread")})
        missing.difference_update(each.name for each in self._plan.decoded)
        unexpected.difference_update(self._plan.consumed)
        read_pending(model, self._plan, device_map)
        _check_missing(self._plan.source, model, missing)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, target in self._shared.items():
            if name not in model.all_tied_weights_keys:  # the files have both, with different values
                continue
            source = model.get_submodule(model.all_tied_weights_keys[name].removesuffix(".weight"))
            layer, replaced = target.make(source.quantized_weight), model.get_submodule(target.path)
            if target.bias is not None:
                layer.bias = replaced.bias
            take_over_hooks(layer, replaced)
            model.set_submodule(target.path, layer.train(replaced.training))
        head = model.get_output_embeddings()
        if any(model.get_submodule(each.target.path) is head for each in self._plan.kept):
            model.config.tie_word_embeddings = False  # the files have one of its own; nothing may tie it later
        model._weight_conversions = None  # those of the model itself, if it is ever saved in 16 bits
        adopt(model, self, self._unsaved(model))
        logger.info("\n%s", size_report(model))
        self._plan = self._file = self._config = None  # unmaps the file
        self._shared = {}
        return model

    def _unsaved(self, model: nn.Module) -> ValueError:
        formats = sorted({layer.format for layer in model.modules() if isinstance(layer, QuantizedLayer)})
        return bad(
            "save_pretrained",
            "a model whose weights have files of its own",
            f"{', '.join(formats)} in the bytes of another file: save the adapter (save_pretrained of the PeftModel), "
            "and use it over that file; or save a copy in 16 bits, which model.dequantize() makes of the model",
        )


def _check_missing(source: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse a file that lacks a weight of the base model or the output layer, which would get random values.

    A new head, such as that of a classifier, is outside both.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    output = model.get_output_embeddings()
    of_output = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = model.all_tied_weights_keys
    absent = set(missing)
    lacking = []
    for name in sorted(absent & parameters.keys()):
        base = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
        partners = {other for pair in tied.items() if name in pair for other in pair}
        if partners and not partners <= absent:
            continue  # tied to one that the file has
        if any(pattern.search(name) for pattern in ignored):
            continue
        if base or id(parameters[name]) in of_output:
            lacking.append(name)
    if lacking:
        raise bad(source, f"all weights of {type(model).__name__}", f"none of {listed(lacking)}")


_get_config_dict = PreTrainedConfig.get_config_dict.__func__


@functools.wraps(_get_config_dict)
def _named(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """Name the file and the tensor if transformers cannot read a GGUF file, whose keys it reads first."""
    try:
        return _get_config_dict(cls, pretrained_model_name_or_path, **kwargs)
    except ImportError:
        raise
    except Exception:
        if (gguf_file := kwargs.get("gguf_file")) is not None:
            for path in (gguf_file, os.path.join(str(pretrained_model_name_or_path), gguf_file)):
                if os.path.isfile(path):
                    GGUFFile(path)
        raise


PreTrainedConfig.get_config_dict = classmethod(_named)
