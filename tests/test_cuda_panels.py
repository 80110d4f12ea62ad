"""Guards products of large M by panels of decoded weight, which torch multiplies (cuda/product/README.md).

They run over the emulator, through both of torch's hooks, and torch's modes must neither disturb nor see them. What a
panel holds, and the order of events, is tested without torch in tests/cpp/test_cuda_panels.cpp.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import cases
import oracle
import test_conformance as conformance
import test_emulated as emulated
import torch
from test_kernels import check_products  # noqa: F401 (shown() calls it)

import qlora_native as qn
from qlora_native._core.weight import op_arguments

BY_PANELS = "for the application's product"


def shown(call, schedule="forward"):
    """What a function of this file prints, run over the emulator; and what its products were."""
    done = emulated.shown(f"import test_cuda_panels; test_cuda_panels.{call}", schedule, QLN_PRINT_CONFIG="1")
    return done.stdout, done.stderr


def test_product_and_its_gradients_are_within_their_tolerance():
    _, products = shown("check_products(*test_cuda_panels.cases.large_m())")
    backward_is_fused = sum(case.dropout > 0 for case in cases.large_m())
    assert products.count(BY_PANELS) == 2 * len(list(cases.large_m())) - backward_is_fused


def test_weight_has_the_bits_of_dequantized():
    _, products = shown("check_bits()")
    assert products.count(BY_PANELS) == products.count("SMs:") > 0


def check_bits():
    """Rows of a unit matrix times W are its own elements. Of 208 columns vectors are decoded, of 203 one by one."""
    N = 130
    for K, dtype, format in itertools.product((203, 208), cases.DTYPES, cases.FORMATS):
        q = conformance.quantize(N, K, format, 32, True)
        w = q.dequantize(dtype)
        assert torch.equal(qn.linear(torch.eye(800, K, dtype=dtype), q)[:K], w.t())
        x = torch.zeros(800, K, dtype=dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(qn.linear(x, q), x, torch.eye(800, N, dtype=dtype))
        assert torch.equal(dx[:N], w)


def test_bits_are_the_same_under_each_order_of_threads():
    digests = {schedule: shown("print_digest()", schedule)[0] for schedule in emulated.SCHEDULES[:3]}
    assert len(set(digests.values())) == 1, digests


def products(M=800, N=96, K=203, dtype=torch.bfloat16, seed=0):
    """[function] that give Y, and dX with the adapter's gradients."""
    torch.manual_seed(seed)
    q, x = qn.quantize(torch.randn(N, K)), torch.randn(M, K).to(dtype).requires_grad_()
    bias, a, b = (torch.randn(size) for size in ((N,), (5, K), (N, 5)))
    a, b, dy = a.requires_grad_(), b.requires_grad_(), torch.randn(M, N).to(dtype)
    return [
        lambda: (qn.linear(x.detach(), q, bias, a.detach(), b.detach(), 0.5),),
        lambda: torch.autograd.grad(qn.linear(x, q, None, a, b, 0.5), (x, a, b), dy),
        lambda: torch.autograd.grad(qn.linear(x, q), x, dy),
    ]


def print_digest():
    results = (product() for dtype in cases.DTYPES for product in products(dtype=dtype))
    print(oracle.digest(tensor for each in results for tensor in each))


def test_python_threads_get_the_bits_that_each_gets_alone():
    shown("check_threads()")


def check_threads():
    calls = [product for seed, M in enumerate((800, 901)) for product in products(M=M, seed=seed)]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(lambda call: call(), calls), alone, strict=True):
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_modes_of_torch_leave_the_product_alone():
    """Autocast would round what it is given, inference has no version counters, and a dispatch mode sees operations."""
    shown("check_modes()")


def check_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    names = set()
    q, x = conformance.quantize(96, 203, "nf4", 64, True), torch.randn(800, 203)

    def forward():
        return torch.ops.qlora_native.linear_forward(x, *op_arguments(q), None, None, None, 1.0, 0.0, None)[0]

    expected = forward()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), Seen()):
        with mode:
            found = forward()
        assert torch.equal(found, expected)
    assert torch.equal(compiled(), expected)
    assert names == {"qlora_native.linear_forward.default"}


def test_products_of_255_rows_are_by_other_kernels():
    _, printed = shown("small_products()")
    assert printed and BY_PANELS not in printed


def small_products():
    for product in products(M=255):
        product()
