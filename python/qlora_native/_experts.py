"""`Experts4bit`: the weights of a layer's experts in 4 bits, in the place of a 3-D parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from ._errors import bad
from ._layer import QuantizedLayer, zero_weight
from ._weight import QuantizedWeight, check_quantized

__all__ = ["Experts4bit"]


class Experts4bit(QuantizedLayer):
    """The quantized weights of E experts, which stand in a module where it had a parameter of three dimensions.

    Expert e is W[e] [N, K], and y = W[e] x, however the parameter was laid out. What is stored has the names of
    `Linear4bit`, below that of the parameter: `weight` uint8 [E, N, K/2], `absmax`, and so on.

    `shape`, `dtype`, `ndim`, `device` and `requires_grad` are those that the parameter had, or would have: PEFT's
    `target_parameters` reads them.

    Attributes:
        num_experts, out_features, in_features: E, N and K.
        transposed: the parameter was [E, K, N], for y = x @ W, as in gpt-oss and Llama 4; else [E, N, K].
        compute_dtype, product_dtype, format, blocksize: as of every QuantizedLayer.
        adapters: low-rank adapters (A [E, r, K], B [E, N, r], scaling) that `forward` adds, inside the same product.
    """

    # transformers initializes what it takes for a parameter unless this says that it has values.
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
        """Make weights of zeros. `dtype` is `compute_dtype` (default: torch's default dtype).

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`, of which the last four arguments are.
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
        """Put `q` [E, N, K] in the place of the weights, with its format, blocksize and dtype; shares its tensors."""
        self.num_experts, self.out_features, self.in_features = q.shape
        super().replace_weight(q)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, transposed: bool = False) -> Experts4bit:
        """Experts over `q` [E, N, K]; shares its tensors.

        Raises:
            TypeError, ValueError: `q` is no QuantizedWeight, or one of another shape.
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
        """Experts with the quantized weights of `parameter`, [E, N, K] or, `transposed`, [E, K, N].

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`, of which the other arguments are.
        """
        weight = parameter.transpose(1, 2) if transposed and parameter.dim() == 3 else parameter
        q = functional.quantize(weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, transposed)

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        E, N, K = self._shape
        return torch.Size((E, K, N) if self.transposed else (E, N, K))

    @property
    def ndim(self) -> int:
        """How many dimensions the parameter has."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype`."""
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self._parameters["weight"].device

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained: it is not."""
        return False

    def parameter(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weights as the parameter has them, in `dtype` (default: `compute_dtype`)."""
        weight = self.dequantize(dtype)
        return weight.transpose(1, 2).contiguous() if self.transposed else weight

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of each row with the weight of its expert, and the adapters'.

        Args:
            x: [T, K], rows sorted by expert: those of expert e are offsets[e] ... offsets[e + 1] - 1.
            offsets: int64 [E + 1], ascending; the last is T.
            bias: [E, N].

        Returns:
            y [T, N], in the dtype of x; under `torch.autocast` in its dtype.
        """
        q, adapter = self.quantized_weight, self._adapter()
        if self.product_dtype is None or self.product_dtype == x.dtype:
            return functional.linear_grouped(x, q, offsets, bias, *adapter)
        return functional.linear_grouped(x.to(self.product_dtype), q, offsets, bias, *adapter).to(x.dtype)

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """All adapters as one: several are one of the sum of their ranks."""
        if not self.adapters:
            return None, None, 1.0
        if len(self.adapters) == 1:
            return self.adapters[0]
        lora_a = torch.cat([a for a, _, _ in self.adapters], dim=1)
        lora_b = torch.cat([scaling * b for _, b, scaling in self.adapters], dim=2)
        return lora_a, lora_b, 1.0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`torch.bmm(x, experts)`, by which Llama 4 multiplies x [E, T, K] by its experts; nothing else."""
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
        """Nothing: a forward that takes single experts would decode them at every call.

        Raises:
            TypeError: it is called.
        """
        raise TypeError(
            "Experts4bit: expected to be multiplied by, got an index. Another implementation of experts was chosen; "
            'quantized ones are run by model.set_experts_implementation("qlora_native")'
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{tuple(self.shape)}, transposed={self.transposed}, {self._describe_format()}"
