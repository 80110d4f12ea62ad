"""Guards bench/first_day.py and bench/tune_cuda.py, which nobody has run on a GPU: their flow over the emulator."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import process
import pytest
from test_bench import script  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--shapes", "128x128", "--m", "16", "--ranks", "0", "--dtypes", "bfloat16")


def emulated(program, folder, *arguments):
    """The ended program, which keeps its results in the folder; the self-check does in the user's cache."""
    environment = {"QLN_BACKEND": "cuda_emulated", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    return process.run(ROOT / "bench" / program, "--folder", folder, *arguments, **environment)


def test_first_day_goes_through_its_steps_once(tmp_path):
    done = emulated("first_day.py", tmp_path)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    steps = json.loads((tmp_path / "steps.json").read_text())
    run = {name for name, step in steps.items() if step["end"] == "done"}
    assert run >= {"tune", "products", "step", "paged"}
    assert all(step["end"].startswith("missing: ") for name, step in steps.items() if name not in run)
    again = emulated("first_day.py", tmp_path)
    begun = {line.partition(" ...")[0] for line in again.stdout.splitlines() if " ..." in line}
    assert again.returncode == 0 and begun == set(steps) - run


def test_tuning_goes_on_after_an_interruption(tmp_path, script):  # noqa: F811
    tune, path = script("tune_cuda"), tmp_path / "tune.jsonl"
    first = emulated("tune_cuda.py", tmp_path, *SMALL, "--minutes", "0")
    assert first.returncode == tune.INCOMPLETE and "2 of 2 products are left" in first.stdout
    second = emulated("tune_cuda.py", tmp_path, *SMALL)
    assert second.returncode == 0, second.stdout + second.stderr
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as if it had been ended before the last product was known
    third = emulated("tune_cuda.py", tmp_path, *SMALL)
    assert third.returncode == 0 and (third.stdout.count("forward"), third.stdout.count("dx")) == (0, 1)
    measured = tune.Progress(path).measured
    kernels = {direction: set(tune.KERNELS) - {"gemv"} for direction in tune.DIRECTIONS}  # gemv: up to 8 rows
    assert {product.direction: set(result["us"]) for product, result in measured.items()} == kernels


def product(tune, **changes):
    fields = {"direction": "dx", "dtype": "bfloat16", "rank": 0, "M": 64, "N": 4096, "K": 14336}
    return tune.Product(**fields | changes)


def test_kernel_that_ends_the_process_twice_is_left_out(tmp_path, script):  # noqa: F811
    tune = script("tune_cuda")
    for end in range(3):
        progress = tune.Progress(tmp_path / "tune.jsonl")
        assert progress.ends_the_process(product(tune), "gemm") == (end == 2)
        assert not progress.ends_the_process(product(tune), "general")
        progress.begin(product(tune), "general")
        progress.begin(product(tune), "gemm")
    progress.finish(product(tune), {"general": 2.0}, {"gemm": "the process ended 2 times"})
    assert not tune.Progress(tmp_path / "tune.jsonl").ends_the_process(product(tune, M=65), "gemm")


def test_rows_of_a_device_replace_its_own_alone(script):  # noqa: F811
    tune = script("tune_cuda")
    table = tune.TABLE.read_text()
    one, other = (tune.rows(90, {product(tune, M=M): {"us": {"gemm": 2.0, "wgmma:64,alone": 1.0}}}) for M in (1, 2))
    assert one == ['{90, dx, bf16, 0, 1, 4096, 14336, "wgmma:64,alone", 1.00},']
    both = tune.with_rows(tune.with_rows(table, 90, "a card", one), 80, "an older one", ["{80, ...},"])
    assert both == table + "// 80: an older one\n{80, ...},\n// 90: a card\n" + one[0] + "\n"
    assert tune.with_rows(both, 90, "another", other) == both.replace("a card", "another").replace(one[0], other[0])


@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="no compiler")
def test_written_rows_are_read_by_the_chooser(tmp_path, script):  # noqa: F811
    tune = script("tune_cuda")
    products = [product(tune, direction=d, dtype=t) for d in tune.DIRECTIONS for t in tune.DTYPES]
    rows = tune.rows(90, {each: {"us": {"wgmma:64,alone": 1.0}} for each in products})
    table = tmp_path / "product/measured.inc"
    table.parent.mkdir()
    table.write_text(tune.with_rows(tune.TABLE.read_text(), 90, "a card", rows))
    code = f"""#include "product/measured.h"
int main() {{ return qlora_native::measured_products().size() == {len(rows)} ? 0 : 1; }}"""
    (tmp_path / "main.cpp").write_text(code)
    source = (tmp_path / "main.cpp", ROOT / "cuda/product/measured.cpp", ROOT / "cuda/product/config.cpp")
    includes = [f"-I{folder}" for folder in (tmp_path, ROOT / "cuda", ROOT / "cpp/src", ROOT / "cpp/include")]
    program = tmp_path / "program"
    command = (os.environ.get("CXX", "g++"), "-std=c++20", *includes, *source, "-o", program)
    subprocess.run(command, check=True)
    assert subprocess.run([program], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.thorough
def test_count_of_clusters_compiles(tmp_path):
    includes = [f"-I{ROOT / folder}" for folder in ("cuda", "cpp/src", "cpp/include")]
    source = ROOT / "bench/clusters.cu"
    subprocess.run(["nvcc", "-std=c++20", "-arch=sm_90", *includes, "-c", source, "-o", tmp_path / "o"], check=True)


def is_running(psutil, pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_step_ends_at_its_limit_with_all_that_it_started(tmp_path, script):  # noqa: F811
    day, started = script("first_day"), tmp_path / "started"
    child = f"""import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(started)!r}, "w").write(str(child.pid))
child.wait()"""
    assert "more than 5 s" in day.run(day.Step("a", (sys.executable, "-c", child), 5), tmp_path / "a.log")
    pid, ends = int(started.read_text()), time.monotonic() + 60
    while is_running(day.psutil, pid):
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_step_in_pieces_runs_until_it_is_complete(tmp_path, script):  # noqa: F811
    day, count = script("first_day"), tmp_path / "count"
    piece = f"import sys; f = open({str(count)!r}, 'a+'); f.write('x'); f.flush(); f.seek(0)"
    piece += f"; sys.exit(0 if f.read() == 'xxx' else {day.INCOMPLETE})"
    assert day.run(day.Step("a", (sys.executable, "-c", piece), 60), tmp_path / "a.log") == day.DONE
    assert count.read_text() == "xxx"
    assert day.run(day.Step("a", (), 60, "no program"), tmp_path / "a.log") == "missing: no program"
    failing = day.Step("a", (sys.executable, "-c", "raise SystemExit(3)"), 60)
    assert day.run(failing, tmp_path / "a.log") == "failed: its exit status is 3"
