"""A QLoRA training step of a model that does not fit into this machine in 16 bits: seconds by part, and peak memory.

    python bench/large.py [--shape llama-7b|llama-33b|llama-65b|qwen3-30b-a3b|gpt-oss-20b] [--layers N] [--tokens 128]
                          [--rank 16] [--expert-rank 4] [--folder DIR] [--output]

The shapes are those of the models. The weights are random, because neither time nor memory depends on them. Each layer
is made in bf16, quantized (NF4, double quantization) and freed before the next one is made, so the whole model never
exists in 16 bits. The experts of gpt-oss are made from random MXFP4 bytes, the format of its files, and never exist in
16 bits. LoRA is on all linear layers, and with rank `--expert-rank` on each expert, through PEFT and the fused
products, with gradient checkpointing and AdamW8bit.

With `--folder` the 4-bit weights of a Llama are written to files, by the writer of `python -m qlora_native quantize`,
and stay in them (`qn.nn.MappedWeights`); a folder that is there is used again. The shapes of 33 and 65 billion
parameters take this way in any case, with a temporary folder. The report then has the rate of the disk and the time of
the products, measured in the same run, beside the step.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qlora_native as qn
import torch
from qlora_native._core.mapped import read_bytes
from qlora_native.integrations.peft import register
from qlora_native.integrations.transformers._experts import find_experts, run_quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import large_files
import machine
import report
from step import seconds_by_part

STANDARD_DEVIATION = 0.02
IN_FILES = ("llama-33b", "llama-65b")  # whose weights stay in files in any case
NOT_QUANTIZED = ("lm_head", "gate", "router")  # a mixture's router stays in its own precision


# {shape: (class of its config, layers, other sizes)}, by Touvron et al. 2023, table 2, and by the models' config.json.
SHAPES: dict[str, tuple[type[PreTrainedConfig], int, dict[str, Any]]] = {
    "llama-7b": (
        LlamaConfig, 32, dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                              num_key_value_heads=32, vocab_size=32_000),
    ),
    "llama-33b": (
        LlamaConfig, 60, dict(hidden_size=6656, intermediate_size=17920, num_attention_heads=52,
                              num_key_value_heads=52, vocab_size=32_000),
    ),
    "llama-65b": (
        LlamaConfig, 80, dict(hidden_size=8192, intermediate_size=22016, num_attention_heads=64,
                              num_key_value_heads=64, vocab_size=32_000),
    ),
    "qwen3-30b-a3b": (  # 128 experts a layer, of which a token takes 8
        Qwen3MoeConfig, 48, dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
                                 num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
                                 num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151_936),
    ),
    "gpt-oss-20b": (  # 32 experts a layer, of which a token takes 4
        GptOssConfig, 24, dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8,
                               head_dim=64, num_local_experts=32, num_experts_per_tok=4, vocab_size=201_088),
    ),
}  # fmt: skip


def config_of(shape: str, layers: int | None = None, **changes: Any) -> PreTrainedConfig:
    """The config of a shape; `layers` and `changes` are other sizes than its own."""
    make, own_layers, sizes = SHAPES[shape]
    layers = own_layers if layers is None else layers
    if shape == "gpt-oss-20b":
        changes["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return make(**{**sizes, "num_hidden_layers": layers, **changes})


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time of the block to that of a part."""
    started = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started


def random_values(like: Tensor) -> nn.Parameter:
    """Values for a tensor on the meta device: ones for a vector, else a million random values, repeated."""
    values = torch.empty(like.shape, dtype=like.dtype)
    if like.dim() == 1:
        return nn.Parameter(values.fill_(1.0), requires_grad=False)
    million = torch.empty(min(values.numel(), 1 << 20), dtype=like.dtype).normal_(std=STANDARD_DEVIATION)
    for part in values.view(-1).split(million.numel()):
        part.copy_(million[: part.numel()])
    return nn.Parameter(values, requires_grad=False)


