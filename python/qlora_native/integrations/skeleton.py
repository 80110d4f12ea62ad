"""`Skeleton`: a model of transformers without weights, which tells what each tensor of a checkpoint is."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from .._errors import FLOAT_DTYPES, bad
from .checkpoints import Checkpoint
from .experts import find_experts
from .transformers import modules_to_quantize

__all__ = ["Skeleton"]


class Skeleton:
    """The modules of a checkpoint's model without weights: which are linear layers, and what the files call them.

    Attributes:
        architecture: the name of the model's class.
        config: the config that transformers makes of config.json.
        dtype: the dtype of the weights in config.json.
        linears: the paths of the layers that are quantized where transformers loads the model (modules_to_quantize).
        unread: what `check_files` has found in the files that transformers does not read: tensors of other versions or
            of parts that the class lacks, and buffers that it computes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Make the model of config.json on the meta device.

        Raises:
            ValueError: it is not a model of transformers, or transformers cannot make it.
        """
        path = checkpoint.folder / "config.json"
        kind = checkpoint.config.get("architectures")
        self.architecture = kind[0] if isinstance(kind, list) and kind and isinstance(kind[0], str) else "none"
        model_class = getattr(transformers, self.architecture, None)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise bad(f"{path}: architectures", "a model class of transformers", self.architecture)
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            layers, names = getattr(config, "num_hidden_layers", 0), sum(map(len, checkpoint.shards.values()))
            if isinstance(layers, int) and layers > names:  # checked before millions of layers are made
                raise bad("num_hidden_layers", f"no more than the {names} tensors of the files", layers)
            with torch.device("meta"):
                self._model = model_class(config)
        except Exception as error:  # transformers raises errors of many types on bad values
            text = " ".join(str(error).split())
            raise bad(str(path), f"the config of a {self.architecture}", f"something else ({text})") from error
        self.config = config
        self.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        if self.dtype not in FLOAT_DTYPES:
            raise bad(f"{path}: dtype", "float32, bfloat16 or float16", _name(self.dtype))
        self.linears = set(modules_to_quantize(self._model))
        self.unread: list[str] = []
        self._state = self._model.state_dict()
        conversions = get_model_conversion_mapping(self._model)
        self._renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self._converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]

    def name_of(self, name: str) -> str:
        """The name in the model of the file's tensor `name`."""
        if name in self._state:
            return name
        return rename_source_key(name, self._renamings, [], self._model.base_model_prefix, self._state)[0]

    def file_names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """{name in the model: name in the file} of the tensors that transformers reads unchanged."""
        names = {self.name_of(name): name for shard in checkpoint.shards.values() for name in shard}
        return {own: name for own, name in names.items() if own in self._state}

    def names_made_of(self, name: str) -> set[str]:
        """The names in the model of what the file's tensor `name` becomes, with others (experts are stacked)."""
        prefix = self._model.base_model_prefix
        own, source = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        for converter in self._converters if source is not None else ():
            if source in converter.source_patterns:
                first, *others = converter.target_patterns
                return {own, *(own.replace(first, other) for other in others)}
        return {own}

    def needed(self, there: set[str]) -> set[str]:
        """The tensors that the files must have. One of several tied ones is enough."""
        tied = self._model.all_tied_weights_keys.items()
        shared = {name for pair in tied if there.intersection(pair) for name in pair}
        return self._reported(self._state.keys() - shared, set())[0]

    def check_files(self, checkpoint: Checkpoint) -> set[str]:
        """Check the tensors of the files, set `unread`, and return the names of the model's tensors that they make.

        Raises:
            ValueError: a tensor is missing, occurs twice, has another shape or a dtype that says that it is quantized,
                or is none of the model.
        """
        file_names: dict[str, str] = {}
        there: set[str] = set()
        others: set[str] = set()
        for name in (name for names in checkpoint.shards.values() for name in names):
            own = self.name_of(name)
            if own in file_names:
                raise bad(str(checkpoint.folder), f"{own} once", f"{file_names[own]} and {name}")
            file_names[own] = name
            if made := self.names_made_of(name) & self._state.keys():
                there.update(made)
                self._check_tensor(checkpoint, name, self._state[min(made)].dtype)
            else:
                others.add(own)
        unexpected = self._reported(set(), others)[1]
        if missing := sorted(self.needed(there) - there):
            more = f", and {len(missing) - 1} more are missing" if missing[1:] else ""
            raise bad(str(checkpoint.folder), f"all tensors of a {self.architecture}", f"no {missing[0]}{more}")
        self.unread = sorted(file_names[own] for own in others.difference(unexpected))
        unknown = [file_names[own] for own in unexpected] + [name for name in self.unread if checkpoint.quantized(name)]
        if unknown:
            raise bad(checkpoint.describe(min(unknown)), f"a tensor that a {self.architecture} has", "another")
        return there

    def _reported(self, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
        """Those of the missing and of the unexpected tensors that transformers would report when it loads the files."""
        computed = {name for name, _ in self._model.named_buffers()}
        found = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected - computed)
        self._model._adjust_missing_and_unexpected_keys(found)
        return found.missing_keys, found.unexpected_keys

    def _check_tensor(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        """Raise ValueError unless the file's tensor `name` has the shape of the model's, and the kind of its `dtype`.

        A quantized tensor is [out, in], also of a Conv1D, whose own weight is [in, out].
        """
        own, shape, stored = self.name_of(name), checkpoint.shape(name), checkpoint.dtype(name)
        if checkpoint.quantized(name) and not own.endswith(".weight"):
            raise bad(name, "experts in 16 bits", "quantized ones, which are converted as a live model only")
        if own in self._state:
            expected = self.shape(own)
            if checkpoint.quantized(name) and isinstance(self.module(own.rpartition(".")[0]), Conv1D):
                expected.reverse()
            if shape != expected:
                raise bad(name, f"the shape {expected}, as config.json says", shape)
        elif checkpoint.quantized(name):
            raise bad(name, f"a weight that a {self.architecture} has", "another, quantized")
        if dtype.is_floating_point:
            fits, kind = stored in FLOAT_DTYPES or stored == dtype, "float32, bfloat16 or float16"
        else:
            fits, kind = not stored.is_floating_point and stored.is_complex == dtype.is_complex, _name(dtype)
        if not fits:
            raise bad(checkpoint.describe(name), kind, f"{_name(stored)}, which has another meaning in the files")

    def note_of_unread(self, done: str) -> list[str]:
        """A sentence about the tensors that transformers does not read, or nothing. `done` is what became of them."""
        if not self.unread:
            return []
        shown = ", ".join(self.unread[:3]) + (", ..." if self.unread[3:] else "")
        return [f"{len(self.unread)} tensors that transformers does not read were {done}: {shown}"]

    def other_linears(self) -> list[str]:
        """The paths of the `nn.Linear` layers that transformers would not give to bitsandbytes, such as lm_head."""
        layers = (name for name, module in self._model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in layers if name not in self.linears]

    def stacks(self) -> dict[str, int]:
        """The experts that transformers keeps as one tensor of three dimensions: {name: elements}."""
        found = ((f"{e.path}.{name}", getattr(e.module, name)) for e in find_experts(self._model) for name in e.names)
        return {name: parameter.numel() for name, parameter in found}

    def names(self) -> set[str]:
        """The names of the model's tensors."""
        return set(self._state)

    def shape(self, name: str) -> list[int]:
        """The shape of the model's tensor `name`."""
        return list(self._state[name].shape)

    def module(self, path: str) -> nn.Module:
        """The module at `path`, without values."""
        return self._model.get_submodule(path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
