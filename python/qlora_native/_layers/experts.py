"""`Experts4bit`: the weights of a layer's experts in 4 bits. It takes the place of a three-dimensional parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core.errors import bad, check_memory
from .._core.weight import QuantizedWeight, check_quantized
from .base import QuantizedLayer, zero_weight


class Experts4bit(QuantizedLayer):
    """The quantized weights of E experts. It replaces the three-dimensional parameter that held them in 16 bits.

    Expert e has the weight `W[e]`, [N, K], and computes `W[e] x`, however the parameter was laid out. The state dict
    has the entries of `Linear4bit` below the parameter's name: `weight` uint8 [E, N, K/2], `absmax`, and so on.

    `shape`, `dtype`, `ndim`, `device` and `requires_grad` describe the parameter that was replaced, because PEFT's
    `target_parameters` reads them.

    Attributes:
        num_experts, out_features, in_features: E, N and K.
        transposed: whether the parameter was [E, K, N], for y = x @ W, as in gpt-oss and Llama 4, and not [E, N, K].
        dtype, compute_dtype, format, blocksize: as in every QuantizedLayer.
        adapters: low-rank adapters (A [E, r, K], B [E, N, r], scaling) that `forward` adds, inside the same product.
    """

    # Tells transformers that the weights have values; otherwise it would initialize them.
    _is_hf_initialized = True

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        transposed: bool = False,
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Make weights of zeros.

        Args:
            num_experts, in_features, out_features: E, K and N, each at least 1.
            device: where the weights are stored; None is torch's default device.
            dtype: what `dequantize` returns: fp32, bf16 or fp16; None is torch's default dtype.
            transposed: see the class.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        if min(num_experts, in_features, out_features) < 1:
            got = f"{num_experts}, {in_features}, {out_features}"
            raise bad("num_experts, in_features, out_features", "numbers above 0", got)
        shape = (num_experts, out_features, in_features)
        self._set(zero_weight(shape, dtype, device, format, blocksize, double_quant, codebook), transposed)

    def _set(self, q: QuantizedWeight, transposed: bool) -> None:
        self._begin(q)
        self.transposed = transposed
        self.adapters: list[tuple[Tensor, Tensor, float]] = []

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Replace the weights, their format, blocksize and dtype by those of `q`, whose tensors are shared, not copied.

        Args:
            q: weights [E, N, K].
        """
        self.num_experts, self.out_features, self.in_features = q.shape
        super().replace_weight(q)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, transposed: bool = False) -> Experts4bit:
        """Make experts over quantized weights, whose tensors are shared, not copied.

        Args:
            q: weights [E, N, K].
            transposed: see the class.

        Raises:
            TypeError: `q` is not a QuantizedWeight.
            ValueError: `q` does not have three dimensions.
        """
        check_quantized(q, "a weight [E, N, K]", 3)
        experts = cls.__new__(cls)
        experts._set(q, transposed)
        return experts

    @classmethod
    def from_parameter(
        cls,
        parameter: Tensor,
        transposed: bool = False,
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> Experts4bit:
        """Quantize the weights of a layer's experts.

        Args:
            parameter: [E, N, K], or [E, K, N] if `transposed`, in fp32, bf16 or fp16.
            transposed: see the class.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: `qlora_native.quantize` refuses the parameter or another argument.
        """
        weight = parameter.transpose(1, 2) if transposed and parameter.dim() == 3 else parameter
        q = functional.quantize(weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, transposed)

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that was replaced."""
        E, N, K = self._shape
        return torch.Size((E, K, N) if self.transposed else (E, N, K))

    @property
    def ndim(self) -> int:
        """The number of dimensions of the parameter that was replaced: 3."""
        return 3

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._parameters["weight"].device

    @property
    def requires_grad(self) -> bool:
        """False: quantized weights are frozen."""
        return False

    def parameter(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weights.

        Args:
            dtype: fp32, bf16 or fp16; None is the layer's own.

        Returns:
            A tensor in the shape and the layout of the parameter that was replaced.
        """
        weight = self.dequantize(dtype)
        return weight.transpose(1, 2).contiguous() if self.transposed else weight

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply each row of x by the weight of its expert, with the adapters in the same product.

        Args:
            x: [T, K], with its rows sorted by expert: expert e has the rows offsets[e] ... offsets[e + 1] - 1.
            offsets: int64 [E + 1], ascending; the last is T.
            bias: [E, N].

        Returns:
            y [T, N] in the dtype of x, or under `torch.autocast` in autocast's dtype.
        """
        q, adapter = self.quantized_weight, self._adapter()
        if self.compute_dtype is None or self.compute_dtype == x.dtype:
            return functional.linear_grouped(x, q, offsets, bias, *adapter)
        check_memory("x", x)
        return functional.linear_grouped(x.to(self.compute_dtype), q, offsets, bias, *adapter).to(x.dtype)

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """All adapters as one (A, B, scaling). Several are stacked into one whose rank is the sum of theirs."""
        if not self.adapters:
            return None, None, 1.0
        if len(self.adapters) == 1:
            return self.adapters[0]
        for a, b, _ in self.adapters:
            check_memory("lora_a", a)
            check_memory("lora_b", b)
        lora_a = torch.cat([a for a, _, _ in self.adapters], dim=1)
        lora_b = torch.cat([scaling * b for _, b, scaling in self.adapters], dim=2)
        return lora_a, lora_b, 1.0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `torch.bmm(x, experts)`, as Llama 4 calls it with x [E, T, K]. All other functions raise a TypeError."""
        if func is torch.bmm and not kwargs and len(args) == 2 and isinstance(args[1], cls) and args[1].transposed:
            x, experts = args
            if x.dim() != 3 or x.shape[0] != experts.num_experts:
                raise bad("x", f"[{experts.num_experts}, T, {experts.in_features}]", list(x.shape))
            E, T, K = x.shape
            offsets = torch.arange(0, (E + 1) * T, T, device=x.device) if T else x.new_zeros(E + 1, dtype=torch.int64)
            return experts(x.reshape(E * T, K), offsets).view(E, T, -1)
        raise TypeError(
            f"{getattr(func, '__name__', func)}: expected a tensor, got the quantized weights of experts. They are run "
            'by model.set_experts_implementation("qlora_native")'
        )

    def __getitem__(self, index: Any) -> Tensor:
        """Refuse to be indexed: a forward that takes one expert after the other would decode each at every call.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Experts4bit: expected to be multiplied by, got an index. Another implementation of experts was chosen; "
            'quantized ones are run by model.set_experts_implementation("qlora_native")'
        )

    def extra_repr(self) -> str:
        """The text that `print` shows between the parentheses."""
        return f"{tuple(self.shape)}, transposed={self.transposed}, {self._describe_format()}"
