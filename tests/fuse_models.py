"""The models that the tests of fuse, fuse_attention, fuse_blocks and fuse_loss train, and what they are trained on."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import models  # noqa: E402

LAYERS = 2
# Weights are large, so that probabilities are far from equal.
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
COMMON |= {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.15}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KV, WINDOW = {"num_key_value_heads": 2}, {"sliding_window": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    "llama": ("Llama", KV),
    "qwen3": ("Qwen3", {**KV, "head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", {**KV, **MOE, "head_dim": 32}),
    "mistral": ("Mistral", {**KV, **WINDOW}),
    "gemma2": ("Gemma2", {**KV, "head_dim": 32, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {**KV, **WINDOW, "head_dim": 16}),
    "phi3": ("Phi3", KV),
    "gpt-neox": ("GPTNeoX", {}),
    "granite": ("Granite", {**KV, "logits_scaling": 4.0}),
    "cohere": ("Cohere", {**KV, "logit_scale": 0.25}),
    "stablelm": ("StableLm", KV),
}


def make(family="llama", dtype=torch.float32, **changes):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():  # norms begin at 1 or 0, where a wrong shift or order would not be seen
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def batch(kind="whole"):
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 11))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    if kind == "padded at the start":
        mask[0, :4], mask[1, :1] = 0, 0
    elif kind == "padded at the end":
        mask[0, -4:], mask[1, -1:] = 0, 0
    elif kind == "packed":
        positions = [*range(4), *range(5), *range(2)]
        return inputs | {"position_ids": torch.tensor([positions] * 3), "use_cache": False}
    elif kind == "holes":
        mask[0, 3:6] = 0
    if kind != "whole":
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return inputs


def step(model, inputs=None, **more):
    torch.manual_seed(2)  # of dropout
    return models.step(model, **(batch() if inputs is None else inputs), **more)


def losses_of_trainer(model, folder, **options):
    """The loss of each step of transformers' Trainer."""
    rows = [{key: values[0].tolist() for key, values in batch("padded at the end").items()} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
