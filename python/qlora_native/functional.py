"""Quantize a weight, decode it, and multiply by it with a LoRA adapter inside the same product.

Also readers of weights that other libraries have quantized (`from_gguf` and its like), and what a language model
computes around its products: attention, gated activations, norms, embeddings and the loss.
"""

from ._core.attention import attention
from ._core.elementwise import gated_activation, rms_norm
from ._core.linear import linear, linear_grouped
from ._core.loss import linear_cross_entropy
from ._core.quantize import dequantize, embedding, quantize
from ._core.rotary import rotary_embedding
from ._files.awq import from_awq
from ._files.compressed_tensors import from_compressed_tensors
from ._files.fp8 import from_fp8
from ._files.gguf import from_gguf, gguf_rows
from ._files.gptq import from_gptq

__all__ = [
    "attention",
    "dequantize",
    "embedding",
    "from_awq",
    "from_compressed_tensors",
    "from_fp8",
    "from_gguf",
    "from_gptq",
    "gated_activation",
    "gguf_rows",
    "linear",
    "linear_cross_entropy",
    "linear_grouped",
    "quantize",
    "rms_norm",
    "rotary_embedding",
]
