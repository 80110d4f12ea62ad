"""Guards `python -m qlora_native check`: it passes here, finds a kernel that is wrong, and has it switched off."""

import functools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace

import process
import pytest
import torch

import qlora_native as qn
from qlora_native import _C
from qlora_native._check import reference, run
from qlora_native._core import checked_devices
from qlora_native._core.checked_devices import OPTIONAL_KERNELS, Device

OPERATIONS = {"dequantize", "loss", "activations, norms", "adapter's gradients", "quantize", "optimizers"}
# Kernels that each instruction set's table has; those of a matrix unit differ.
CPU_KERNELS = {"scalar": {"products"}, "amx_emulated": {"tiles"}, "amx_bf16": {"tiles"}}
EMULATED = Device("the emulated GPU", "none", _C.version())
USE = """
import torch, qlora_native as qn
q = qn.quantize(torch.ones(72, 320))
for _ in range(2):
    qn.linear(torch.ones(70, 320, dtype=torch.bfloat16), q)
"""


def emulated(*arguments, cache, run=process.succeed, **environment):
    """Python whose tensors are those of the emulated GPU, with its own cache folder."""
    environment |= {"QLN_BACKEND": "cuda_emulated", "QLN_CHECKS": "1", "XDG_CACHE_HOME": str(cache)}
    return run(*arguments, **environment)


def stored(cache):
    return json.loads((cache / "qlora_native/checks.json").read_text())


def parts(report):
    """{heading: {name: result}} of the report."""
    found = {}
    for part in report.split("\n\n")[1:]:
        heading, *lines = part.splitlines()
        found[heading] = {line[2:].split("  ")[0]: line for line in lines}
    return found


# ---- the check passes here -------------------------------------------------------------------------------------------


def test_cpu_passes_on_each_instruction_set_and_each_kernel_has_a_line():
    shown = process.succeed("-m", "qlora_native", "check", "--only", "cpu", QLN_FORCE_ISA="scalar").stdout
    assert shown.startswith(f"qlora_native            {qn.__version__}\n") and "All is right" in shown
    found = parts(shown)
    for isa in _C.available_isas():
        lines = found[f"CPU, {isa}"]
        expected = {"attention", *OPERATIONS, *CPU_KERNELS.get(isa, {"small_m", "vectors"})}
        assert lines.keys() >= expected, isa
        assert all("  right  " in line for line in lines.values()), lines


def test_gpu_passes_and_each_kernel_has_a_line(tmp_path):
    shown = emulated("-m", "qlora_native", "check", "--only", "gpu", cache=tmp_path)
    assert "All is right" in shown.stdout and "switched off from now on: nothing" in shown.stdout
    lines = parts(shown.stdout)["GPU 0, the emulated GPU, driver none"]
    assert lines.keys() == {"general", *OPTIONAL_KERNELS, *OPERATIONS}
    assert all("  right  " in line for line in lines.values()), lines
    assert stored(tmp_path) == [asdict(EMULATED) | {"wrong": []}]
    assert "GPU" not in emulated("-c", USE, cache=tmp_path).stderr  # nothing is left to be said


def test_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(run, "scalar", lambda: run.Found("products"))
    monkeypatch.setattr(run, "gpus", list)
    assert list(run.check("gpu")) == [("GPU\n  none that the kernels run on", True)]


@pytest.mark.parametrize("only", ["cpu", "gpu"])
def test_process_that_ends_before_its_first_result_is_named_with_the_reason(only, monkeypatch):
    found = run.Found("products")
    found.end("the process ended with 1: no module", is_error=True)
    monkeypatch.setattr(run, "scalar", lambda: found)
    monkeypatch.setattr(_C, "available_isas", lambda: ["scalar"])
    shown, right = next(run.check(only))
    assert shown == "CPU, scalar\n  not checked: before the first result: the process ended with 1: no module"
    assert not right


# ---- a kernel that is wrong ------------------------------------------------------------------------------------------


def planted(mistake, function, *operands):
    """`linear` with a mistake in what gemm computes."""
    y = function(*operands)
    if os.environ.get("QLN_FORCE_KERNEL") != "gemm":
        return y
    if mistake == "crash":
        os.abort()
    if mistake == "hang":
        time.sleep(1000)
    return y + 0.1 * (torch.arange(y.numel()).view(y.shape) == 77)  # one element


def check_with(mistake, timeout=60):
    """Print the check of the emulated GPU with a mistake, by processes of this file."""
    os.environ["PLANTED"] = mistake
    run.CASES, run.TIMEOUT, run.CUDA_KERNELS = "test_check", timeout, ("general", "gemm", "panels")
    for text, _ in run.check("gpu"):
        print(text)


