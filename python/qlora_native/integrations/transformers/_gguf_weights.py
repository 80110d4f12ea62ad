"""Which tensors of a GGUF file make which weights of a model, by transformers' own mappings.

transformers has two: for most architectures the names are those of the package gguf, and a `TensorProcessor` undoes
what llama.cpp's converter did to values; for newer ones both are a list of `WeightTransform`. Whatever moves rows alone
moves the bytes of rows. To learn what is moved, the same code is run on the numbers of the rows in place of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key
from transformers.integrations.gguf.gguf_conversion_mapping import Cast
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from ..._core.errors import bad
from ..._core.weight import QuantizedWeight
from ..._files.gguf import GGUF_TYPES, from_gguf, gguf_rows
from ..._files.gguf_file import FLOATS, GGUFFile, GGUFTensor
from ._kept import NO_LAYER, CannotBeKept, Kept, Plan, Target, checked_order, converted, ignores, incomplete_experts

ROPE_DIVISORS = "rope_freqs.weight"  # of the frequencies of RoPE
LONGROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


class LazyTensor:
    """A tensor of 32 bits that transformers reads when it needs it, as it reads those of safetensors' files."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def get_dtype(self) -> str:
        """The dtype, in the words of safetensors."""
        return "F32"


def values_of(file: GGUFFile, tensor: GGUFTensor) -> Tensor:
    """The values of a tensor in fp32, whatever its type."""
    data = file.data(tensor)
    if tensor.type in FLOATS:
        width = FLOATS[tensor.type].itemsize
        aligned = data if tensor.begin % width == 0 else data.clone()
        return aligned.view(FLOATS[tensor.type]).view(tensor.shape).float()
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    try:
        values = gguf.dequantize(data.view(tensor.rows, -1).numpy(), kind)
    except NotImplementedError:
        raise bad(f"{file.path}: {tensor.name}", "a type that the package gguf decodes", tensor.type) from None
    return torch.from_numpy(values).view(tensor.shape)


def plan(file: GGUFFile, model: nn.Module, places: dict[str, Target], dtype: torch.dtype) -> Plan:
    """Decide what becomes of the tensors of a file.

    Args:
        file: a GGUF file.
        model: the model that transformers made of its keys, without values.
        places: its `targets`.
        dtype: the dtype of the model.

    Raises:
        ValueError: the file has a tensor that the model lacks, or that has another shape.
    """
    mapping = mapping_of(file, model, dtype)
    groups = mapping.groups()
    kept: dict[str, Kept] = {}
    refused: dict[str, str] = {}
    for name, tensors in groups.items():
        if all(tensor.type in FLOATS for tensor in tensors):
            continue
        try:
            kept[name] = _kept(file, mapping, name, tensors, places.get(name))
        except CannotBeKept as error:
            refused[name] = str(error)
    for name in incomplete_experts(kept):
        refused[name] = "the other stack of its experts cannot be kept"
        del kept[name]
    dense = mapping.dense({name: tensors for name, tensors in groups.items() if name not in kept})
    shown = {", ".join(tensor.name for tensor in groups[name]): reason for name, reason in refused.items()}
    return Plan(file.path, list(kept.values()), shown, dense, mapping.conversions())


def mapping_of(file: GGUFFile, model: nn.Module, dtype: torch.dtype) -> Mapping:
    """The mapping that transformers has for the architecture of a file; arguments as in `plan`."""
    return _Transforms(file, model, dtype) if is_gguf_arch_supported(_architecture(file)) else _Names(file, model)


def _architecture(file: GGUFFile) -> str:
    return file.values["general.architecture"]


