"""Generating text with SmolLM2-135M: ours in 4 bits against bf16, bitsandbytes and llama.cpp.

    python bench/generate.py [--quick] [--llama-cpp FOLDER] [--output]

1. The forward pass over a prompt, and over single tokens after it with the cache, as generate() calls it.
2. `model.generate` itself, greedily: until the first token, and from one token to the next.

Contestants, each also with a LoRA adapter (r=16 on all seven linears of every layer, in fp32, under PEFT), but for
llama.cpp:

- transformers in bf16, and bitsandbytes' NF4 layers in it, which repack their weights where the processor allows;
- ours in NF4 by `quantize_model`, as it is by default and with the embedding, to which the output layer is tied;
- ours over the Q4_1 weights of the file, the embedding and the output layer over its Q8_0 (`KeepQuantized`);
- each of ours after `fuse`, too;
- llama.cpp over the same file, which rounds activations to 8 bits. The package's library is for AVX2; --llama-cpp names
  the folder of one that was built for this machine (llama_cpp.py).

Contestants take turns in one process, with threads and caches as the others left them, and with a short pause before
each turn (timing.PAUSE_S). Those with an adapter have processes of their own. Figures are medians of all turns, and of
the processes. Before they are timed, each contestant's logits are compared with those of the fp32 model whose weights
are the decoded ones. --quick runs a random model of one layer, without the file, which says nothing about speed.
--output writes bench/results/<machine>/generate.md, and figures.json, from which bench/readme.py writes
docs/numbers.md. It takes about ten minutes on two cores.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qlora_native as qn
import torch
from qlora_native.nn import Embedding4bit, Linear4bit
from qlora_native.testing import relative_error
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import checks
import llama_cpp
import machine
import report
import step
import timing
from generate_pages import BF16, BITSANDBYTES, FIRST, GENERATED, LLAMA_CPP, after, page, prompt_of

PROMPTS, TOKENS, NEW_TOKENS = (16, 512), 8, 16  # TOKENS follow each prompt, NEW_TOKENS are generated after the first
QUICK_PROMPTS = (3, 6)
ROUNDS, PROCESSES = 5, 2
# The allowed relative error of a contestant's logits. bf16 has 8 bits, and layers add up its roundings: models in bf16
# had up to 0.018, and llama.cpp, which rounds activations to 8 bits, had 0.019.
ALLOWED_ERROR = 0.05
B_SIZE = 0.02  # of the elements of B: it changes the products by some percent, as a trained adapter does


class Cached:
    """A model of transformers, or PEFT's of one, with its cache."""

    def __init__(self, model: nn.Module) -> None:
        """Start with an empty cache."""
        self.model = model.eval()
        model.generation_config.eos_token_id = None  # no token ends the text, so all generate as many
        self.clear()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append int64 tokens [T] to the cache. Returns the logits of the last, [vocabulary]."""
        out = self.model(input_ids=tokens[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[0, -1]

    def clear(self) -> None:
        """Empty the cache."""
        self._cache = None


class Clock(BaseStreamer):
    """Notes when generate() has a token."""

    def __init__(self) -> None:
        """Note the beginning."""
        self.times = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        """Called with the prompt, and then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def seconds(self) -> list[float]:
        """The seconds until the first token, and from each to the next."""
        began, _, *tokens = self.times
        return [after - before for before, after in itertools.pairwise([began, *tokens])]


def generated(model: nn.Module, prompt: Tensor) -> tuple[list[float], Tensor]:
    """Generate after a prompt [P] greedily: Clock.seconds(), and the new tokens."""
    options = {"max_new_tokens": NEW_TOKENS + 1, "do_sample": False, "pad_token_id": 0}
    ids, clock = prompt[None], Clock()
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    return clock.seconds(), found[0, len(prompt) :]


def forwarded(contestant: Any, prompt: Tensor, tokens: Tensor) -> tuple[list[float], Tensor]:
    """The seconds of a prompt and of each token after it, and the logits of its last token and of these, in fp32.

    `contestant` is a Cached or a llama_cpp.Model.
    """
    contestant.clear()
    seconds, logits = [], []
    for part in (prompt, *tokens.split(1)):
        started = time.perf_counter()
        result = contestant(part)
        seconds.append(time.perf_counter() - started)
        logits.append(result.to(torch.float32, copy=True))
    return seconds, torch.stack(logits)


