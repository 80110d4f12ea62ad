"""Read an adapter that PEFT has saved, and merge it tensor by tensor: LoRA and its relatives, LoHa, IA³, tokens.

PEFT itself says what an adapter consists of: its layers are made over the model without values, from the adapter's
config. The file has to have exactly their tensors, in their shapes.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from ._versions import require

require("peft")

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from .._errors import bad, is_finite_number
from .._json import parse_object
from .adapter_changes import Added, Change, Rows, changes_of
from .checkpoints import file_inside, open_safetensors
from .skeleton import Part, Skeleton

__all__ = ["Adapter"]

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
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")
_PREFIX = "base_model.model."


class Adapter:
    """An adapter from a folder, over the model that it was trained for.

    Attributes:
        config: what its adapter_config.json has.
        model: the model that it makes of the base: with its vocabulary, and with the ties that it leaves.
        changes: {name of a tensor of the model: its changes, each with the name that its layer has for the tensor};
            tied tensors have each other's.
        replaced: {name of a tensor of the model: its new value}, from `modules_to_save`, trained biases and resized
            embeddings.
        names: those of both.
        notes: sentences for a reader of the merged files.
    """

    def __init__(self, folder: str | Path, base: Skeleton) -> None:
        """Read and check the adapter in `folder` of the model `base`.

        Raises:
            FileNotFoundError: adapter_config.json or adapter_model.safetensors is missing.
            ValueError: the folder has no adapter that can be merged here, a damaged one, one that contradicts itself,
                or one of another model.
        """
        folder = Path(folder)
        names = "adapter_config.json", "adapter_model.safetensors"
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: expected a file that PEFT saved, found none")
        config, weights = (file_inside(folder, name) for name in names)
        self.config: dict[str, Any] = parse_object(config.read_bytes(), str(config))
        made = _config(self.config)
        tensors = _read(weights)
        self.notes: list[str] = []
        self.model = _resized(base, tensors)
        layers = _layers(self.model, made)
        values = _assigned(layers, tensors)
        self.changes: dict[str, list[tuple[str, Change]]] = {}
        self.replaced: dict[str, Tensor] = {}
        self._parameters = self._collect(layers, values)
        self.names = {*self.changes, *self.replaced}
        for name in sorted(self.model.names() - set(self.replaced)):
            if self.model.shape(name) != base.shape(name):
                raise bad("adapter", "all tensors that have a row for each token of its vocabulary", f"no {name}")
        self._untie(base)

    def _collect(self, layers: nn.Module, values: dict[int, Tensor]) -> dict[str, int]:
        """Find what becomes of each tensor. All names of a tied tensor have the changes of the layers over either.

        Returns:
            {name in the merged model: id of the tensor}, which tied tensors share.
        """
        changes: dict[int, list[tuple[str, Change]]] = {}
        for name, layer in layers.named_modules():
            if isinstance(layer, BaseTunerLayer):
                path = name.removeprefix(_PREFIX).replace(".base_layer", "").removesuffix(".token_adapter")
                for parameter, change in changes_of(path, layer, lambda tensor: values[id(tensor)]).items():
                    below = getattr(layer.get_base_layer(), parameter)
                    changes.setdefault(id(below), []).append((f"{path}.{parameter}", change))
        parameters = {name: id(tensor) for name, tensor in layers.unload().state_dict(keep_vars=True).items()}
        self.changes = {name: changes[key] for name, key in parameters.items() if key in changes}
        self.replaced = {name: values[key] for name, key in parameters.items() if key in values}
        return parameters

    def _untie(self, base: Skeleton) -> None:
        """Untie the tensors that PEFT has untied by replacing one of them.

        Raises:
            ValueError: transformers ties them whatever config.json says.
        """
        for name in sorted(self.names):
            apart = sorted(other for other in base.tied(name) if not self._shared(name, other))
            if apart:
                self.model = self.model.changed(tied=False)
                self.notes.append(f"{name} and {apart[0]} are no longer tied: each has values of its own")
                break
        for name in self._parameters:
            for other in self.model.tied(name):
                if not self._shared(name, other):
                    raise bad("adapter", f"one value for {name} and {other}, which transformers ties", "two")
        for name, changes in self.changes.items():
            others = [own for own, change in changes if own != name and not isinstance(change, Rows)]
            if others:
                self.notes.append(
                    f"{name} and {others[0]} are tied: a change of one is merged into both, as PEFT does, which is not "
                    "the model that was trained"
                )
                break

    def _shared(self, name: str, other: str) -> bool:
        return self._parameters[name] == self._parameters[other]

    def check_parts(self, parts: list[tuple[str, Part]]) -> None:
        """Raise ValueError unless the adapter can be merged into the tensors of the files that are parts of others.

        Args:
            parts: (name in the files, what it is).
        """
        for name, part in parts:
            changes = [change for _, change in self.changes.get(part.own, ())]
            if not all(isinstance(change, Added) for change in changes):
                raise bad(f"adapter, {part.own}", f"a change that can be added to {name}, its part", "another")
            rows = self.model.shape(part.own)[0]
            if (changes or part.own in self.replaced) and part.expert is not None and part.expert >= rows:
                raise bad(name, f"one of {rows} experts", part.expert)

    def merged(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the adapter into the model's tensor `name`, whose value in the base is `tensor`.

        Returns:
            (merged, trained), in fp32: what PEFT merges, and what the trained model computes with. They differ where a
            tensor gets the changes of another one, which it is tied to.

        Raises:
            ValueError: the merged tensor is not finite.
        """
        start, changes = self.replaced.get(name, tensor), self.changes.get(name, [])
        merged = _finite(name, _applied(start, [change for _, change in changes]))
        own = [change for of, change in changes if of == name]
        return merged, merged if len(own) == len(changes) else _applied(start, own)

    def merged_part(self, part: Part, tensor: Tensor) -> Tensor:
        """Merge the adapter into a tensor of the base's files that is a part of one of the model, in fp32.

        Raises:
            ValueError: the result is not finite, or `tensor` has another shape than the part.
        """
        replaced = self.replaced.get(part.own)
        merged = tensor
        if replaced is not None:
            merged = part.of(replaced if part.expert is None else replaced[part.expert])
        deltas = [part.of(change.delta(part.expert)) for _, change in self.changes.get(part.own, ())]  # see check_parts
        for value in (merged, *deltas):
            if value.shape != tensor.shape:
                raise bad(f"{part.own}, {part.source}", f"the shape {list(value.shape)}", list(tensor.shape))
        return _finite(part.own, sum(deltas, start=merged.float()))


