"""Small models with adapters, in two forms: over our quantized layers, and over plain ones with the same values."""

import copy

import models
import peft
import pytest
import torch
from torch import nn

import qlora_native as qn
from qlora_native.integrations.peft import register

# {family: how many layers are quantized}: neither the output layer nor T5's wo, which stays in fp32.
LINEARS = {"llama": 2 * 7, "gpt-neox": 2 * 4, "t5": 2 * 5 + 2 * 9}
TASK = {"t5": "SEQ_2_SEQ_LM"}
EXCLUDED = {"t5": ["wo"]}
families = pytest.mark.parametrize("family", LINEARS)


def quantized(family="llama", dtype=torch.float32):
    """A model of `models.make` with our layers in it."""
    return qn.nn.quantize_model(models.make(family, dtype), progress=False)


def dequantized(model):
    """The quantized model's twin with plain nn.Linear layers of the same values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, qn.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    if "hf_quantizer" in vars(model):  # a model of transformers is one that it would take for quantized
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "hqq_quantized"):
            delattr(model, name)
        del model.config.quantization_config
    return model


def config(family="llama", **changes):
    """An adapter with random values on every quantized layer."""
    options = {
        "task_type": TASK.get(family, "CAUSAL_LM"),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "exclude_modules": EXCLUDED.get(family),
        "init_lora_weights": False,
    }
    return peft.LoraConfig(**{**options, **changes})


def pair(family="llama", dtype=torch.float32, **changes):
    """(quantized model with our layers, its dense twin with PEFT's own), with equal adapters."""
    base = quantized(family, dtype)
    ours = peft.get_peft_model(copy.deepcopy(base), register(config(family, **changes)))
    theirs = peft.get_peft_model(dequantized(base), config(family, **changes))
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    return ours, theirs


def logits(model, **forward):
    """With the graph, in the mode in which the model is."""
    return model(**models.inputs(), **forward).logits


def fused_layers(model, monkeypatch, **forward):
    """How many layers run base and adapter as one product in one forward pass."""
    count = 0
    linear, linear_grouped = qn.functional.linear, qn.functional.linear_grouped

    def counted(x, q, bias=None, lora_a=None, *args, **kwargs):
        nonlocal count
        count += lora_a is not None
        return linear(x, q, bias, lora_a, *args, **kwargs)

    def counted_groups(*args, **kwargs):
        nonlocal count
        count += 1
        return linear_grouped(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(qn.functional, "linear", counted)
        patch.setattr(qn.functional, "linear_grouped", counted_groups)
        logits(model, **forward)
    return count


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(actual, expected, tolerance):
    error = relative_error(actual, expected)
    assert error < tolerance, f"relative error {error:.2e}, expected below {tolerance}"
