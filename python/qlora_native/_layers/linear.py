"""`Linear4bit` and `Linear8bit`: an `nn.Linear` whose weight stays in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from .._core.errors import bad, bad_type, check_memory
from .._core.weight import QuantizedWeight
from . import callbacks
from .base import QuantizedLayer, zero_weight


class Linear4bit(QuantizedLayer, nn.Linear):
    """A linear layer over a quantized weight, which `qlora_native.linear` multiplies by.

    A layer made by the constructor multiplies by zero until a state dict is loaded; `from_linear` and `from_quantized`
    make one with values. The state dict has these entries:

        weight         uint8 [N, K/2], frozen parameter: the codes (see QuantizedWeight.codes for odd K)
        absmax         the scales: double-quantized uint8 [blocks], frozen parameter; or fp32 [blocks], buffer
        nested_absmax, nested_code, offset     fp32, buffers of the double quantization; None without it
        minimum, nested_minimum, zero_point, column_order    of formats of files; None in others (see QuantizedWeight)
        codebook       fp32 [16], buffer: what the codes mean
        bias           [N], parameter, or None

    Bytes are parameters, so that FSDP shards them. fp32 values are buffers, so that FSDP's mixed precision does not
    cast them. Casting the module (`.to(dtype)`, `.half()`, ...) casts the bias and sets `dtype`; no scale is cast.

    Attributes:
        in_features, out_features, bias: as in `nn.Linear`.
        dtype, compute_dtype, format, blocksize: as in every QuantizedLayer.
    """

    _bits, _format = 4, "nf4"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str | None = None,
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Make a layer of zeros.

        Args:
            in_features, out_features: the columns K and rows N of the weight, each at least 1.
            bias: whether the layer has a bias [N].
            device: where the tensors are stored; None is torch's default device.
            dtype: of the bias, and of what `dequantize` returns: fp32, bf16 or fp16; None is torch's default dtype.
            format: "nf4" if None; of `Linear8bit`, "int8".
            blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        if in_features < 1 or out_features < 1:
            raise bad("in_features, out_features", "numbers above 0", f"{in_features}, {out_features}")
        zeros = zero_weight(
            (out_features, in_features), dtype, device, format or self._format, blocksize, double_quant, codebook
        )
        zero_bias = nn.Parameter(torch.zeros(out_features, device=zeros.device, dtype=zeros.dtype)) if bias else None
        self._set(zeros, zero_bias)

    def _set(self, q: QuantizedWeight, bias: nn.Parameter | None) -> None:
        """Initialize the layer over `q`. nn.Linear's constructor is not called: it would make an fp32 weight."""
        self._begin(q)
        self.bias = bias

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Replace the weight, its format, blocksize and dtype by those of `q`, whose tensors are shared, not copied.

        Args:
            q: a weight [N, K].

        Raises:
            ValueError: its codes do not have 4 bits. `Linear8bit` is for those of 8.
        """
        if q.bits != self._bits:
            expected = f"one of {self._bits} bits in {type(self).__name__}"
            raise bad("format", expected, f"{q.format!r}: use {linear_class(q).__name__}")
        self.out_features, self.in_features = q.shape
        super().replace_weight(q)

    def replace_by_part(self, q: QuantizedWeight) -> None:
        """Replace the weight by the part of it that this process has in tensor parallelism.

        `in_features` and `out_features` stay those of the whole layer, as libraries that shard layers expect.

        Args:
            q: some rows or columns of the weight, whose tensors are shared, not copied.
        """
        sizes = self.out_features, self.in_features
        self.replace_weight(q)
        self.out_features, self.in_features = sizes

    @property
    def is_part(self) -> bool:
        """Whether the layer has only a part of its weight: the other processes of tensor parallelism have the rest."""
        return self._shape != (self.out_features, self.in_features)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: nn.Parameter | None = None) -> Linear4bit:
        """Make a layer over a quantized weight, whose tensors are shared, not copied.

        Args:
            q: a weight [N, K].
            bias: a floating-point parameter [N] on the device of `q`, or None.

        Raises:
            TypeError: `q` is not a QuantizedWeight, or `bias` not a floating-point parameter.
            ValueError: `q` does not have two dimensions, or `bias` has another shape or device.
        """
        if not isinstance(q, QuantizedWeight):
            raise bad_type("q", "a QuantizedWeight", type(q).__name__)
        if bias is not None and not isinstance(bias, nn.Parameter):
            raise bad_type("bias", "an nn.Parameter", type(bias).__name__)
        if bias is not None and (bias.shape != (q.shape[0],) or bias.device != q.device):
            raise bad("bias", f"[{q.shape[0]}] on {q.device}", f"{list(bias.shape)} on {bias.device}")
        layer = cls.__new__(cls)
        layer._set(q, bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str | None = None,
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> Linear4bit:
        """Quantize a linear layer.

        Args:
            linear: the layer; its bias is shared, not copied.
            format: "nf4" if None; of `Linear8bit`, "int8".
            blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Returns:
            A new layer on the same device, in the same training mode.

        Raises:
            TypeError: `linear` is not an nn.Linear, or is quantized already.
            TypeError, ValueError: `qlora_native.quantize` refuses its weight or an argument.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise bad_type("linear", "an nn.Linear that is not quantized", type(linear).__name__)
        q = functional.quantize(linear.weight, format or cls._format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, linear.bias).train(linear.training)

    @property
    def W_q(self) -> nn.Parameter:
        """The codes, under the name by which PEFT recognises a layer that has `dequantize()`.

        Raises:
            RuntimeError: PEFT was imported after this layer was made, and would take the codes for weights.
        """
        for check in callbacks.check_loaded:
            check()
        return self._parameters["weight"]

    def forward(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_scaling: float | Tensor = 1.0,
        lora_dropout: float = 0.0,
        adapter_index: Tensor | None = None,
    ) -> Tensor:
        """Multiply by the weight, with an adapter in the same product.

        Args:
            x: [..., in_features] in fp32, bf16 or fp16.
            lora_a, lora_b, lora_scaling, lora_dropout: the adapter, as in `qlora_native.linear`.
            adapter_index: int64 [...], or None. The adapter of each row of x, as in
                `qlora_native.functional.linear_grouped`: `lora_a` is then [count, rank, in_features], and `lora_b`
                [count, out_features, rank].

        Returns:
            [..., out_features] in the dtype of x.
        """
        q, lora = self.quantized_weight, (lora_a, lora_b, lora_scaling, lora_dropout)
        rows = x
        if self.compute_dtype is not None:
            check_memory("x", x)
            rows = x.to(self.compute_dtype)
        if adapter_index is None:
            y = functional.linear(rows, q, self.bias, *lora)
        else:
            y = functional.linear_grouped(rows, q, None, self.bias, *lora, adapter_index=adapter_index)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        """The text that `print` shows between the parentheses."""
        return f"{super().extra_repr()}, {self._describe_format()}"


class Linear8bit(Linear4bit):
    """A `Linear4bit` with twice the bits: "int8", 255 linear levels, or a format of files whose codes have 8 bits.

    `weight` is uint8 [N, K], a byte for each element, and there is no `codebook`. All else is as in `Linear4bit`, also
    for PEFT, and `isinstance` takes it for one.
    """

    _bits, _format = 8, "int8"


def linear_class(q: QuantizedWeight) -> type[Linear4bit]:
    """The class of a layer over `q`."""
    return Linear8bit if q.bits == 8 else Linear4bit
