"""Guards the CUDA kernels without a GPU, over their emulator (cuda/emulator/), and that CPUs do not need a driver.

The emulator runs the threads of a kernel in an order that QLN_SCHEDULE names. If a result depends on the order, a
barrier or a wait is missing, so every order must pass the conformance cases and give the same bits. `make sanitize`
repeats all of this under AddressSanitizer, which finds reads and writes out of bounds.
"""

import re
import subprocess
import sys
from pathlib import Path

import cases
import oracle
import process
import pytest
import torch

import qlora_native as qn
from qlora_native import _C

SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")
# Blocks at the same time: for what passes between them, partial sums of a tile (stream-K) and the optimizer's step.
CONCURRENT = ("concurrent:1", "concurrent:2", "concurrent:3")
# Every schedule but the first runs one case in so many; prime, so that each loop of cases.py is sampled.
EVERY = 17


def orders(*schedules, others=()):
    """Parameters of a test, of which one of each kind of order is for `make test`, and the rest for `make test-all`."""
    thorough = pytest.mark.thorough
    return [pytest.param(s, *others, marks=thorough if s[-2:] in (":2", ":3") else ()) for s in schedules]


def shown(code, schedule="forward", **more):
    """What a statement prints over the emulator."""
    return process.succeed("-c", code, QLN_BACKEND="cuda_emulated", QLN_SCHEDULE=schedule, **more)


def conformance(*arguments, **environment):
    return process.pytest_of("test_conformance.py", *arguments, QLN_BACKEND="cuda_emulated", **environment)


# Each order without wgmma and with it, and two orders with pairs of blocks that load for each other.
@pytest.mark.parametrize(
    ("schedule", "kernel"),
    [case for kernel in ("", "wgmma") for case in orders(*SCHEDULES, CONCURRENT[0], others=(kernel,))]
    + orders(SCHEDULES[-1], CONCURRENT[0], others=("wgmma,pairs",)),
)
def test_cases_pass_under_each_order_of_threads(schedule, kernel):
    step = 1 if schedule == SCHEDULES[0] and kernel == "" else EVERY
    done = conformance(f"--every={step}", QLN_SCHEDULE=schedule, QLN_FORCE_KERNEL=kernel)
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]


@pytest.mark.parametrize("kernel", ["", "general", "panels"])
@pytest.mark.parametrize("schedule", orders(*SCHEDULES, CONCURRENT[0]))
def test_weights_of_files_are_multiplied_under_each_order_of_threads(schedule, kernel):
    """By the kernels that are chosen, and all by the kernels that are for every weight.

    Threads are the CPU's: torch multiplies panels on a GPU, and over the emulator its bits depend on their number.
    """
    step = 1 if schedule == SCHEDULES[0] else EVERY
    done = process.pytest_of(
        f"--every={step}",
        "-k not number_of_threads",
        "test_file_formats.py",
        QLN_BACKEND="cuda_emulated",
        QLN_SCHEDULE=schedule,
        QLN_FORCE_KERNEL=kernel,
    )
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]


def test_bits_are_the_same_under_each_order_of_threads():
    digests = {s: shown("import test_emulated; print(test_emulated.digest())", s).stdout for s in SCHEDULES}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("schedule", orders(*CONCURRENT))
def test_product_of_concurrent_blocks_has_the_same_bits(schedule):
    """Tiles of 16, 64 and 128 rows, whose K several blocks split, forward and backward."""
    code = "import test_emulated; print(test_emulated.stream_k_digest())"
    expected, done = (shown(code, order, QLN_PRINT_CONFIG="1") for order in (SCHEDULES[0], schedule))
    assert done.stdout == expected.stdout
    tiles = re.findall(r"(\d+) tiles of (\d+x\d+), \d+ steps each, (\d+) blocks", done.stderr)
    shared = {tile for count, tile, blocks in tiles if int(blocks) > 1 and int(count) % int(blocks) != 0}
    assert shared == {"16x128", "64x128", "128x256"}, tiles


def stream_k_digest():
    """Products in two 16-bit dtypes. The last K is not a whole number of vectors."""
    return digest(((12, 200, 704), (40, 130, 960), (100, 130, 704), (40, 130, 333)), cases.DTYPES[1:])


