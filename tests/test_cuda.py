"""Guards the CUDA backend on a GPU (make test-gpu): the conformance cases, streams, graphs, torch.compile."""

import cases
import oracle
import pytest
import test_conformance as conformance
import test_file_formats as files
import torch

import qlora_native as qn
from qlora_native import _C

MISSING = _C.cuda_unavailable_reason() or ("" if torch.cuda.is_available() else "torch sees no GPU")
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING)
DEVICE = "cuda"
N, K, M = 192, 320, 65


def weight():
    return conformance.quantize(N, K, "nf4", 64, double_quant=True)


def randn(*size, dtype=torch.bfloat16):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize("case", list(cases.products()), ids=str)
def test_product_and_its_gradients_are_within_their_tolerance(case):
    conformance.check_product(case, DEVICE)


@pytest.mark.parametrize("format", cases.FORMATS)
def test_weight_has_the_bits_of_the_cpu(format):
    codebook = cases.CODEBOOK if format == "codebook" else None
    for shape in cases.WEIGHTS:
        for dtype in cases.DTYPES:
            source = conformance.random_weight(*shape, dtype)
            here = qn.quantize(source, format, 64, False, codebook)
            there = qn.quantize(source.to(DEVICE), format, 64, False, codebook)
            assert torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.absmax.cpu(), here.absmax)
            conformance.assert_same_bits(there.dequantize(dtype).cpu(), here.dequantize(dtype), f"{shape} {dtype}")


def test_double_quantized_weight_decodes_to_the_bits_of_the_cpu():
    q = weight()
    for dtype in cases.DTYPES:
        conformance.assert_same_bits(q.to(DEVICE).dequantize(dtype).cpu(), q.dequantize(dtype), str(dtype))


@files.weights
def test_weight_of_a_file_has_the_bits_of_the_cpu(format, variant):
    for shape in files.SHAPES:
        q = oracle.random_of_file(format, shape, **variant)
        for dtype in cases.DTYPES:
            conformance.assert_same_bits(q.to(DEVICE).dequantize(dtype).cpu(), q.dequantize(dtype), f"{shape} {dtype}")


@files.weights
def test_product_with_a_weight_of_a_file_is_within_its_tolerance(format, variant, monkeypatch):
    """By the kernels that are chosen for one row and for many, and by the general one."""
    for rows, kernel in ((1, ""), (70, ""), (70, "general")):
        monkeypatch.setenv("QLN_FORCE_KERNEL", kernel)
        for shape, dtype in zip(files.SHAPES, (*cases.DTYPES, torch.bfloat16), strict=True):
            files.check_product(format, variant, shape, dtype, rows, DEVICE)


def test_rows_of_an_embedding_have_the_bits_of_the_cpu_and_one_out_of_range_is_nan():
    q, ids = weight(), torch.tensor([[N - 1, 0], [7, 7]])
    for dtype in cases.DTYPES:
        found = qn.functional.embedding(ids.to(DEVICE), q.to(DEVICE), dtype)
        conformance.assert_same_bits(found.cpu(), qn.functional.embedding(ids, q, dtype), str(dtype))
    outside = qn.functional.embedding(torch.tensor([0, N, -1], device=DEVICE), q.to(DEVICE))
    assert outside.isnan().all(1).tolist() == [False, True, True]


