"""Load embeddings in 4 bits with transformers, and the output layers that are tied to them.

transformers ties parameters by assigning one module's parameter to the other. A quantized weight has several tensors,
so only the embedding is quantized while a model is read; the layer tied to it is made afterwards, over the same
tensors.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ... import functional
from ..._core.errors import FLOAT_DTYPES, bad
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ..._layers.eligible import is_linear, kept_by_models, note_reason
from ..._layers.embedding import can_be_quantized
from ..._layers.hooks import take_over_hooks
from ...nn import Embedding4bit, Linear4bit
from ._weight_files import file_has

# Subclasses of nn.Embedding that multiply rows by `scalar_embed_scale` in the dtype of the rows, and do nothing else.
_SCALED = frozenset(f"{name}TextScaledWordEmbedding" for name in ("Gemma", "Gemma2", "Gemma3", "Gemma3n", "Gemma4"))


class ScaledEmbedding4bit(Embedding4bit):
    """An `Embedding4bit` whose rows are multiplied by a number, as Gemma's are.

    Attributes:
        scales: {dtype of the rows: the number, rounded to it}.
        plain: the class that it stands for.
    """

    scales: dict[torch.dtype, float]
    plain: type[nn.Embedding]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows of the weight, and multiply them."""
        rows = super().forward(ids)
        return rows * self.scales[rows.dtype]


def embedding_like(module: nn.Module) -> Callable[[QuantizedWeight], Embedding4bit] | None:
    """What makes an embedding over a quantized weight that computes what `module` does, or None if nothing does."""
    if can_be_quantized(module):
        return lambda q: Embedding4bit.from_quantized(q, module.padding_idx)
    if type(module).__name__ not in _SCALED or module.max_norm is not None:
        return None

    def scaled(q: QuantizedWeight) -> Embedding4bit:
        layer = ScaledEmbedding4bit.from_quantized(q, module.padding_idx)
        scale = module.scalar_embed_scale
        layer.scales = {dtype: torch.tensor(scale, dtype=dtype).item() for dtype in FLOAT_DTYPES}
        layer.plain = type(module)
        return layer

    return scaled


def tied_linears(model: nn.Module) -> dict[str, str]:
    """The ties of a model of transformers: {path of an nn.Linear: path of the module that shares its weight}."""
    paths = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
    }
    modules = dict(model.named_modules())
    return {target: source for target, source in paths.items() if target in modules and is_linear(modules[target])}


def replace_embeddings(model: nn.Module, config: Any, wanted: bool, quantized: set[str] | None) -> list[str]:
    """Replace embeddings by `Embedding4bit` without values.

    Args:
        model: on the meta device.
        config: a `BitsAndBytesConfig` of ours.
        wanted: whether embeddings are to be quantized while they are read.
        quantized: the names that the files have in 4 bits, or None if the files are not quantized. If they are, only
            these embeddings are replaced.

    Returns:
        The paths of linear layers that are tied to an embedding or to each other, and are not read from the files.
    """
    keep = kept_by_models(model)
    for name, module in list(model.named_modules()):
        chosen = wanted if quantized is None else file_has(quantized, f"{name}.weight")
        if not chosen or not can_be_quantized(module) or not should_convert_module(name, keep):
            continue
        layer = Embedding4bit(
            *module.weight.shape, module.padding_idx, "meta", module.weight.dtype, **config.quantize_options
        )
        model.set_submodule(name, layer)
    tied = tied_linears(model)
    for target, source in tied.items():
        if not isinstance(model.get_submodule(source), Embedding4bit):
            note_reason(model.get_submodule(target), "tied to a weight that stays")
    return list(tied)


def replace_tied(model: nn.Module, config: Any) -> None:
    """Replace each layer that is tied to an `Embedding4bit` by a `Linear4bit` over the same tensors.

    Called after the model has been read. A checkpoint may have the weight of the layer and not of the embedding; the
    embedding then shares it. It may also have both, if they differ.
    """
    for module in model.modules():
        if isinstance(module, Embedding4bit) and (weight := module._parameters["weight"]).is_floating_point():
            module.replace_weight(functional.quantize(weight, **config.quantize_options))
    for target, source in tied_linears(model).items():
        embedding, linear = model.get_submodule(source), model.get_submodule(target)
        if isinstance(embedding, Embedding4bit):
            layer = Linear4bit.from_quantized(embedding.quantized_weight, linear.bias)
            layer.compute_dtype = config.compute_dtype
            take_over_hooks(layer, linear)
            model.set_submodule(target, layer.train(linear.training))


def codes_of_embeddings(model: nn.Module) -> set[int]:
    """The ids of the codes of each `Embedding4bit` in `model`."""
    return {id(module._parameters["weight"]) for module in model.modules() if isinstance(module, Embedding4bit)}


def _check_rows(layer: nn.Module, rows: int, tokens: int | None, multiple: int | None) -> None:
    """Raise unless `layer`, if it is quantized, has as many rows as a resize of one of `rows` rows would give it."""
    wanted = rows if tokens is None else tokens
    if multiple is not None:
        wanted = math.ceil(wanted / multiple) * multiple
    if isinstance(layer, QuantizedLayer) and layer.quantized_weight.shape[0] != wanted:
        expected = f"{layer.quantized_weight.shape[0]} tokens, as {type(layer).__name__} has"
        raise bad("resize_token_embeddings", expected, wanted)


# Wraps what `resize_token_embeddings` calls first, so that nothing is resized where a part of it cannot be.
def _refusing_before(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def resize(
        self: PreTrainedModel,
        new_num_tokens: int | None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        embedding = self.get_input_embeddings()
        if not (new_num_tokens is None and pad_to_multiple_of is None):
            for layer in (embedding, self.get_output_embeddings()):
                _check_rows(layer, embedding.weight.shape[0], new_num_tokens, pad_to_multiple_of)
        return method(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize


# Wraps what resizes one layer, and would take codes for a weight of half as many columns.
def _refusing_quantized(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def resized(self: PreTrainedModel, old: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old, QuantizedLayer):
            return method(self, old, *args, **kwargs)
        given = signature.bind(self, old, *args, **kwargs).arguments
        rows = old.quantized_weight.shape[0]
        _check_rows(old, rows, given.get("new_num_tokens"), given.get("pad_to_multiple_of"))
        return old

    return resized


for _name, _wrap in (
    ("_resize_token_embeddings", _refusing_before),
    ("_get_resized_embeddings", _refusing_quantized),
    ("_get_resized_lm_head", _refusing_quantized),
):
    setattr(PreTrainedModel, _name, _wrap(getattr(PreTrainedModel, _name)))
