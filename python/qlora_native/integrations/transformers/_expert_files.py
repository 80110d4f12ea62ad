"""Read experts from files into 4 bits while transformers loads a model, and write them.

A 16-bit checkpoint has a tensor for each expert, which transformers would stack, or one tensor [E, ...]. Here experts
are quantized one after the other. Experts that a file has in 4 bits keep their bytes (_weight_files.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, log_conversion_errors
from transformers.quantizers.quantizers_utils import should_convert_module

from ... import functional
from ..._core.blocks import ceil_div
from ..._core.errors import bad, named
from ..._core.quantize import double_quantized
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import note_reason
from ..._layers.experts import Experts4bit
from ._experts import find_experts
from ._weight_files import SUFFIXES, file_has, read_weight


def experts_by_path(model: nn.Module) -> dict[str, Experts4bit]:
    """The quantized experts of a model: {path of the parameter: layer}."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Experts4bit)}


# ---- reading ---------------------------------------------------------------------------------------------------------


def replace_experts(model: nn.Module, config: Any, keep: list[str], quantized: set[str] | None) -> None:
    """Replace experts by `Experts4bit` without values, and make transformers run them.

    Args:
        model: on the meta device.
        config: a `BitsAndBytesConfig` of ours.
        keep: the names of modules that stay in 16 bits, as transformers matches them.
        quantized: the names that the files have in 4 bits, or None if the files are not quantized. If they are, only
            these experts are replaced.
    """
    for found in list(find_experts(model)):
        paths = [f"{found.path}.{name}" for name in found.names]
        if not all(should_convert_module(path, keep) for path in (found.path, *paths)):
            note_reason(found.module, "named in llm_int8_skip_modules")
        elif quantized is not None and not all(file_has(quantized, path) for path in paths):
            note_reason(found.module, "experts that the file has in 16 bits")
        else:
            for name, (E, N, K) in zip(found.names, found.shapes, strict=True):
                layer = Experts4bit(
                    E,
                    K,
                    N,
                    "meta",
                    getattr(found.module, name).dtype,
                    transposed=found.transposed,
                    format="mxfp4" if config.experts_in_mxfp4 else config.bnb_4bit_quant_type,
                    blocksize=None if config.experts_in_mxfp4 else config.blocksize,
                    double_quant=config.bnb_4bit_use_double_quant,
                )
                layer.compute_dtype = config.compute_dtype
                del found.module._parameters[name]
                setattr(found.module, name, layer)
            found.run_quantized()


def read_conversions(conversions: list[Any], model: nn.Module, quantizer: Any) -> list[Any]:
    """Change transformers' conversions of a checkpoint so that experts become `Experts4bit`.

    Args:
        conversions: the conversions of the model and of its quantizer.
        model: a model with `Experts4bit` that have no values yet.
        quantizer: a `Quantizer` of ours. It becomes the `hf_quantizer` of our operations, so that transformers does not
            cast what they read.

    Returns:
        The conversions to use in their place.
    """
    paths = frozenset(experts_by_path(model))
    if not paths:
        return conversions
    in_4_bits = quantizer.pre_quantized or quantizer.quantization_config.experts_in_mxfp4
    made: list[Any] = []
    for conversion in conversions:
        if not _is_of_experts(conversion, paths):
            made.append(conversion)
        elif not (in_4_bits and _keeps_the_name(conversion)):  # else it would take the codes and scales, too
            made.append(_experts_converter(conversion, paths))
    for tail in sorted({".".join(path.split(".")[-2:]) for path in paths}):
        if in_4_bits:
            sources, operation = [f"{tail}{suffix}$" for suffix in SUFFIXES], _ReadEntries(quantizer)
        else:
            sources, operation = [f"{tail}$"], _Whole()
        made.append(_experts_converter(WeightConverter(sources, [tail], [operation]), paths))
    return made


