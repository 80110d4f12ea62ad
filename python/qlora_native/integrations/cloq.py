"""CLoQ: initialize an adapter so that the 4-bit model with it gives what the 16-bit model gives, on given text.

    model = get_peft_model(quantized_model, LoraConfig(...))
    initialize_cloq(model, folder_of_the_16_bit_model, batches)

LoftQ makes the error of the weights small; this makes small the error of what they give, ‖X (W - Q - s B A)ᵀ‖, for the
inputs X of each layer. The base stays as it is, so the adapter can be exchanged with others over it. (Deng et al.,
"CLoQ: Enhancing Fine-Tuning of Quantized LLMs via Calibrated LoRA Initialization", 2025; Zhang et al., "QERA: an
Analytical Framework for Quantization Error Reconstruction", 2024.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .._calibrate.batches import check_tokens, checked_batches
from .._calibrate.layers import Layers
from .._calibrate.observe import Inputs
from .._core.errors import bad
from .._core.progress import Progress
from .._core.weight import QuantizedWeight
from .loftq import adapted_layers, key_of, set_adapter, source_of, weight_of

__all__ = ["cloq", "initialize_cloq"]

ITERATIONS = 8  # of the subspace: on SmolLM2 the error was then within 0.05 % of the least, also over a calibrated base


@torch.no_grad()
def cloq(
    weight: Tensor, q: QuantizedWeight, gram: Tensor, rank: int, scaling: float = 1.0
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Find the adapter whose sum with a quantized weight gives most nearly what `weight` gives.

    With the residual D = W - Q, the best product of rank r is the projection of D on the r principal directions U of
    the output's error X Dᵀ: B A = U Uᵀ D. They are the eigenvectors of D H Dᵀ for H = XᵀX, so H need not be invertible.

    Args:
        weight: W [N, K] in fp32, bf16 or fp16.
        q: the quantized `weight`.
        gram: XᵀX [K, K] in fp32.
        rank: the rank r of the adapter, at most min(N, K).
        scaling: the factor s of B A.

    Returns:
        (A fp32 [r, K], B fp32 [N, r], (error without the adapter, error with it)), each error
        ‖X (W - Q - s B A)ᵀ‖ / ‖X Wᵀ‖ in Frobenius norms.

    Raises:
        ValueError: the shapes do not fit each other, or a number is out of its range.
    """
    if weight.shape != q.shape:
        raise bad("weight", f"{list(q.shape)}, the shape of q", list(weight.shape))
    N, K = q.shape
    if gram.shape != (K, K):
        raise bad("gram", f"[{K}, {K}]", list(gram.shape))
    if not 1 <= rank <= min(N, K):
        raise bad("rank", f"1 ... {min(N, K)}", rank)
    if not scaling > 0:
        raise bad("scaling", "a number above 0", scaling)
    weight = weight.float()
    residual = weight - q.dequantize(torch.float32)
    directions, largest = _principal(residual, gram, rank)
    whole = torch.dot((weight @ gram).view(-1), weight.view(-1)).item()
    before = torch.dot((residual @ gram).view(-1), residual.view(-1)).item()
    errors = [math.sqrt(max(0.0, part) / whole) if whole > 0 else 0.0 for part in (before, before - largest)]
    root = math.sqrt(scaling)
    return (directions.T @ residual) / root, directions / root, (errors[0], errors[1])


def _principal(residual: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` leading eigenvectors [N, rank] of D H Dᵀ, and the sum of their eigenvalues, by subspace iteration."""
    width = min(2 * rank, *residual.shape)
    start = torch.Generator().manual_seed(0)
    subspace = torch.randn(len(residual), width, generator=start).to(residual.device)
    for _ in range(ITERATIONS):
        subspace = torch.linalg.qr(residual @ (gram @ (residual.T @ subspace))).Q
    inner = residual.T @ subspace
    values, vectors = torch.linalg.eigh(inner.T @ (gram @ inner))
    return (subspace @ vectors[:, -rank:].flip(1)).contiguous(), values[-rank:].sum().item()


@torch.no_grad()
def initialize_cloq(
    model: nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    batches: Iterable[Tensor | Mapping[str, Any]],
    adapter_name: str = "default",
    progress: bool = True,
) -> dict[str, tuple[float, float]]:
    """Set the adapter of every `LoraLinear4bit` in a model to its CLoQ values, in place.

    One pass over the batches, layer by layer, gives the inputs, so memory holds those of one layer. They are the inputs
    that the quantized model gives as it is. Weights outside of such layers take another pass, as in `calibrate`.

    Args:
        model: a PEFT model over quantized layers.
        weights: the 16-bit model: its folder, which is read tensor by tensor, or its state dict, with the names of the
            base model.
        batches: some of the text that the model will see, as in `qlora_native.calibrate`.
        adapter_name: the adapter to initialize.
        progress: show the progress on stderr.

    Returns:
        {layer: (error without the adapter, error with it)}, as in `cloq`.

    Raises:
        TypeError: a batch is neither a tensor nor a mapping.
        ValueError: the model has no such layer or adapter, or one with DoRA, a rank above min(N, K) or a scaling that
            is not above 0; `weights` lacks the weight of a layer; the batches are such as `calibrate` refuses; an input
            has a NaN or Inf; or no batch reaches a layer. In the last two cases the layers before it have been
            initialized.
        NotImplementedError: the model is not on the CPU.
    """
    found = adapted_layers(model, adapter_name)
    if devices := {parameter.device.type for parameter in model.parameters()} - {"cpu"}:
        raise NotImplementedError(f"initialize_cloq: expected a model on the CPU, got one on {min(devices)}")
    source = source_of(weights)
    for name in found:
        key_of(source, name)
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # takes use_cache
    given = checked_batches(base, batches)
    check_tokens(given, max(layer.get_base_layer().in_features for layer in found.values()))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        layers = Layers(base, given, found.values())
        inside = [set(module.modules()) for module in layers.modules]
        stages = [{name: each for name, each in found.items() if each in modules} for modules in inside]
        if rest := {name: each for name, each in found.items() if not any(each in modules for modules in inside)}:
            stages.append(rest)
        errors = {}
        counted = Progress(len(stages), progress, "initialize", "layer")
        for index, own in counted.over(enumerate(stages)):
            inputs = Inputs(own)
            with inputs.observed():
                for number in layers.run(index if index < len(inside) else None, advance=True):
                    inputs.begin(given[number])
            for name, layer in own.items():
                gram = inputs.gram([inputs.key(name)], name)
                if gram is None:
                    raise bad(name, "a layer that the batches reach", "one that none reaches")
                weight, q = weight_of(source, name, layer), layer.get_base_layer().quantized_weight
                a, b, errors[name] = cloq(weight, q, gram, layer.r[adapter_name], layer.scaling[adapter_name])
                set_adapter(layer, adapter_name, a, b)
    finally:
        for module, training in modes.items():
            module.training = training
    return errors