def main():
    """A process of the check, of a few products."""
    from qlora_native._check import cases

    cases.linear = functools.partial(planted, os.environ["PLANTED"], cases.linear)
    if os.environ["PLANTED"] == "memory":
        cases.CACHED_BYTES = 1 << 60
    cases.PRODUCTS, cases.OF_TILES, cases.REST = cases.PRODUCTS[6:7], (), ()
    cases.main(*sys.argv[1:])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("wrong", "WRONG  2 of 4 results: y of [40, 704] . [200, 704]^T, nf4, bfloat16: 1 of 8000 elements"),
        pytest.param("crash", "the process ended with -6", marks=pytest.mark.thorough),
        pytest.param("hang", "no result for 30 s", marks=pytest.mark.thorough),
    ],
)
def test_wrong_kernel_is_found_stored_switched_off_and_named(mistake, said, tmp_path):
    code = f"import test_check; test_check.check_with({mistake!r}, timeout=30)"
    shown = emulated("-c", code, cache=tmp_path).stdout
    lines = [line for line in shown.splitlines() if "WRONG" in line]
    assert len(lines) == 1 and lines[0].startswith("  gemm ") and said in lines[0], shown
    assert "switched off from now on: gemm (stored in " in shown
    assert stored(tmp_path) == [asdict(EMULATED) | {"wrong": ["gemm"]}]

    used = emulated("-c", USE, cache=tmp_path, QLN_PRINT_CONFIG="1").stderr
    assert used.count("switched off, as the check found wrong results: gemm") == 1
    assert used.count(": general, on tensor cores") == 2
    forced = emulated("-c", USE, cache=tmp_path, QLN_PRINT_CONFIG="1", QLN_FORCE_KERNEL="gemm").stderr
    assert forced.count(": general, on tensor cores") == 2


def test_check_of_a_wrong_result_ends_with_an_error(monkeypatch, capsys):
    from qlora_native import __main__ as command

    monkeypatch.setattr(run, "check", lambda only: iter([("CPU, one", True), ("CPU, other", False)]))
    with pytest.raises(SystemExit, match="1"):
        command.main(["check"])
    assert "SOMETHING IS WRONG" in capsys.readouterr().out


