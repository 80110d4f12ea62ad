"""The module in 16 bits that a quantized layer stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...nn import Embedding4bit, Linear4bit
from ._embeddings import ScaledEmbedding4bit


def dense_of(layer: Linear4bit | Embedding4bit) -> nn.Module:
    """The module that `layer` stands for, whose weight is on the meta device, with the layer's own bias and mode."""
    if isinstance(layer, Embedding4bit):
        dense: Any = _embedding(layer)
    else:
        with torch.device("meta"):
            sizes = (layer.in_features, layer.out_features)
            dense = Conv1D(*reversed(sizes)) if layer.transposed_source else nn.Linear(*sizes, bias=False)
        dense.bias = layer.bias
    dense.weight = nn.Parameter(dense.weight.to(layer.dtype))
    return dense.train(layer.training)


def _embedding(layer: Embedding4bit) -> nn.Embedding:
    """The module that an embedding stands for."""
    sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
    if not isinstance(layer, ScaledEmbedding4bit):
        return nn.Embedding(*sizes, device="meta")
    scale = layer.scales[torch.float32]
    with torch.device("meta"):
        dense = layer.plain(*sizes, embed_scale=scale)
    dense.embed_scale = torch.tensor(scale, device=layer.absmax.device)
    return dense
