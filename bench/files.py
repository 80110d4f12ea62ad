"""What layers of quantized files cost: against NF4 and int8, against llama.cpp, and in a training step.

    python bench/files.py [--quick] [--llama-cpp FOLDER] [--output]

1. Y and dX over each format of files, beside NF4 (codes of 4 bits) or int8 (codes of 8 bits) of the same shape, in
   bf16.
2. Y over the same bytes by llama.cpp, by GPTQModel where it is installed (gptqmodel_layer.py), by torch's dense product
   with the decoded weight, and by decoding at each call and then the dense product, as libraries do that have no
   product for a CPU. llama.cpp is at its best where it was built for this machine: --llama-cpp names the folder of such
   a build (llama_cpp.py). The package's is for AVX2.
3. A training step of SmolLM2-135M over the Q4_1 weights of its file, beside one over NF4 of the same model, as step.py
   takes it.

Contestants alternate in one process (timing.py), with cold weights; figures are medians. Results are checked before
they are timed. Freed memory stays with the process. --quick runs a few small cases, which say nothing about speed.
--output writes bench/results/<machine>/files.md, and figures.json, from which bench/readme.py writes docs/numbers.md.
It takes about five minutes on two cores.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import qlora_native as qn
import torch
import torch.nn.functional as F
from qlora_native.functional import from_awq, from_fp8, from_gguf, from_gptq
from qlora_native.testing import relative_error
from torch import Tensor

import checks
import contest
import gptqmodel_layer
import llama_cpp
import machine
import report
import step
import timing
from cases import OURS
from file_pages import AGAIN, DECODED, DENSE, GPTQMODEL, LLAMA_CPP, NF4_STEP, Q4_1_STEP, REFERENCES, page, slow
from peers import PEER_ERROR, ours

PRODUCTS = (*(("Y", M) for M in (1, 4, 8, 16, 64, 256, 512)), ("dX", 16), ("dX", 256))
PEER_MS = (1, 16, 64, 256, 512)
GGUF_TYPES = ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")
GPTQ_INT4, GPTQ_INT8, AWQ_INT4 = "GPTQ int4, symmetric", "GPTQ int8", "AWQ int4"
# Those that meet the peers. llama.cpp takes part in the types of GGUF, and GPTQModel in those of METHODS.
AGAINST_PEERS = ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", GPTQ_INT4, AWQ_INT4, "FP8")
METHODS = {GPTQ_INT4: "gptq", AWQ_INT4: "awq"}
GROUP = 128  # of GPTQ and AWQ, and the side of FP8's square blocks
# Random rows, which are repeated: llama.cpp's quantizers take seconds for a whole weight, and time depends on no value.
ROWS = 256
COLUMNS = 256  # of a result, which are checked
DTYPE = torch.bfloat16
# {shape: seconds of a case for each of its contestants}; a case of M rows has 1 + M/256 times as many.
SHAPES = {(4096, 4096): 0.3, (576, 1536): 0.2}  # a square, and the down projection of SmolLM2-135M
QUICK_SHAPES = {(128, 512): 0.01}
STEP_ROUNDS, STEP_PROCESSES = 4, 2
FAILURES = (checks.WrongResult, ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError)
Shape = tuple[int, int]
# What a file has of a weight: the bytes of a tensor of GGUF, or the codes, zero points and scales of GPTQ and AWQ.
Data = Tensor | tuple[Tensor, Tensor, Tensor]
# Times the contestants of a case with so many rows, and returns the seconds of each.
Timer = Callable[[timing.Contestants, int], dict[str, float]]


# ---- weights ---------------------------------------------------------------------------------------------------------


def packed(low: int, high: int, rows: int, columns: int, bits: int) -> Tensor:
    """Random fields in low ... high - 1, packed into int32 [rows, columns]."""
    fields = torch.randint(low, high, (rows, columns * 32 // bits), dtype=torch.uint8)
    if bits == 4:
        fields = fields[:, 0::2] | fields[:, 1::2] << 4
    return fields.contiguous().view(torch.int32)


def integers(N: int, K: int) -> dict[str, Data]:
    """GPTQ's and AWQ's layers, of random codes."""
    torch.manual_seed(0)
    groups = K // GROUP

    def scales(levels: int) -> Tensor:
        """By which codes of `levels` levels have about the size of weights."""
        return ((0.5 + torch.rand(groups, N)) * 3.5 / levels * K**-0.5).half()

    return {
        GPTQ_INT4: (packed(0, 16, K // 8, N, 4), packed(8, 9, groups, N // 8, 4), scales(16)),
        AWQ_INT4: (packed(0, 16, K, N // 8, 4), packed(6, 11, groups, N // 8, 4), scales(16)),
        GPTQ_INT8: (packed(0, 256, K // 4, N, 8), packed(120, 137, groups, N // 4, 8), scales(256)),
    }


def read(name: str, data: Data, shape: Shape) -> qn.QuantizedWeight:
    """The weight of what a file has of it."""
    if isinstance(data, Tensor):
        return from_gguf(data, name, shape)
    if name == AWQ_INT4:
        return from_awq(*data)
    bits, sym = (4, True) if name == GPTQ_INT4 else (8, False)
    return from_gptq(*data, bits=bits, group_size=GROUP, sym=sym, checkpoint_format="gptq_v2")


def fp8(N: int, K: int) -> qn.QuantizedWeight:
    """A layer of FP8 with a scale of each square block."""
    codes = (100 * torch.randn(min(N, ROWS), K)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (0.5 + torch.rand(-(-N // GROUP), -(-K // GROUP))) * K**-0.5 / 100
    return from_fp8(repeated(codes.view(torch.uint8), N).view(torch.float8_e4m3fn), scales, block_size=(GROUP, GROUP))


def repeated(rows: Tensor, N: int) -> Tensor:
    """The rows again and again, N in all."""
    return rows.repeat(-(-N // len(rows)), 1)[:N].contiguous()


def gguf_bytes(library: llama_cpp.LlamaCpp, type: str, N: int, K: int) -> Tensor:
    """A tensor of a GGUF file by llama.cpp's quantizer, whose decoded values are those of gguf."""
    from gguf.quants import dequantize

    torch.manual_seed(0)
    rows = library.quantize(torch.randn(min(N, ROWS), K) * K**-0.5, number_of(type))
    decoded = torch.from_numpy(dequantize(rows.numpy(), number_of(type)))
    checks.equal(type, from_gguf(rows, type, decoded.shape).dequantize(torch.float32), decoded)
    return repeated(rows, N)