def mxfp4_experts(layer: nn.Module) -> None:
    """Give random MXFP4 bytes to the experts of a layer on the meta device."""
    for found in find_experts(layer):
        for name, (E, N, K) in zip(found.names, found.shapes, strict=True):
            blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 122, (E, N, K // 32), dtype=torch.uint8)  # 2**-9 ... 2**-6
            weight = qn.QuantizedWeight.from_mxfp4(blocks, scales)
            del found.module._parameters[name]
            setattr(found.module, name, qn.nn.Experts4bit.from_quantized(weight, found.transposed))
        run_quantized(found.module)


def empty_model(config: PreTrainedConfig) -> nn.Module:
    """A causal model in bf16 on the meta device; only the buffers of its rotary embedding have values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config)  # its buffers are computed, not loaded
    return model


def fill(model: nn.Module) -> None:
    """Give random values to the parameters of `model` that are on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, random_values(parameter))


def quantized_model(config: PreTrainedConfig, seconds: dict[str, float]) -> nn.Module:
    """Make a model of random weights, whose layers are quantized one by one."""
    model = empty_model(config)
    for part in (*model.model.layers, model):
        with timed(seconds, "make weights"):
            if config.model_type == "gpt_oss" and part is not model:
                mxfp4_experts(part)
            fill(part)
        if part is not model:
            with timed(seconds, "quantize"):
                qn.nn.quantize_model(part, NOT_QUANTIZED, progress=False)
    return model


def model_in_files(
    config: PreTrainedConfig, folder: Path, seconds: dict[str, float]
) -> tuple[nn.Module, qn.nn.MappedWeights, dict[str, Any]]:
    """Make the folder of a model of random weights unless it is there, and load it with weights that stay in its files.

    Returns:
        The model, what reads its weights, and figures of the files.
    """

    def make(part: nn.Module) -> None:
        fill(part)
        if part is not empty:
            qn.nn.quantize_model(part, NOT_QUANTIZED, progress=False)

    if not (folder / "config.json").exists():
        empty = empty_model(config)
        with timed(seconds, "make weights, quantize and write them"):
            large_files.write(folder, config, empty.model.layers, empty, make)
    files = large_files.files_of(folder)
    large_files.forget(files)
    rate = large_files.disk_rate(files)
    with timed(seconds, "load"):
        model, weights = large_files.load(folder, config)
    return model, weights, {"bytes": sum(path.stat().st_size for path in files), "disk_bytes_per_s": rate}


