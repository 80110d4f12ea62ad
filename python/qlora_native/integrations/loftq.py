"""LoftQ: initialize an adapter so that the 4-bit weight plus the adapter is as near as possible to the 16-bit weight.

    model = get_peft_model(quantized_model, LoraConfig(...))
    initialize_loftq(model, folder_of_the_16_bit_model)

(Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, algorithm 1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._core.errors import bad
from .._core.quantize import quantized_like
from .._core.weight import QuantizedWeight
from ..convert._checkpoints import Checkpoint
from .peft._lora import LoraLinear4bit

__all__ = ["initialize_loftq", "loftq"]


@torch.no_grad()
def loftq(
    weight: Tensor, q: QuantizedWeight, rank: int, scaling: float = 1.0, iterations: int = 1
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """Find an adapter, and a quantized weight, whose sum is nearest to `weight`.

    Args:
        weight: [N, K] in fp32, bf16 or fp16.
        q: the quantized `weight`. The result has its format, blocksize and double quantization.
        rank: the rank of the adapter, at most min(N, K).
        scaling: the factor of B A, above 0.
        iterations: 1 leaves `q` unchanged, so that adapters over the same base can be exchanged. Each further iteration
            quantizes W - scaling * B A again, which makes the error smaller.

    Returns:
        (q, lora_a fp32 [rank, K], lora_b fp32 [N, rank]).

    Raises:
        ValueError: the shapes do not fit each other, or a number is out of its range.
    """
    if weight.shape != q.shape:
        raise bad("weight", f"{list(q.shape)}, the shape of q", list(weight.shape))
    if not 1 <= rank <= min(q.shape):
        raise bad("rank", f"1 ... {min(q.shape)}", rank)
    if not scaling > 0:
        raise bad("scaling", "a number above 0", scaling)
    if iterations < 1:
        raise bad("iterations", "a number above 0", iterations)
    weight = weight.float()
    a, b = _nearest(weight - q.dequantize(torch.float32), rank, scaling)
    for _ in range(iterations - 1):
        q = quantized_like(q, weight - scaling * (b @ a))
        a, b = _nearest(weight - q.dequantize(torch.float32), rank, scaling)
    return q, a, b


def _nearest(residual: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The A [rank, K] and B [N, rank] for which scaling * B A is nearest to `residual` (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def initialize_loftq(
    model: nn.Module, weights: str | Path | Mapping[str, Tensor], adapter_name: str = "default", iterations: int = 1
) -> dict[str, tuple[float, float]]:
    """Set the adapter of every `LoraLinear4bit` in a model to its LoftQ values, in place.

    Args:
        model: a PEFT model over quantized layers.
        weights: the 16-bit model: its folder, which is read tensor by tensor, or its state dict, with the names of the
            base model.
        adapter_name: the adapter to initialize.
        iterations: as in `loftq`. With more than 1 the base changes too: save it with the adapter.

    Returns:
        {layer: (error without the adapter, error with it)}, each |W - (Q + scaling * B A)| / |W| in Frobenius norms.

    Raises:
        ValueError: the model has no such layer or adapter, or one with DoRA, a rank above min(N, K) or a scaling that
            is not above 0; `iterations` is less than 1; or `weights` lacks the weight of a layer. In the last case the
            layers before it have been initialized.
    """
    source = source_of(weights)
    errors = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        base = layer.get_base_layer()
        weight = weight_of(source, name, layer)
        scaling = layer.scaling[adapter_name]
        before = _error(weight, base.dequantize(torch.float32))
        q, a, b = loftq(weight, base.quantized_weight, layer.r[adapter_name], scaling, iterations)
        if iterations > 1:
            base.replace_weight(q)
        set_adapter(layer, adapter_name, a, b)
        errors[name] = before, _error(weight, q.dequantize(torch.float32) + scaling * (b @ a))
    return errors


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLinear4bit]:
    """The quantized layers with an adapter of that name, by their path.

    Raises:
        ValueError: there is none, one that computes more than scaling * B A, a rank above min(N, K), or a scaling that
            is not above 0.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear4bit) and adapter_name in module.lora_A
    }
    if not layers:
        raise bad("model", f"LoRA layers over Linear4bit with an adapter {adapter_name!r}", "none")
    for name, layer in layers.items():
        variant, rank, scaling = (
            layer.lora_variant.get(adapter_name),
            layer.r[adapter_name],
            layer.scaling[adapter_name],
        )
        if variant is not None:
            raise bad(f"{name}: adapter {adapter_name!r}", "plain LoRA", type(variant).__name__)
        if rank > (most := min(layer.get_base_layer().quantized_weight.shape)):
            raise bad(f"{name}: rank", f"1 ... {most}", rank)
        if not scaling > 0:
            raise bad(f"{name}: scaling", "a number above 0", scaling)
    return layers


def source_of(weights: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor] | Checkpoint:
    """The weights of the 16-bit model by their names."""
    return Checkpoint(weights) if isinstance(weights, str | Path) else weights


def key_of(source: Mapping[str, Tensor] | Checkpoint, name: str) -> str:
    """The key of the weight of the layer at `name`."""
    key = f"{name.removeprefix('base_model.model.')}.weight"
    if key not in source:
        raise bad("weights", f"the key {key!r}", "none")
    return key


def weight_of(source: Mapping[str, Tensor] | Checkpoint, name: str, layer: LoraLinear4bit) -> Tensor:
    """The 16-bit weight [N, K] of the layer at `name`."""
    base = layer.get_base_layer()
    weight = source[key_of(source, name)].to(base.weight.device)
    return _as_stored_in_a_linear(weight, base.dequantize(torch.float32))


def set_adapter(layer: LoraLinear4bit, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Set A and B of an adapter, in its own dtype."""
    for module, value in ((layer.lora_A[adapter_name], a), (layer.lora_B[adapter_name], b)):
        module.weight.data = value.to(module.weight.dtype)


def _as_stored_in_a_linear(weight: Tensor, quantized: Tensor) -> Tensor:
    """`weight` or its transpose: GPT-2's Conv1D has [in, out]. Only its values tell how a square one is laid out."""
    if weight.shape != quantized.shape[::-1]:
        return weight
    straight = weight.shape == quantized.shape and _error(weight, quantized) <= _error(weight.t(), quantized)
    return weight if straight else weight.t()


def _error(weight: Tensor, approximation: Tensor) -> float:
    return ((weight.float() - approximation).norm() / weight.float().norm()).item()