def _kept(file: GGUFFile, mapping: Any, name: str, tensors: list[GGUFTensor], target: Target | None) -> Kept:
    """The weight of these tensors, or the reason why it cannot be kept."""
    types = sorted({tensor.type for tensor in tensors})
    if target is None:
        raise CannotBeKept(f"{' and '.join(types)} of {name}, {NO_LAYER}")
    if len(types) > 1:
        raise CannotBeKept(f"{' and '.join(types)} in one weight, {name}")
    if types[0] not in GGUF_TYPES:
        raise CannotBeKept(f"{types[0]}, which is not among {', '.join(GGUF_TYPES)}")
    order, columns = mapping.order(name, tensors)
    rows = sum(tensor.rows for tensor in tensors)
    columns_differ = any(tensor.shape[-1] != target.shape[-1] for tensor in tensors)
    if columns_differ or rows != torch.Size(target.shape[:-1]).numel():
        got = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise bad(f"{file.path}: {tensors[0].name}", f"{list(target.shape)}, as the model's {name} has", got)
    identity = len(tensors) == 1 and torch.equal(order, torch.arange(rows))
    scale = mapping.scale(tensors)

    def read() -> QuantizedWeight:
        parts = [gguf_rows(file.data(tensor), tensor.type, tensor.shape) for tensor in tensors]
        data = parts[0] if identity else _gathered(parts, order)
        q = from_gguf(data, types[0], target.shape, target.dtype, scale=scale)
        return q if columns is None else replace(q, column_order=columns)

    nbytes = sum(tensor.end - tensor.begin for tensor in tensors)
    return Kept(target, tuple(f"{file.path}: {tensor.name}" for tensor in tensors), nbytes, read)


def _gathered(parts: list[Tensor], order: Tensor) -> Tensor:
    """Rows in `order`, which counts the rows of all parts in turn."""
    if len(parts) == 1:
        return parts[0][order]
    gathered = parts[0].new_empty(len(order), parts[0].shape[1])
    begin = 0
    for part in parts:
        places = ((order >= begin) & (order < begin + len(part))).nonzero().squeeze(1)
        gathered[places] = part[order[places] - begin]
        begin += len(part)
    return gathered


def _row_numbers(tensors: list[GGUFTensor]) -> Iterator[Tensor]:
    """For each tensor the numbers of its rows [..., 1], which go on from one tensor to the next."""
    begin = 0
    for tensor in tensors:
        yield torch.arange(begin, begin + tensor.rows).view(*tensor.shape[:-1], 1)
        begin += tensor.rows


