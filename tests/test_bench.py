"""Guards the scripts of bench/ whose figures are committed: they run, and count what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import qlora_native as qn

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A module of bench/, by its name; what it put into sys.path and sys.modules is taken out again."""
    for path in (*BENCH.glob("*.py"), *(BENCH / "quality").glob("*.py")):  # tests/ has a module `cases`, too
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        folder, _, module = name.rpartition("/")
        monkeypatch.setattr(sys, "path", [str(BENCH / folder), str(BENCH), *sys.path])
        return importlib.import_module(module)

    yield load
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(BENCH)):
            del sys.modules[name]


SMALL = {"hidden_size": 256, "intermediate_size": 352}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
MIXTURES = {
    "llama-7b": {},
    "qwen3-30b-a3b": {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2},
    "gpt-oss-20b": {"num_local_experts": 6, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("shape", MIXTURES)
def test_large_model_takes_two_steps(script, shape):
    found = script("large").measure(shape, 2, 16, 4, 3, vocab_size=1000, **SMALL, **MIXTURES[shape])
    assert found["losses"][0] > found["losses"][1] > found["losses"][2]
    assert found["base_bytes"] < found["bytes_in_16_bits"]
    attention = 2 * 4 * (256 + 256) + 2 * 4 * (256 + 128)  # q and o, then k and v, of rank 4
    width, experts = (64, 6) if shape.startswith("qwen") else (352, 6)
    of_experts = experts * 3 * ((256 + 2 * width) + (width + 256))  # gate and up, then down, of rank 3
    of_mlp = 4 * 3 * (256 + 352)
    assert found["trainable"] == 2 * (attention + (of_mlp if shape == "llama-7b" else of_experts))
    assert found["operations_s"]["products"] > 0


def test_large_model_in_files_is_written_once_and_trains(script, tmp_path):
    large = script("large")
    sizes = {"vocab_size": 1000, **SMALL}
    written = []
    for _ in range(2):
        found = large.measure("llama-65b", 3, 16, 4, 3, tmp_path / "weights", **sizes)
        assert found["losses"][0] > found["losses"][1] > found["losses"][2]
        files = found["files"]
        assert files["products_s"] > 0 and files["disk_bytes_per_s"] > 0 and files["peaks"]["RssAnon"] > 0
        written.append(sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "weights").iterdir()))
        assert files["bytes"] == sum(path.stat().st_size for path in (tmp_path / "weights").glob("*.safetensors"))
        assert "its products alone" in large.lines(found)
    assert written[0] == written[1]
    assert [name for name, _ in written[0] if name.endswith("safetensors")][-1] == "model-00004-of-00004.safetensors"
    with pytest.raises(ValueError, match="expected num_hidden_layers 2, got 3"):
        large.measure("llama-65b", 2, 16, 4, 3, tmp_path / "weights", **sizes)


@pytest.mark.parametrize("contestant", ["qlora_native", "qlora_native, nothing fused"])
def test_account_of_a_step_has_all_of_its_time(script, contestant):
    account = script("account")
    name = "2 layers of Llama-7B"
    row = account.measure(name, contestant, 1, vocab_size=1000, **SMALL)
    assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
    assert min(row["parts"].values()) > 0
    width, inner, keys = 256, 352, 128
    weights = 2 * (2 * width * width + 2 * width * keys + 3 * width * inner)
    sides = 2 * (4 * width + 2 * (width + keys) + 3 * (width + inner))
    assert row["operations"]["products"] == 4 * account.TOKENS * (weights + 16 * sides)


def test_products_that_a_loss_calls_are_of_the_head(script):
    step = script("step")
    x, head, labels = torch.randn(8, 16), torch.randn(50, 16), torch.arange(8)
    loss = functools.partial(qn.functional.linear_cross_entropy, x, head, labels)
    seconds = step.seconds_by_part(loss, vocabulary=1)  # which no shape has, as those of panels
    assert seconds[step.HEAD] > 0 and seconds["products"] == 0


@pytest.mark.parametrize("method", ["16 bits", "LoRA", "QLoRA"])
def test_footprint_is_what_is_allocated(script, method):
    footprint = script("quality/footprint")
    size = (128, 344, 2, 2)
    parts, allocated = footprint.parts_of(size, method), footprint.allocated(size, method)
    kept = sum(parts.values()) - parts["activations"]
    assert allocated["kept"] == pytest.approx(kept, rel=footprint.KEPT_TOLERANCE)
    during = parts["gradients"] + parts["activations"]
    assert allocated["peak"] == pytest.approx(during, rel=footprint.PEAK_TOLERANCE)