def test_mistake_without_a_replacement_is_named(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked_devices.write_result(EMULATED, ["general", "wgmma"])
    monkeypatch.setenv("QLN_CHECKS", "1")
    monkeypatch.setattr(checked_devices, "EMULATED", True)
    monkeypatch.setattr(checked_devices, "_used", set())
    off = []
    monkeypatch.setattr(_C, "disable_cuda_kernels", lambda index, kernels: off.append((index, kernels)))
    checked_devices.note_use(torch.ones(1))
    assert off == [(0, ["wgmma"])]
    assert "nothing replaces what the check found wrong: general" in caplog.text


def test_second_thread_waits_until_a_wrong_kernel_is_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked_devices.write_result(EMULATED, ["gemm"])
    monkeypatch.setenv("QLN_CHECKS", "1")
    monkeypatch.setattr(checked_devices, "EMULATED", True)
    monkeypatch.setattr(checked_devices, "_used", set())
    begun, end, off, seen = threading.Event(), threading.Event(), [], []

    def disable(index, kernels):
        begun.set()
        end.wait(10)
        off.extend(kernels)

    def use():
        checked_devices.note_use(torch.ones(1))
        seen.append(list(off))

    monkeypatch.setattr(_C, "disable_cuda_kernels", disable)
    threads = [threading.Thread(target=use) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    end.set()
    for thread in threads:
        thread.join()
    assert seen == [["gemm"], ["gemm"]]


def test_right_bits_are_those_of_scalar():
    found = run.Found("all")
    for what in ("nf4", "fp4", "int4"):
        found.add(f'{{"line": "quantize", "what": "{what}", "digest": "a"}}\n')
    found.compare_digests({("quantize", "nf4"): "a", ("quantize", "fp4"): "c"})  # int4 is an error of scalar's
    assert found.lines["quantize"].results == 2
    assert found.lines["quantize"].errors == ["fp4: other bits than those of scalar"]


@pytest.mark.parametrize("name", ["y", "dx", "da", "db"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapter_that_is_missing_or_of_another_size_exceeds_the_tolerance_of_norms(name, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (70, 333), "w": (130, 333), "dy": (70, 130), "bias": (130,), "lora_a": (16, 333), "lora_b": (130, 16)}
    operands = {key: 0.1 * torch.randn(size, generator=generator) for key, size in sizes.items()}
    operands |= {key: operands[key].to(dtype) for key in ("x", "w", "dy")}
    right = reference.Linear(**operands, scaling=1.7)
    exact, wrong = right.exact(), reference.Linear(**operands, scaling=1.7 * (1 - 0.1)).exact()
    allowed = right.norm_tolerance(exact)[name]
    assert (wrong[name] - exact[name]).norm() > allowed
    rounded = exact[name].to(dtype if name in ("y", "dx") else torch.float32)
    assert (rounded.double() - exact[name]).norm() < allowed


# The program behaves as compute-sanitizer does: it runs a process, and its own lines stand among those of the process.
FAKE = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
"$@" | awk '{print} /"line": "gemm", "begin"/ && !n++ {print "========= Invalid __global__ read of size 4 bytes"}'
"""


def test_access_that_compute_sanitizer_finds_counts_for_the_kernel_at_work(tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE)
    program.chmod(0o755)
    code = f"from qlora_native._check import run; found = run.check_accesses({str(program)!r}, 0)"
    code += "\nprint(found.unfinished, {name: line.errors for name, line in found.lines.items() if line.errors})"
    shown = emulated("-c", code, cache=tmp_path).stdout
    assert shown.startswith(" {'gemm': ['["), shown
    assert shown.count("Invalid __global__ read of size 4 bytes") == 1


def test_kernels_stay_right_where_the_sanitizer_cannot_run(tmp_path):
    found = run.run_cases("cpu", "all", "sanitizer", (sys.executable, "-c", "raise SystemExit('no permission')"))
    assert found.unfinished.endswith("the process ended with 1: no permission") and not found.lines


def test_gpu_without_free_memory_keeps_all_of_its_kernels(tmp_path):
    code = "import test_check; test_check.check_with('memory')"
    shown = emulated("-c", code, cache=tmp_path).stdout
    assert (
        "  not checked, so nothing is stored\n  general: before the first result: the process ended with 1: " in shown
    )
    assert "WRONG" not in shown and not (tmp_path / "qlora_native").exists()


# ---- the first use of a GPU ------------------------------------------------------------------------------------------

OPERATIONS_OF_A_GPU = {
    "product": USE,
    "compiled": USE.replace("qn.linear(", "torch.compile(qn.linear, backend='eager')("),
    "norm": "import torch, qlora_native as qn\nqn.functional.rms_norm(torch.ones(2, 8), torch.ones(8))",
    "loss": "import torch, qlora_native as qn\n"
    "qn.functional.linear_cross_entropy(torch.ones(2, 8), torch.ones(9, 8), torch.zeros(2, dtype=torch.long))",
    "optimizer": "import torch, qlora_native as qn\np = torch.nn.Parameter(torch.ones(8)); p.grad = torch.ones(8)\n"
    "qn.optim.AdamW8bit([p]).step()",
}


@pytest.mark.parametrize("operation", OPERATIONS_OF_A_GPU)
def test_first_use_of_a_gpu_that_nobody_checked_is_logged_once(operation, tmp_path):
    said = emulated("-c", OPERATIONS_OF_A_GPU[operation], cache=tmp_path).stderr
    assert said.count("nobody has checked the kernels on this GPU. Check them: python -m qlora_native check") == 1


def test_cpu_is_no_gpu_that_could_be_checked(tmp_path):
    assert process.succeed("-c", USE, QLN_CHECKS="1", XDG_CACHE_HOME=str(tmp_path)).stderr == ""


def test_checks_are_not_heeded_where_the_environment_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked_devices.write_result(EMULATED, ["gemm"])
    used = process.succeed("-c", USE, QLN_BACKEND="cuda_emulated", QLN_CHECKS="0", QLN_PRINT_CONFIG="1").stderr
    assert "GPU" not in used and used.count(": gemm, ") == 2


@pytest.mark.parametrize("other", [{"name": "another"}, {"driver": "1.2"}, {"version": "9.9"}], ids=str)
def test_result_of_another_device_driver_or_version_counts_for_nothing(other, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked_devices.write_result(replace(EMULATED, **other), ["gemm"])
    used = emulated("-c", USE, cache=tmp_path, QLN_PRINT_CONFIG="1").stderr
    assert "nobody has checked" in used and used.count(": gemm, ") == 2


def test_results_of_several_devices_are_stored_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = replace(EMULATED, name="another")
    for device, wrong in ((EMULATED, ["gemm"]), (other, []), (EMULATED, ["gemv", "loss"])):
        checked_devices.write_result(device, wrong)
    assert checked_devices.read_results() == {EMULATED: ["gemv", "loss"], other: []}
    assert [path.name for path in (tmp_path / "qlora_native").iterdir()] == ["checks.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "7",
        '{"a": 1}',
        "[[]]",
        '[{"name": "a", "driver": "b"}]',
        '[{"name": "a", "driver": "b", "version": "c", "wrong": "gemm"}]',
        '[{"name": "a", "driver": "b", "version": "c", "wrong": [7]}]',
        '[{"name": [], "driver": "b", "version": "c", "wrong": []}]',
    ],
)
def test_file_that_is_damaged_or_foreign_is_ignored_with_a_warning(text, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = checked_devices.results_file()
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    assert checked_devices.read_results() == {}
    assert f"{path} is damaged" in caplog.text
    checked_devices.write_result(EMULATED, [])
    assert checked_devices.read_results() == {EMULATED: []}


if __name__ == "__main__":
    main()
