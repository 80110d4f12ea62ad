"""The contestants: ours and the peers, as classes with the same few functions."""

from __future__ import annotations

import copy as copying
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import qlora_native as qn
import torch
import torch.nn.functional as F
from qlora_native._core.weight import op_arguments
from torch import Tensor, nn

from cases import BLOCKSIZE, OURS, Case

# The allowed relative error of a peer. It quantizes by itself, so near ties of 8-bit scales differ; bitsandbytes rounds
# the scales of repacked weights to bf16.
PEER_ERROR = 0.02


class Contestant:
    """A library, with `quantize(weight [N, K])` to a form of its own and `dequantize(held, dtype)`.

    Where it supports cases with an adapter, it has `attach(held, **lora)`, with the arguments of qn.linear.
    """

    name: str  # in the table
    error = PEER_ERROR

    def missing(self) -> str | None:
        """The reason why it cannot run here, or None."""
        return None

    def supports(self, case: Case) -> bool:
        """Whether it takes part in a case."""
        return case.operation in ("forward", "dx") and not case.rank

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Any:
        """Its form of `weight` [N, K] bf16; `dense` is our quantized weight, decoded to the activations' dtype."""
        return self.quantize(weight)

    def copy(self, held: Any) -> Any:
        """A copy in other memory."""
        return copying.deepcopy(held)

    def nbytes(self, held: Any) -> int:
        """The bytes of the weight, which decide on the number of copies."""
        return held.nbytes

    def forward(self, held: Any, x: Tensor) -> Tensor:
        """Y = X·Wᵀ: x [M, K] -> [M, N], differentiable in x. By default as without a fused product."""
        return F.linear(x, self.dequantize(held, x.dtype))

    def backward_input(self, held: Any, dy: Tensor) -> Tensor:
        """dX = dY·W: dy [M, N] -> [M, K]."""
        return dy @ self.dequantize(held, dy.dtype)


