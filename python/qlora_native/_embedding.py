"""`Embedding4bit`: an embedding whose rows are decoded as they are looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from ._errors import bad, bad_type
from ._layer import QuantizedLayer, zero_weight
from ._weight import QuantizedWeight, check_quantized

__all__ = ["Embedding4bit", "can_be_quantized"]


class Embedding4bit(QuantizedLayer, nn.Embedding):
    """An embedding over a quantized weight [num_embeddings, embedding_dim], for `qlora_native.functional.embedding`.

    An output layer tied to it is `Linear4bit.from_quantized(embedding.quantized_weight)`, over the same tensors.
    What is stored, and how it moves, is as in `Linear4bit`. It is frozen, and one that is made by the constructor is
    zero until a state dict is loaded.

    Its attributes compute_dtype, format and blocksize are those of every QuantizedLayer. A row comes in compute_dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Make an embedding of zeros. `dtype` is its `compute_dtype` (default: torch's default dtype).

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`, of which the keyword arguments are.
        """
        if num_embeddings < 1 or embedding_dim < 1:
            raise bad("num_embeddings, embedding_dim", "numbers above 0", f"{num_embeddings}, {embedding_dim}")
        shape = (num_embeddings, embedding_dim)
        self._set(zero_weight(shape, dtype, device, format, blocksize, double_quant, codebook), padding_idx)

    def _set(self, q: QuantizedWeight, padding_idx: int | None) -> None:
        """Initialize as an embedding that holds `q`. Not through nn.Embedding's constructor, which makes a weight."""
        self._begin(q)
        if padding_idx is not None and not -q.shape[0] <= padding_idx < q.shape[0]:
            raise bad("padding_idx", f"a row of {q.shape[0]}", padding_idx)
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else q.shape[0] + padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Put `q` [num_embeddings, embedding_dim] in the place of the weight, with its format; shares its tensors."""
        self.num_embeddings, self.embedding_dim = q.shape
        super().replace_weight(q)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, padding_idx: int | None = None) -> Embedding4bit:
        """An embedding over `q` [num_embeddings, embedding_dim]; shares its tensors.

        Raises:
            TypeError, ValueError: `q` is no QuantizedWeight of two dimensions; `padding_idx` is none of its rows.
        """
        check_quantized(q, "[num_embeddings, embedding_dim]", 2)
        layer = cls.__new__(cls)
        layer._set(q, padding_idx)
        return layer

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> Embedding4bit:
        """An embedding with the quantized weight of `embedding`. Arguments as `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`; `embedding` is no plain nn.Embedding, or it has a
                `max_norm`, by which it changes its weight when it is used.
        """
        if type(embedding) is not nn.Embedding:
            raise bad_type("embedding", "an nn.Embedding that is not quantized", type(embedding).__name__)
        if embedding.max_norm is not None:
            raise bad("embedding.max_norm", "None", embedding.max_norm)
        q = functional.quantize(embedding.weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, embedding.padding_idx).train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int64 or int32 -> [..., embedding_dim] in compute_dtype."""
        return functional.embedding(ids, self.quantized_weight)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, {self._describe_format()}"


def can_be_quantized(module: nn.Module) -> bool:
    """Whether `module` is an embedding that an Embedding4bit can stand for."""
    return type(module) is nn.Embedding and module.max_norm is None
