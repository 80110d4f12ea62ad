"""QLoRA fine-tuning in native code: 4-bit weights, low-rank adapters, one fused product.

    import qlora_native as qn

    q = qn.quantize(weight)                                      # NF4 in blocks of 64, scales double-quantized
    y = qn.linear(x, q, lora_a=a, lora_b=b, lora_scaling=2.0)    # W stays in 4 bits, forward and backward
    qn.nn.quantize_model(model)                                  # every nn.Linear but lm_head, in place
    qn.calibrate(model, batches)                                 # the same, with less error on text of that kind
    qn.fuse(model)                                               # attention, norms and the loss as one op each
    qn.optim.AdamW8bit(parameters, lr=2e-4)                      # AdamW with 8-bit moments

`qlora_native.integrations` is for transformers, PEFT and bitsandbytes, and `qlora_native.testing` checks a product.
QLoRA is Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

import torch as _torch  # before _C: it loads the library that _C links

if tuple(map(int, _torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f'qlora_native needs torch 2.10 or later, got {_torch.__version__}: pip install "torch>=2.10"')

from . import _C, _loader, functional, nn, optim  # noqa: F401  (_loader loads integrations)
from ._calibrate.model import calibrate
from ._calibrate.report import CalibrationReport
from ._core import flops as _flops  # noqa: F401  (_flops registers formulas)
from ._core.weight import QuantizedWeight
from .functional import dequantize, linear, quantize
from .integrations.fuse import fuse

__version__ = _C.version()
__all__ = [
    "CalibrationReport",
    "QuantizedWeight",
    "__version__",
    "calibrate",
    "dequantize",
    "functional",
    "fuse",
    "linear",
    "nn",
    "optim",
    "quantize",
]
