"""Read the files of an adapter, and find out of PEFT what they have to hold."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from .._core.errors import bad, is_finite_number
from ._checkpoints import open_safetensors
from ._skeleton import Skeleton

_CONFIGS: dict[str, type[PeftConfig]] = {
    "LORA": LoraConfig,
    "LOHA": LoHaConfig,
    "IA3": IA3Config,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
}
# Fields of a config which say what is adapted, and how it is computed. PEFT gets them as they are.
_USED = frozenset(
    "alpha alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out feedforward_modules "
    "layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save r rank_pattern "
    "target_modules target_parameters token_indices trainable_token_indices use_dora use_rslora".split()
)
# Fields that do not change what a trained adapter computes: where it came from, how it started, and dropout.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_ia3_weights init_lora_weights "
    "init_weights loftq_config lora_ga_config megatron_config megatron_core module_dropout peft_type peft_version "
    "qalora_group_size rank_dropout revision runtime_config task_type use_effective_conv2d".split()
)
# Values of init_lora_weights with which PEFT changed the base weight before it trained.
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
PREFIX = "base_model.model."


def peft_config(config: dict[str, Any]) -> PeftConfig:
    """Make PEFT's config of the fields that say what is adapted."""
    kind = config.get("peft_type")
    made = _CONFIGS.get(kind) if isinstance(kind, str) else None
    if made is None:
        raise bad("adapter_config.json: peft_type", "one of " + ", ".join(_CONFIGS), kind)
    fields = {field.name: field for field in dataclasses.fields(made)}
    for name, field in fields.items():
        value = config.get(name)
        if value and value != field.default and name not in _USED | _WITHOUT_EFFECT:
            raise bad(f"adapter_config.json: {name}", "none, as it cannot be merged here", value)
    for name in sorted(config.keys() - fields.keys()):
        if config[name] is True or (isinstance(config[name], dict) and config[name]):
            raise bad(f"adapter_config.json: {name}", "no option that the installed PEFT does not know", config[name])
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise bad("adapter_config.json: init_lora_weights", "one that leaves the base weight as it is", start)
    used = {name: config[name] for name in fields if name in _USED and name in config}
    for name in ("alpha", "lora_alpha"):
        if name in used:
            _check_number(name, used[name])
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(name, used.get(name) or {})
    try:
        return made(**used)
    except Exception as error:
        raise _refused(error) from error


def _check_number(name: str, value: Any) -> None:
    if not is_finite_number(value):
        raise bad(f"adapter_config.json: {name}", "a finite number", repr(value))


def _check_patterns(name: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise bad(f"adapter_config.json: {name}", "an object", type(patterns).__name__)
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise bad(f"adapter_config.json: {name}", "regular expressions", f"{pattern!r} ({error})") from None
        _check_number(f"{name}, {pattern}", value)


def _refused(error: Exception) -> ValueError:
    """The error for a config that PEFT refuses, by errors of many types."""
    text = " ".join(str(error).split())
    return bad("adapter_config.json", "a config that PEFT can use over this base", f"something else ({text})")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, without the prefix of their names, which some programs leave out."""
    tensors: dict[str, Tensor] = {}
    with open_safetensors(path) as file:
        for key in file.keys():
            name = key.removeprefix(PREFIX)
            if name in tensors:
                raise bad(f"adapter, {name}", "one tensor of that name", f"one with {PREFIX} before it and one without")
            tensor = tensors[name] = file.get_tensor(key)
            if not tensor.is_floating_point():
                raise bad(f"adapter, {name}", "a floating-point tensor", tensor.dtype)
            if not tensor.float().isfinite().all():
                raise bad(f"adapter, {name}", "finite values", "NaN or Inf")
    return tensors


def resized(base: Skeleton, tensors: dict[str, Tensor]) -> Skeleton:
    """The base with the vocabulary of the embedding that the adapter has, if it has one."""
    embedding = base.input_embeddings()
    if embedding is None:
        return base
    path = embedding.removesuffix(".weight")
    for inner in ("", ".base_layer", ".token_adapter.base_layer"):
        tensor = tensors.get(f"{path}{inner}.weight")
        if tensor is None or tensor.dim() != 2 or len(tensor) == base.shape(embedding)[0]:
            continue
        try:
            model = base.changed(vocab_size=len(tensor))
        except Exception as error:  # transformers raises errors of many types on bad values
            raise bad(
                f"adapter, {embedding}", "a vocabulary that the base can have", f"{len(tensor)} ({error})"
            ) from None
        if model.shape(embedding)[0] != len(tensor):
            raise bad(f"adapter, {embedding}", f"{model.shape(embedding)[0]} tokens, as the base has them", len(tensor))
        return model
    return base


def layers_over(model: Skeleton, config: PeftConfig) -> nn.Module:
    """Make PEFT's layers over the model, without values."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # they are about training; `Adapter.notes` has what is about merging
            return get_peft_model(model.model(), config)
    except Exception as error:
        raise _refused(error) from error


def assign(layers: nn.Module, tensors: dict[str, Tensor], has_embeddings: bool) -> dict[int, Tensor]:
    """Find out which of PEFT's tensors each tensor of the file is: {id of PEFT's: value}.

    PEFT passes over what it has no tensor for, and leaves at its initial values what the file does not have. Here
    either is an error. A file may have tensors of the base too, such as embeddings of another vocabulary.

    Args:
        layers: PEFT's model, without values.
        tensors: what `read_tensors` has read.
        has_embeddings: whether the base has input embeddings, which PEFT may save beside the adapter.
    """
    state = layers.state_dict(keep_vars=True)
    needed, saved = (
        {
            name.removeprefix(PREFIX): tensor
            for name, tensor in get_peft_model_state_dict(
                layers, state_dict=state, save_embedding_layers=embeddings
            ).items()
        }
        for embeddings in (False, has_embeddings)
    )
    own = {id(tensor) for tensor in needed.values()}
    base = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if id(tensor) not in own}
    known = base | saved
    values: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        # Other versions of PEFT write `a.weight` of an adapted embedding, and `a.lora_magnitude_vector.weight`.
        path = name.removesuffix(".weight")
        names = (name, path, f"{path}.base_layer.weight")
        expected = next((known[each] for each in names if each in known), None)
        if expected is None:
            raise bad("adapter", "tensors of layers that the base has and adapter_config.json adapts", name)
        if tensor.shape != expected.shape:
            shape = f"the shape {list(expected.shape)}, by adapter_config.json and the base"
            raise bad(f"adapter, {name}", shape, list(tensor.shape))
        if not torch.equal(values.setdefault(id(expected), tensor).float(), tensor.float()):
            raise bad(f"adapter, {name}", "the values of the tensor that it is tied to", "others")
    for name, expected in needed.items():
        if id(expected) not in values:
            raise bad("adapter", f"{name}, as adapter_config.json adapts that layer of the base", "none")
    return values