def test_product_runs_on_torchs_current_stream():
    q, x = weight().to(DEVICE), randn(M, K)
    expected = qn.linear(x, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)  # tens of milliseconds: a product on another stream would read the zeros
        late.copy_(x)
        y = qn.linear(late, q)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_product_can_be_captured():
    q, x = weight().to(DEVICE), randn(M, K)
    a, b = randn(16, K, dtype=torch.float32), randn(N, 16, dtype=torch.float32)
    qn.linear(x, q, lora_a=a, lora_b=b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qn.linear(x, q, lora_a=a, lora_b=b)
    x.copy_(-x)
    graph.replay()
    assert torch.equal(y, qn.linear(x, q, lora_a=a, lora_b=b))


# Large enough for panels of up to 200 SMs: two of them forward; and rows that are copied in two parts.
LARGE_M = (
    cases.Product(2500, 5000, 1003, torch.bfloat16, bias=True, rank=5),
    cases.Product(2048, 2000, 2048, torch.float16, format="int8", blocksize=128, double_quant=False),
    cases.Product(8200, 1000, 1000, torch.float32, bias=True, rank=16),
)


@pytest.mark.parametrize("case", LARGE_M, ids=str)
def test_product_by_panels_is_within_its_tolerance(case, monkeypatch, capfd):
    monkeypatch.setenv("QLN_PRINT_CONFIG", "1")
    conformance.check_product(case, DEVICE)
    assert capfd.readouterr().err.count("panels of") == 2


def test_product_by_panels_can_be_captured():
    N, K, M = 9000, 1000, 2048
    q, x = conformance.quantize(N, K, "nf4", 64, double_quant=True).to(DEVICE), randn(M, K)
    a, b = randn(16, K, dtype=torch.float32), randn(N, 16, dtype=torch.float32)
    qn.linear(x, q, lora_a=a, lora_b=b)
    graphs, results = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(qn.linear(x, q, lora_a=a, lora_b=b))
    for y, graph in zip(results, graphs, strict=True):
        x.copy_(-x)
        graph.replay()
        assert torch.equal(y, qn.linear(x, q, lora_a=a, lora_b=b))


def test_memory_of_a_call_comes_from_torchs_allocator():
    q, x = conformance.quantize(9000, 1000, "nf4", 64, double_quant=True).to(DEVICE), randn(2048, 1000)
    qn.linear(x, q)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = qn.linear(x, q)
    panels = torch.cuda.max_memory_allocated() - before - y.nbytes
    rest = 2**20  # torch counts whole blocks, off which it splits no less
    assert 2 * rest < panels <= 2 * 2**24 + 2 * rest
    assert torch.cuda.memory_allocated() - before - y.nbytes <= rest


def test_captured_dropout_draws_a_mask_at_each_replay():
    q, x = weight().to(DEVICE), randn(M, K, dtype=torch.float32).requires_grad_()
    a, b = randn(16, K, dtype=torch.float32), randn(N, 16, dtype=torch.float32)

    def step():
        x.grad = None
        y = qn.linear(x, q, lora_a=a, lora_b=b, lora_dropout=0.5)
        y.sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(y.detach().clone())
        # y is linear in x under its mask, so that backward must have had the same one.
        size = (x.grad.double() * x.double()).abs().sum()
        assert abs(y.double().sum() - (x.grad.double() * x.double()).sum()) < 1e-5 * size
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_bits_are_the_same_from_run_to_run():
    q, x = weight().to(DEVICE), randn(M, K)
    first = qn.linear(x, q)
    assert all(torch.equal(qn.linear(x, q), first) for _ in range(20))


def test_compiled_layer_is_one_graph():
    layer = torch.nn.Linear(K, N, bias=False)
    layer = qn.nn.Linear4bit.from_linear(layer).to(DEVICE)
    x = randn(M, K, dtype=torch.float32)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_device_of_a_tensor_elsewhere_is_named_in_the_error():
    with pytest.raises(ValueError, match="device"):
        qn.linear(randn(M, K), weight())


def test_optimizer_has_the_bits_of_the_cpu():
    def train(device):
        parameters = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (5000, 70_000, 3)]
        optimizer = qn.optim.AdamW8bit(parameters, lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        return [parameter.detach().cpu() for parameter in parameters]

    assert all(torch.equal(a, b) for a, b in zip(train(DEVICE), train("cpu"), strict=True))


def test_captured_step_reads_its_learning_rate_and_counts():
    def optimizer():
        params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in (5000, 70_000, 3)]
        made = qn.optim.AdamW8bit(params, lr=torch.tensor(1e-2, device=DEVICE))
        generator = torch.Generator().manual_seed(0)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        made.step()
        return made

    eager, captured = optimizer(), optimizer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (1e-2, 3e-3, float("nan"), -1.0, 1e-4):
        for each in (eager, captured):
            each.param_groups[0]["lr"].fill_(lr)
        eager.step()
        graph.replay()
        for (p, ours), (other, theirs) in zip(captured.state.items(), eager.state.items(), strict=True):
            assert torch.equal(p, other)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert captured.stats()["skipped_steps"] == eager.stats()["skipped_steps"] == 2
    assert [int(state["step"]) for state in captured.state.values()] == [4, 4, 4]
