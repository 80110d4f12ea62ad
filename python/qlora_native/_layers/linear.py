"""`Linear4bit`, an `nn.Linear` whose weight stays in 4 bits, and `quantize_model`, which puts it into a model.

`Embedding4bit` and `Experts4bit` are the same for embeddings and for the experts of a mixture.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._core.errors import bad, bad_type, check_memory
from .._core.progress import Progress
from .._core.weight import QuantizedWeight
from .base import QuantizedLayer, zero_weight
from .callbacks import (
    added_by_peft,
    adopt_layers_of_peft,
    adopt_quantized,
    check_layers_of_peft,
    check_peft_is_guarded,
    find_experts,
    run_quantized_experts,
    transformers_models,
)
from .embedding import Embedding4bit, can_be_quantized
from .experts import Experts4bit
from .sizes import (
    is_linear,
    linears_of_routers,
    note_reason,
    size_report,
    unquantized_parameters,
    why_nothing,
)


class Linear4bit(QuantizedLayer, nn.Linear):
    """A linear layer over a quantized weight, which `qlora_native.linear` multiplies by.

    A layer made by the constructor multiplies by zero until a state dict is loaded; `from_linear` and `from_quantized`
    make one with values. The state dict has these entries:

        weight         uint8 [N, K/2], frozen parameter: the codes (see QuantizedWeight.codes for "int8" and odd K)
        absmax         the scales: double-quantized uint8 [blocks], frozen parameter; or fp32 [blocks], buffer
        nested_absmax, nested_code, offset     fp32, buffers of the double quantization; None without it
        codebook       fp32 [16], buffer: what the codes mean; None for "int8"
        bias           [N], parameter, or None

    Bytes are parameters, so that FSDP shards them. fp32 values are buffers, so that FSDP's mixed precision does not
    cast them. Casting the module (`.to(dtype)`, `.half()`, ...) casts the bias and `compute_dtype`, never a scale.

    Attributes:
        in_features, out_features, bias: as in `nn.Linear`.
        compute_dtype, product_dtype, format, blocksize: as in every QuantizedLayer.
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
        """Make a layer of zeros.

        Args:
            in_features, out_features: the columns K and rows N of the weight, each at least 1.
            bias: whether the layer has a bias [N].
            device: where the tensors are stored; None is torch's default device.
            dtype: of the bias, and the `compute_dtype`: fp32, bf16 or fp16; None is torch's default dtype.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        if in_features < 1 or out_features < 1:
            raise bad("in_features, out_features", "numbers above 0", f"{in_features}, {out_features}")
        zeros = zero_weight((out_features, in_features), dtype, device, format, blocksize, double_quant, codebook)
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
        """
        self.out_features, self.in_features = q.shape
        super().replace_weight(q)

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
        format: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        codebook: Tensor | Sequence[float] | None = None,
    ) -> Linear4bit:
        """Quantize a linear layer.

        Args:
            linear: the layer; its bias is shared, not copied.
            format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.

        Returns:
            A new layer on the same device, in the same training mode.

        Raises:
            TypeError: `linear` is not an nn.Linear, or is quantized already.
            TypeError, ValueError: `qlora_native.quantize` refuses its weight or an argument.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise bad_type("linear", "an nn.Linear that is not quantized", type(linear).__name__)
        q = functional.quantize(linear.weight, format, blocksize, double_quant, codebook)
        return cls.from_quantized(q, linear.bias).train(linear.training)

    @property
    def W_q(self) -> nn.Parameter:
        """The codes, under the name by which PEFT recognises a layer that has `dequantize()`.

        Raises:
            RuntimeError: PEFT was imported after this layer was made, and would take the codes for weights.
        """
        check_peft_is_guarded()
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
        if self.product_dtype is not None:
            check_memory("x", x)
            rows = x.to(self.product_dtype)
        if adapter_index is None:
            y = functional.linear(rows, q, self.bias, *lora)
        else:
            y = functional.linear_grouped(rows, q, None, self.bias, *lora, adapter_index=adapter_index)
        return y if self.product_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        """The text that `print` shows between the parentheses."""
        return f"{super().extra_repr()}, {self._describe_format()}"


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    format: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
    codebook: Tensor | Sequence[float] | None = None,
    progress: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Replace every `nn.Linear` in a model, in place, by a `Linear4bit` over its quantized weight.

    These layers are not quantized: subclasses of nn.Linear, but for Falcon's, which computes the same; layers that
    share their weight with a module that is not quantized, such as an output layer tied to the embedding; layers that a
    model of transformers keeps in fp32 (T5 casts its input to the weight's dtype); and routers, which choose experts,
    with the linear layers in them.

    A model may have adapters of PEFT. They stay as they are, the layers below them are quantized, and LoRA is fused as
    if the model had been quantized first. Modules in `modules_to_save`, and embeddings below an adapter, stay too.

    With `skip=()` every plain `nn.Embedding` becomes an `Embedding4bit`, and an output layer tied to one becomes a
    `Linear4bit` over the same bytes. The experts of a mixture, which transformers keeps as parameters of three
    dimensions, become `Experts4bit`; the implementation "qlora_native" of transformers' registry of experts runs them.

    A module or weight that appears several times is quantized once and stays shared. Layers are replaced only after
    every one has been quantized, so an error leaves the model as it was. `size_report(model)` lists what was quantized,
    and what was not and why.

    transformers then treats its model as quantized: `save_pretrained`, also of a larger model that contains `model`,
    writes bitsandbytes' format (or, with "mxfp4" and "nvfp4", one that only this library reads) with a
    quantization_config, or raises a ValueError that names the format it cannot write.

    Args:
        model: any module but a linear layer, which cannot be replaced in place.
        skip: names of modules that stay as they are, with everything in them: "lm_head", "layers.0", "mlp.down_proj". A
            name matches wherever its dotted parts appear in the path of a module. The experts of one layer are skipped
            together.
        format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.
        progress: show the progress on stderr, and then the table of bytes. On a terminal the progress is a bar, if tqdm
            is installed; in a log file it is a line now and then.
        strict: refuse a model that has weights whose use is unknown. Otherwise they stay in 16 bits, with a warning if
            they may be experts.

    Returns:
        `model`. Warns if it has nothing to quantize, and says what was left, and why.

    Raises:
        TypeError: `model` is not a module, or `skip` is a string.
        ValueError: `model` is a linear layer; `strict`, and there are weights whose use is unknown; or the experts of a
            layer differ in shape; or an adapter is merged into a layer.
        NotImplementedError: a method of PEFT over a layer has not been tried over quantized ones.
        TypeError, ValueError: `qlora_native.quantize` refuses a weight or an argument; the message names the layer.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "an nn.Module", type(model).__name__)
    if isinstance(model, nn.Linear):
        raise bad("model", "a module that contains nn.Linear layers", "a linear layer: use Linear4bit.from_linear")
    if isinstance(skip, str):
        raise bad_type("skip", "a sequence of names", "a string")
    skip = tuple(skip)
    with_embeddings = not skip
    skip += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    names = _to_quantize(model, skip, with_embeddings)
    experts = [found for found in find_experts(model) if not _skipped(found, skip)]
    for found in experts:
        _ = found.shapes  # raises if they differ, before anything is quantized
    planned = {id(model.get_submodule(name).weight) for name in names}
    planned |= {id(getattr(found.module, name)) for found in experts for name in found.names}
    unknown = [each for each in unquantized_parameters(model, planned) if each.unknown_use]
    if unknown and strict:
        raise bad("model", "weights whose use is known", "; ".join(map(str, unknown)))
    check_layers_of_peft(model, planned)
    if not names and not experts:
        warnings.warn(f"quantize_model: found no nn.Linear to quantize; {why_nothing(model)}", stacklevel=2)
    options = (format, blocksize, double_quant, codebook)
    weights: dict[int, QuantizedWeight] = {}  # by the id of the weight

    def quantized(path: str, weight: Tensor, transposed: bool = False) -> QuantizedWeight:
        try:
            if id(weight) not in weights:
                weights[id(weight)] = functional.quantize(weight.transpose(1, 2) if transposed else weight, *options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}{error}" if str(error).startswith("weight") else str(error)) from None
        return weights[id(weight)]

    layers: dict[Any, QuantizedLayer] = {}  # by the id of the layer, or for experts by (id of the module, name)
    items = [*names, *experts]
    for item in Progress(len(items), progress, "quantize", "layer").over(items):
        if isinstance(item, str):
            dense = model.get_submodule(item)
            if id(dense) not in layers:
                q = quantized(f"{item}.", dense.weight)
                if isinstance(dense, nn.Embedding):
                    layer = Embedding4bit.from_quantized(q, dense.padding_idx)
                else:
                    layer = Linear4bit.from_quantized(q, dense.bias)
                layers[id(dense)] = layer.train(dense.training)
                weights[id(dense.weight)] = (
                    layer.quantized_weight
                )  # so that a layer tied to this one shares its parameters
            continue
        for name in item.names:
            if (id(item.module), name) not in layers:
                weight = getattr(item.module, name)
                layer = Experts4bit.from_quantized(
                    quantized(f"{item.path}.{name}, ", weight, item.transposed), item.transposed
                )
                layers[id(item.module), name] = layer.train(item.module.training)
                weights[id(weight)] = layer.quantized_weight
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(model.get_submodule(name))])
    for found in experts:
        for name in found.names:
            found.module._parameters.pop(name, None)
            setattr(found.module, name, layers[id(found.module), name])
        run_quantized_experts(found.module)
    for each in unknown:
        if each.is_stack:
            warnings.warn(f"quantize_model: {each}", stacklevel=2)
    if layers:
        adopt_layers_of_peft(model)
        for pretrained in transformers_models(model):
            adopt_quantized(pretrained)
        if progress:
            sys.stderr.write(f"{size_report(model)}\n")
    return model


def _is_named(skip: tuple[str, ...], path: str) -> bool:
    """Whether one of the names to skip appears in `path`."""
    return any(f".{part}." in f".{path}." for part in skip)


def _skipped(found: Any, skip: tuple[str, ...]) -> bool:
    """Whether `skip` names the experts of a module. If so, the reason is stored there for the report."""
    skipped = any(_is_named(skip, f"{found.path}.{name}") for name in found.names)
    if skipped:
        note_reason(found.module, "named in skip")
    return skipped


def _to_quantize(model: nn.Module, skip: tuple[str, ...], with_embeddings: bool) -> list[str]:
    """The paths of the linear layers and embeddings to replace. A shared module has several."""
    modules = list(model.named_modules(remove_duplicate=False))
    routers = {id(model.get_submodule(name)) for name in linears_of_routers(model)}
    skipped = {id(module) for name, module in modules if _is_named(skip, name)} - routers
    staying_modules = skipped | routers | added_by_peft(model)
    found = [
        (name, module)
        for name, module in modules
        if (is_linear(module) or (with_embeddings and can_be_quantized(module))) and id(module) not in staying_modules
    ]
    chosen = {id(module) for _, module in found}
    staying = {
        id(parameter)
        for module in model.modules()
        if id(module) not in chosen
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        if not is_linear(module) or id(module) in routers:
            continue
        if id(module) in skipped:
            note_reason(module, "named in skip, or kept in fp32")
        elif id(module.weight) in staying:
            note_reason(module, "tied to a weight that stays")
    return [name for name, module in found if id(module.weight) not in staying]
