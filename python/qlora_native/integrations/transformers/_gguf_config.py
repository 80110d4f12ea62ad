"""What a GGUF file says of its model that transformers does not read: the scaling of RoPE, and Gemma's large sizes.

llama.cpp computes with these, so a model without them is another one than is served. Where the configuration lacks
them, they are added, or the file is refused with what to do.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..._core.errors import bad
from ..._files.gguf_file import GGUFFile
from ._gguf_weights import LONGROPE_FACTORS, ROPE_DIVISORS, values_of

# The scaling of Llama 3.1 to 3.3, of which the file has nothing but the divisors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_READ = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}
# {(architecture, layers): query_pre_attn_scalar} where it is not the size of a head; llama.cpp, too, goes by layers.
_GEMMA_27B = {("gemma2", 46): 144, ("gemma3", 62): 168}
_REMEDY = "pass the configuration of the original model: from_pretrained(..., config=AutoConfig.from_pretrained(it))"


def complete_config(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Add to `config` what the file says beside it. A configuration that has a scaling of RoPE keeps its own.

    Raises:
        ValueError: the file has a scaling, or another RoPE, that cannot be added.
    """
    config = config.get_text_config(decoder=True)
    architecture = file.values["general.architecture"]
    scalar = _GEMMA_27B.get((architecture, file.values.get(f"{architecture}.block_count")))
    if scalar is not None and config.query_pre_attn_scalar == type(config)().query_pre_attn_scalar:
        config.query_pre_attn_scalar = scalar
    every = getattr(config, "rope_parameters", None)
    if not isinstance(every, dict) or not every:
        return
    rope = every.get("full_attention", every)  # llama.cpp scales no layer with a window
    if not isinstance(rope, dict) or any(_is_scaled(each) for each in every.values()) or _is_scaled(every):
        return
    rope.update(_scaling(file, architecture, config, rope))
    _check(file, architecture, config, rope)


def _is_scaled(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.get("rope_type", "default") != "default"


def _scaling(file: GGUFFile, architecture: str, config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of the file's scaling, none if it has none."""
    begin = f"{architecture}.rope.scaling."
    found = {key.removeprefix(begin): value for key, value in file.values.items() if key.startswith(begin)}
    factor, context = found.get("factor"), found.get("original_context_length")
    if factor is None:  # old files
        factor = file.values.get(f"{architecture}.rope.scale_linear")
    kind = found.get("type", "none" if factor is None or factor in (0.0, 1.0) else "linear")
    if kind == "none" and ROPE_DIVISORS in file.tensors:
        return _llama3(file, config, rope)
    if kind == "none" and not any(name in file.tensors for name in LONGROPE_FACTORS):
        return {}
    others = sorted(found.keys() - _READ)
    if kind == "linear" and factor is not None and not others:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor is not None and context is not None and not others:
        betas = {name: float(found[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in found}
        return {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(context),
            **betas,
        }
    got = ", ".join([repr(kind), *others]) if kind != "none" else "longrope's factors"
    raise bad(f"{file.path}: {begin}type", "a scaling of RoPE that is known here: linear or yarn", f"{got}. {_REMEDY}")


def _llama3(file: GGUFFile, config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """The scaling "llama3" that has the divisors of the file."""
    divisors = values_of(file, file.tensors[ROPE_DIVISORS])
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    trial = copy.deepcopy(config)
    trial.rope_parameters = rope | scaling
    found = llama3_divisors(trial)
    if found.shape == divisors.shape and torch.allclose(found, divisors, rtol=1e-5, atol=0.0):
        return scaling
    raise bad(f"{file.path}: {ROPE_DIVISORS}", 'the divisors of the scaling "llama3"', f"others. {_REMEDY}")


def llama3_divisors(config: PreTrainedConfig) -> Tensor:
    """What the scaling "llama3" of a configuration divides the frequencies of RoPE by: fp32 [head_dim / 2]."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = 2 * scaled.numel()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / config.rope_parameters["rope_theta"] ** exponents) / scaled


def _check(file: GGUFFile, architecture: str, config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    """Refuse a file whose RoPE has another base, or turns a part of a head, where the configuration says otherwise."""
    key = f"{architecture}.rope.freq_base"
    base, own = file.values.get(key), rope.get("rope_theta")
    if base is not None and own is not None and not math.isclose(base, own, rel_tol=1e-6):
        raise bad(f"{file.path}: {key}", f"{own}, as in the configuration", f"{base}. {_REMEDY}")
    key = f"{architecture}.rope.dimension_count"
    turned = file.values.get(key)
    if turned is None or hasattr(config, "qk_rope_head_dim"):  # there it is not a part of a head
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if int(size * part) != turned:
        raise bad(f"{file.path}: {key}", f"{int(size * part)}, as in the configuration", f"{turned}. {_REMEDY}")