def digest(shapes=((4, 130, 513), (70, 130, 704), (150, 72, 448)), dtypes=cases.DTYPES):
    """Everything that test_determinism.py computes, for products of one row of tiles and of several, in each dtype."""
    import test_determinism

    every = [test_determinism.results(*shape, dtype) for shape in shapes for dtype in dtypes]
    return oracle.digest(tensor for results in every for _, tensor in sorted(results.items()))


@pytest.mark.parametrize("schedule", orders(*SCHEDULES[:3], *CONCURRENT))
def test_optimizer_has_the_bits_of_the_cpu(schedule):
    code = "import test_emulated; print(test_emulated.optimizer_digest())"
    assert shown(code, schedule).stdout.strip() == optimizer_digest()


def optimizer_digest():
    """Each algorithm over every kind of tensor, and AdamW8bit over more tensors than a launch takes."""
    import test_adamw

    params = test_adamw.parameters([515] * 600)
    # Some where vectors cannot reach them, and some of another dtype than their gradients.
    unaligned = [torch.nn.Parameter(torch.cat((p.detach(), p.detach()))[1:]) for p in params[:3]]
    mixed = [torch.nn.Parameter(p.detach().bfloat16()) for p in params[:3]]
    several = [{"params": params[i::40], "lr": 1e-3 * (i + 1), "weight_decay": 0.01 * i} for i in range(40)]
    optimizer = qn.optim.AdamW8bit([*several, {"params": unaligned + mixed}], **test_adamw.OPTIONS)
    for seed in range(2):
        test_adamw.set_gradients(params + unaligned + mixed, seed, torch.float32)
        optimizer.step()
    tensors = (tensor for param, state in optimizer.state.items() for tensor in (param.detach(), *state.values()))
    return test_adamw.digest() + oracle.digest(tensors)


@pytest.mark.parametrize(
    ("kilobytes", "tiles"), [(99, {"64x128"}), (163, {"128x128", "256x128"}), (227, {"128x128", "128x256", "256x128"})]
)
def test_each_tile_is_right_on_a_device_whose_shared_memory_holds_it(kilobytes, tiles):
    """The large products in each of the tiles that may fit shared memory, under one more order of threads."""
    shapes = " or ".join(f"{M}x{N}x{K}" for (M, N, K), *_ in cases.LARGE)
    environment = {"QLN_SCHEDULE": "random:4", "QLN_EMULATED_SMEM": str(kilobytes * 1024), "QLN_PRINT_CONFIG": "1"}
    environment["QLN_FORCE_KERNEL"] = "gemm"  # some have as many rows as panels take
    done = conformance("-s", "-k", f"({shapes}) and (bf16 or f16)", **environment)
    assert f"{2 * len(cases.LARGE)} passed" in done.stdout, done.stdout[-1000:]
    assert set(re.findall(r"tiles of (\d+x\d+)", done.stderr)) == tiles


def test_emulator_is_what_runs():
    """Otherwise the tests above would test the cpu backend."""
    code = "from qlora_native import _C; print(_C.cpu_tensors_backend())"
    assert shown(code).stdout.strip() == "cuda_emulated"


# ---- a machine without a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_machine_without_a_gpu_is_told_why():
    """The module is imported above: a build with CUDA asks for no driver until it is used."""
    reason = _C.cuda_unavailable_reason()
    assert reason.startswith(("no CUDA device can be used here: ", "this build has no CUDA backend: ")), reason
    report = process.succeed("-m", "qlora_native", QLN_BACKEND="cuda_emulated").stdout.splitlines()
    assert any(line.split("  ", 1)[0] == "CUDA backend" and reason in line for line in report)
    q = qn.quantize(torch.ones(2, 64))
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
        qn.linear(torch.ones(1, 64, device="cuda"), q)
    assert qn.linear(torch.ones(1, 64), q).shape == (1, 2), "the cpu backend is as it was"


@pytest.mark.skipif(sys.platform != "linux", reason="readelf's tables")
def test_wheel_needs_no_library_of_the_driver():
    """cudart is linked in, and finds the driver when it is asked for a device."""
    library = Path(_C.__file__).parent / "lib/libqlora_native_torch.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "cuda" not in needed.replace("cuda_emulated", ""), needed
