"""A QLoRA training step of a Llama of 7 billion parameters, on this machine: seconds by part, and peak memory.

    python bench/large.py [--layers 32] [--width 4096] [--tokens 128] [--rank 16] [--output FILE]

The shape is Llama-7B's; the weights are random, for neither time nor memory depends on them. A layer is made in bf16,
quantized (NF4, double quantization) and freed before the next one is made, so that the whole model never exists in 16
bits. LoRA on all seven linears of every layer through PEFT and the fused product, gradient checkpointing, AdamW8bit.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qlora_native as qn
import torch
from qlora_native.integrations.peft import register
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import machine
import report

VOCABULARY = 32_000
MLP_RATIO = 11008 / 4096  # of Llama-7B
HEAD = 128
STANDARD_DEVIATION = 0.02


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        """No part yet."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def quantized_llama(config: LlamaConfig, clock: Clock) -> LlamaForCausalLM:
    """A model of random weights whose linears, but for lm_head, are quantized as they are made."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded

    def materialize(like: Tensor) -> nn.Parameter:
        values = torch.empty(like.shape, dtype=like.dtype)
        filled = values.fill_(1.0) if like.dim() == 1 else values.normal_(std=STANDARD_DEVIATION)
        return nn.Parameter(filled, requires_grad=False)

    for path in [path for path, _ in model.named_modules()]:  # a list of the modules would keep their weights
        module = model.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            with clock.part("make weights"):
                module.register_parameter(name, materialize(parameter))
        if isinstance(module, nn.Linear) and path != "lm_head":
            with clock.part("quantize"):
                model.set_submodule(path, qn.nn.Linear4bit.from_linear(module))
    return model


def step_parts(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, clock: Clock) -> float:
    """One training step; returns its loss."""
    with clock.part("forward"):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with clock.part("backward, with the forward of every layer again"):
        loss.backward()
    with clock.part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def measure(layers: int, width: int, tokens: int, rank: int) -> dict[str, object]:
    """Make the model, and take two training steps, of which the second one is timed.

    Raises:
        RuntimeError: the loss of the same tokens does not fall.
    """
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=round(width * MLP_RATIO),
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    making, step = Clock(), Clock()
    model = quantized_llama(config, making)
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    parameters = sum(
        module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
        for module in model.modules()
        if getattr(module, "weight", None) is not None
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with making.part("adapters"):
        model = get_peft_model(model, register(lora))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = qn.optim.AdamW8bit(trainable, lr=1e-3)
    ids = torch.randint(VOCABULARY, (1, tokens))
    losses = [step_parts(model, optimizer, ids, Clock()), step_parts(model, optimizer, ids, step)]
    losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    if not losses[0] > losses[1] > losses[2]:
        raise RuntimeError(f"expected losses that fall, got {losses}")
    return {
        "parameters": parameters,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "base_bytes": base,
        "bytes_in_16_bits": 2 * parameters,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "tokens": tokens,
        "rank": rank,
        "losses": losses,
        "making_s": making.seconds,
        "step_s": step.seconds,
        "tokens_per_s": tokens / sum(step.seconds.values()),
        "threads": torch.get_num_threads(),
    }


def lines(found: dict) -> str:
    """The result as text."""
    gigabytes = {name: found[name] / 2**30 for name in ("bytes_in_16_bits", "base_bytes", "peak_bytes")}
    text = [
        f"{found['parameters'] / 1e9:.2f} billion parameters, {found['trainable'] / 1e6:.1f} million trainable "
        f"(rank {found['rank']}), {found['threads']} threads",
        f"in 16 bits {gigabytes['bytes_in_16_bits']:.2f} GiB, here {gigabytes['base_bytes']:.2f} GiB; "
        f"peak of the process {gigabytes['peak_bytes']:.2f} GiB",
        *(f"  {seconds:8.2f} s  {part}" for part, seconds in found["making_s"].items()),
        f"a step of {found['tokens']} tokens: {found['tokens_per_s']:.1f} tokens/s, losses {found['losses']}",
        *(f"  {seconds:8.2f} s  {part}" for part, seconds in found["step_s"].items()),
    ]
    return "\n".join(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path, help="also write JSON")
    args = parser.parse_args()
    found = measure(args.layers, args.width, args.tokens, args.rank)
    print(lines(found))
    if args.output is not None:
        report.write(args.output, json.dumps({"machine": machine.describe(), **found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
