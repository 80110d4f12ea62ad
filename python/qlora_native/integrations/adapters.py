"""A LoRA adapter as PEFT saves it, for merging without PEFT: W + scaling * B A, and DoRA's magnitude."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .._errors import bad

__all__ = ["Adapter"]

# Fields of a LoraConfig that mean another product than W + scaling * B A where they are set.
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
    """What PEFT saved in a folder.

    Attributes:
        layers: {path of a layer: its parts by name}, paths as in the base model.
        replaced: {name of a tensor: the tensor that takes its place} (`modules_to_save`, trained biases).
    """

    def __init__(self, folder: str | Path) -> None:
        """Read and check it.

        Raises:
            FileNotFoundError: adapter_config.json or adapter_model.safetensors is missing.
            ValueError: it is no LoRA adapter, or of a variant that has no merged weight here.
        """
        folder = Path(folder)
        paths = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: expected a file that PEFT saved, found none")
        self.config: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8"))
        if self.config.get("peft_type") != "LORA":
            raise bad("adapter_config.json: peft_type", "LORA", self.config.get("peft_type"))
        for name in _OTHER_PRODUCTS:
            if self.config.get(name):
                raise bad(f"adapter_config.json: {name}", "none, as it cannot be merged here", self.config[name])
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASES):
            raise bad("adapter_config.json: init_lora_weights", "one that leaves the base weight as it is", start)
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.replaced: dict[str, Tensor] = {}
        with safe_open(paths[1], framework="pt") as file:
            for key in file.keys():
                self._add(key, file.get_tensor(key))

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
        """Names of the base's tensors that it changes."""
        biases = {f"{path}.bias" for path, parts in self.layers.items() if "lora_B.bias" in parts}
        return {f"{path}.weight" for path in self.layers} | biases | set(self.replaced)

    def scaling(self, path: str) -> float:
        """alpha / rank of the layer, or alpha / sqrt(rank) for rsLoRA."""
        parts = self.layers[path]
        rank = (parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"]).shape[0]
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        # The first pattern that the end of the path matches (PEFT, get_pattern_key).
        found = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
        alpha = found[0] if found else self.config["lora_alpha"]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def merged_weight(self, path: str, weight: Tensor) -> Tensor:
        """`weight` [out, in] of the layer `path` with the adapter in it, fp32.

        Raises:
            ValueError: the adapter's shapes do not fit it.
        """
        parts = self.layers[path]
        if "lora_embedding_A" in parts:
            left, right = parts["lora_embedding_A"].t(), parts["lora_embedding_B"].t()
        else:
            left, right = parts["lora_B"], parts["lora_A"]
        if weight.shape != (left.shape[0], right.shape[1]):
            raise bad(f"adapter, {path}", f"the weight's shape {list(weight.shape)}", [left.shape[0], right.shape[1]])
        merged = torch.addmm(weight.float(), left.float(), right.float(), alpha=self.scaling(path))
        if "lora_magnitude_vector" in parts:
            magnitude = parts["lora_magnitude_vector"].float()
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged

    def merged_bias(self, path: str, bias: Tensor) -> Tensor:
        """`bias` of the layer `path` with `lora_bias` in it, fp32."""
        added = self.layers[path].get("lora_B.bias")
        return bias if added is None else bias.float() + self.scaling(path) * added.float()
