"""The tensors of a quantized weight in the files of a model: their names, and how they are written and read.

| format of the parameter `a.b` | tensors |
|---|---|
| nf4, fp4 | bitsandbytes': `a.b`, `a.b.absmax`, ..., `a.b.quant_state.bitsandbytes__nf4` |
| mxfp4 | gpt-oss': `a.b_blocks` [..., N, K/32, 16] and `a.b_scales` [..., N, K/32] |
| nvfp4 | the same in blocks of 16, and `a.b_scale_values` fp32 [127], the value of each byte of a scale |

The tensors alone say in which format a weight is. A file with other formats than bitsandbytes' says in its config that
it is one of ours (_config.py), because others would read a part of it and give random values to the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings, dot_natural_key

from ..._core.errors import bad, named
from ..._core.formats import CODEBOOKS
from ..._core.microscaling import MICROSCALED, nvfp4_block_fields, swapped_codes
from ..._core.quant_state import QUANT_STATE, STATE_SUFFIXES, read_quant_state
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ...nn import Experts4bit
from ._config import FORMATS

_BLOCKS, _SCALES, _SCALE_VALUES = "_blocks", "_scales", "_scale_values"
SUFFIXES = ("", *STATE_SUFFIXES, _BLOCKS, _SCALES, _SCALE_VALUES)


def why_not_saved(model: nn.Module) -> ValueError | None:
    """The error that names a quantized layer of `model` for which there are no files, or None."""
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        if layer.format not in FORMATS:
            return bad(f"{name}: format", f"one of {', '.join(FORMATS)}, which have files", layer.format)
        K = layer._shape[-1]
        if layer.format in MICROSCALED and K % layer.blocksize:
            return bad(f"{name}: K", f"a multiple of {layer.blocksize}, as files of {layer.format} need", K)
    return None


def written_weight(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    """Make the tensors of a file for the parameter `name`. Codes of mxfp4 and nvfp4 are copied, others are shared."""
    q = layer.quantized_weight
    if q.format not in MICROSCALED:
        parent, _, own = name.rpartition(".")
        return q.to_bitsandbytes(
            f"{parent}." if parent else "", own, isinstance(layer, Experts4bit) and layer.transposed
        )
    *rows, K = q.shape
    made = {
        _BLOCKS: swapped_codes(q.codes).view(*rows, K // q.blocksize, q.blocksize // 2),
        _SCALES: q.absmax.view(*rows, K // q.blocksize),
    }
    if q.format == "nvfp4":
        made[_SCALE_VALUES] = q.nested_code[: len(MICROSCALED["nvfp4"])].clone()
    return {name + suffix: tensor for suffix, tensor in made.items()}


def read_weight(name: str, layer: QuantizedLayer, found: dict[str, Tensor]) -> QuantizedWeight:
    """Make the weight of the parameter `name` from the tensors of a file, by their suffixes."""
    transposed = isinstance(layer, Experts4bit) and layer.transposed
    if any(suffix in found for suffix in (_BLOCKS, _SCALES, _SCALE_VALUES)):
        q = _read_blocks(name, layer, found)
    else:
        parent, _, own = name.rpartition(".")
        entries = {name + suffix: tensor for suffix, tensor in found.items()}
        q = QuantizedWeight.from_bitsandbytes(entries, f"{parent}." if parent else "", own)
        key = next(key for key in entries if QUANT_STATE in key)
        state = read_quant_state(key, entries[key], q.nested_absmax is not None)
        if bool(state.get("transposed", False)) != transposed:
            shape = list(layer.shape if isinstance(layer, Experts4bit) else layer._shape)
            expected = f"blocks along the {'rows' if transposed else 'last dimension'} of {shape}"
            raise bad(name, f"{expected}, as they are written here", "blocks along the other")
    if q.shape != layer._shape:
        raise bad(name, f"{list(layer._shape)}, as config.json says", list(q.shape))
    return q


def _read_blocks(name: str, layer: QuantizedLayer, found: dict[str, Tensor]) -> QuantizedWeight:
    if missing := {_BLOCKS, _SCALES} - found.keys():
        raise bad(name, "blocks and scales", f"no {', '.join(sorted(name + suffix for suffix in missing))}")
    if others := found.keys() - {_BLOCKS, _SCALES, _SCALE_VALUES}:
        raise bad(name, "one weight", f"blocks, and {', '.join(sorted(name + suffix for suffix in others))}")
    blocks, scales = found[_BLOCKS], found[_SCALES]
    with named(f"{name}, "):
        if _SCALE_VALUES in found:
            fields = nvfp4_block_fields(blocks, scales, found[_SCALE_VALUES])
            code = CODEBOOKS["nvfp4"].to(blocks.device, copy=True)
            return QuantizedWeight(**fields, code=code, dtype=layer.dtype)
        return QuantizedWeight.from_mxfp4(blocks, scales, layer.dtype)


def check_weights_are_dense(
    files: Iterable[str] | None, model: nn.Module, linears: set[str], experts_in_mxfp4: bool
) -> None:
    """Check that safetensors files have floats, and no scales, for layers that are quantized while they are read.

    transformers casts what it reads to the dtype of the model, so codes in FP8 or int8 would be taken for values.
    """
    stacks = [] if experts_in_mxfp4 else [p for p, module in model.named_modules() if isinstance(module, Experts4bit)]
    experts = {path.rpartition(".")[0] for path in stacks}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = list(_tensors_of(files))
    renamed = _renamed((name for _, name, _ in found), model)
    for file, name, dtype in found:
        own = renamed[name]
        path, _, part = own.rpartition(".")
        of_linear = not linears.isdisjoint((path, prefix + path, path.removeprefix(prefix)))
        if of_linear and part not in ("weight", "bias"):
            raise bad(f"{file}: {name}", "a weight or a bias of a layer in 16 bits", "another tensor of it")
        if (of_linear or any(f"{each}." in own for each in experts)) and dtype not in ("F32", "BF16", "F16"):
            raise bad(f"{file}: {name}", "F32, BF16 or F16", f"{dtype}, which has another meaning in the files")


def names_in_files(files: Iterable[str] | None, model: nn.Module) -> set[str]:
    """The parameters that are quantized in safetensors files, by their names in the model."""
    names = {name for _, name, _ in _tensors_of(files)}
    found = {name.partition(QUANT_STATE)[0] for name in names if QUANT_STATE in name}
    found.update(name.removesuffix(suffix) for suffix in (_BLOCKS, _SCALES) for name in names if name.endswith(suffix))
    renamed = _renamed(names | found, model)
    return {renamed[name] for name in found}


def _renamed(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """{name in the files: name in the model} of all tensors of the files.

    Some renamings depend on the names before, so they are applied in the order in which transformers applies them, and
    to copies, because each one remembers what it has renamed.
    """
    conversions = copy.deepcopy(get_model_conversion_mapping(model))
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    return {name: apply_renamings(name, renamings) for name in sorted(set(names), key=dot_natural_key)}


def _tensors_of(files: Iterable[str] | None) -> Iterator[tuple[str, str, str]]:
    """The tensors of the safetensors files among `files`: file, name and safetensors' word for the dtype."""
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    yield str(file), name, opened.get_slice(name).get_dtype()


def file_has(names: set[str], path: str) -> bool:
    """Whether `path` is in `names`. Either may leave out the prefix of the base model."""
    return any(path == name or path.endswith(f".{name}") or name.endswith(f".{path}") for name in names)
