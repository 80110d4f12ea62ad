"""Merge an adapter that PEFT has saved, tensor by tensor: LoRA and its relatives, LoHa, IA³, trained tokens.

PEFT itself says what an adapter consists of: its layers are made over the model without values, from the adapter's
config, and the file has to have exactly their tensors (_adapter_files.py). What each layer makes of the tensor below it
is a change (_adapter_changes.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._core.versions import require

require("peft")

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._core.errors import bad
from .._core.json import parse_object
from ._adapter_changes import Added, Change, Rows, changes_of
from ._adapter_files import PREFIX, assign, layers_over, peft_config, read_tensors, resized
from ._checkpoints import file_inside
from ._skeleton import Part, Skeleton

# The files of a tokenizer.
TOKENIZER = (
    "tokenizer_config.json tokenizer.json tokenizer.model special_tokens_map.json added_tokens.json "
    "chat_template.jinja vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model"
).split()


class Adapter:
    """An adapter from a folder, over the model that it was trained for.

    Attributes:
        folder: where it is.
        config: what its adapter_config.json has.
        model: the model that it makes of the base: with its vocabulary, and with the ties that it leaves.
        changes: {name of a tensor of the model: its changes, each with the name that its layer has for the tensor};
            tied tensors have each other's.
        replaced: {name of a tensor of the model: its new value}, from `modules_to_save`, trained biases and resized
            embeddings.
        names: those of both.
        tokenizer: the files of the tokenizer that was saved with the adapter, as trainers do. It may have new tokens.
        notes: sentences for a reader of the merged files.
    """

    def __init__(self, folder: str | Path, base: Skeleton) -> None:
        """Read and check the adapter in `folder` of the model `base`."""
        folder = Path(folder)
        names = "adapter_config.json", "adapter_model.safetensors"
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: expected a file that PEFT saved, found none")
        config, weights = (file_inside(folder, name) for name in names)
        self.folder = folder
        self.config: dict[str, Any] = parse_object(config.read_bytes(), str(config))
        known = peft_config(self.config)
        tensors = read_tensors(weights)
        self.model = resized(base, tensors)
        layers = layers_over(self.model, known)
        self._collect(layers, assign(layers, tensors, self.model.input_embeddings() is not None))
        for name in sorted(self.model.names() - set(self.replaced)):
            if self.model.shape(name) != base.shape(name):
                raise bad("adapter", "all tensors that have a row for each token of its vocabulary", f"no {name}")
        there = (folder / "tokenizer_config.json").is_file()
        self.tokenizer = [file_inside(folder, name) for name in TOKENIZER if there and (folder / name).is_file()]
        self.notes: list[str] = []
        self._tie(base)

    def _collect(self, layers: nn.Module, values: dict[int, Tensor]) -> None:
        """Find what becomes of each tensor. All names of a tied tensor have the changes of the layers over either."""
        changes: dict[int, list[tuple[str, Change]]] = {}
        for name, layer in layers.named_modules():
            if isinstance(layer, BaseTunerLayer):
                path = name.removeprefix(PREFIX).replace(".base_layer", "").removesuffix(".token_adapter")
                for parameter, change in changes_of(path, layer, lambda tensor: values[id(tensor)]).items():
                    below = getattr(layer.get_base_layer(), parameter)
                    changes.setdefault(id(below), []).append((f"{path}.{parameter}", change))
        merged = layers.unload().state_dict(keep_vars=True)
        self._ids = {name: id(tensor) for name, tensor in merged.items()}  # which tied tensors share
        if left := sorted(self.model.names() - self._ids.keys()):
            raise bad("adapter", "a model that PEFT can merge", f"{left[0]}, which PEFT leaves under several layers")
        self.changes = {name: changes[key] for name, key in self._ids.items() if key in changes}
        self.replaced = {name: values[key] for name, key in self._ids.items() if key in values}
        self.names = {*self.changes, *self.replaced}

    def _tie(self, base: Skeleton) -> None:
        """Leave the ties that PEFT leaves, which unties a tensor by replacing it.

        Raises:
            ValueError: transformers ties them whatever config.json says.
        """
        for name in sorted(self.names):
            apart = sorted(other for other in base.tied(name) if not self._shared(name, other))
            if apart:
                self.model = self.model.changed(tied=False)
                self.notes.append(f"{name} and {apart[0]} are no longer tied: each has values of its own")
                break
        for name in self._ids:
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
        return self._ids[name] == self._ids[other]

    def check_parts(self, parts: list[tuple[str, Part]]) -> None:
        """Raise ValueError unless the adapter can be merged into the tensors of the files that are parts of others."""
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
        """
        start, changes = self.replaced.get(name, tensor), self.changes.get(name, [])
        merged = _finite(name, _applied(start, [change for _, change in changes]))
        own = [change for of, change in changes if of == name]
        return merged, merged if len(own) == len(changes) else _applied(start, own)

    def merged_part(self, part: Part, tensor: Tensor) -> Tensor:
        """Merge the adapter into a tensor of the base's files that is a part of one of the model, in fp32."""
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
