"""A small Llama with adapters, twice: over our quantized layers, and over plain ones with the same values."""

import copy

import peft
import torch
import transformers
from torch import nn

import qlora_native as qn
from qlora_native.integrations.peft import register

LINEARS_OF_A_LAYER = 7
LAYERS = 2


def small_llama(dtype=torch.float32):
    """A Llama whose linears have ragged shapes: 96 and 3 * 96 are no multiples of every block, 72 is none of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=72,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def quantized(model):
    qn.nn.quantize_model(model, skip=("lm_head",))
    return model


def dequantized(model):
    """The quantized model's twin with plain nn.Linear layers of the same values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, qn.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


def config(**changes):
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return peft.LoraConfig(**{**options, "init_lora_weights": False, **changes})


def pair(dtype=torch.float32, **changes):
    """(quantized model with our layers, its dense twin with PEFT's own), with equal adapters."""
    base = quantized(small_llama(dtype))
    ours = peft.get_peft_model(copy.deepcopy(base), register(config(**changes)))
    theirs = peft.get_peft_model(dequantized(base), config(**changes))
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    return ours, theirs


def ids(rows=2, length=9):
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def fused_layers(model, monkeypatch, **forward):
    """How many layers run base and adapter as one product in one forward pass."""
    count = 0
    linear = qn.functional.linear

    def counted(x, q, bias=None, lora_a=None, *args, **kwargs):
        nonlocal count
        count += lora_a is not None
        return linear(x, q, bias, lora_a, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(qn.functional, "linear", counted)
        model(ids(), **forward)
    return count


def assert_close(actual, expected, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative error {error:.2e}, expected below {tolerance}"