class Mapping:
    """How transformers gives names to the tensors of a file, and what it does to them."""

    def __init__(self, file: GGUFFile, model: nn.Module) -> None:
        self.file, self.model, self.state = file, model, model.state_dict()

    def name(self, tensor: GGUFTensor) -> str | None:
        """The parameter that a tensor is, or a part of, or None."""
        raise NotImplementedError

    def order(self, name: str, tensors: list[GGUFTensor]) -> tuple[Tensor, Tensor | None]:
        """The order in which a parameter has the rows of its tensors, and which columns these have, or None."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[GGUFTensor]]:
        """The tensors that make each parameter of the model."""
        groups: dict[str, list[GGUFTensor]] = {}
        unknown = []
        for tensor in self.file.tensors.values():
            # What a table says of RoPE is in the configuration (_gguf_config.py).
            if tensor.name in (ROPE_DIVISORS, *LONGROPE_FACTORS) or self._scaled(tensor) is not None:
                continue
            name = self.name(tensor)
            if name in self.state:
                groups.setdefault(name, []).append(tensor)
            elif not ignores(self.model, name or tensor.name):
                unknown.append(tensor.name)
        if unknown:
            more = f", and {len(unknown) - 4} more" * (len(unknown) > 4)
            raise bad(
                self.file.path,
                f"tensors that {type(self.model).__name__} has, by transformers' mapping of {_architecture(self.file)}",
                f"{', '.join(unknown[:4])}{more}",
            )
        return groups

    def _scaled(self, tensor: GGUFTensor) -> GGUFTensor | None:
        """The weight in NVFP4 whose scale this tensor is, or None."""
        stem, _, end = tensor.name.rpartition(".")
        weight = self.file.tensors.get(f"{stem}.weight") if end == "scale" else None
        return weight if weight is not None and weight.type == "NVFP4" else None

    def scale(self, tensors: list[GGUFTensor]) -> float:
        """The scale of the whole weight that these tensors make, which only NVFP4 has."""
        scales = [self.file.tensors.get(f"{tensor.name.rpartition('.')[0]}.scale") for tensor in tensors]
        if tensors[0].type != "NVFP4" or not any(scales):
            return 1.0
        if len(scales) > 1 or scales[0].shape != (1,):
            raise CannotBeKept("NVFP4 with a scale for each expert")
        return values_of(self.file, scales[0]).item()


class _Names(Mapping):
    """The mapping by names of the package gguf, with a `TensorProcessor`."""

    def __init__(self, file: GGUFFile, model: nn.Module) -> None:
        super().__init__(file, model)
        processor = TENSOR_PROCESSORS.get(_architecture(file), TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)

    def name(self, tensor: GGUFTensor) -> str | None:
        stem = tensor.name.removesuffix(".weight")  # experts have parameters without this suffix
        return self._names.get(tensor.name, self._names.get(stem))

    def order(self, name: str, tensors: list[GGUFTensor]) -> tuple[Tensor, None]:
        """A `TensorProcessor` moves no columns."""
        numbers = list(_row_numbers(tensors))
        try:
            order = self._processed(name, tensors, numbers)
        except ValueError:  # the processor knows the number of columns
            K = tensors[0].shape[-1]
            try:
                order = self._processed(name, tensors, [each.int().expand(*each.shape[:-1], K) for each in numbers])
            except ValueError as error:
                raise CannotBeKept(f"{tensors[0].type} of {name}: {error}") from None
            order = order[..., 0].long()
        return checked_order(name, order, sum(tensor.rows for tensor in tensors)), None

    def dense(self, groups: dict[str, list[GGUFTensor]]) -> dict[str, LazyTensor]:
        """The tensors that transformers reads, by their names in the model."""

        def reader(name: str, tensors: list[GGUFTensor]) -> Callable[[], Tensor]:
            return lambda: self._processed(name, tensors, [values_of(self.file, tensor) for tensor in tensors])

        return {name: LazyTensor(reader(name, tensors)) for name, tensors in groups.items()}

    def conversions(self) -> list[WeightTransform]:
        """None: names and values are those of the model."""
        return []

    def _processed(self, name: str, tensors: list[GGUFTensor], values: list[Tensor]) -> Tensor:
        made: dict[str, Any] = {"tensors": {}}
        for tensor, value in zip(tensors, values, strict=True):
            result = self._processor.process(
                value.numpy(), tensor.name, tensor_key_mapping=self._names, parsed_parameters=made
            )
            if result.name is not None:
                made["tensors"][name] = torch.from_numpy(result.weights.copy())
        return made["tensors"][name]


class _Transforms(Mapping):
    """The mapping by a list of `WeightTransform`."""

    def __init__(self, file: GGUFFile, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(file, model)
        self._dtype = dtype
        self._named: dict[str, tuple[str, str | None]] = {}
        # Matching a name marks a transform as used, so the one that matches is not the one that transformers gets.
        transforms = self._transforms()
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def _transforms(self) -> list[WeightTransform]:
        return get_gguf_conversion_mapping(_architecture(self.file), self.model.config)

    def name(self, tensor: GGUFTensor) -> str | None:
        named = rename_source_key(
            tensor.name, self._renamings, self._converters, self.model.base_model_prefix, self.state
        )
        self._named[tensor.name] = named
        return named[0]

    def order(self, name: str, tensors: list[GGUFTensor]) -> tuple[Tensor, Tensor | None]:
        """What the operations of its converter make of the numbers of the rows."""
        pattern = self._named[tensors[0].name][1]
        numbers = list(_row_numbers(tensors))
        if pattern is None:
            return numbers[0].reshape(-1), None
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        made: dict[str, Any] = {
            self._named[tensor.name][1]: [value] for tensor, value in zip(tensors, numbers, strict=True)
        }
        if len(made) == 1:
            made = {pattern: numbers[0]}
        columns = None
        for operation in converter.operations:
            if (permutation := getattr(operation, "input_permutation", None)) is not None:
                columns = permutation.to(torch.int32)
                continue
            made = converted(made, operation, converter, name, self.model)
        order = next(iter(made.values()))
        order = order[0] if isinstance(order, list) else order
        return checked_order(name, order, sum(tensor.rows for tensor in tensors)), columns

    def dense(self, groups: dict[str, list[GGUFTensor]]) -> dict[str, LazyTensor]:
        """The tensors that transformers reads, by their names in the file."""

        def reader(tensor: GGUFTensor) -> Callable[[], Tensor]:
            return lambda: values_of(self.file, tensor)

        return {tensor.name: LazyTensor(reader(tensor)) for tensors in groups.values() for tensor in tensors}

    def conversions(self) -> list[WeightTransform]:
        """Those of the mapping, and then the cast to the dtype of the model."""
        transforms = self._transforms()
        for transform in transforms:
            if isinstance(transform, WeightConverter):
                transform.operations.append(Cast(self._dtype))
        return transforms
