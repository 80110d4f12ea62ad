"""`QuantizedLayer`, the base of the 4-bit layers: it holds, moves and loads a quantized weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.blocks import ceil_div, chosen_blocksize
from .._core.errors import bad_type, check_float_dtype, check_memory
from .._core.formats import DYNAMIC_MAP, check_format, codes_shape, levels_of
from .._core.layouts import LAYOUTS, SCALE_LEVELS
from .._core.microscaling import MICROSCALED, check_scale_table, check_scales, scale_table
from .._core.paging import note_written
from .._core.quantize import code_tensor
from .._core.weight import (
    QuantizedWeight,
    check_e4m3,
    check_e4m3_scales,
    check_finite,
    check_permutation,
    unchecked,
)
from . import callbacks

# {tensor of a layer's quantized weight, as its state dict calls it: the field of QuantizedWeight}. The last one is not
# called `code`, because the modules that torch.export makes have a property of this name.
_STATE = {
    "weight": "codes",
    "absmax": "absmax",
    "nested_absmax": "nested_absmax",
    "nested_code": "nested_code",
    "offset": "offset",
    "minimum": "minimum",
    "nested_minimum": "nested_minimum",
    "zero_point": "zero_point",
    "column_order": "column_order",
    "codebook": "code",
}


def zero_weight(
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    format: str,
    blocksize: int | None,
    double_quant: bool,
    codebook: Tensor | Sequence[float] | None,
) -> QuantizedWeight:
    """Make a weight whose codes and scales are 0, for a layer that a state dict is loaded into.

    Args:
        shape: [N, K] or [E, N, K].
        dtype, device: None is torch's default.
        format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.
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
        nested_absmax=fp32(ceil_div(blocks, LAYOUTS[format].nested_blocksize)) if double_quant else None,
        nested_code=_levels_of_scales(format).to(device, copy=True) if double_quant else None,
        offset=fp32() if double_quant else None,
        code=None if bits == 8 else code_tensor(format, codebook, device),
        shape=shape,
        blocksize=blocksize,
        format=format,
        dtype=dtype,
    )


