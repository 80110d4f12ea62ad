"""`Embedding4bit`: an embedding whose rows are decoded as they are looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from .._core.errors import bad, bad_type
from .._core.weight import QuantizedWeight, check_quantized
from .base import QuantizedLayer, zero_weight


class Embedding4bit(QuantizedLayer, nn.Embedding):
    """An embedding over a quantized weight [num_embeddings, embedding_dim], for `qlora_native.functional.embedding`.

    An output layer tied to it is `Linear4bit.from_quantized(embedding.quantized_weight)`, over the same tensors.
    It stores its weight and moves between devices as `Linear4bit` does. The weight is frozen. A layer made by the
    constructor is zero until a state dict is loaded.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as in `nn.Embedding`.
        dtype: the dtype of the rows that it returns.
        format, blocksize: as in `qlora_native.quantize`.
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
        """Make an embedding of zeros.

        Args:
            num_embeddings, embedding_dim: the rows and columns of the weight, each at least 1.
            padding_idx: as in `nn.Embedding`: a row, or None. It is only remembered, because nothing is trained.
            device: where the weight is stored; None is torch's default device.
            dtype: of the rows that it returns: fp32, bf16 or fp16; None is torch's default dtype.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        if num_embeddings < 1 or embedding_dim < 1:
            raise bad("num_embeddings, embedding_dim", "numbers above 0", f"{num_embeddings}, {embedding_dim}")
        shape = (num_embeddings, embedding_dim)
        self._set(zero_weight(shape, dtype, device, format, blocksize, double_quant, codebook), padding_idx)

    def _set(self, q: QuantizedWeight, padding_idx: int | None) -> None:
        """Initialize the embedding over `q`. nn.Embedding's constructor is not called: it would make a weight."""
        self._begin(q)
        if padding_idx is not None and not -q.shape[0] <= padding_idx < q.shape[0]:
            raise bad("padding_idx", f"a row of {q.shape[0]}", padding_idx)
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else q.shape[0] + padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Replace the weight, its format, blocksize and dtype by those of `q`, whose tensors are shared, not copied.

        Args:
            q: a weight [num_embeddings, embedding_dim].
        """
        self.num_embeddings, self.embedding_dim = q.shape
        super().replace_weight(q)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, padding_idx: int | None = None) -> Embedding4bit:
        """Make an embedding over a quantized weight, whose tensors are shared, not copied.

        Args:
            q: a weight [num_embeddings, embedding_dim].
            padding_idx: as in `nn.Embedding`: a row, or None.

        Returns:
            The embedding, on the device of `q`.

        Raises:
            TypeError: `q` is not a QuantizedWeight.
            ValueError: `q` does not have two dimensions, or `padding_idx` is not one of its rows.
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
        """Quantize an embedding.

        Args:
            embedding: a plain `nn.Embedding` without `max_norm`, which would change the weight at each look-up.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Returns:
            A new embedding on the same device, in the same training mode.

        Raises:
            TypeError: `embedding` is not a plain `nn.Embedding`.
            TypeError, ValueError: it has a `max_norm`, or `qlora_native.quantize` refuses its weight or an argument.
        """
        if type(embedding) is not nn.Embedding:
            raise bad_type("embedding", "an nn.Embedding that is not quantized", type(embedding).__name__)
        if embedding.max_norm is not None:
            raise bad("embedding.max_norm", "None", embedding.max_norm)
        q = functional.quantize(embedding.weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, embedding.padding_idx).train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows of the weight.

        Args:
            ids: int64 or int32 [...], the rows.

        Returns:
            [..., embedding_dim] in the layer's dtype.
        """
        return functional.embedding(ids, self.quantized_weight)

    def extra_repr(self) -> str:
        """The text that `print` shows between the parentheses."""
        return f"{super().extra_repr()}, {self._describe_format()}"


def can_be_quantized(module: nn.Module) -> bool:
    """Whether an Embedding4bit can replace `module`."""
    return type(module) is nn.Embedding and module.max_norm is None
