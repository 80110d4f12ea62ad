"""What an adapter is exported over, the folder of a model or a GGUF file, and where a GGUF file has its tensors."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Protocol

from .._core.versions import require

require("transformers")
require("gguf")

import transformers
from torch import Tensor

from .._core.errors import bad
from .._files.gguf_file import GGUFFile, GGUFTensor
from ..integrations.transformers._gguf_weights import mapping_of, values_of
from ..integrations.transformers._kept import CannotBeKept
from ._checkpoints import Checkpoint
from ._gguf_files import Layout
from ._skeleton import Skeleton


class Base(Protocol):
    """The model that an adapter was trained over.

    Attributes:
        skeleton: the model without its values.
        architecture: the value of general.architecture.
    """

    skeleton: Skeleton
    architecture: str

    def factors(self, own: str, lora_a: Tensor, lora_b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The low-rank change of the model's tensor `own` as changes of the tensors that a GGUF file has of it.

        Args:
            own: the model's name of a weight, or of a stack [E, ...] of experts.
            lora_a: [..., rank, columns of the weight].
            lora_b: [..., rows of the weight, rank].

        Returns:
            {name in the file: (A, B)}, with rows and columns in the order of the file.
        """

    def value(self, own: str) -> Tensor | None:
        """The base's own value of the model's tensor `own`, or of one that is tied to it, or None."""


class FolderBase:
    """A `Base` in the folder of a checkpoint, of which a GGUF file can be exported."""

    def __init__(self, path: str | Path) -> None:
        """Read the config, and check the names and shapes of the tensors."""
        self._checkpoint = Checkpoint(path)
        skeleton = Skeleton(self._checkpoint)
        skeleton.check_files(self._checkpoint)
        self._layout = Layout(skeleton.as_loaded(self._checkpoint))
        self.skeleton, self.architecture = self._layout.skeleton, self._layout.architecture.name

    def factors(self, own: str, lora_a: Tensor, lora_b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Base`."""
        return {self._layout.name_of(own): (lora_a, self._layout.reordered(own, lora_b))}

    def value(self, own: str) -> Tensor | None:
        """See `Base`."""
        names = self.skeleton.file_names(self._checkpoint)
        found = [names[other] for other in self.skeleton.tied(own) if other in names]
        return self._checkpoint.dense(found[0]) if found else None


class FileBase:
    """A `Base` in a GGUF file, of any causal language model that transformers reads from one."""

    def __init__(self, path: str | Path) -> None:
        """Read the keys of the file and its table of tensors."""
        self._file = GGUFFile(path)
        self.architecture: str = self._file.values["general.architecture"]
        folder, name = Path(path).parent, Path(path).name
        try:
            config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
            layers, tensors = config.get_text_config().num_hidden_layers, len(self._file.tensors)
            if layers > tensors:  # checked before millions of layers are made
                raise bad("block_count", f"no more than the {tensors} tensors of the file", layers)
            model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            self.skeleton = Skeleton.of_config(model_class, config)
        except Exception as error:  # transformers raises errors of many types on bad values
            text = " ".join(str(error).split())
            raise bad(str(path), "a causal language model that transformers knows", f"another ({text})") from error
        self._mapping = mapping_of(self._file, self.skeleton.model(), self.skeleton.dtype)
        self._groups = self._mapping.groups()

    def factors(self, own: str, lora_a: Tensor, lora_b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Base`. Tensors that are joined in the model, as gates are with what they gate, have the same A."""
        tensors = self._tensors(own)
        try:
            order, columns = self._mapping.order(own, tensors)
        except CannotBeKept as error:
            raise bad(f"adapter, {own}", "a weight whose rows the file has", str(error)) from None
        if self.skeleton.is_transposed(own):  # the file has [out, in]
            lora_a, lora_b = lora_b.t(), lora_a.t()
        rows = lora_b.new_empty(len(order), lora_b.shape[-1])
        rows[order] = lora_b.flatten(0, -2)
        if columns is not None:
            lora_a = lora_a[..., columns]
        parts = rows.split([tensor.rows for tensor in tensors])
        return {t.name: (lora_a, part.view(*t.shape[:-1], -1)) for t, part in zip(tensors, parts, strict=True)}

    def value(self, own: str) -> Tensor | None:
        """See `Base`."""
        found = [self._groups[other] for other in self.skeleton.tied(own) if other in self._groups]
        return values_of(self._file, found[0][0]) if found and len(found[0]) == 1 else None

    def _tensors(self, own: str) -> list[GGUFTensor]:
        """The tensors that make a weight: together they have its rows, and each has its columns."""
        tensors = self._groups.get(own)
        if tensors is None:
            raise bad(f"adapter, {own}", f"a weight that {self._file.path} has", "another")
        *leading, rows, columns = self.skeleton.shape(own)
        if self.skeleton.is_transposed(own):
            rows, columns = columns, rows
        expected = [*leading, rows, columns]
        shapes = [[*map(int, tensor.shape)] for tensor in tensors]
        fits = all(shape[:-2] == leading and shape[-1] == columns for shape in shapes)
        if not fits or sum(prod(shape[:-1]) for shape in shapes) != prod(expected[:-1]):
            got = " and ".join(map(str, shapes))
            raise bad(f"{self._file.path}: {tensors[0].name}", f"{expected}, as the model's {own} has", got)
        return tensors


def base_of(path: str | Path) -> Base:
    """The base in a GGUF file, in a folder, or of an id in the Hugging Face cache."""
    return FileBase(path) if Path(path).is_file() else FolderBase(path)
