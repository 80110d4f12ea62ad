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

from . import functional
from ._embedding import Embedding4bit, can_be_quantized
from ._errors import bad, bad_type
from ._experts import Experts4bit
from ._layer import QuantizedLayer, zero_weight
from ._neighbours import (
    adopt_quantized,
    check_peft_is_guarded,
    find_experts,
    run_quantized_experts,
    transformers_models,
)
from ._progress import Progress
from ._sizes import SizeReport, left_alone, linears_of_routers, note_left, size_report
from ._weight import QuantizedWeight

__all__ = ["Embedding4bit", "Experts4bit", "Linear4bit", "SizeReport", "quantize_model", "size_report"]


class Linear4bit(QuantizedLayer, nn.Linear):
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

    Its attributes compute_dtype, product_dtype, format and blocksize are those of every QuantizedLayer.
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
        if in_features < 1 or out_features < 1:
            raise bad("in_features, out_features", "numbers above 0", f"{in_features}, {out_features}")
        zeros = zero_weight((out_features, in_features), dtype, device, format, blocksize, double_quant, codebook)
        zero_bias = nn.Parameter(torch.zeros(out_features, device=zeros.device, dtype=zeros.dtype)) if bias else None
        self._set(zeros, zero_bias)

    def _set(self, q: QuantizedWeight, bias: nn.Parameter | None) -> None:
        """Initialize as a layer that holds `q`. Not through nn.Linear's constructor, which makes an fp32 weight."""
        self._begin(q)
        self.bias = bias

    def replace_weight(self, q: QuantizedWeight) -> None:
        """Put `q` [N, K] in the place of the weight, with its format, blocksize and dtype; shares its tensors."""
        self.out_features, self.in_features = q.shape
        super().replace_weight(q)

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

    @property
    def W_q(self) -> nn.Parameter:
        """The codes, under the name by which PEFT knows a weight that `dequantize()` decodes.

        Raises:
            RuntimeError: PEFT asks, and it was imported after this layer was made: it would take codes for weights.
        """
        check_peft_is_guarded()
        return self._parameters["weight"]

    def forward(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_scaling: float = 1.0,
        lora_dropout: float = 0.0,
        adapter_index: Tensor | None = None,
    ) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x; the adapter as `qlora_native.linear`'s.

        `adapter_index`: int64 [...], which of the adapters in `lora_a` [count, rank, in_features] and `lora_b` [count,
        out_features, rank] each row of x has, as `qlora_native.functional.linear_grouped` takes it.
        """
        q, lora = self.quantized_weight, (lora_a, lora_b, lora_scaling, lora_dropout)
        rows = x if self.product_dtype is None else x.to(self.product_dtype)
        if adapter_index is None:
            y = functional.linear(rows, q, self.bias, *lora)
        else:
            y = functional.linear_grouped(rows, q, None, self.bias, *lora, adapter_index=adapter_index)
        return y if self.product_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
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
    """Replace every `nn.Linear` in `model`, in place, by a `Linear4bit` over its quantized weight; experts likewise.

    Subclasses of nn.Linear stay: who wrote one has a reason. So does a layer whose weight belongs to something that
    stays too, such as an output layer tied to the embedding, and one that a model of transformers keeps in fp32 (T5
    casts its input to the weight's dtype). With `skip=()` every plain `nn.Embedding` becomes an `Embedding4bit`, and an
    output layer that is tied to one a `Linear4bit` over the same bytes. A module or weight that appears several times
    is quantized once and stays shared. All of it or nothing: layers are replaced when every one has been quantized.

    The experts of a mixture, which transformers keeps as parameters of three dimensions, become `Experts4bit`, and are
    run by the implementation "qlora_native" of its registry of experts. Routers stay, linear layers in them too. What
    was quantized, what was not and why is `size_report(model)`; with `progress` it is printed.

    A model of transformers is from then on one that transformers knows as quantized: `save_pretrained` writes
    bitsandbytes' format with its quantization_config, or raises a ValueError that names the format it cannot write.
    So does that of a model of which `model` is a part.

    Args:
        skip: modules to leave alone, with all below them, by name: "lm_head", "layers.0", "mlp.down_proj". A name
            matches wherever its dotted parts appear in a module's path. Experts of one layer stay together.
        format, blocksize, double_quant, codebook: as `qlora_native.quantize`.
        progress: show how far it is on stderr (a bar on a terminal, where tqdm is installed; in a log file a line now
            and then), and then the table of bytes.
        strict: refuse a model with weights of which it is not known how they are multiplied by, which stay otherwise,
            with a warning for experts.

    Returns:
        `model`. Warns if it has nothing to quantize.

    Raises:
        TypeError, ValueError: as `qlora_native.quantize`, with the name of the layer; experts of one layer differ in
            shape; `strict`, and there are weights of unknown use; the model is as it was. Or `model` is itself an
            nn.Linear, which cannot be replaced in place, or `skip` a string.
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
        _ = found.shapes  # checked before anything is quantized
    planned = {id(model.get_submodule(name).weight) for name in names}
    planned |= {id(getattr(found.module, name)) for found in experts for name in found.names}
    unknown = [left for left in left_alone(model, planned) if left.unknown]
    if unknown and strict:
        raise bad("model", "weights that are known how to be multiplied by", "; ".join(map(str, unknown)))
    if not names and not experts:
        warnings.warn("quantize_model: found no nn.Linear to quantize", stacklevel=2)
    options = (format, blocksize, double_quant, codebook)
    weights: dict[int, QuantizedWeight] = {}  # by id of the weight

    def quantized(path: str, weight: Tensor, transposed: bool = False) -> QuantizedWeight:
        try:
            if id(weight) not in weights:
                weights[id(weight)] = functional.quantize(weight.transpose(1, 2) if transposed else weight, *options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}{error}" if str(error).startswith("weight") else str(error)) from None
        return weights[id(weight)]

    layers: dict[Any, QuantizedLayer] = {}  # by id of the layer, or of the module of experts and the name in it
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
                weights[id(dense.weight)] = layer.quantized_weight  # its parameters: the next layer shares them
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
    for left in unknown:
        if left.is_stack:
            warnings.warn(f"quantize_model: {left}", stacklevel=2)
    if layers:
        for pretrained in transformers_models(model):
            adopt_quantized(pretrained)
        if progress:
            sys.stderr.write(f"{size_report(model)}\n")
    return model


def _is_named(skip: tuple[str, ...], path: str) -> bool:
    """Whether one of the names to skip appears in `path`."""
    return any(f".{part}." in f".{path}." for part in skip)


def _skipped(found: Any, skip: tuple[str, ...]) -> bool:
    """Whether the experts of a module are to be left alone, which is noted there for the report."""
    skipped = any(_is_named(skip, f"{found.path}.{name}") for name in found.names)
    if skipped:
        note_left(found.module, "named in skip")
    return skipped


def _to_quantize(model: nn.Module, skip: tuple[str, ...], with_embeddings: bool) -> list[str]:
    """Paths of the linear layers and embeddings to replace, every path of a shared one."""
    modules = list(model.named_modules(remove_duplicate=False))
    routers = {id(model.get_submodule(name)) for name in linears_of_routers(model)}
    skipped = {id(module) for name, module in modules if _is_named(skip, name)} - routers
    found = [
        (name, module)
        for name, module in modules
        if (type(module) is nn.Linear or (with_embeddings and can_be_quantized(module)))
        and id(module) not in skipped | routers
    ]
    chosen = {id(module) for _, module in found}
    staying = {
        id(parameter)
        for module in model.modules()
        if id(module) not in chosen
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in routers:
            continue
        if id(module) in skipped:
            note_left(module, "named in skip, or kept in fp32")
        elif id(module.weight) in staying:
            note_left(module, "tied to a weight that stays")
    return [name for name, module in found if id(module.weight) not in staying]