def _applied(tensor: Tensor, changes: list[Change]) -> Tensor:
    for change in changes:
        tensor = change.apply(tensor)
    return tensor.float()


def _finite(name: str, merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise bad(f"adapter, {name}", "a merged weight of finite values", "NaN or Inf")
    return merged


# ---- reading ---------------------------------------------------------------------------------------------------------


def _config(config: dict[str, Any]) -> PeftConfig:
    """Make PEFT's config of the fields that say what is adapted.

    Raises:
        ValueError: a field has a wrong value, or one with which the adapter cannot be merged here.
    """
    kind = config.get("peft_type")
    made = _CONFIGS.get(kind) if isinstance(kind, str) else None
    if made is None:
        raise bad("adapter_config.json: peft_type", "one of " + ", ".join(_CONFIGS), kind)
    fields = {field.name: field for field in dataclasses.fields(made)}
    for name, field in fields.items():
        value = config.get(name)
        if value and value != field.default and name not in _USED | _WITHOUT_EFFECT:
            raise bad(f"adapter_config.json: {name}", "none, as it cannot be merged here", value)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASES):
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


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, without the prefix of their names, which some programs leave out.

    Raises:
        ValueError: a tensor occurs twice, is not of a floating-point dtype, or is not finite.
    """
    tensors: dict[str, Tensor] = {}
    with open_safetensors(path) as file:
        for key in file.keys():
            name = key.removeprefix(_PREFIX)
            if name in tensors:
                raise bad(
                    f"adapter, {name}", "one tensor of that name", f"one with {_PREFIX} before it and one without"
                )
            tensor = tensors[name] = file.get_tensor(key)
            if not tensor.is_floating_point():
                raise bad(f"adapter, {name}", "a floating-point tensor", tensor.dtype)
            if not tensor.float().isfinite().all():
                raise bad(f"adapter, {name}", "finite values", "NaN or Inf")
    return tensors


def _resized(base: Skeleton, tensors: dict[str, Tensor]) -> Skeleton:
    """The base with the vocabulary of the embedding that the adapter has, if it has one.

    Raises:
        ValueError: the model cannot have that vocabulary.
    """
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


def _layers(model: Skeleton, config: PeftConfig) -> nn.Module:
    """Make PEFT's layers over the model, without values.

    Raises:
        ValueError: PEFT refuses the config for this model.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # they are about training; `Adapter.notes` has what is about merging
            return get_peft_model(model.model(), config)
    except Exception as error:
        raise _refused(error) from error


def _assigned(layers: nn.Module, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """Find out which of PEFT's tensors each tensor of the file is: {id of PEFT's: value}.

    PEFT passes over what it has no tensor for, and leaves at its initial values what the file does not have. Here
    either is an error. A file may have tensors of the base too, such as embeddings of another vocabulary.

    Raises:
        ValueError: a tensor is missing or left over, or has another shape.
    """
    state = layers.state_dict(keep_vars=True)
    needed, saved = (
        {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in get_peft_model_state_dict(
                layers, state_dict=state, save_embedding_layers=embeddings
            ).items()
        }
        for embeddings in (False, True)
    )
    own = {id(tensor) for tensor in needed.values()}
    base = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if id(tensor) not in own}
    known = base | saved
    values: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        expected = known.get(name, known.get(f"{name}.weight"))  # of a magnitude there are both names
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