class Ours(Contestant):
    """qlora_native, with a few more functions for the op, the layer and LoRA."""

    name = OURS

    def supports(self, case: Case) -> bool:
        return True

    def quantize(self, weight: Tensor, format: str = "nf4") -> qn.QuantizedWeight:
        return qn.quantize(weight, format, BLOCKSIZE if format == "nf4" else None, double_quant=True)

    def dequantize(self, held: qn.QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return qn.dequantize(held, dtype=dtype)

    def forward(self, held: qn.QuantizedWeight, x: Tensor, **lora: Any) -> Tensor:
        """`lora`: the arguments of qn.linear that describe the adapter."""
        return qn.linear(x, held, **lora)

    def forward_op(self, held: qn.QuantizedWeight, x: Tensor) -> Tensor:
        """The torch op without its Python wrapper."""
        return torch.ops.qlora_native.linear_forward(x, *op_arguments(held), None, None, None, 1.0, 0.0, None)[0]

    def backward_input(
        self,
        held: qn.QuantizedWeight,
        dy: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_scaling: float = 1.0,
        lora_dropout: float = 0.0,
    ) -> Tensor:
        lora = (lora_a, lora_b, lora_scaling, lora_dropout, None)
        return torch.ops.qlora_native.linear_backward_input(dy, *op_arguments(held), *lora, True)[0]

    def lora_gradients(self, x: Tensor, dy: Tensor, u: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """(dA, dB)."""
        return torch.ops.qlora_native.lora_gradients(x, dy, u, v, scaling, 0.0, None, torch.float32)

    def layer(self, weight: Tensor) -> qn.nn.Linear4bit:
        """The layer over `weight` [N, K], as `from_linear` makes it."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return qn.nn.Linear4bit.from_linear(linear, format="nf4", blocksize=BLOCKSIZE, double_quant=True)


class TorchDense(Contestant):
    """torch's own product with the unquantized weight, in the dtype of the activations."""

    name = "torch dense"

    def supports(self, case: Case) -> bool:
        return case.operation == "lora_gradients" or super().supports(case)

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Tensor:
        return dense.to(dtype)

    def dequantize(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        return held

    def lora_gradients(self, x: Tensor, dy: Tensor, u: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        return v.t() @ x, scaling * (dy.t() @ u)


class Decoded(Contestant):
    """Our own weight, decoded whole and multiplied by torch, which a product should never be slower than."""

    name = "decode, then dense"
    quantize, dequantize = Ours.quantize, Ours.dequantize

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.via == "function"


class Bitsandbytes(Contestant):
    """bitsandbytes with NF4 and double quantization, in the layout that it trains in.

    Its forward decodes the whole weight and multiplies (`matmul_4bit`). Its backward does the same, and is repeated
    here from its MatMul4Bit.
    """

    name = "bitsandbytes"

    def missing(self) -> str | None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional download is missing
        return None if find_spec("bitsandbytes") else "not installed"

    def supports(self, case: Case) -> bool:
        return case.operation in ("quantize", "dequantize") or super().supports(case)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        codes, state = self.quantize(weight)
        state.dtype = dtype
        return codes, state

    def nbytes(self, held: tuple[Tensor, Any]) -> int:
        return held[0].nbytes

    def dequantize(self, held: tuple[Tensor, Any], dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        held[1].dtype = dtype
        return dequantize_4bit(*held)

    def forward(self, held: tuple[Tensor, Any], x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, held[0], quant_state=held[1])


class BitsandbytesPacked(Bitsandbytes):
    """bitsandbytes in the layout that its Linear4bit switches to in eval mode, on processors with AVX-512 BF16.

    It has no backward, rounds the scales to bf16 and drops the double quantization, so it is not a peer for training,
    but it is what a user gets at inference.
    """

    name = "bitsandbytes packed"
    MAX_M = 64  # the layout is made for small M

    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        from bitsandbytes.functional import has_avx512bf16

        return None if has_avx512bf16() else "needs AVX-512 BF16"

    def supports(self, case: Case) -> bool:
        plain = not case.rank and case.via == "function" and case.dtype == "bfloat16"
        return plain and case.operation == "forward" and case.M <= self.MAX_M

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        return _convert_weight_packed_for_cpu(*self.quantize(weight))


class Torchao(Contestant):
    """torchao's NF4Tensor, with its double quantization (blocks of 64, scalers in blocks of 256): plain torch.

    It decodes the whole weight for every product, and keeps only the weight for backward. It finds the nearest code by
    comparing with all sixteen, which takes a gigabyte and seconds for the largest shapes.
    """

    name = "torchao"
    error = 0.03  # its 8-bit scales are linear, not the dynamic map
    MODULE = "torchao.quantization.quantize_.workflows.nf4"
    SCALER_BLOCKSIZE = 256

    def missing(self) -> str | None:
        os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # kernels for GPUs; it says that they fail
        try:
            found = find_spec("torchao") and find_spec(f"{self.MODULE}.nf4_tensor")
        except ModuleNotFoundError:
            return "this version has no NF4 tensors"
        return None if found else "not installed"

    def supports(self, case: Case) -> bool:
        # It takes tenths of seconds for any M, so a few cases are enough.
        product = super().supports(case) and case.M in (1, 64, 512)
        plain = (case.via, case.memory) == ("function", "default")
        return plain and (product or case.operation in ("quantize", "dequantize"))

    def quantize(self, weight: Tensor) -> Any:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        return to_nf4(weight, BLOCKSIZE, self.SCALER_BLOCKSIZE)

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Any:
        return self.quantize(weight.to(dtype))  # its products are in the dtype that was quantized

    def nbytes(self, held: Any) -> int:
        return held.numel() // 2

    def dequantize(self, held: Any, dtype: torch.dtype) -> Tensor:
        return held.get_original_weight().to(dtype)

    def forward(self, held: Any, x: Tensor) -> Tensor:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

        return linear_nf4(x, held)


class PeftUnfused(Contestant):
    """PEFT's own LoRA layer over our Linear4bit: two more products and an addition beside ours, in fp32."""

    name = "PEFT unfused"

    def missing(self) -> str | None:
        return None if find_spec("peft") else "not installed"

    def supports(self, case: Case) -> bool:
        # Without dropout, because its mask differs from ours, and the result could not be checked.
        through = case.via == ("function" if case.operation == "forward" else "autograd")
        return case.operation in ("forward", "dx") and case.rank > 0 and not case.dropout and through

    def hold(self, weight: Tensor, dense: Tensor, dtype: torch.dtype) -> nn.Module:
        return ours.layer(weight)

    def attach(
        self, held: nn.Module, lora_a: Tensor, lora_b: Tensor, lora_scaling: float, lora_dropout: float
    ) -> nn.Module:
        """The layer with the adapter that the arguments of qn.linear describe."""
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        rank, alpha = lora_a.shape[0], lora_scaling * lora_a.shape[0]
        layer = Linear(held, "default", LoraConfig(r=rank, lora_alpha=alpha), r=rank, lora_alpha=alpha)
        layer.lora_A["default"].weight.data = lora_a
        layer.lora_B["default"].weight.data = lora_b
        return layer.requires_grad_(False)

    def nbytes(self, held: nn.Module) -> int:
        return held.quantized_weight.nbytes

    def forward(self, held: Any, x: Tensor) -> Tensor:
        return held(x)


ours = Ours()
# {name on the command line: peer}, and those that take part by default.
PEERS: dict[str, Contestant] = {
    "torch_dense": TorchDense(),
    "bitsandbytes": Bitsandbytes(),
    "bitsandbytes_packed": BitsandbytesPacked(),
    "torchao": Torchao(),
    "peft_unfused": PeftUnfused(),
    "decoded": Decoded(),
}
DEFAULT = {
    "cpu": ("torch_dense", "bitsandbytes", "bitsandbytes_packed", "torchao", "peft_unfused"),
    "cuda": ("torch_dense", "bitsandbytes", "peft_unfused"),
}


def load(names: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can run here, and {name: the reason why it is missing}.

    Raises:
        ValueError: there is no such peer.
    """
    if unknown := set(names) - set(PEERS):
        raise ValueError(f"peers: expected of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    reasons = {name: PEERS[name].missing() for name in names}
    missing = {name: reason for name, reason in reasons.items() if reason}
    return [PEERS[name] for name in names if name not in missing], missing