def _is_of_experts(conversion: Any, paths: frozenset[str]) -> bool:
    """Whether a conversion makes a parameter that is replaced by quantized experts."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    target = conversion.target_patterns[0].lstrip(".")
    return any(path == target or path.endswith(f".{target}") for path in paths)


def _keeps_the_name(conversion: WeightConverter) -> bool:
    """Whether a conversion changes values and no name, as that of Qwen3-VL-MoE, which transposes."""
    return conversion._original_source_patterns == conversion._original_target_patterns


def _experts_converter(like: WeightConverter, paths: frozenset[str]) -> _ExpertsConverter:
    sources, targets = list(like._original_source_patterns), list(like._original_target_patterns)
    made = _ExpertsConverter(sources, targets, like.operations, like.force_cpu)
    made.scope_prefix, made.base_model_prefix = like.scope_prefix, like.base_model_prefix
    made.paths = paths
    return made


class _ExpertsConverter(WeightConverter):
    """A conversion that makes a parameter of experts, and quantizes it expert by expert.

    Attributes:
        paths: the paths of the parameters to quantize; others are made by transformers.
    """

    __slots__ = ("paths",)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename a key as any conversion does; a parameter to quantize gets the name of its codes."""
        renamed, pattern = super().rename_source_key(source_key)
        if pattern is not None and file_has(self.paths, renamed):
            renamed += ".weight"
        return renamed, pattern

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        """Make the tensors of an `Experts4bit`, by name. Other parameters are made by transformers."""
        path = layer_name.removesuffix(".weight")
        if path not in self.paths:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        layer = model.get_submodule(path)
        with log_conversion_errors(
            layer_name, loading_info, (len(self.collected_tensors), layer_name), self.operations
        ):
            q = self._read(path, layer, model, config)
            layer.was_read = True
            return hf_quantizer.put_weight(path, layer, q, model, loading_info and loading_info.missing_keys)

    def _read(self, path: str, layer: Experts4bit, model: Any, config: Any) -> QuantizedWeight:
        first = self.operations[0]
        if isinstance(first, _ReadEntries):
            return first.read(path, layer, {name: _value(t[0]) for name, t in self._taken().items()})
        return _quantized(path, layer, self._single_experts(path, layer, model, config))

    def _single_experts(self, path: str, layer: Experts4bit, model: Any, config: Any) -> Iterable[Tensor]:
        """The weights [N, K] of the experts, or one tensor [E, N, K]; a weight may be made of several tensors."""
        lists = self._taken()
        counts = {len(tensors) for tensors in lists.values()}
        if counts == {1} and layer.num_experts > 1:
            counts = {layer.num_experts}
            lists = {name: [_value(tensors[0])] for name, tensors in lists.items()}
        elif counts != {layer.num_experts} or len(lists) != len(self.source_patterns):
            got = ", ".join(f"{len(lists.get(name, ()))} of {name}" for name in self.source_patterns)
            raise bad(path, f"{layer.num_experts} experts, as config.json says", got)
        shapes: dict[str, torch.Size] = {}
        for e in range(len(next(iter(lists.values())))):
            parts = {}
            for name, tensors in lists.items():
                part, tensors[e] = _value(tensors[e]), None
                if part.shape != shapes.setdefault(name, part.shape):
                    shape = list(shapes[name])
                    raise bad(path, f"experts of one shape, {shape} of {name}", f"{list(part.shape)} of expert {e}")
                parts[name] = [part]
            for operation in self.operations:
                parts = operation.convert(
                    parts,
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                    full_layer_name=path,
                    model=_ModelIn16Bits(model, path, layer),
                    config=config,
                )
            (made,) = parts.values()
            made = made[0] if isinstance(made, list) else made
            expected = [len(made) if made.dim() == 3 else 0, *layer.shape[1:]]
            if list(made.shape) != expected:
                raise bad(path, f"{list(layer.shape)}, as config.json says", [layer.num_experts, *made.shape[1:]])
            made = made.transpose(1, 2) if layer.transposed else made
            yield from (made[0],) if len(made) == 1 else (made,)

    def _taken(self) -> dict[str, list[Any]]:
        """Take the collected tensors, so that the conversion no longer holds them."""
        taken = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return taken


class _ModelIn16Bits:
    """The model as an operation of transformers knows it: it may ask for the shape of the parameter that it makes."""

    def __init__(self, model: nn.Module, path: str, layer: Experts4bit) -> None:
        """Keep the model, and the layer that stands at `path` in the place of the parameter."""
        self._model, self._path, self._layer = model, path, layer

    def get_parameter(self, name: str) -> Tensor:
        """The parameter of a name, without values if it is the one that is made."""
        if name == self._path:
            return torch.empty(self._layer.shape, device="meta")
        return self._model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _value(tensor: Any) -> Tensor:
    """Load a tensor of a file. transformers may pass it unread, or as the future of a thread that reads it."""
    if isinstance(tensor, Future):
        return tensor.result()
    return tensor() if callable(tensor) and not isinstance(tensor, Tensor) else tensor


