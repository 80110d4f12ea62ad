"""GPTQModel: its product for a CPU over a layer of GPTQ or AWQ.

    pip install --no-deps gptqmodel==7.7.0 defuser device-smi logbar pypcre threadpoolctl tokenicer

Without its dependencies, because it names a later torch than it needs for a product. The layer is the one that it
selects by itself for this processor. With AVX-512 BF16 that has a kernel of its own, which a C++ compiler builds at the
first use, in about a minute; elsewhere it calls torch's product with a packed int4 weight. Neither has a backward.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

DTYPE = torch.bfloat16


def installed() -> bool:
    """Whether the package is there."""
    return find_spec("gptqmodel") is not None


class Layer:
    """A layer without a bias over the tensors of a file, which it packs for the processor."""

    def __init__(self, method: str, tensors: tuple[Tensor, Tensor, Tensor], group_size: int) -> None:
        """Make the layer.

        Args:
            method: "gptq", with zero points as in version 2, or "awq".
            tensors: codes and zero points in int32, and scales in fp16 [groups, N].
            group_size: the columns that share a scale.
        """
        # Not at the top, for the import changes functions of transformers and safetensors, and prints.
        from gptqmodel.utils.importer import select_quant_linear

        codes, zeros, scales = tensors
        groups, N = scales.shape
        scheme = {"bits": 4, "group_size": group_size, "sym": False, "desc_act": False, "pack_dtype": torch.int32}
        format = {"gptq": "gptq_v2", "awq": "gemm"}[method]
        layer_class = select_quant_linear(**scheme, device="cpu", dtype=DTYPE, quant_method=method, format=format)
        self.kernel: str = layer_class.__name__
        self.layer = layer_class(**scheme, in_features=groups * group_size, out_features=N, register_buffers=True)
        self.layer.qweight, self.layer.qzeros, self.layer.scales = codes.clone(), zeros.clone(), scales.clone()
        self.layer.post_init()
        self.layer.eval()
        self(torch.zeros(1, groups * group_size, dtype=DTYPE))  # the first product packs

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Y [M, N] of x [M, K] in bf16."""
        return self.layer(x)