# ---- bench/files.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def file_products(script, monkeypatch):
    """The cases of a small weight in every format, where each takes as many seconds as it has bytes; what was wrong."""
    pytest.importorskip("gguf")
    files, llama_cpp = script("files"), script("llama_cpp")
    monkeypatch.setattr(files.contest, "copies_needed", lambda nbytes: 2)  # they need not be cold
    monkeypatch.setattr(files.timing, "set_allocator", lambda mode: True)  # that of the other tests stays as it is
    if (folder := llama_cpp.folder_of_package()) is None:
        pytest.skip("pip install llama-cpp-py-sync has not been run")
    library, shape, wrong = llama_cpp.LlamaCpp(folder, 1), (64, 512), []
    data = {type: files.gguf_bytes(library, type, *shape) for type in files.GGUF_TYPES} | files.integers(*shape)
    nbytes = {name: weight.nbytes for name, weight in files.weights(shape, data).items()}

    def timer(calls, M):
        return {name: nbytes.get(name, 1) for name in calls}

    with torch.no_grad():
        rows = list(files.products(shape, data, [("Y", 2), ("dX", 3)], timer, wrong))
        weight = files.weights(shape, data)["Q4_K"]
        peers = list(files.against_peers("Q4_K", weight, data["Q4_K"], library, (1, 3), timer))
    found = {"machine": script("machine").describe(), "load": {"others": 0.0, "stolen": 0.0}, "llama_cpp": ["avx2"]}
    return {**found, "products": rows, "peers": peers, "step": None, "wrong": wrong}


def test_products_over_files_are_right_in_every_format(script, file_products):
    pages = script("file_pages")
    assert not file_products["wrong"]
    for row in file_products["products"]:
        assert row["seconds"].keys() == row["bits"].keys() > set(pages.REFERENCES.values())
        assert set(row["bits"].values()) == set(pages.REFERENCES)


def test_llama_cpp_multiplies_the_same_bytes(script, file_products):
    pages = script("file_pages")
    for row in file_products["peers"]:
        assert row["errors"]["qlora_native"] < row["errors"][pages.LLAMA_CPP] < 0.02


def test_format_is_slow_where_it_takes_longer_than_its_bytes(script, file_products):
    slow = script("file_pages").slow
    assert not [line for line in slow(file_products) if "nf4" in line]
    file_products["products"][0]["seconds"]["AWQ int4"] *= 2
    assert ["AWQ int4" in line for line in slow(file_products) if "nf4" in line] == [True]


def test_report_on_files_names_every_format(script, file_products):
    pages = script("file_pages")
    for text in (pages.page(file_products), pages.numbers(file_products)):
        assert all(f"| {name} |" in text for name in ("Q4_K", "IQ4_XS", "AWQ int4", "GPTQ int8", "FP8"))


def test_programs_end_with_1_where_something_failed(script, file_products, monkeypatch, capsys):
    for name, found in (("files", file_products), ("generate", {"wrong": []})):
        program = script(name)
        monkeypatch.setattr(program, "measure", lambda *_, found=found: found)
        monkeypatch.setattr(program, "page", lambda found: "")
        monkeypatch.setattr(sys, "argv", [name])
        assert program.main() == 0
        monkeypatch.setattr(program, "measure", lambda *_, found=found: {**found, "wrong": ["a product"]})
        assert program.main() == 1


# ---- bench/generate.py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_contestants_that_generate_are_right_and_timed(script, adapter):
    pytest.importorskip("peft")
    generate = script("generate")
    rows = generate.measure_together(adapter, None, 1, True)
    names = [row["name"] for row in rows if row["name"] != generate.BITSANDBYTES]
    ours = ["NF4", "NF4, embedding too"]
    assert names == [generate.BF16, *(f"{name}{fused}" for name in ours for fused in ("", ", fused"))]
    for row in rows:
        assert 0 < row["error"] <= generate.ALLOWED_ERROR
        assert len(row["seconds"]) == 6 and min(row["seconds"].values()) > 0


def test_contestant_that_generates_other_logits_is_refused(script):
    generate, checks = script("generate"), script("checks")
    with torch.no_grad():
        contest = generate.contest(False, None, True)
        contest.contestants["NF4, fused"].model.lm_head.weight *= 1.2
        with pytest.raises(checks.WrongResult, match="NF4, fused"):
            contest.check()


