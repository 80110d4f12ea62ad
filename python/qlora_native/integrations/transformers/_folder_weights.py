"""Which tensors of a folder's safetensors files make which quantized weights of a model.

A file says by a weight's own tensors whether it is quantized, so that layers which the lists of a config leave out
(`ignore`, `modules_to_not_convert`, `dynamic`, `extra_config`) are in 16 bits without being looked up. Names are those
of transformers' own conversions, which also say which weights of single experts make a stack.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from ..._core.errors import bad
from ..._core.weight import QuantizedWeight
from ._folder_methods import GLOBAL_SCALE, METHODS, Config
from ._kept import NO_LAYER, Decoded, Kept, Plan, Target, checked_order, converted, ignores, incomplete_experts

# What only a server reads that rounds activations, or keys and values of attention.
_OF_ACTIVATIONS = frozenset(
    f"{what}_{value}" for what in ("input", "output") for value in ("scale", "zero_point", "global_scale")
) | {"activation_scale", "q_scale", "k_scale", "v_scale"}
_FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes of what is not quantized
_SCALE_OF_STACK = "_scale_inv"  # of a parameter of experts that a file has in FP8 as one tensor


class Folder:
    """The safetensors files of a folder, which are mapped and not read.

    Attributes:
        path: the folder.
        tensors: {name: (file, safetensors' word for the dtype, shape)}.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.path = os.path.dirname(files[0]) if files else ""
        self.tensors: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self._open: dict[str, Any] = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise bad(str(file), "a file of safetensors", "another")
            try:
                opened = self._open[str(file)] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise bad(str(file), "a whole file of safetensors", f"another, or a part of one ({error})") from None
            for name in opened.keys():
                if name in self.tensors:
                    raise bad(f"{file}: {name}", "one tensor of this name", f"another in {self.tensors[name][0]}")
                part = opened.get_slice(name)
                self.tensors[name] = (str(file), part.get_dtype(), tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self.tensors[name][0]].get_tensor(name)

    def where(self, name: str) -> str:
        """The file of a tensor, and its name, for errors."""
        return f"{self.tensors[name][0]}: {name}"


@dataclass(frozen=True)
class Stored:
    """A quantized weight [N, K] or [E, N, K] of the files.

    Attributes:
        name: of its layer in the files, or of the parameter.
        weight: what the weight would be called in 16 bits.
        parts: {the last part of a name: the tensor's name}.
    """

    name: str
    weight: str
    parts: dict[str, str]


def plan(files: Sequence[str], model: nn.Module, places: dict[str, Target], config: Config) -> Plan:
    """Decide what becomes of the quantized weights of a folder.

    Args:
        files: its safetensors files.
        model: the model that transformers made of its config.json, without values.
        places: its `targets`.
        config: the quantization_config of its config.json.

    Raises:
        ValueError: a weight lacks a tensor, a tensor belongs to no weight, or the model has no such weight.
    """
    _check_config(config)
    return _Planner(Folder(files), model, config).plan(places)


def _check_config(config: Config) -> None:
    """Refuse what changes values or products in another way than by scales."""
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise bad("sparsity_config", "the format dense", repr(sparsity.get("format")))
    for key in ("transform_config", "rotation_config", "spinquant_config"):
        if config.get(key):
            raise bad(key, "none: weights that are not rotated", "one")


class _Planner:
    def __init__(self, folder: Folder, model: nn.Module, config: dict[str, Any]) -> None:
        self.folder, self.model, self.config = folder, model, config
        self.method = METHODS[config["quant_method"]]
        # A copy, because matching a name marks a conversion as used.
        conversions = copy.deepcopy(get_model_conversion_mapping(model))
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._state = model.state_dict()

    def plan(self, places: dict[str, Target]) -> Plan:
        kept: dict[str, Kept] = {}
        decoded: list[Decoded] = []
        refused: dict[str, str] = {}
        groups: dict[str, list[tuple[Stored, str | None]]] = {}
        consumed = set()
        stored_weights = self._stored()
        self._check_others({part for stored in stored_weights for part in stored.parts.values()})
        for stored in sorted(stored_weights, key=lambda each: dot_natural_key(each.name)):
            name, pattern = self._renamed(stored.weight)
            consumed.update(self._renamed(part)[0] for part in stored.parts.values())
            if name in self._state:
                groups.setdefault(name, []).append((stored, pattern))
            elif not ignores(self.model, name):
                part = next(iter(stored.parts.values()))
                raise bad(self.folder.where(part), f"a weight that {type(self.model).__name__} has", f"one of {name}")
        for name, group in groups.items():
            names = self._names(group)
            self._check_global_scales(name, [stored for stored, _ in group])
            if (target := places.get(name)) is not None:
                nbytes = sum(self._nbytes(part) for stored, _ in group for part in stored.parts.values())
                kept[name] = Kept(target, names, nbytes, self._reader(name, group, target.shape, target.dtype))
                continue
            refused[names[0]] = f"{name}, {NO_LAYER}"
            own, transposed = self._state[name], isinstance(self._module(name), Conv1D)
            shape = tuple(reversed(own.shape)) if transposed else tuple(own.shape)
            if len(shape) != 2:
                raise bad(names[0], "a weight that can be kept, or one of two dimensions", refused[names[0]])
            decoded.append(Decoded(name, names, transposed, self._reader(name, group, shape, own.dtype)))
        for name in incomplete_experts(kept):
            half = kept.pop(name)
            refused[half.names[0]] = "the other stack of its experts is in 16 bits"
            decoded.append(Decoded(name, half.names, half.target.transposed, half.read))
        return Plan(self.folder.path, list(kept.values()), refused, decoded=decoded, consumed=consumed)

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _stored(self) -> list[Stored]:
        """The quantized weights of the files. Each tensor that can only be a part of one has been assigned then."""
        tensors, method = self.folder.tensors, self.method
        layers: dict[str, dict[str, str]] = {}
        found = []
        for name, (_, dtype, _) in tensors.items():
            layer, _, part = name.rpartition(".")
            if part.endswith(_SCALE_OF_STACK) and part != "weight_scale_inv":
                if name.removesuffix(_SCALE_OF_STACK) not in tensors:
                    raise bad(self.folder.where(name), "the quantized weight that it belongs to", "none")
            elif dtype in method.dtypes and part != "weight" and f"{name}{_SCALE_OF_STACK}" in tensors:
                found.append(Stored(name, name, {"weight": name, "weight_scale_inv": name + _SCALE_OF_STACK}))
            else:
                layers.setdefault(layer, {})[part] = name
        for layer, parts in layers.items():
            own = {part: name for part, name in parts.items() if part in method.parts}
            if method.mark not in own and not ("weight" in own and tensors[own["weight"]][1] in method.dtypes):
                left = [part for part in sorted(own) if part != "weight" and not self._has(own[part])]
                if left:
                    raise bad(self.folder.where(own[left[0]]), "the quantized weight that it belongs to", "none")
                continue
            if unknown := sorted(parts.keys() - method.parts - _OF_ACTIVATIONS - {"bias"}):
                expected = f"one of {', '.join(sorted(method.parts))}, of a quantized weight"
                raise bad(self.folder.where(parts[unknown[0]]), expected, "another tensor")
            if missing := [part for part in method.required if part not in own]:
                raise bad(f"{layer}.{missing[0]}", f"a tensor beside {next(iter(own.values()))}", "none")
            found.append(Stored(layer, f"{layer}.weight", own))
        return found

    def _has(self, name: str) -> bool:
        """Whether a tensor is a parameter or a buffer of the model by itself."""
        return self._renamed(name)[0] in self._state

    def _check_others(self, parts: set[str]) -> None:
        """Refuse codes under names that the method does not have: transformers would cast them to 16 bits."""
        for name, (_, dtype, _) in self.folder.tensors.items():
            if name in parts or dtype in _FLOATS:
                continue
            own = self._state.get(self._renamed(name)[0])
            if own is not None and own.is_floating_point():
                expected = f"{', '.join(_FLOATS)}, or the tensors of a weight of {self.config['quant_method']}"
                raise bad(self.folder.where(name), expected, f"{dtype} without its scale")

    def _check_global_scales(self, name: str, group: list[Stored]) -> None:
        """Refuse a stack of NVFP4 whose weights have a scale each: one weight has one."""
        scales = [self.folder[each.parts[GLOBAL_SCALE]] for each in group if GLOBAL_SCALE in each.parts]
        if any(not torch.equal(scale, scales[0]) for scale in scales):
            where = self.folder.where(group[0].parts[GLOBAL_SCALE])
            raise bad(where, f"one scale of all weights that make {name}", "several, which one weight cannot hold")

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name of a tensor in the model, and the pattern of the conversion that makes it, if there is one."""
        return rename_source_key(
            name, self._renamings, self._converters, self.model.base_model_prefix or None, self._state
        )

    def _names(self, group: list[tuple[Stored, str | None]]) -> tuple[str, ...]:
        return tuple(self.folder.where(next(iter(stored.parts.values()))) for stored, _ in group)

    def _reader(
        self, name: str, group: list[tuple[Stored, str | None]], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], QuantizedWeight]:
        """What reads the parameter `name`, which is one weight of the files, or a stack of weights."""

        def reader(stored: Stored, transposed: bool = False) -> Callable[[], QuantizedWeight]:
            def read() -> QuantizedWeight:
                tensors = {part: self.folder[name] for part, name in stored.parts.items()}
                if transposed:
                    tensors = {part: t.mT.contiguous() if t.dim() == 3 else t for part, t in tensors.items()}
                return self.method.read(stored.name, tensors, self.config, dtype)

            return read

        if len(group) == 1 and (transposed := self._is_transposed(name, *group[0])) is not None:
            return reader(group[0][0], transposed)
        readers = [reader(stored) for stored, _ in group]
        order = self._order(name, group, shape)
        return lambda: _stacked(readers, order, shape)

    def _nbytes(self, name: str) -> int:
        _, dtype, shape = self.folder.tensors[name]
        bits = re.search(r"\d+", dtype)  # "BF16", "F8_E4M3", "I32"
        return torch.Size(shape).numel() * (8 if bits is None else int(bits[0])) // 8

    def _is_transposed(self, name: str, stored: Stored, pattern: str | None) -> bool | None:
        """Whether transformers transposes the matrices of a weight, of which it makes the parameter `name` alone.

        A conversion may do so only if the shape is not that of the parameter. None is returned if it does anything
        else.
        """
        if pattern is None:
            return False
        transposed, shape = False, self.folder.tensors[next(iter(stored.parts.values()))][2]
        for operation in self._converter({pattern}).operations:
            if not isinstance(operation, Transpose) or (operation.dim0, operation.dim1) != (1, 2) or len(shape) != 3:
                return None
            if not (getattr(operation, "check_dims", False) and shape == self._state[name].shape):
                transposed, shape = not transposed, (shape[0], shape[2], shape[1])
        return transposed

    def _converter(self, patterns: Set[str | None]) -> WeightConverter:
        """The conversion whose patterns these are."""
        (converter,) = {id(each): each for each in self._converters if patterns & set(each.source_patterns)}.values()
        return converter

    def _order(self, name: str, group: list[tuple[Stored, str | None]], shape: tuple[int, ...]) -> Tensor:
        """The order in which a parameter has the rows of its weights: the conversion is run on their numbers."""
        where, patterns = self._names(group)[0], {pattern for _, pattern in group}
        if None in patterns:
            raise bad(where, f"one weight that becomes {name}", len(group))
        converter = self._converter(patterns)
        if len(converter.target_patterns) != 1:
            raise bad(where, "a weight that transformers does not divide", f"one of which {name} is a part")
        rows = torch.Size(shape[:-1]).numel()
        if rows % len(group):
            raise bad(where, f"{list(shape)} in weights of one shape, as {name} has", f"{len(group)} weights")
        each = rows // len(group)
        made: dict[str, Any] = {}
        for i, (_, pattern) in enumerate(group):
            made.setdefault(pattern, []).append(torch.arange(i * each, (i + 1) * each).view(each, 1))
        try:
            for operation in converter.operations:
                made = converted(made, operation, converter, name, self.model)
            order = next(iter(made.values()))
            return checked_order(name, order[0] if isinstance(order, list) else order, rows)
        except (RuntimeError, ValueError, LookupError) as error:
            text = f"{len(group)}, of which {type(operation).__name__} makes another ({error})"
            raise bad(where, f"weights whose rows make {list(shape)} of {name}", text) from None


def _stacked(readers: list[Callable[[], QuantizedWeight]], order: Tensor, shape: tuple[int, ...]) -> QuantizedWeight:
    """Read weights one after the other into one weight, whose rows are those of all in turn, taken in `order`."""
    rows = torch.Size(shape[:-1]).numel()
    places = torch.empty_like(order)
    places[order] = torch.arange(rows)
    made: dict[str, Tensor] = {}
    begin, first = 0, None
    for read in readers:
        q = read()
        if first is None:
            first = q
        N = len(q.codes.view(-1, q.codes.shape[-1]))
        if (q.format, q.blocksize, q.shape) != (first.format, first.blocksize, first.shape) or q.shape[-1] != shape[-1]:
            got = f"{q.format} {list(q.shape)} in blocks of {q.blocksize}"
            raise bad("its weights", f"{first.format} {list(shape)} in blocks of {first.blocksize}", got)
        if q.tensors().keys() != first.tensors().keys():
            raise bad("its weights", f"{', '.join(first.tensors())}, as the first has", ", ".join(q.tensors()))
        for name, tensor in q.tensors().items():
            if name in ("codes", "absmax", "minimum", "zero_point"):
                if name not in made:
                    made[name] = tensor.new_empty(rows, tensor.numel() // N)
                made[name][places[begin : begin + N]] = tensor.view(N, -1)
            elif name == "nested_absmax":
                made[name] = tensor.new_ones(1)  # of E8M0, where all are 1
            elif not _same_bits(tensor, getattr(first, name)):
                raise bad("its weights", f"one {name}, as the first has", "another")
        begin += N
    if begin != rows:
        raise bad("its weights", f"{rows} rows", begin)
    if "nested_absmax" in made:
        blocks = made["absmax"].numel()
        made["nested_absmax"] = made["nested_absmax"].expand(-(-blocks // first.layout.nested_blocksize)).contiguous()
    fields: dict[str, Any] = {name: tensor.view(-1) for name, tensor in made.items()}
    fields["codes"] = made["codes"].view(*shape[:-1], -1)
    return replace(first, **fields, shape=shape)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tables are equal, of which those of scales have NaN where a byte is none."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