def _quantized(path: str, layer: Experts4bit, experts: Iterable[Tensor]) -> QuantizedWeight:
    """Quantize experts to the format of `layer`.

    Memory holds one expert in 16 bits at a time, or all of them if blocks straddle experts or all share a scale
    (NVFP4).
    """
    options = (layer.format, layer.blocksize, layer.double_quant)
    whole_blocks = layer.out_features * layer.in_features % layer.blocksize == 0
    apart = whole_blocks and layer.format != "nvfp4"
    quantized: list[QuantizedWeight] = []
    together: Tensor | None = None
    for e, weight in enumerate(experts):
        with named(f"{path}, expert {e}: "):
            if weight.dim() == 3:
                return functional.quantize(weight, *options)
            if apart:
                quantized.append(functional.quantize(weight, layer.format, layer.blocksize, double_quant=False))
                continue
            if together is None:
                together = weight.new_empty(layer._shape)
            together[e] = weight
    if together is None:
        return _stacked(quantized, layer.double_quant)
    with named(f"{path}: "):
        return functional.quantize(together, *options)


def _stacked(experts: list[QuantizedWeight], double_quant: bool) -> QuantizedWeight:
    """Join the weights of experts into one weight; its scales are then double-quantized if `double_quant`."""
    first = experts[0]
    absmax = torch.cat([q.absmax for q in experts])
    codes = torch.stack([q.codes for q in experts])
    nested_blocks = ceil_div(absmax.numel(), first.layout.nested_blocksize)
    q = replace(
        first,
        codes=codes,
        absmax=absmax,
        # MXFP4 has nested scales of 1.
        nested_absmax=None if first.nested_absmax is None else first.nested_absmax.new_ones(nested_blocks),
        shape=(len(experts), *first.shape),
    )
    return double_quantized(q) if double_quant and q.nested_absmax is None else q


class _Whole(ConversionOps):
    """The operation for experts that a file has as one tensor."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        """Return the tensor under the name of the parameter."""
        return {target_patterns[0]: next(iter(input_dict.values()))}


class _ReadEntries(ConversionOps):
    """The operation that reads experts which a file has in 4 bits."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        """Return the tensor of experts that the file has in 16 bits."""
        if len(input_dict) != 1:
            got = ", ".join(name.removesuffix("$") for name in input_dict)
            raise bad("llm_int8_skip_modules", f"no {target_patterns[0]}, which the file has in 4 bits", got)
        return {target_patterns[0]: next(iter(input_dict.values()))}

    def read(self, path: str, layer: Experts4bit, found: dict[str, Tensor]) -> QuantizedWeight:
        """Make the weight from the bytes of the file."""
        tail = ".".join(path.split(".")[-2:])
        entries = {name.removesuffix("$").removeprefix(tail): tensor for name, tensor in found.items()}
        if not self.hf_quantizer.pre_quantized:
            # transformers has cast the bytes to the dtype of the model, which holds every byte exactly.
            entries = {suffix: tensor.to(torch.uint8) for suffix, tensor in entries.items()}
        return read_weight(path, layer, entries)


# ---- writing ---------------------------------------------------------------------------------------------------------


def saved_conversions(model: nn.Module) -> list[Any]:
    """The conversions that transformers undoes when it saves `model`, without those that make quantized weights.

    These join or split tensors, which codes and scales do not bear: files of a quantized layer have the model's names.
    Tensors of the same layers in 16 bits are then written as the model has them, which transformers reads too.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    paths = [path for path, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    return [c for c in conversions if not isinstance(c, _ExpertsConverter) and not _makes_one_of(c, paths)]


def _makes_one_of(conversion: Any, paths: list[str]) -> bool:
    """Whether a conversion makes a tensor of one of the layers at `paths`."""
    if not isinstance(conversion, WeightConverter):
        return False
    targets = [target.strip("^$.").removesuffix(".weight") for target in conversion.target_patterns]
    return any(f".{path}".endswith(f".{target}") for path in paths for target in targets)
