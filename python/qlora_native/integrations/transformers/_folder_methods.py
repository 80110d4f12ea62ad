"""Methods of quantization of a folder: which tensors a weight has, and how it is made of them and of the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._core.errors import bad
from ..._core.weight import QuantizedWeight
from ..._files.awq import from_awq
from ..._files.compressed_tensors import from_compressed_tensors
from ..._files.fp8 import from_fp8
from ..._files.gptq import from_gptq

GLOBAL_SCALE = "weight_global_scale"  # of a weight in NVFP4

Tensors, Config = Mapping[str, Tensor], dict[str, Any]
Reader = Callable[[str, Tensors, Config, torch.dtype], QuantizedWeight]


@dataclass(frozen=True)
class Method:
    """A method of quantization.

    Tensors are called by the last parts of their names.

    Attributes:
        mark: the tensor by which a weight is known to be quantized, if it is not by the dtype of `weight`.
        dtypes: those of a `weight` that is quantized, in safetensors' words.
        required: the tensors that a weight has beside that one.
        optional: those that it may have.
        read: makes the weight from (the name of its layer in the file, its tensors, the config, dtype).
    """

    mark: str | None
    dtypes: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Reader

    @property
    def parts(self) -> frozenset[str]:
        """All tensors that a weight may have."""
        own = () if self.mark is None else (self.mark,)
        return frozenset((*own, *(("weight",) if self.dtypes else ()), *self.required, *self.optional))


def _gptq(name: str, tensors: Tensors, config: Config, dtype: torch.dtype) -> QuantizedWeight:
    options = {**config, **_of_layer(name, config.get("dynamic") or {}, "+:")}
    if (pack := options.get("pack_dtype", "int32")) != "int32":
        raise bad("pack_dtype", "int32", repr(pack))
    return from_gptq(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        tensors.get("g_idx"),
        bits=options.get("bits", 4),
        group_size=options.get("group_size", 128),
        sym=options.get("sym", True),
        checkpoint_format=options.get("checkpoint_format") or options.get("format") or "gptq",
        dtype=dtype,
    )


def _awq(name: str, tensors: Tensors, config: Config, dtype: torch.dtype) -> QuantizedWeight:
    return from_awq(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        bits=config.get("bits", config.get("w_bit", 4)),
        group_size=config.get("group_size", config.get("q_group_size", 128)),
        version=config.get("version") or "gemm",
        dtype=dtype,
    )


def _auto_round(name: str, tensors: Tensors, config: Config, dtype: torch.dtype) -> QuantizedWeight:
    packing = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
    options = {**config, **_of_layer(name, config.get("extra_config") or {}, matches=re.search)}
    layout = packing.removeprefix("auto_round:").split(":")[0]  # the name of a kernel may follow
    if layout in ("awq", "auto_awq"):
        return _awq(name, tensors, options, dtype)
    if layout in ("auto", "gptq", "auto_gptq"):
        packing = "auto_round:auto_gptq"
    return _gptq(name, tensors, {**options, "checkpoint_format": packing}, dtype)


def _of_layer(
    name: str, rules: Mapping[str, Any], prefix: str = "", matches: Callable[[str, str], Any] = re.match
) -> dict[str, Any]:
    """The options that a config has for one layer: those of the rule that is its name, or the first that matches it."""
    of_layers = {rule.removeprefix(prefix): each for rule, each in rules.items() if isinstance(each, dict)}
    if name in of_layers:
        return of_layers[name]
    return next((options for pattern, options in of_layers.items() if matches(pattern, name)), {})


def _compressed(name: str, tensors: Tensors, config: Config, dtype: torch.dtype) -> QuantizedWeight:
    group = _group(name, config)
    format = group.get("format") or config.get("format")
    if format == "nvfp4-pack-quantized":
        packed, scale, factor = (tensors[part] for part in ("weight_packed", "weight_scale", GLOBAL_SCALE))
        return QuantizedWeight.from_nvfp4(packed, scale, weight_global_scale=factor, dtype=dtype)
    if format == "mxfp4-pack-quantized":
        return QuantizedWeight.from_mxfp4(tensors["weight_packed"], tensors["weight_scale"], dtype)
    return from_compressed_tensors(tensors, group.get("weights") or {}, format, dtype)


def _group(name: str, config: Config) -> Config:
    """The one of `config_groups` that has a layer, by its name or else by its class, as compressed-tensors finds it."""
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, dict)]
    targets = [(target, group) for group in groups for target in group.get("targets") or ()]
    for target, group in targets:
        if target == name or (target.startswith("re:") and re.match(target.removeprefix("re:"), name)):
            return group
    for target, group in targets:
        if target == "Linear":
            return group
    raise bad("config_groups", f"a group with {name}", "none")


def _fp8(name: str, tensors: Tensors, config: Config, dtype: torch.dtype) -> QuantizedWeight:
    scales = [part for part in ("weight_scale_inv", "weight_scale", "scale") if part in tensors]
    if len(scales) != 1:
        raise bad(f"{name}.weight_scale_inv", "one scale of the weight", ", ".join(scales) or "none")
    block = config.get("weight_block_size")
    scale = tensors[scales[0]]
    one = scale.numel() == 1 or (tensors["weight"].dim() == 3 and scale.numel() == len(scale))
    return from_fp8(tensors["weight"], scale, block_size=None if block is None or one else tuple(block), dtype=dtype)


METHODS = {
    "gptq": Method("qweight", (), ("qzeros", "scales"), ("g_idx",), _gptq),
    "awq": Method("qweight", (), ("qzeros", "scales"), (), _awq),
    "auto-round": Method("qweight", (), ("qzeros", "scales"), ("g_idx",), _auto_round),
    "compressed-tensors": Method(
        "weight_packed",
        ("F8_E4M3", "I8"),
        ("weight_scale",),
        ("weight_zero_point", "weight_shape", "weight_g_idx", GLOBAL_SCALE),
        _compressed,
    ),
    "fp8": Method(None, ("F8_E4M3", "F8_E4M3FNUZ"), (), ("weight_scale_inv", "weight_scale", "scale"), _fp8),
}
