"""`Skeleton`: a model of transformers without weights, which tells what each tensor of a checkpoint is."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key
from transformers.pytorch_utils import Conv1D

from .._core.errors import FLOAT_DTYPES, bad, dtype_name
from ..integrations.transformers._experts import find_experts
from ..integrations.transformers._quantizer import modules_to_quantize
from ._checkpoints import Checkpoint


@dataclass(frozen=True)
class Part:
    """How a tensor of the files is a part of a tensor of the model, as the weight of one expert is of a stack.

    Attributes:
        own: the name of the model's tensor.
        expert: the index of the part in the first dimension, or None if the model's tensor is not a stack.
        source: the pattern of this tensor among those that make up the model's.
        converter: transformers' conversion of the files' tensors.
        model: the model, without values.
    """

    own: str
    expert: int | None
    source: str
    converter: WeightConverter
    model: nn.Module

    def of(self, tensor: Tensor) -> Tensor:
        """Take this part out of a value of the model's tensor, or of the one expert of a stack that has it."""
        try:
            undo = self.converter.reverse_transform()
            parts: dict[str, Any] = {undo.source_patterns[0]: [tensor if self.expert is None else tensor[None]]}
            for operation in undo.operations:
                parts = operation.convert(
                    parts,
                    source_patterns=undo.source_patterns,
                    target_patterns=undo.target_patterns,
                    full_layer_name=self.own,
                    model=self.model,
                    config=self.model.config,
                )
            target = undo.target_patterns[self.converter.source_patterns.index(self.source)]
            part = parts[target.replace("*", "0")]
        except (NotImplementedError, KeyError, ValueError) as error:
            raise bad(self.own, "a tensor whose conversion can be undone", f"{self.source} ({error})") from None
        return part[0] if isinstance(part, list) else part


def assembled(parts: list[tuple[Part, Tensor]]) -> Tensor:
    """Make a tensor of the model of the values of all its parts, as transformers does when it loads the files."""
    first = parts[0][0]
    converter = copy.deepcopy(first.converter)
    for part, tensor in sorted(parts, key=lambda each: each[0].expert or 0):
        converter.add_tensor(part.own, part.source, part.source, tensor)
    expected = list(first.model.get_parameter(first.own).shape)
    try:
        (made,) = converter.convert(first.own, model=first.model, config=first.model.config).values()
    except RuntimeError as error:
        raise bad(first.own, f"parts of a tensor {expected}", f"others ({error})") from None
    made = made[0] if isinstance(made, list) else made
    if list(made.shape) != expected:
        raise bad(first.own, f"parts of a tensor {expected}", f"parts of one {list(made.shape)}")
    return made


