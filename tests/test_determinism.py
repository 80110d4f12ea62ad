"""Guards determinism: the same bits for any number of threads, in every run, and in concurrent Python threads."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import qlora_native as qn
from qlora_native.testing import relative_error

SHAPES = ((1, 640, 512), (4, 200, 513), (16, 257, 1100), (64, 130, 700), (300, 96, 1030), (64, 1400, 700))


def results(M, N, K, dtype, seed=0):
    """Everything that is computed, by name, for one product with an adapter and dropout."""
    torch.manual_seed(seed)
    weight = torch.randn(N, K)
    q = qn.quantize(weight)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    bias, a, b = (torch.randn(size).requires_grad_() for size in ((N,), (16, K), (N, 16)))
    y = qn.linear(x, q, bias, a, b, 0.5, 0.25)
    gradients = torch.autograd.grad(y, (x, bias, a, b), torch.randn_like(y))
    return {
        **q.tensors(),
        "w": q.dequantize(dtype),
        "int8": qn.quantize(weight, "int8", double_quant=False).codes,
        "y": y.detach(),
        **dict(zip(("dx", "dbias", "da", "db"), gradients, strict=True)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_the_same_for_any_number_of_threads(shape, dtype):
    torch.set_num_threads(1)
    expected = results(*shape, dtype)
    for threads in (2, 3, 3):
        torch.set_num_threads(threads)
        for name, tensor in results(*shape, dtype).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("K", [65, 128, 260])
def test_input_gradient_of_a_vocabulary_has_the_bits_of_any_part_of_its_rows(K, rank):
    """Of 40 rows of 131,075 logits, some columns are multiplied after the others; of up to 27 rows, all at once."""
    torch.manual_seed(0)
    q = qn.quantize(torch.randn(131_075, K), "nf4" if K < 200 else "int8")
    V, counts = q.shape[0], [13, 0, 27]
    x, dy = torch.zeros(40, K, dtype=torch.bfloat16, requires_grad=True), torch.randn(40, V).bfloat16()
    a, b, offsets = torch.randn(3, rank, K), torch.randn(3, V, rank), torch.tensor([0, *counts]).cumsum(0)
    w = q.dequantize(torch.bfloat16).double()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        (dx,) = torch.autograd.grad(qn.functional.linear_grouped(x, q, offsets, None, a, b, 0.5), x, dy)
        for rows, out, a1, b1 in zip(dy.split(counts), dx.split(counts), a, b, strict=True):
            alone = x.detach()[: len(rows)].requires_grad_()
            (wanted,) = torch.autograd.grad(qn.linear(alone, q, None, a1, b1, 0.5), alone, rows)
            assert torch.equal(out, wanted)
            if len(rows):
                exact = rows.double() @ (w + 0.5 * b1.bfloat16().double() @ a1.bfloat16().double())
                assert relative_error(out, exact) < 2**-8


def test_python_threads_get_the_bits_that_each_gets_alone():
    arguments = []
    for M, N, K in SHAPES * 2:
        q, x = qn.quantize(torch.randn(N, K)), torch.randn(M, K).bfloat16()
        arguments.append((x, q, *(torch.randn(size) for size in ((N,), (16, K), (N, 16))), 0.5))

    def both(arguments):
        return qn.linear(*arguments), qn.quantize(arguments[1].dequantize()).codes

    expected = [both(each) for each in arguments]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(both, arguments), expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_other_python_threads_run_during_a_product():
    """No clock: while nothing makes the interpreter switch threads, another runs only if the product lets it."""
    torch.set_num_threads(1)
    q, x = qn.quantize(torch.randn(512, 512)), torch.randn(4096, 512)
    passes, counted = 0, []
    done = threading.Event()

    def products():
        for _ in range(1000):  # the other thread may wait for the system, but not every time
            before = passes
            qn.linear(x, q)
            counted.append(passes - before)
            if counted[-1] > 0:
                break
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=products)
        worker.start()
        while not done.is_set():
            passes += 1
            time.sleep(0)  # lets the worker run
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert counted[-1] > 0, f"no Python ran in any of {len(counted)} products"


def test_forked_process_can_quantize():
    """A data loader's workers are forked, and may quantize."""
    import multiprocessing

    qn.quantize(torch.randn(64, 64))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(qn.quantize(torch.ones(8, 64)).absmax.tolist()))
    child.start()
    child.join(60)
    hung = child.is_alive()
    child.kill()
    assert not hung
    assert child.exitcode == 0
    assert queue.get() == qn.quantize(torch.ones(8, 64)).absmax.tolist()
