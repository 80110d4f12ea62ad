"""`Linear4bit`, an `nn.Linear` whose weight stays in 4 bits, and `quantize_model`, which puts it into a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._errors import FLOAT_DTYPES, bad, bad_type, check_float_dtype, check_memory, chosen_blocksize
from ._microscaling import MICROSCALED, check_scale_table, check_scales, scale_table
from ._neighbours import adopt_quantized, check_peft_is_guarded, guard_neighbours, transformers_models
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

__all__ = ["Linear4bit", "quantize_model"]

# The tensors of a layer that are the quantized weight: `weight` holds the codes.
_STATE = ("weight", "absmax", "nested_absmax", "nested_code", "offset", "code")


class Linear4bit(nn.Linear):
    """A linear layer over a quantized weight, for `qlora_native.linear`.

    A layer made by the constructor multiplies by zero until a state dict is loaded; `from_linear` and
    `from_quantized` make one with values. What is stored, under the names of the state dict:

        weight         uint8 [N, K/2], frozen parameter: the codes (see QuantizedWeight.codes for "int8" and odd K)
        absmax         uint8 [blocks], frozen parameter: double-quantized scales; fp32 [blocks], buffer, without that
        nested_absmax, nested_code, offset     fp32 buffers of the double quantization, else None
        code           fp32 [16], buffer: what the codes mean; None for "int8"
        bias           [N], parameter, or None

    Bytes are parameters, so that FSDP shards them; fp32 values are buffers, so that its mixed precision leaves them
    alone. Casting the module (`.to(dtype)`, `.half()`, ...) casts the bias and `compute_dtype`, never a scale.

    Attributes:
        compute_dtype: the dtype `dequantize` gives, and PEFT an adapter.
        product_dtype: if not None, x is cast to it for the product and y back, as bitsandbytes does with its
            `compute_dtype`; by default the product is computed in the dtype of x.
        format, blocksize: as in `qlora_native.quantize`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Make a layer of zeros. `dtype` is that of bias and `compute_dtype` (default: torch's default dtype).

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`, of which the keyword arguments are.
        """
        check_format(format)
        blocksize = chosen_blocksize(blocksize, format)
        double_quant = double_quant or format in MICROSCALED
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = torch.get_default_device() if device is None else torch.device(device)
        check_float_dtype("dtype", dtype)
        if in_features < 1 or out_features < 1:
            raise bad("in_features, out_features", "numbers above 0", f"{in_features}, {out_features}")
        bits = 8 if format == "int8" else 4
        blocks = ceil_div(in_features * out_features, blocksize)

        def fp32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        zeros = QuantizedWeight(
            codes=torch.zeros(codes_shape(out_features, in_features, bits), dtype=torch.uint8, device=device),
            absmax=torch.zeros(blocks, dtype=torch.uint8, device=device) if double_quant else fp32(blocks),
            nested_absmax=fp32(ceil_div(blocks, NESTED_BLOCKSIZE)) if double_quant else None,
            nested_code=_levels_of_scales(format).to(device, copy=True) if double_quant else None,
            offset=fp32() if double_quant else None,
            code=None if bits == 8 else functional.code_tensor(format, codebook, device),
            shape=(out_features, in_features),
            blocksize=blocksize,
            format=format,
            dtype=dtype,
        )
        self._set(zeros, nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None)

    def _set(self, q: QuantizedWeight, bias: nn.Parameter | None) -> None:
        """Initialize as a layer that holds `q`. Not through nn.Linear's constructor, which makes an fp32 weight."""
        nn.Module.__init__(self)
        guard_neighbours()
        self.product_dtype: torch.dtype | None = None
        self.replace_weight(q)
        self.bias = bias

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Put `q` [N, K] in the place of the weight, with its format, blocksize and dtype; shares its tensors."""
        self.out_features, self.in_features = q.shape
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

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: nn.Parameter | None = None) -> Linear4bit:
        """A layer over `q` [N, K] and `bias` [N]; shares their tensors.

        Raises:
            TypeError, ValueError: `q` is no QuantizedWeight; `bias` no floating-point parameter [N] beside it.
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
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> Linear4bit:
        """A layer with the quantized weight of `linear`, and its very bias. Arguments as `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: as `qlora_native.quantize`; `linear` is no nn.Linear or is quantized already.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise bad_type("linear", "an nn.Linear that is not quantized", type(linear).__name__)
        q = functional.quantize(linear.weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, linear.bias).train(linear.training)

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
            (self.out_features, self.in_features),
            self.blocksize,
            self.format,
            self.compute_dtype,
        )

    @property
    def W_q(self) -> nn.Parameter:
        """The codes, under the name by which PEFT knows a weight that `dequantize()` decodes.

        Raises:
            RuntimeError: PEFT asks, and it was imported after this layer was made: it would take codes for weights.
        """
        check_peft_is_guarded()
        return self._parameters["weight"]

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    def forward(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_scaling: float = 1.0,
        lora_dropout: float = 0.0,
    ) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x; the adapter as `qlora_native.linear`'s."""
        lora = (lora_a, lora_b, lora_scaling, lora_dropout)
        if self.product_dtype is None or self.product_dtype == x.dtype:
            return functional.linear(x, self.quantized_weight, self.bias, *lora)
        y = functional.linear(x.to(self.product_dtype), self.quantized_weight, self.bias, *lora)
        return y.to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype` (default: `compute_dtype`)."""
        return self.quantized_weight.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Make it a layer of zeros, as the constructor does: for a layer that left the meta device empty."""
        with torch.no_grad():
            for tensor in (self._parameters["weight"], self.absmax, self.nested_absmax, self.offset, self.bias):
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
        for name, own in (*self.weight_tensors().items(), ("bias", self.bias)):
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

    def extra_repr(self) -> str:
        """What `print` shows."""
        ours = f"format={self.format}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        return f"{super().extra_repr()}, {ours}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
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


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    format: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
    codebook: Tensor | Sequence[float] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace every `nn.Linear` in `model`, in place, by a `Linear4bit` over its quantized weight.

    Subclasses of nn.Linear stay: who wrote one has a reason. So does a layer whose weight belongs to something that
    stays too, such as an output layer tied to the embedding, and one that a model of transformers keeps in fp32 (T5
    casts its input to the weight's dtype). A module or weight that appears several times is quantized once and stays
    shared. All of it or nothing: layers are replaced when every one has been quantized.

    A model of transformers is from then on one that transformers knows as quantized: `save_pretrained` writes
    bitsandbytes' format with its quantization_config, or raises a ValueError that names the format it cannot write.
    So does that of a model of which `model` is a part.

    Args:
        skip: modules to leave alone, with all below them, by name: "lm_head", "layers.0", "mlp.down_proj". A name
            matches wherever its dotted parts appear in a module's path.
        format, blocksize, double_quant, codebook: as `qlora_native.quantize`.
        progress: show a progress bar, where tqdm is installed.

    Returns:
        `model`. Warns if it has nothing to quantize.

    Raises:
        TypeError, ValueError: as `qlora_native.quantize`, with the name of the layer; the model is as it was. Or
            `model` is itself an nn.Linear, which cannot be replaced in place, or `skip` a string.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "an nn.Module", type(model).__name__)
    if isinstance(model, nn.Linear):
        raise bad("model", "a module that contains nn.Linear layers", "a linear layer: use Linear4bit.from_linear")
    if isinstance(skip, str):
        raise bad_type("skip", "a sequence of names", "a string")
    names = _to_quantize(model, (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())))
    if not names:
        warnings.warn("quantize_model: found no nn.Linear to quantize", stacklevel=2)
    layers: dict[int, Linear4bit] = {}  # by id of the nn.Linear
    weights: dict[int, QuantizedWeight] = {}  # by id of its weight
    for name in _with_progress(names, progress):
        linear = model.get_submodule(name)
        if id(linear) in layers:
            continue
        try:
            if id(linear.weight) not in weights:
                weights[id(linear.weight)] = functional.quantize(
                    linear.weight, format, blocksize, double_quant, codebook
                )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.{error}" if str(error).startswith("weight") else str(error)) from None
        layer = Linear4bit.from_quantized(weights[id(linear.weight)], linear.bias)
        layers[id(linear)] = layer.train(linear.training)
        weights[id(linear.weight)] = layer.quantized_weight  # its parameters: the next layer with it shares them
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(model.get_submodule(name))])
    if names:
        for pretrained in transformers_models(model):
            adopt_quantized(pretrained)
    return model


def _levels_of_scales(format: str) -> Tensor:
    return scale_table(format) if format in MICROSCALED else DYNAMIC_MAP


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _to_quantize(model: nn.Module, skip: tuple[str, ...]) -> list[str]:
    """Paths of the linear layers to replace, every path of a shared one."""
    modules = list(model.named_modules(remove_duplicate=False))
    skipped = {id(module) for name, module in modules if any(f".{part}." in f".{name}." for part in skip)}
    found = [(name, module) for name, module in modules if type(module) is nn.Linear and id(module) not in skipped]
    chosen = {id(module) for _, module in found}
    staying = {
        id(parameter)
        for module in model.modules()
        if id(module) not in chosen
        for parameter in module.parameters(recurse=False)
    }
    return [name for name, module in found if id(module.weight) not in staying]


def _with_progress(names: list[str], progress: bool) -> Iterable[str]:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return names
        return tqdm(names, desc="quantize", unit="layer")
    return names