# ---- contestants -----------------------------------------------------------------------------------------------------


def decoded(dense: nn.Module, quantized: nn.Module) -> nn.Module:
    """The model `dense` in fp32, with the weights to which those of `quantized` decode."""
    model = copy.deepcopy(dense).float()
    for path, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit | Embedding4bit):
            model.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    return model


def adapted(model: nn.Module, register: Callable | None = None) -> nn.Module:
    """Add a LoRA adapter that changes the result; values are the same for all, as some libraries round them to bf16."""
    model = step.with_adapter(model, 0.0, register)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=B_SIZE)
        if "lora_" in path:
            parameter.data = parameter.data.bfloat16().float()
    return model


class Contest:
    """The contestants, and the logits that each should have."""

    def __init__(self, dense: nn.Module, tokens: Tensor, prompts: tuple[int, ...], adapter: bool) -> None:
        """`dense`: the model in bf16. `tokens`: [max(prompts) + TOKENS] or more of them."""
        self.dense, self.adapter = dense, adapter
        self.text, self.longest = tokens[: max(prompts) + TOKENS], tokens[: max(prompts)]
        self.parts = {P: (tokens[:P], tokens[P : P + TOKENS]) for P in prompts}
        self.contestants: dict[str, Any] = {}
        self.wanted: dict[str, dict[int, Tensor]] = {}

    def add(self, quantized: nn.Module, contestants: dict[str, Any], *, with_fused: str = "") -> None:
        """Add contestants over the weights of `quantized`: models, or a llama_cpp.Model.

        In a contest with an adapter each model's copy gets one. `with_fused` names one that is ours, of which a fused
        copy is added too.
        """
        reference = decoded(self.dense, quantized)
        if self.adapter:
            from qlora_native.integrations.peft import register

            reference = adapted(reference)
            for name, each in contestants.items():
                contestants[name] = adapted(copy.deepcopy(each), register if name == with_fused else None)
        if with_fused:
            contestants[f"{with_fused}, fused"] = fused = copy.deepcopy(contestants[with_fused])
            qn.fuse(fused)
        logits = reference.eval()(input_ids=self.text[None], use_cache=False).logits[0]
        wanted = {P: logits[P - 1 : P + TOKENS].clone() for P in self.parts}
        for name, each in contestants.items():
            self.contestants[name] = Cached(each) if isinstance(each, nn.Module) else each
            self.wanted[name] = wanted

    def check(self) -> dict[str, float]:
        """{contestant: the largest relative error of its logits after a prompt}.

        Raises:
            checks.WrongResult: it is too large, or generate() chooses another token first.
        """
        errors = {}
        for name, each in self.contestants.items():
            logits = {P: forwarded(each, *parts)[1] for P, parts in self.parts.items()}
            for P, wanted in self.wanted[name].items():
                checks.close(f"{name}, prompt of {P}", logits[P], wanted.double(), ALLOWED_ERROR)
            errors[name] = max(relative_error(logits[P], wanted) for P, wanted in self.wanted[name].items())
            if isinstance(each, Cached):
                first, (_, new) = logits[len(self.longest)][0].argmax(), generated(each.model, self.longest)
                if len(new) != NEW_TOKENS + 1 or new[0] != first:
                    raise checks.WrongResult(f"{name}: expected {first} first from generate(), got {new.tolist()}")
        return errors

    def measure(self, rounds: int) -> dict[str, dict[str, float]]:
        """{contestant: {what: median of its seconds}}."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in self.contestants}
        for name, _ in timing.schedule(dict.fromkeys(self.contestants, rounds)):
            contestant = self.contestants[name]
            time.sleep(timing.PAUSE_S)
            for P, parts in self.parts.items():
                first, *others = forwarded(contestant, *parts)[0]
                found[name].setdefault(prompt_of(P), []).append(first)
                found[name].setdefault(after(P), []).extend(others)
            if isinstance(contestant, Cached):
                first, *others = generated(contestant.model, self.longest)[0]
                found[name].setdefault(FIRST, []).append(first)
                found[name].setdefault(GENERATED, []).extend(others)
        return {name: {what: statistics.median(times) for what, times in each.items()} for name, each in found.items()}


def contest(adapter: bool, folder: str | None, quick: bool) -> Contest:
    """The contestants, with llama.cpp's library from `folder`."""
    if quick:
        dense, tokens = step.tiny_model(), torch.arange(step.TINY_VOCABULARY)
    else:
        dense, tokens = step.load(), step.some_tokens().flatten()
    prompts = QUICK_PROMPTS if quick else PROMPTS
    found = Contest(dense, tokens, prompts, adapter)
    found.add(dense, {BF16: dense})
    nf4 = qn.nn.quantize_model(copy.deepcopy(dense), progress=False)
    contestants = {"NF4": nf4}
    if importlib.util.find_spec("bitsandbytes"):
        contestants[BITSANDBYTES] = step.in_bitsandbytes(copy.deepcopy(dense))
    found.add(nf4, contestants, with_fused="NF4")
    embeddings = qn.nn.quantize_model(copy.deepcopy(dense), skip=(), embeddings=True, progress=False)
    found.add(embeddings, {"NF4, embedding too": embeddings}, with_fused="NF4, embedding too")
    if not quick:
        from qlora_native.integrations.transformers import KeepQuantized

        kept = step.load(KeepQuantized())
        others = {}
        if folder and not adapter:
            room = max(prompts) + TOKENS
            others[LLAMA_CPP] = llama_cpp.Model(Path(folder), step.model_file(), torch.get_num_threads(), room)
        found.add(kept, {"Q4_1, as in the file": kept, **others}, with_fused="Q4_1, as in the file")
    return found


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure_together(adapter: bool, folder: str | None, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Check and time the contestants with or without an adapter: for a process of its own.

    Returns:
        A row for each: name, adapter, error (relative, of its logits), seconds {what: median}.

    Raises:
        checks.WrongResult: a contestant's logits are wrong.
    """
    with torch.no_grad():
        found = contest(adapter, folder, quick)
        errors, seconds = found.check(), found.measure(rounds)
    return [
        {"name": name, "adapter": adapter, "error": errors[name], "seconds": seconds[name]}
        for name in found.contestants
    ]


def merged(processes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several processes as one: medians of the seconds, and the largest errors."""
    return [
        {
            **rows[0],
            "error": max(row["error"] for row in rows),
            "seconds": {what: statistics.median(row["seconds"][what] for row in rows) for what in rows[0]["seconds"]},
        }
        for rows in zip(*processes, strict=True)
    ]


def measure(folder: Path | None, quick: bool) -> dict[str, Any]:
    """The figures. A process that fails is listed in `wrong`; the others are measured all the same."""
    others, rows, wrong = machine.Others(), [], []
    rounds, count = (1, 1) if quick else (ROUNDS, PROCESSES)
    where = None if folder is None else str(folder)
    for adapter in (False, True):
        try:
            processes = [timing.in_own_process(measure_together, adapter, where, rounds, quick) for _ in range(count)]
            rows += merged(processes)
        except subprocess.CalledProcessError as error:
            wrong.append(f"{'with an' if adapter else 'without'} adapter: its process ended with {error.returncode}")
    return {
        "machine": machine.describe(),
        "load": others.shares(),
        "llama_cpp": llama_cpp.LlamaCpp(folder, 1).instructions if folder else [],
        "rank": step.RANK,
        "contestants": rows,
        "wrong": wrong,
    }


def main() -> int:
    """The command line. Returns 1 if a process failed, else 0."""
    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a random model of one layer, in seconds")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="FOLDER", help="of llama.cpp's libraries; default: the package's"
    )
    args = parser.parse_args()
    found = measure(args.llama_cpp or llama_cpp.folder_of_package(), args.quick)
    print(page(found))
    if args.output:
        folder = report.folder_of(found["machine"])
        report.write(folder / "generate.md", page(found))
        report.write_figures(folder, "generate", found)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
