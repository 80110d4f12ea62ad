"""What `Linear4bit` and `Experts4bit` share: a quantized weight in a module, how it moves and how it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._errors import FLOAT_DTYPES, bad_type, check_float_dtype, check_memory, chosen_blocksize
from ._microscaling import MICROSCALED, check_scale_table, check_scales, scale_table
from ._neighbours import guard_neighbours
from ._weight import (
    CODEBOOKS,
    DYNAMIC_MAP,
    NESTED_BLOCKSIZE,
    QuantizedWeight,
    ceil_div,
    check_finite,
    check_format,
    codes_shape,
)

__all__ = ["QuantizedLayer", "zero_weight"]

# The tensors of a layer that are the quantized weight: `weight` holds the codes.
_STATE = ("weight", "absmax", "nested_absmax", "nested_code", "offset", "code")


def zero_weight(
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    format: str,
    blocksize: int | None,
    double_quant: bool,
    codebook: Tensor | Sequence[float] | None,
) -> QuantizedWeight:
    """A weight whose codes and scales are 0, for a layer that a state dict is loaded into.

    `dtype` and `device` are torch's defaults where they are None.

    Raises:
        TypeError, ValueError: as `qlora_native.quantize`, of which the last four arguments are.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.get_default_device() if device is None else torch.device(device)
    check_format(format)
    blocksize = chosen_blocksize(blocksize, format)
    double_quant = double_quant or format in MICROSCALED
    check_float_dtype("dtype", dtype)
    bits = 8 if format == "int8" else 4
    blocks = ceil_div(math.prod(shape), blocksize)

    def fp32(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    return QuantizedWeight(
        codes=torch.zeros(codes_shape(*shape, bits=bits), dtype=torch.uint8, device=device),
        absmax=torch.zeros(blocks, dtype=torch.uint8, device=device) if double_quant else fp32(blocks),
        nested_absmax=fp32(ceil_div(blocks, NESTED_BLOCKSIZE)) if double_quant else None,
        nested_code=_levels_of_scales(format).to(device, copy=True) if double_quant else None,
        offset=fp32() if double_quant else None,
        code=None if bits == 8 else functional.code_tensor(format, codebook, device),
        shape=shape,
        blocksize=blocksize,
        format=format,
        dtype=dtype,
    )


class QuantizedLayer(nn.Module):
    """A module that holds a quantized weight as plain frozen parameters and buffers.

    Attributes:
        format, blocksize: as in `qlora_native.quantize`.
        compute_dtype: the dtype `dequantize` gives, and PEFT an adapter.
        product_dtype: if not None, x is cast to it for the product and y back, as bitsandbytes does with its
            `compute_dtype`; by default the product is computed in the dtype of x.
    """

    def _begin(self, q: QuantizedWeight) -> None:
        """Initialize as a module that holds `q`; nothing else initializes it."""
        nn.Module.__init__(self)
        guard_neighbours()
        self.product_dtype: torch.dtype | None = None
        self.replace_weight(q)

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Put `q` in the place of the weight, with its format, blocksize and dtype; shares its tensors."""
        self._shape = q.shape
        self.format, self.blocksize, self.compute_dtype = q.format, q.blocksize, q.dtype
        for name in _STATE:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        self.weight = _frozen(q.codes)
        if q.nested_absmax is None:
            self.register_buffer("absmax", q.absmax)
        else:
            self.absmax = _frozen(q.absmax)
        for name in _STATE[2:]:
            self.register_buffer(name, getattr(q, name))

    def weight_names(self) -> list[str]:
        """Names, as in the state dict, of the tensors that are the quantized weight."""
        return list(self.weight_tensors())

    def weight_tensors(self) -> dict[str, Tensor]:
        """The quantized weight's tensors by those names."""
        stored = {**self._parameters, **self._buffers}  # not `self.weight`, which PEFT reads: integrations/decoded.py
        return {name: stored[name] for name in _STATE if stored[name] is not None}

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight as a container over the layer's own tensors."""
        # Past nn.Module.__getattr__, which costs as much as the rest of this: it is on the way of every forward.
        parameters, buffers = self._parameters, self._buffers
        absmax = parameters.get("absmax")
        return QuantizedWeight.unchecked(
            parameters["weight"],
            buffers["absmax"] if absmax is None else absmax,
            buffers["nested_absmax"],
            buffers["nested_code"],
            buffers["offset"],
            buffers["code"],
            self._shape,
            self.blocksize,
            self.format,
            self.compute_dtype,
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    def _describe_format(self) -> str:
        """How the weight is stored, for `extra_repr`."""
        return f"format={self.format}, blocksize={self.blocksize}, double_quant={self.double_quant}"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype` (default: `compute_dtype`)."""
        return self.quantized_weight.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Make it a layer of zeros, as the constructor does: for a layer that left the meta device empty."""
        with torch.no_grad():
            for tensor in (
                self._parameters["weight"],
                self.absmax,
                self.nested_absmax,
                self.offset,
                self._parameters.get("bias"),
            ):
                if tensor is not None:
                    tensor.zero_()
            if self.nested_code is not None:
                self.nested_code.copy_(_levels_of_scales(self.format))
            if self.format in CODEBOOKS:
                self.code.copy_(CODEBOOKS[self.format])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Load as every module does, but only tensors that are this layer's: nothing is cast, scales are finite.

        torch would cast a 16-bit weight to bytes, and copy it over the codes.
        """
        errors = []
        assign = args[0].get("assign_to_params_buffers", False)
        for name, own in (*self.weight_tensors().items(), ("bias", self._parameters.get("bias"))):
            tensor = state_dict.get(prefix + name)
            if own is None or tensor is None:
                continue
            try:
                if not isinstance(tensor, Tensor):
                    raise bad_type(prefix + name, "a tensor", type(tensor).__name__)
                if tensor.dtype != own.dtype and not (name == "bias" and tensor.is_floating_point()):
                    raise bad_type(prefix + name, f"{own.dtype}, as the layer has it", tensor.dtype)
                check_memory(prefix + name, tensor, None if assign else own)
                if self.format in MICROSCALED and name in ("absmax", "nested_code"):
                    check = check_scales if name == "absmax" else check_scale_table
                    check(prefix + name, tensor, self.format)
                elif name != "bias":
                    check_finite(prefix + name, tensor)
                if name in self._buffers:  # torch would make a parameter of a buffer that it is given as one
                    state_dict[prefix + name] = tensor.detach()
            except (TypeError, ValueError) as error:
                errors.append(str(error))
        if errors:  # where torch collects what it then raises
            args[-1].extend(errors)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move or cast: the quantized weight moves and is never cast."""
        weight = {id(tensor) for tensor in self.weight_tensors().values()}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if id(tensor) not in weight or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if dtype in FLOAT_DTYPES:
            self.compute_dtype = dtype
        return self


def _levels_of_scales(format: str) -> Tensor:
    return scale_table(format) if format in MICROSCALED else DYNAMIC_MAP


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