def test_adapter_changes_what_is_generated(script):
    pytest.importorskip("peft")
    generate = script("generate")
    with torch.no_grad():
        plain, adapted = (generate.contest(adapter, None, True).wanted["NF4"] for adapter in (False, True))
    for P in generate.QUICK_PROMPTS:
        assert (adapted[P] - plain[P]).norm() > generate.ALLOWED_ERROR * plain[P].norm()


def test_llama_cpp_generates_by_the_same_model(script, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp_py_sync._cffi_bindings", exc_type=ImportError)
    from gguf_files import make

    from qlora_native.convert.gguf import export_model

    generate, llama_cpp = script("generate"), script("llama_cpp")
    model = make("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", "f32", progress=False)
    prompt, tokens = torch.arange(5, 9), torch.arange(20, 23)
    theirs = llama_cpp.Model(llama_cpp.folder_of_package(), tmp_path / "m.gguf", 1, 64)
    with torch.no_grad():
        expected = generate.forwarded(generate.Cached(model), prompt, tokens)[1]
        for _ in range(2):  # the second time over an emptied cache
            error = generate.forwarded(theirs, prompt, tokens)[1] - expected
            assert error.norm() <= 2**-10 * expected.norm()  # keys and values are in fp16


def test_report_on_generating_says_where_a_peer_is_faster(script):
    pages = script("generate_pages")
    bf16, ours, llama_cpp = ({pages.prompt_of(16): a, pages.after(16): b} for a, b in ((4, 2), (2, 1), (1, 3)))
    names = {pages.BF16: bf16, "NF4": ours, pages.LLAMA_CPP: llama_cpp}
    rows = [{"name": name, "adapter": False, "error": 0.01, "seconds": each} for name, each in names.items()]
    rows += [{**rows[1], "adapter": True}, {**rows[0], "adapter": True}]
    rows[0]["seconds"][pages.FIRST] = rows[1]["seconds"][pages.FIRST] = 0.02
    found = {"machine": script("machine").describe(), "load": {"others": 0.0, "stolen": 0.0}, "llama_cpp": ["avx2"]}
    found |= {"rank": 16, "contestants": rows, "wrong": []}
    assert pages.faster_peers(found) == ["Without an adapter, prompt of 16: llama.cpp, Q4_1 is 2.00 × as fast as NF4"]
    assert "| NF4 | 2000 (2.00 ×) | 1000 (2.00 ×) | 20 (1.00 ×) | 10.0 |" in pages.page(found)
    assert "| llama.cpp, Q4_1 | 1000 (4.00 ×) | 3000 (0.67 ×) | – |" in pages.numbers(found)


# ---- bench/run.py --device cuda, as far as it goes without a GPU -----------------------------------------------------


class RecordedCuda:
    """In torch.cuda's place, with its events and graphs: records its calls. A graph takes 8 ms."""

    def __init__(self):
        self.log = []
        for name in ("flush", "synchronize", "replay", "_sleep"):
            entry = "hold" if name == "_sleep" else name
            setattr(self, name, lambda *_, entry=entry: self.log.append(entry))
        self.CUDAGraph = lambda: self
        self.event = SimpleNamespace(
            record=lambda: self.log.append("record"),
            synchronize=lambda: self.log.append("wait"),
            elapsed_time=lambda end: 8.0 if self.log[-1] == "wait" else None,
        )

    @contextlib.contextmanager
    def graph(self, graph):
        self.log.append("capture")
        yield
        self.log.append("captured")

    def Event(self, enable_timing):
        assert enable_timing
        return self.event


REPLAYED = ["flush", "hold", "record", "replay", "record", "wait"]


def test_replay_is_timed_with_a_cold_cache_and_without_its_launch(script):
    timing = script("timing")
    cuda, called = RecordedCuda(), []
    clock = timing.Gpu(cuda.flush, cuda)
    call = {"ours": called.append, "peer": lambda i: cuda.log.append("peer")}
    times, probe = clock.alternate(call, lambda: cuda.log.append("probe"), budget_s=0.2)
    assert called == [0, *range(clock.CALLS)]
    captures = []
    for name in ("ours", "peer", "probe"):
        logged = [] if name == "ours" else [name]
        captures += [*logged, "synchronize", "capture", *clock.CALLS * logged, "captured"]
    assert cuda.log[: len(captures)] == captures
    replays = cuda.log[len(captures) :]
    assert replays == REPLAYED * (len(replays) // len(REPLAYED))
    assert times["ours"].median == probe.median == pytest.approx(8e-3 / clock.CALLS)
    # 0.2 s for three of 8 ms, and one each to see how long they take
    assert [times["ours"].calls, times["peer"].calls, probe.calls] == [8, 8, 8]
    assert len(replays) == len(REPLAYED) * 3 * 9


def test_calls_of_a_slow_contestant_are_spread_over_the_whole_time(script):
    order = list(script("timing").schedule({"a": 4, "b": 2, "c": 4}))
    assert [number for name, number in order if name == "a"] == [1, 2, 3, 4]
    assert [name for name, _ in order] == ["a", "c", "b", "c", "a", "c", "a", "a", "b", "c"]


def test_each_line_of_a_summary_has_a_case_that_is_measured(script):
    cases, summary = script("cases"), script("summary")
    elsewhere = {*cases.STEPS, "memory", cases.ADAMW_ADAPTER, cases.ADAMW_TENSOR}
    measured = {
        (case.operation, case.rank, case.dtype, case.format, case.memory, case.M)
        for device, shapes in cases.SHAPES.items() for shape in shapes for case in cases.cases(shape, device)
    }  # fmt: skip
    for line in [*summary.LINES, *summary.MORE_LINES, *summary.SHORT]:
        of_line = {(line.operation, line.rank, line.dtype, line.format, line.memory, M) for M in line.Ms}
        assert line.operation in elsewhere or of_line & measured, line


def test_limit_of_bf16_is_at_least_that_of_fp32(script):
    """A processor without bf16 instructions multiplies in fp32."""
    matrix_rate = script("cases").matrix_rate
    assert matrix_rate({"bfloat16": 60e9, "float32": 290e9}, "bfloat16") == 290e9
    assert matrix_rate({"bfloat16": 900e9, "float32": 180e9}, "bfloat16") == 900e9
    assert matrix_rate({"bfloat16": 60e9}, "bfloat16") == 60e9


def test_gpu_is_measured_over_its_own_cases(script, tmp_path, monkeypatch):
    """Cases of a small weight, checked on the CPU, over the recorded clock; the report as if it were the large one."""
    run, machine, report, peers, timing = map(script, ("run", "machine", "report", "peers", "timing"))
    small = (128, 128)
    args = run.arguments(["--device", "cuda", "--shapes", "128x128", "--budget", "0.05"])
    cuda = RecordedCuda()
    probes = SimpleNamespace(nbytes=1 << 20, copy=lambda: None, read=lambda: None)
    clock = timing.Gpu(cuda.flush, cuda)
    monkeypatch.setitem(machine.SQUARES, "cpu", 64)
    limits = machine.limits(probes, args.dtypes, clock)
    assert limits == {"read": 2**20 / 8e-3, "copy": 2**21 / 8e-3} | dict.fromkeys(args.dtypes, 2 * 64**3 / 8e-3)
    found, missing = peers.load(peers.DEFAULT["cuda"])
    card = {"gpu": "NVIDIA H100 80GB HBM3", "processors": 132, "l2_bytes": 50 << 20, "cuda": "13.0"}
    result = {"machine": {**machine.describe(), **card}, "missing_peers": missing, "limits": limits}
    result |= {"rows": [], "memory": [], "wrong": [], "load": {"others": 0.0, "stolen": 0.0}}
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)  # of a weight that small there would be thousands of copies
    with torch.no_grad():
        run.measure_table(args, found, probes, clock, result)
    assert not result["wrong"]
    assert [row.M for row in result["rows"]] == [case.M for case in script("cases").cases(small, "cuda")]
    assert {row.gb_per_s for row in result["rows"]} == {2 * probes.nbytes / (8e-3 / clock.CALLS) / 1e9}
    result["rows"] = [dataclasses.replace(row, shape=(4096, 4096)) for row in result["rows"]]
    assert machine.folder_name(result["machine"]) == "nvidia-h100-80gb-hbm3"
    report.write_figures(tmp_path, "products", result)
    written = report.products(report.figures(tmp_path)["products"], tmp_path)
    assert written.startswith("# NVIDIA H100 80GB HBM3\n")
    assert "| Y, 64 rows | dense | 1.00 × |" in written


def test_optimizer_on_a_gpu_is_timed_uncaptured(script, monkeypatch):
    optimizer, timing = script("optimizer"), script("timing")
    cuda, probes = RecordedCuda(), SimpleNamespace(nbytes=1 << 20, copy=lambda: None)
    monkeypatch.setattr(optimizer, "ADAPTER", [300, 5000])
    monkeypatch.setattr(optimizer, "LARGE", [6000])
    adapter, tensor = optimizer.measure(probes, timing.Gpu(cuda.flush, cuda), budget_s=0.1)
    assert "capture" not in cuda.log
    assert adapter["us"]["torch fused"] == pytest.approx(8000)
    assert (adapter["tensors"], tensor["tensors"]) == (2, 1)
    assert tensor["limit_us"] == pytest.approx(6000 * 16 / 2**21 * 8000)  # 2 MB are copied in 8 ms


def test_optimizer_in_bf16_passes_its_check(script):
    optimizer = script("optimizer")
    with torch.enable_grad():
        for contestant in (optimizer.OURS, optimizer.FUSED):
            optimizer._checked(contestant, [5000, 300], torch.bfloat16)(0)


def test_failed_step_keeps_what_was_measured_before(script, monkeypatch, capfd):
    run, step = script("run"), script("step")
    failing = "import sys; sys.exit('no model')"
    monkeypatch.setattr(step, "measure_alone", lambda **_: subprocess.run([sys.executable, "-c", failing], check=True))
    result = {"rows": ["a row"], "wrong": []}
    run.measure_steps(result)
    steps = [f"{name}: its process ended with 1" for name in script("cases").STEPS]
    assert result == {"rows": ["a row"], "wrong": steps}
    out, err = capfd.readouterr()
    assert out.count("WRONG RESULT") == err.count("no model") == len(steps)


def test_step_in_several_processes_is_their_median(script):
    def found(ours, peer):
        seconds = {"qlora_native": ours, "bitsandbytes + PEFT": peer}
        contestants = {
            name: {"seconds": each, "tokens_per_s": 1024 / each, "losses": [3.5, 3.4]} for name, each in seconds.items()
        }
        about = {"model": "M", "tokens": 1024, "rank": 16, "dropout": 0.0, "memory": "default", "dtype": "bfloat16"}
        return about | {"contestants": contestants, "ratio": peer / ours}

    merged = script("step").merged([found(2.0, 2.4), found(3.0, 3.9), found(2.5, 4.0)])
    assert merged["ratios"] == pytest.approx([1.2, 1.3, 1.6]) and merged["ratio"] == pytest.approx(1.3)
    assert [each["seconds"] for each in merged["contestants"].values()] == [2.5, 3.9]


MEASURED = sorted(BENCH.glob("results/*/figures.json"))
assert MEASURED


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_committed_figures_are_those_of_one_machine(script, path):
    machine, report = script("machine"), script("report")
    assert path.stat().st_size < 70_000
    for program in report.figures(path.parent).values():
        assert machine.folder_name(program["machine"]) == path.parent.name


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_committed_page_is_written_again_from_its_figures(script, path):
    report = script("report")
    if products := report.figures(path.parent).get("products"):
        assert path.with_name("products.md").read_text() == report.products(products, path.parent) + "\n"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "stepping", "generation"),
    [
        ("AuthenticAMD", 25, 1, "AMD EPYC", 1, "Zen 3"),
        ("AuthenticAMD", 25, 17, "AMD EPYC", 1, "Zen 4"),
        ("AuthenticAMD", 26, 80, "AMD EPYC", 0, None),
        ("GenuineIntel", 6, 85, "Intel(R) Xeon(R) Processor @ 2.50GHz", 4, "Skylake-X"),
        ("GenuineIntel", 6, 85, "Intel(R) Xeon(R) Processor @ 2.50GHz", 7, "Cascade Lake"),
    ],
)
def test_processors_of_one_name_are_distinguished(script, vendor, family, model, name, stepping, generation):
    machine = script("machine")
    fields = {"vendor_id": vendor, "cpu family": family, "model": model, "model name": name, "stepping": stepping}
    text = "".join(f"{field}\t: {value}\n" for field, value in fields.items())
    found = machine.processor(f"processor\t: 0\n{text}\nprocessor\t: 1\nmodel name\t: another\n")
    assert machine.cpu_name(found) == name + (f" ({generation})" if generation else "")
    maker, generation = "amd-epyc" if "AMD" in name else "intel-xeon", (generation or "").lower().replace(" ", "-")
    folder = machine.folder_name({**found, "threads": 2, "isa": "avx2"})
    assert folder == "-".join(filter(None, (maker, generation, "2-threads-avx2")))