class QuantizedLayer(nn.Module):
    """A module that holds a quantized weight as plain frozen parameters and buffers.

    Attributes:
        format, blocksize: as in `qlora_native.quantize`.
        dtype: the dtype that `dequantize` returns.
        compute_dtype: the dtype of the product, as in bitsandbytes: x is cast to it, and y back. None, the default,
            computes the product in the dtype of x.
        transposed_source: whether the module that it stands for keeps its weight transposed, as GPT-2's Conv1D does.

    The two dtypes are fp32, bf16 or fp16: to set another, or to cast the layer to one, is a TypeError.
    """

    transposed_source = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dtype" or (name == "compute_dtype" and value is not None):
            check_float_dtype(name, value)
        super().__setattr__(name, value)

    def _begin(self, q: QuantizedWeight) -> None:
        """Initialize the module over `q`. Subclasses call this in place of their other base class's constructor."""
        nn.Module.__init__(self)
        callbacks.load_integrations()
        self.compute_dtype: torch.dtype | None = None
        self.replace_weight(q)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, or copy, the layer. As where one is made, integrations are loaded."""
        super().__setstate__(state)
        callbacks.load_integrations()

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse nn.DataParallel, whose replicas have no parameters. Trainer takes it where it sees several GPUs."""
        raise NotImplementedError(
            f"nn.DataParallel: {type(self).__name__} is not replicated; start a process for each GPU, with torchrun or "
            "accelerate launch, or let one GPU be visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Replace the weight, its format, blocksize and dtype by those of `q`, whose tensors are shared, not copied.

        Args:
            q: a weight.
        """
        self._shape = q.shape
        self.format, self.blocksize, self.dtype = q.format, q.blocksize, q.dtype
        for name in _STATE:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        tensors = {name: getattr(q, field) for name, field in _STATE.items()}
        # Those that are None are registered last: torch.export (2.13) counts them when it looks for the names of the
        # others.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1] is None):
            if tensor is not None and not tensor.is_floating_point():
                setattr(self, name, _frozen(tensor))
            else:
                self.register_buffer(name, tensor)

    def weight_names(self) -> list[str]:
        """The names of the tensors that make up the quantized weight, as in the state dict."""
        return list(self.weight_tensors())

    def weight_tensors(self) -> dict[str, Tensor]:
        """The tensors that make up the quantized weight, by name."""
        # Not `self.weight`: under PEFT that decodes the weight (integrations/peft/_dequantized.py).
        stored = {**self._parameters, **self._buffers}
        return {name: stored[name] for name in _STATE if stored[name] is not None}

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight as a container over the layer's own tensors."""
        # Reads the dictionaries: every forward passes here, and nn.Module.__getattr__ would double its cost.
        parameters, buffers = self._parameters, self._buffers
        absmax, minimum = parameters.get("absmax"), parameters.get("minimum")
        return unchecked(
            parameters["weight"],
            buffers["absmax"] if absmax is None else absmax,
            buffers["nested_absmax"],
            buffers["nested_code"],
            buffers["offset"],
            buffers["codebook"],
            self._shape,
            self.blocksize,
            self.format,
            self.dtype,
            buffers.get("minimum") if minimum is None else minimum,
            buffers.get("nested_minimum"),
            parameters.get("zero_point"),
            parameters.get("column_order"),
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    def _describe_format(self) -> str:
        """Describe how the weight is stored, for `extra_repr`."""
        return f"format={self.format}, blocksize={self.blocksize}, double_quant={self.double_quant}"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight.

        Args:
            dtype: fp32, bf16 or fp16; None is the layer's own.

        Returns:
            The weight in its own shape. Not differentiable.
        """
        return self.quantized_weight.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Set the weight and the bias to zero and restore the tables, as after construction.

        `torch.nn.Module.to_empty` leaves the meta device without values; this gives the layer valid ones.
        """
        for name, tensor in {**self.weight_tensors(), "bias": self._parameters.get("bias")}.items():
            check_memory(name, tensor)
        q = self.quantized_weight
        with torch.no_grad():
            for tensor in (
                self._parameters["weight"],
                self.absmax,
                self.nested_absmax,
                self.offset,
                q.minimum,
                q.nested_minimum,
                q.zero_point,
                self._parameters.get("bias"),
            ):
                if tensor is not None:
                    tensor.zero_()
            if self.nested_code is not None:
                self.nested_code.copy_(_levels_of_scales(self.format))
            if (levels := levels_of(self.format)) is not None:
                self.codebook.copy_(levels)
            if q.column_order is not None:
                torch.arange(len(q.column_order), out=q.column_order)
        self._note_written()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Load as every module does, after a check that each tensor has this layer's dtype and values that are valid.

        Without the check torch would cast a 16-bit weight to bytes and copy them over the codes.
        """
        errors = []
        scales = _format_of_scales(self.format)
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
                if self.format == "fp8" and name == "weight":
                    check_e4m3(prefix + name, tensor)
                elif name == "absmax" and scales is not None and own.dtype == torch.uint8:
                    check_scales(prefix + name, tensor, scales)
                elif name == "nested_code" and scales is not None:
                    check_scale_table(prefix + name, tensor, scales)
                elif name == "column_order":
                    check_permutation(prefix + name, tensor)
                elif name != "bias":
                    check_finite(prefix + name, tensor)
                if name in self._buffers:  # torch would turn the buffer into a parameter if the entry is one
                    state_dict[prefix + name] = tensor.detach()
            except (TypeError, ValueError) as error:
                errors.append(str(error))
        if self.format == "fp8" and not errors:  # two tensors that are valid each make the scales
            loaded = {name: state_dict.get(prefix + name, own) for name, own in self.weight_tensors().items()}
            try:
                check_e4m3_scales(prefix + "absmax", loaded["absmax"], loaded.get("nested_code"))
            except ValueError as error:
                errors.append(str(error))
        if errors:  # the list in which torch collects what it raises later
            args[-1].extend(errors)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._note_written()

    def _note_written(self) -> None:
        for tensor in self.weight_tensors().values():
            note_written(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move or cast the module. The quantized weight is moved, but never cast."""
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        check_float_dtype("dtype", dtype)  # before anything is changed
        weight = {id(tensor) for tensor in self.weight_tensors().values()}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if id(tensor) not in weight or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        self.dtype = dtype
        return self


def _format_of_scales(format: str) -> str | None:
    """The microscaled format whose scales those of `format` are where they are bytes, or None."""
    return {"fp8": "mxfp4"}.get(format, format if format in MICROSCALED else None)


def _levels_of_scales(format: str) -> Tensor:
    scales = _format_of_scales(format)
    return SCALE_LEVELS.get(format, DYNAMIC_MAP) if scales is None else scale_table(scales)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
