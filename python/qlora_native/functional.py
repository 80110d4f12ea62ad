"""Quantize a weight, decode it, and multiply by it with a LoRA adapter inside the same product.

Also what a language model computes around its products: attention, gated activations, norms, embeddings and the loss.
"""

from ._core.attention import attention
from ._core.elementwise import gated_activation, rms_norm
from ._core.linear import linear, linear_grouped
from ._core.loss import linear_cross_entropy
from ._core.quantize import dequantize, embedding, quantize
from ._core.rotary import rotary_embedding

__all__ = [
    "attention",
    "dequantize",
    "embedding",
    "gated_activation",
    "linear",
    "linear_cross_entropy",
    "linear_grouped",
    "quantize",
    "rms_norm",
    "rotary_embedding",
]