@pytest.mark.parametrize(("flags", "generation"), [("avx512f amx_tile", "Granite Rapids"), ("avx512f", None)])
def test_granite_rapids_is_known_under_another_model_by_amx(script, flags, generation):
    text = f"vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t: 167\nstepping\t: 1\nflags\t: {flags}\n"
    assert script("machine").processor(text).get("microarchitecture") == generation


def test_figures_of_one_program_leave_those_of_another(script, tmp_path):
    report, cases = script("report"), script("cases")
    case = {"operation": "forward", "shape": (4096, 4096), "M": 4, "dtype": "float32"}
    row = cases.Row(**case, us={"qlora_native": 2.5}, gb_per_s=25.0)
    report.write_figures(tmp_path, "products", {"machine": {"cpu": "A"}, "rows": [row]})
    report.write_figures(tmp_path, "account", {"measured": [{"seconds": 1.23456789}]})
    assert report.figures(tmp_path) == {
        "products": {"machine": {"cpu": "A"}, "rows": [row]},
        "account": {"measured": [{"seconds": 1.2346}]},
    }


def test_other_half_of_a_step_is_measured_against_its_parts(script, monkeypatch):
    half = script("other_half")
    monkeypatch.setattr(half, "BUDGET_S", 0.01)
    with torch.enable_grad():
        rows = [
            half.loss(40, 32, 300, half.timing.Cpu(), lambda: None),
            *half.blocks(30, 64, 96, half.timing.Cpu(), lambda: None),
            *half.heads(1, 4, 2, 20, 8, half.timing.Cpu(), lambda: None),
        ]
        rows.append(half.large_loss(40, 64, 300))
    kept = [row["kept_bytes"] for row in rows if "kept_bytes" in row]
    of_attention = 4 * 20 * (8 * 2 + 4) + 20 * 2 * 4  # the result, a number for each query of a head, and the ranges
    assert [each[half.OURS] for each in kept] == [0, 30 * 4, of_attention, 0]
    assert kept[0][half.UNFUSED] == 30 * 96 * 2 and kept[1][half.UNFUSED] >= 30 * 64 * 4
    machine = {"cpu": "A", "isa": "avx2", "versions": {"torch": "2"}, "threads": 2}
    text = half.lines({"machine": machine, "measured": rows})
    assert text.count("× as fast") == 5