def step_parts(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, seconds: dict[str, float]) -> float:
    """Take one training step, and return its loss."""
    with timed(seconds, "forward"):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with timed(seconds, "backward, with the forward of every layer again"):
        loss.backward()
    with timed(seconds, "optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def measure(
    shape: str,
    layers: int | None,
    tokens: int,
    rank: int,
    expert_rank: int,
    folder: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Make the model, and take two training steps. The second is timed, and its operations are counted.

    `folder` is where the weights stay in files, or None. `changes` are other sizes for the config.

    Raises:
        RuntimeError: the loss of the same tokens does not fall.
    """
    from peft import LoraConfig, get_peft_model

    config = config_of(shape, layers, **changes)
    torch.manual_seed(0)
    making: dict[str, float] = {}
    step: dict[str, float] = {}
    weights, files = None, None
    if folder is None:
        model = quantized_model(config, making)
    else:
        model, weights, files = model_in_files(config, folder, making)
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    parameters = parameters_of(model)
    experts = [path for path, module in model.named_modules() if isinstance(module, qn.nn.Experts4bit)]
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[path for path, module in model.named_modules() if isinstance(module, qn.nn.Linear4bit)],
        target_parameters=experts,
        rank_pattern=dict.fromkeys(experts, expert_rank),
        task_type="CAUSAL_LM",
    )
    with timed(making, "adapters"):
        model = get_peft_model(model, register(lora))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = qn.optim.AdamW8bit(trainable, lr=1e-3)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    with large_files.Memory() as memory:
        losses = [step_parts(model, optimizer, ids, {})]
        read, waited = read_bytes(), weights.waited_s if weights else 0.0
        operations = seconds_by_part(
            lambda: losses.append(step_parts(model, optimizer, ids, step)), model.config.vocab_size
        )
        read = read_bytes() - read
    if files is not None:
        files |= {"read_bytes": read, "waited_s": weights.waited_s - waited, "peaks": memory.peaks}
        weights.close()
        files["products_s"] = large_files.products_s(model, tokens)
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    if not losses[0] > losses[1] > losses[2]:
        raise RuntimeError(f"expected losses that fall, got {losses}")
    return {
        "shape": shape,
        "layers": config.num_hidden_layers,
        "of_layers": SHAPES[shape][1],
        "parameters": parameters,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "base_bytes": base,
        "bytes_in_16_bits": 2 * parameters,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "tokens": tokens,
        "rank": rank,
        "expert_rank": expert_rank if experts else None,
        "losses": losses,
        "making_s": making,
        "step_s": step,
        "operations_s": operations,
        "files": files,
        "tokens_per_s": tokens / sum(step.values()),
        "threads": torch.get_num_threads(),
    }


def parameters_of(model: nn.Module) -> int:
    """The elements of all weights. A 4-bit weight counts its elements, not its bytes."""
    count = 0
    for module in model.modules():
        if isinstance(module, (qn.nn.Linear4bit, qn.nn.Experts4bit)):
            count += torch.Size(module.quantized_weight.shape).numel()
        else:
            count += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return count


def lines(found: dict) -> str:
    """The result as text."""
    ranks = f"rank {found['rank']}" + (f", of experts {found['expert_rank']}" if found["expert_rank"] else "")
    text = [
        f"{found['shape']}, {found['layers']} of {found['of_layers']} layers: {found['parameters'] / 1e9:.2f} billion "
        f"parameters, {found['trainable'] / 1e6:.1f} million trainable ({ranks}), {found['threads']} threads",
        f"in 16 bits {found['bytes_in_16_bits'] / 2**30:.2f} GiB, here {found['base_bytes'] / 2**30:.2f} GiB; "
        f"peak of the process {found['peak_bytes'] / 2**30:.2f} GiB",
    ]
    losses = ", ".join(f"{loss:.3f}" for loss in found["losses"])
    for title, parts in (
        ("made in", found["making_s"]),
        (f"a step of {found['tokens']} tokens: {found['tokens_per_s']:.1f} tokens/s, losses {losses}", found["step_s"]),
        ("the same by part:", found["operations_s"]),
    ):
        text += [title, *(f"  {seconds:8.2f} s  {part}" for part, seconds in parts.items())]
    if found["files"]:
        text += lines_of_files(found["files"], sum(found["step_s"].values()))
    return "\n".join(text)


def lines_of_files(files: dict[str, Any], step_s: float) -> list[str]:
    """The figures of weights that stay in files, as text."""
    peaks = {name: peak / 1e9 for name, peak in files["peaks"].items()}
    rate = files["disk_bytes_per_s"]
    limits = files["products_s"], files["read_bytes"] / rate
    return [
        f"weights in files of {files['bytes'] / 1e9:.2f} GB; in the steps, peak of the process's own memory "
        f"{peaks['RssAnon']:.2f} GB, of mapped files, which are the page cache's, {peaks['RssFile']:.2f} GB, of both "
        f"{peaks['VmRSS']:.2f} GB",
        f"  {step_s:8.2f} s  the step, {files['waited_s']:.2f} s of which waited for weights",
        f"  {limits[0]:8.2f} s  its products alone, with weights that are in memory",
        f"  {limits[1]:8.2f} s  {files['read_bytes'] / 1e9:.2f} GB that the step has read (/proc/self/io), at "
        f"{rate / 1e9:.2f} GB/s, the rate of the disk",
        f"  {step_s / max(limits):8.2f} ×  the step, in the larger of the two",
    ]


def main() -> None:
    """The command line."""
    parser = report.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where memory does not hold all")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--expert-rank", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="of a Llama's weights, which stay there; made if it is not there")
    args = parser.parse_args()
    if args.folder and not args.shape.startswith("llama"):
        parser.error("--folder is for the shapes of Llama")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or (Path(temporary) / args.shape if args.shape in IN_FILES else None)
        found = measure(args.shape, args.layers, args.tokens, args.rank, args.expert_rank, folder)
    print(lines(found))
    if args.output:
        description = machine.describe()
        page = f"# A training step of {args.shape}\n\n{report.head(description)}; `bench/large.py`.\n\n    "
        page += lines(found).replace("\n", "\n    ")
        name = f"{args.shape}-{args.tokens}-tokens.md" if folder else f"{args.shape}.md"
        report.write(report.folder_of(description) / name, page)


if __name__ == "__main__":
    main()