def number_of(type: str) -> int:
    """The number of a type in GGUF and ggml."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type]


def weights(shape: Shape, files: dict[str, Data]) -> dict[str, qn.QuantizedWeight]:
    """The weight in every format: the references first, then those of files."""
    torch.manual_seed(0)
    dense = torch.randn(shape) * shape[1] ** -0.5
    found = {format: ours.quantize(dense, format) for format in REFERENCES.values()}
    found[AGAIN] = found["nf4"]  # how far equal contestants differ
    found |= {name: read(name, data, shape) for name, data in files.items()}
    return {**found, "FP8": fp8(*shape)}


# ---- products --------------------------------------------------------------------------------------------------------


def some(size: int) -> Tensor:
    """The indices of the columns to check."""
    return torch.linspace(0, size - 1, min(size, COLUMNS)).round().long()


def right_of(weight: qn.QuantizedWeight, operation: str, dtype: torch.dtype) -> Tensor:
    """The right operand of a product, W decoded to `dtype`, in float64, with the columns to check."""
    decoded = weight.dequantize(dtype)
    right = decoded.t() if operation == "Y" else decoded
    return right[:, some(right.shape[1])].double()


def time(clock: timing.Cpu, probe: Callable[[], object], seconds: float, calls: timing.Contestants, M: int) -> dict:
    """Time the contestants of a case, as a Timer does with `seconds` of SHAPES."""
    times, _ = clock.alternate(calls, probe, len(calls) * seconds * (1 + M / 256))
    return {name: each.median for name, each in times.items()}


def call_of(operation: str, held: list[qn.QuantizedWeight], left: Tensor) -> Callable[[int], Tensor]:
    """Our product of `left` with one of the copies of a weight."""
    function = ours.forward if operation == "Y" else ours.backward_input
    return lambda i: function(held[i % len(held)], left)


def products(
    shape: Shape, files: dict[str, Data], cases: Sequence[tuple[str, int]], timer: Timer, wrong: list[str]
) -> Iterator[dict]:
    """Y and dX over every format: the figures of each case. A format whose result is wrong goes into `wrong`."""
    timing.set_allocator("setup")
    found = weights(shape, files)
    copies = {
        name: [weight, *(ours.copy(weight) for _ in range(contest.copies_needed(weight.nbytes) - 1))]
        for name, weight in found.items()
    }
    timing.set_allocator("kept")
    for operation, M in cases:
        left = torch.randn(M, shape[1] if operation == "Y" else shape[0]).to(DTYPE)
        rows = checks.rows_of(M)
        contestants = {}
        for name, held in copies.items():
            call = call_of(operation, held, left)
            right, result = right_of(held[0], operation, DTYPE), call(0)[rows]
            try:
                checks.product(
                    f"{operation}, {M} rows, {name}", result[:, some(result.shape[1])], left[rows], right, DTYPE
                )
            except checks.WrongResult as error:
                wrong.append(f"{shape}: {error}")
            else:
                contestants[name] = call
        yield {
            "shape": shape, "operation": operation, "M": M, "seconds": timer(contestants, M),
            "nbytes": {name: weight.nbytes for name, weight in found.items()},
            "bits": {name: weight.bits for name, weight in found.items()},
        }  # fmt: skip


def against_peers(
    name: str,
    weight: qn.QuantizedWeight,
    data: Data | None,
    library: llama_cpp.LlamaCpp,
    Ms: Sequence[int],
    timer: Timer,
) -> Iterator[dict]:
    """Y over one weight by ours and the peers; `data` is what a file has of it, or None."""
    timing.set_allocator("setup")
    count = contest.copies_needed(weight.nbytes)
    held = [weight, *(ours.copy(weight) for _ in range(count - 1))]
    dense = weight.dequantize(DTYPE)
    dense_copies = [dense, *(dense.clone() for _ in range(contest.copies_needed(dense.nbytes) - 1))]
    theirs, layers = [], []
    if isinstance(data, Tensor):
        theirs = [llama_cpp.Weight(library, data, number_of(name), weight.shape) for _ in range(count)]
    elif data is not None and gptqmodel_layer.installed():
        layer = gptqmodel_layer.Layer(METHODS[name], data, GROUP)
        layers = [layer, *(ours.copy(layer) for _ in range(count - 1))]
    exact = right_of(weight, "Y", torch.float32)
    timing.set_allocator("kept")
    for M in Ms:
        x = torch.randn(M, weight.shape[1]).to(DTYPE)
        contestants: dict[str, Callable[[int], Any]] = {
            OURS: lambda i, x=x: ours.forward(held[i % len(held)], x),
            DENSE: lambda i, x=x: F.linear(x, dense_copies[i % len(dense_copies)]),
            DECODED: lambda i, x=x: F.linear(x, held[i % len(held)].dequantize(DTYPE)),
        }
        if layers:
            contestants[GPTQMODEL] = lambda i, x=x: layers[i % len(layers)](x)
        results = {each: call(0) for each, call in contestants.items()}
        if theirs:
            graphs = [llama_cpp.Product(each, x) for each in theirs]
            contestants[LLAMA_CPP] = lambda i, graphs=graphs: graphs[i % len(graphs)]()
            contestants[LLAMA_CPP](0)
            results[LLAMA_CPP] = graphs[0].result()
        rows = checks.rows_of(M)
        wanted = x[rows].double() @ exact
        errors = {}
        for each, result in results.items():
            result = result[rows][:, some(result.shape[1])]
            checks.close(f"{name}, {each}", result, wanted, PEER_ERROR)
            errors[each] = relative_error(result, wanted)
        yield {
            "name": name, "shape": weight.shape, "M": M, "seconds": timer(contestants, M), "errors": errors,
            "buffer": theirs[0].buffer if theirs else None, "kernel": layers[0].kernel if layers else None,
        }  # fmt: skip


# ---- a training step -------------------------------------------------------------------------------------------------


def measure_step(rounds: int) -> dict[str, Any]:
    """Time steps over the file's weights and over NF4 alternately.

    The first loss over the file's weights has to be that of the decoded model.

    Raises:
        RuntimeError: it is another, or a loss does not fall.
    """
    from qlora_native.integrations.transformers import KeepQuantized

    timing.set_allocator("kept")
    decoded = step.load()
    tokens = step.some_tokens()
    with torch.no_grad():
        loss = decoded(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    steps = {
        Q4_1_STEP: step.step_of_quantized(step.load(KeepQuantized()), 0.0),
        NF4_STEP: step.step_of_ours(decoded, 0.0),
    }
    found = step.alternated(steps, rounds, tokens)
    first = found[Q4_1_STEP]["losses"][0]
    if abs(first - loss) > step.LOSS_TOLERANCE * loss:
        raise RuntimeError(f"{Q4_1_STEP}: expected the decoded model's loss {loss:.4f}, got {first:.4f}")
    for name, contestant in found.items():
        if not contestant["losses"][-1] < contestant["losses"][0]:
            raise RuntimeError(f"{name}: expected losses that fall, got {contestant['losses']}")
    return {
        "contestants": found, "decoded_loss": loss, "tokens": tokens.numel(), "rank": step.RANK,
        "ratio": found[Q4_1_STEP]["seconds"] / found[NF4_STEP]["seconds"],
    }  # fmt: skip


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(library: llama_cpp.LlamaCpp, quick: bool) -> dict[str, Any]:
    """The figures of all parts. What fails is printed, and listed in `wrong`; the rest is measured all the same."""
    others, description = machine.Others(), machine.describe()
    products_of: list[dict] = []
    peers: list[dict] = []
    steps: list[dict] = []
    wrong: list[str] = []

    def attempt(name: str, rows: list[dict], work: Callable[[], Iterable[dict]]) -> None:
        print(name, flush=True)
        try:
            rows.extend(work())
        except FAILURES as error:
            traceback.print_exc()
            wrong.append(f"{name}: {error}")

    shapes, cases, Ms = (QUICK_SHAPES, PRODUCTS[:1] + PRODUCTS[-2:], (1, 16)) if quick else (SHAPES, PRODUCTS, PEER_MS)
    rounds, processes = (1, 1) if quick else (STEP_ROUNDS, STEP_PROCESSES)
    clock, probes = timing.Cpu(), machine.Probes()
    for shape, seconds in shapes.items():
        timer = functools.partial(time, clock, probes.read, seconds)
        files = {type: gguf_bytes(library, type, *shape) for type in GGUF_TYPES} | integers(*shape)
        work = functools.partial(products, shape, files, cases, timer, wrong)
        attempt(f"products {shape}", products_of, work)
        if shape != next(iter(shapes)):
            continue
        for name, weight in weights(shape, files).items():
            if name in AGAINST_PEERS:
                work = functools.partial(against_peers, name, weight, files.get(name), library, Ms, timer)
                attempt(f"{name} against peers {shape}", peers, work)
    for _ in range(processes):
        attempt("a training step", steps, lambda: [timing.in_own_process(measure_step, rounds)])
    return {
        "machine": description, "load": others.shares(), "llama_cpp": library.instructions, "products": products_of,
        "peers": peers, "step": step.merged(steps) if steps else None, "wrong": wrong,
    }  # fmt: skip


def main() -> int:
    """The command line. Returns 1 if something failed or was wrong, else 0."""
    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small cases, in seconds")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="FOLDER", help="of llama.cpp's libraries; default: the package's"
    )
    args = parser.parse_args()
    folder = args.llama_cpp or llama_cpp.folder_of_package()
    if folder is None:
        parser.error("llama.cpp is missing: pip install llama-cpp-py-sync")
    with torch.no_grad():
        found = measure(llama_cpp.LlamaCpp(folder, torch.get_num_threads()), args.quick)
    print(page(found))
    if beyond := slow(found):
        print("longer than allowed:", *beyond, sep="\n")
    if args.output:
        folder = report.folder_of(found["machine"])
        report.write(folder / "files.md", page(found))
        report.write_figures(folder, "files", found)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
