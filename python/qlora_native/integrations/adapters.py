"""Read a LoRA adapter that PEFT has saved, and merge it without PEFT: W + scaling * B A, with DoRA's magnitude."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import bad, is_finite_number
from .._json import parse_object
from .checkpoints import file_inside, open_safetensors

__all__ = ["Adapter"]

# Fields of a LoraConfig with which the layer computes something other than W + scaling * B A.
_OTHER_PRODUCTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
# Values of init_lora_weights with which PEFT changed the base weight before it trained.
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")
_PART = re.compile(r"^(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?$")


class Adapter:
    """A LoRA adapter from a folder.

    Attributes:
        layers: {path of a layer in the base model: {name of a part: tensor}}.
        replaced: {name of a tensor of the base: its new value}, from `modules_to_save` and trained biases.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read and check the adapter in `folder`.

        Raises:
            FileNotFoundError: adapter_config.json or adapter_model.safetensors is missing.
            ValueError: the folder has no LoRA adapter, a damaged one, or a variant that cannot be merged here.
        """
        folder = Path(folder)
        names = "adapter_config.json", "adapter_model.safetensors"
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: expected a file that PEFT saved, found none")
        config, weights = (file_inside(folder, name) for name in names)
        self.config: dict[str, Any] = parse_object(config.read_bytes(), str(config))
        if self.config.get("peft_type") != "LORA":
            raise bad("adapter_config.json: peft_type", "LORA", self.config.get("peft_type"))
        for name in _OTHER_PRODUCTS:
            if self.config.get(name):
                raise bad(f"adapter_config.json: {name}", "none, as it cannot be merged here", self.config[name])
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASES):
            raise bad("adapter_config.json: init_lora_weights", "one that leaves the base weight as it is", start)
        self._alpha, self._alphas = _alphas(self.config)
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.replaced: dict[str, Tensor] = {}
        with open_safetensors(weights) as file:
            for key in file.keys():
                self._add(key, file.get_tensor(key))
        for path, parts in self.layers.items():
            _check_parts(path, parts)

    def _add(self, key: str, tensor: Tensor) -> None:
        name = key.removeprefix("base_model.model.")
        match = _PART.match(name)
        if match is None:
            if "lora_" in name:
                raise bad("adapter_model.safetensors", "keys of LoRA layers", key)
            self.replaced[name.replace(".base_layer.", ".")] = tensor
            return
        path, part, suffix = match.groups()
        self.layers.setdefault(path, {})[part if suffix != ".bias" else f"{part}.bias"] = tensor

    def names(self) -> set[str]:
        """The names of the base's tensors that the adapter changes."""
        biases = {f"{path}.bias" for path, parts in self.layers.items() if "lora_B.bias" in parts}
        return {f"{path}.weight" for path in self.layers} | biases | set(self.replaced)

    def check_names(self, there: set[str]) -> None:
        """Raise ValueError unless `there` has the names of all tensors that the adapter changes."""
        if missing := sorted(self.names() - there):
            raise bad("adapter", "changes to tensors that the base has", f"{missing[0]}, which it has not")

    def scaling(self, path: str) -> float:
        """The scaling of a layer: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        parts = self.layers[path]
        rank = (parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"]).shape[0]
        # PEFT takes the first pattern that matches the end of the path (its get_pattern_key).
        alpha = next((value for pattern, value in self._alphas if pattern.match(path)), self._alpha)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def factors(self, path: str, shape: list[int]) -> tuple[Tensor, Tensor]:
        """The factors of a layer's change: left [out, rank] and right [rank, in], which are B and A of a linear layer.

        Raises:
            ValueError: their product does not have `shape`, the shape of the layer's weight.
        """
        parts = self.layers[path]
        if "lora_embedding_A" in parts:
            left, right = parts["lora_embedding_A"].t(), parts["lora_embedding_B"].t()
        else:
            left, right = parts["lora_B"], parts["lora_A"]
        if shape != [left.shape[0], right.shape[1]]:
            raise bad(f"adapter, {path}", f"the weight's shape {shape}", [left.shape[0], right.shape[1]])
        return left, right

    def merged_weight(self, path: str, weight: Tensor) -> Tensor:
        """Merge the adapter into `weight` [out, in] of the layer `path`, in fp32.

        Raises:
            ValueError: the shapes of the adapter do not fit the weight.
        """
        parts = self.layers[path]
        left, right = self.factors(path, list(weight.shape))
        merged = torch.addmm(weight.float(), left.float(), right.float(), alpha=self.scaling(path))
        if "lora_magnitude_vector" in parts:
            magnitude = parts["lora_magnitude_vector"].float()
            if magnitude.shape != merged.shape[:1]:
                raise bad(f"adapter, {path}: lora_magnitude_vector", f"[{len(merged)}]", list(magnitude.shape))
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        if not merged.isfinite().all():
            raise bad(f"adapter, {path}", "a merged weight of finite values", "NaN or Inf")
        return merged

    def merged_bias(self, path: str, bias: Tensor) -> Tensor:
        """Add `lora_bias` to the bias of the layer `path`, in fp32."""
        added = self.layers[path].get("lora_B.bias")
        if added is None:
            return bias
        if added.shape != bias.shape:
            raise bad(f"adapter, {path}: lora_B.bias", f"the bias's shape {list(bias.shape)}", list(added.shape))
        return bias.float() + self.scaling(path) * added.float()


def _alphas(config: dict[str, Any]) -> tuple[float, list[tuple[re.Pattern[str], float]]]:
    """lora_alpha, and a list of (pattern of paths, alpha) for the layers that have another."""

    def number(name: str, value: Any) -> float:
        if not is_finite_number(value):
            raise bad(f"adapter_config.json: {name}", "a finite number", repr(value))
        return value

    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise bad("adapter_config.json: alpha_pattern", "an object", type(patterns).__name__)
    alphas = []
    for pattern, alpha in patterns.items():
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise bad("adapter_config.json: alpha_pattern", "regular expressions", f"{pattern!r} ({error})") from None
        alphas.append((compiled, number(f"alpha_pattern, {pattern}", alpha)))
    return number("lora_alpha", config.get("lora_alpha")), alphas


def _check_parts(path: str, parts: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors of a layer make up one adapter."""
    pair = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    for name in pair:
        if name not in parts:
            raise bad(f"adapter, {path}", f"{pair[0]} and {pair[1]}", f"no {name}")
        if not parts[name].is_floating_point() or parts[name].dim() != 2 or 0 in parts[name].shape:
            got = f"{parts[name].dtype} {list(parts[name].shape)}"
            raise bad(f"adapter, {path}: {name}", "a floating-point matrix", got)
    a, b = (parts[name] for name in pair)
    if a.shape[0] != b.shape[1]:
        raise bad(f"adapter, {path}: {pair[1]}", f"the rank {a.shape[0]} of {pair[0]}", b.shape[1])