def test_growth_is_one_row_for_each_number_of_rows_of_x(script):
    growth, cases = script("growth"), script("cases")

    def row(operation, M, ms, **more):
        us = {growth.OURS: 1e3 * ms, "torch dense": 2e3 * ms, "decode, then dense": 3e3 * ms}
        case = cases.Case(operation=operation, shape=cases.SQUARE, M=M, **more)
        return vars(cases.Row(**vars(case), us=us, gb_per_s=1.0))

    def rows(ms):
        others = [
            row("forward", 64, 9, rank=16),
            row("forward", 64, 9, memory="kept"),
            row("dx", 64, 9, via="autograd"),
        ]
        return [row(operation, M, ms * M) for operation in ("forward", "dx") for M in (1, 64)] + others

    machine = {"cpu": "A", "isa": "avx2", "versions": {"torch": "2"}, "threads": 2, "date": "2026-01-02 03:04"}
    page = growth.page({"machine": machine, "conditions": {"1 thread": rows(2), "2 threads": rows(1)}})
    assert page.count("| M | 1 thread, ms | dense | decoded | 2 threads, ms | dense | decoded |\n") == 2
    assert page.count("| 1 | 2 | 2.00 × | 3.00 × | 1 | 2.00 × | 3.00 × |\n") == 2
    assert page.count("| 64 | 128 | 2.00 × | 3.00 × | 64 | 2.00 × | 3.00 × |\n") == 2


def test_rows_for_another_program_fail_with_what_was_wrong(script, monkeypatch):
    run = script("run")
    monkeypatch.setattr(run, "set_environment", lambda _: None)
    monkeypatch.setattr(run, "measured", lambda args: {"rows": [], "wrong": [f"forward M=1 {args.dtypes[0]}"]})
    with pytest.raises(RuntimeError, match="forward M=1 bfloat16"):
        run.rows("--operations", "forward")


def test_figures_of_the_docs_are_those_of_the_reports(script):
    readme = script("readme")
    for path in readme.PARTS:
        assert readme.written(path) == path.read_text(), "python bench/readme.py --write"