class Skeleton:
    """The modules of a checkpoint's model without weights: which are linear layers, and what the files call them.

    Attributes:
        architecture: the name of the model's class.
        config: the config that transformers makes of config.json.
        dtype: the dtype of the weights in config.json.
        linears: the paths of the layers that are quantized where transformers loads the model (modules_to_quantize).
        dense: those of the layers like these that the files keep in 16 bits beside others in 4.
        unread: what `check_files` has found in the files that transformers does not read: tensors of other versions or
            of parts that the class lacks, and buffers that it computes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Make the model of config.json on the meta device."""
        path = checkpoint.folder / "config.json"
        self._json = checkpoint.config
        kind = self._json.get("architectures")
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
            self.dense: set[str] = set()
            self._make(model_class, config)
        except Exception as error:  # transformers raises errors of many types on bad values
            text = " ".join(str(error).split())
            raise bad(str(path), f"the config of a {self.architecture}", f"something else ({text})") from error
        if self.dtype not in FLOAT_DTYPES:
            raise bad(f"{path}: dtype", "float32, bfloat16 or float16", dtype_name(self.dtype))
        files = self.file_names(checkpoint)
        if any(map(checkpoint.quantized, files.values())):
            self.dense = {path for path in self.linears if not checkpoint.quantized(files.get(f"{path}.weight", ""))}
            self.linears -= self.dense
        self.unread: list[str] = []

    @classmethod
    def of_config(cls, model_class: type[nn.Module], config: Any) -> Skeleton:
        """The model of a configuration that does not come from a folder."""
        made = cls.__new__(cls)
        made._json, made.architecture = config.to_dict(), model_class.__name__
        made.dense, made.unread = set(), []
        made._make(model_class, config)
        return made

    def _make(self, model_class: type[nn.Module], config: Any) -> None:
        with torch.device("meta"):
            self._model = model_class(config)
        self.config = config
        self.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.linears = set(modules_to_quantize(self._model)) - self.dense
        self._state = self._model.state_dict()
        conversions = get_model_conversion_mapping(self._model)
        self._renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self._converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]

    def changed(self, vocab_size: int | None = None, tied: bool | None = None) -> Skeleton:
        """The model with another `vocab_size` or `tie_word_embeddings` in its config.json."""
        made = copy.copy(self)
        made._json = self.json
        text = made._json.get("text_config")
        inner = text if isinstance(text, dict) else made._json
        for name, value, place in (("vocab_size", vocab_size, inner), ("tie_word_embeddings", tied, made._json)):
            for part in (made._json, inner) if value is not None else ():
                if part is place or name in part:
                    part[name] = value
        json = {name: value for name, value in made._json.items() if name != "quantization_config"}
        made._make(type(self._model), type(self.config).from_dict(json))
        return made

    @property
    def json(self) -> dict[str, Any]:
        """A copy of what config.json has."""
        return copy.deepcopy(self._json)

    def model(self) -> nn.Module:
        """A copy of the model, without values, that may be changed."""
        return copy.deepcopy(self._model)

    def without_values(self) -> nn.Module:
        """A new model: its parameters are on the meta device, and its buffers have their values."""
        with parameters_on_meta():
            return type(self._model)._from_config(self.config, dtype=self.dtype).eval()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which transformers loads the model's tensor `name`, some of which it keeps in fp32."""
        plan = self._model._get_dtype_plan(self.dtype).items()
        return next((dtype for part, dtype in plan if re.search(part.replace("*", ".*"), name)), self.dtype)

    def name_of(self, name: str) -> str:
        """The name in the model of the file's tensor `name`."""
        if name in self._state:
            return name
        return rename_source_key(name, self._renamings, [], self._model.base_model_prefix, self._state)[0]

    def file_names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """{name in the model: name in the file} of the tensors that transformers reads unchanged."""
        names = {self.name_of(name): name for shard in checkpoint.shards.values() for name in shard}
        return {own: name for own, name in names.items() if own in self._state}

    def sources(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        """{name in the model: names in the files} of the tensors that are read unchanged, or made of parts."""
        found: dict[str, list[str]] = {}
        for name in (name for shard in checkpoint.shards.values() for name in shard):
            part = self.part_of(name)
            found.setdefault(self.name_of(name) if part is None else part.own, []).append(name)
        return {own: names for own, names in found.items() if own in self._state}

    def names_made_of(self, name: str) -> set[str]:
        """The names in the model of what the file's tensor `name` becomes, with others (experts are stacked)."""
        prefix = self._model.base_model_prefix
        own, source = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        for converter in self._converters if source is not None else ():
            if source in converter.source_patterns:
                first, *others = converter.target_patterns
                return {own, *(own.replace(first, other) for other in others)}
        return {own}

    def part_of(self, name: str) -> Part | None:
        """What the file's tensor `name` is a part of; None if the model has it as it is, or makes several of it."""
        prefix = self._model.base_model_prefix
        own, source = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        converter = next((c for c in self._converters if source in c.source_patterns), None)
        if name in self._state or converter is None or len(converter.target_patterns) != 1:
            return None
        index = re.search(source.replace("*.", r"(\d+)\."), apply_renamings(name, self._renamings))
        return Part(
            own, int(index[1]) if "*." in source and index is not None else None, source, converter, self._model
        )

    def tied(self, name: str) -> set[str]:
        """The names of all tensors that are tied to the model's tensor `name`, with its own."""
        ties = self._model.all_tied_weights_keys
        source = ties.get(name, name)
        return {name, source, *(target for target, of in ties.items() if of == source)}

    def as_loaded(self, checkpoint: Checkpoint) -> Skeleton:
        """The model with the ties that transformers makes: none if the files have both tensors, and these differ."""
        files = self.file_names(checkpoint)
        for name, source in self._model.all_tied_weights_keys.items():
            if name in files and source in files:
                first, second = (checkpoint.dense(files[own]) for own in (name, source))
                if not torch.equal(first, second):
                    return self.changed(tied=False)
        return self

    def input_embeddings(self) -> str | None:
        """The name of the weight of the embedding, or None if the model has none."""
        try:
            embedding = self._model.get_input_embeddings()
        except NotImplementedError:
            return None
        return next((f"{name}.weight" for name, module in self._model.named_modules() if module is embedding), None)

    def needed(self, there: set[str]) -> set[str]:
        """The tensors that the files must have. One of several tied ones is enough."""
        tied = self._model.all_tied_weights_keys.items()
        shared = {name for pair in tied if there.intersection(pair) for name in pair}
        return self._reported(self._state.keys() - shared, set())[0]

    def check_files(self, checkpoint: Checkpoint) -> set[str]:
        """Check the tensors of the files, set `unread`, and return the names of the model's tensors that they make."""
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
        if missing := sorted(self.needed(there) - there):
            more = f", and {len(missing) - 1} more are missing" if missing[1:] else ""
            raise bad(str(checkpoint.folder), f"all tensors of a {self.architecture}", f"no {missing[0]}{more}")
        reported = {file_names[own] for own in self._reported(set(), others)[1]}
        unread = {file_names[own] for own in others}
        self.unread = sorted(unread - _belonging(reported, set(file_names.values()) - unread))
        unknown = unread.difference(self.unread) | {name for name in self.unread if checkpoint.quantized(name)}
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
            if checkpoint.quantized(name) and self.is_transposed(own):
                expected.reverse()
            if shape != expected:
                raise bad(name, f"the shape {expected}, as config.json says", shape)
        elif checkpoint.quantized(name):
            raise bad(name, f"a weight that a {self.architecture} has", "another, quantized")
        if dtype.is_floating_point:
            fits, kind = stored in FLOAT_DTYPES or stored == dtype, "float32, bfloat16 or float16"
        else:
            fits, kind = not stored.is_floating_point and stored.is_complex == dtype.is_complex, dtype_name(dtype)
        if not fits:
            raise bad(checkpoint.describe(name), kind, f"{dtype_name(stored)}, which has another meaning in the files")

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

    def is_transposed(self, name: str) -> bool:
        """Whether the model's tensor `name`, if it has one, is the weight [in, out] of a Conv1D."""
        path = name.rpartition(".")[0]
        return name in self._state and isinstance(self.module(path), Conv1D) and self._state[name].dim() == 2

    def module(self, path: str) -> nn.Module:
        """The module at `path`, without values."""
        return self._model.get_submodule(path)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters are on the meta device, and whose buffers have their values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _belonging(names: set[str], tensors: set[str]) -> set[str]:
    """Those of the `names` that say something of one of the other `tensors` of the files, as scales do.

    Such a name begins with that of a tensor, or with the path of a module that has tensors and no module below it that
    has: `q_proj.weight_scale`, `q_proj.bias`, `experts.down_proj_scales`. Other names are of parts that the model's
    class lacks, such as another head.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    leaves = owners - {path[:end] for path in owners for end in _ends(path, ".")}
    return {
        name
        for name in names
        if any(name[:end] in tensors for end in _ends(name, "._"))
        or any(name[:end] in leaves for end in _ends(name, "."))
    }


def _ends(name: str, separators: str) -> list[int]:
    """Where the beginnings of a name end, each before a separator."""
    return [end for end, character in enumerate(name) if character in separators]
