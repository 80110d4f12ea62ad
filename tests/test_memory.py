"""Guards memory: a call takes at most 8 MB and 1 MB a thread beside its results, and never a dequantized weight.

That is so by each kernel that a machine could choose for a product (product/config.h). Where torch's dense product
multiplies panels of decoded weight, its memory is added.
"""

import ctypes
import os
from pathlib import Path

import process
import pytest
import torch
from peak import ENVIRONMENT

import qlora_native as qn
from qlora_native import _C

MEGABYTE = 2**20
BOUND = 8 * MEGABYTE + 2 * MEGABYTE  # with two threads
# What the allocator adds. And the kernel counts a process's pages for each processor separately, and joins a count only
# when it has grown to a batch (Linux, lib/percpu_counter.c): so much may be missing, for each of two processors.
BATCH = max(32, 2 * os.cpu_count()) * os.sysconf("SC_PAGESIZE")
SLACK = MEGABYTE // 2 + 2 * BATCH

# The peak of this process is reset before the call (proc(5), clear_refs), and read after it.
PROGRAM = """
import ctypes, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page that is touched is mapped alone
import torch
import qlora_native as qn
from qlora_native._core.weight import op_arguments
torch.set_num_threads(2)
what, M, N, K, dtype = sys.argv[1], *map(int, sys.argv[2:5]), getattr(torch, sys.argv[5])

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def peak(function):
    # the bytes that a function takes beside its results
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    results = function()
    return status("VmHWM") - before - sum(result.nbytes for result in results)

def call(M, N, K):
    # the bytes that the call takes, and those that torch's products of U, and of its rows with a panel, take
    weight = torch.zeros(N, K, dtype=dtype)
    q = qn.quantize(weight)
    x = torch.zeros(M, K, dtype=dtype)
    dy = torch.zeros(M, N, dtype=dtype)
    a, b = torch.zeros(16, K), torch.zeros(N, 16)
    u = torch.zeros(M, 16, dtype=dtype)
    lora = (a, b, 1.0, 0.0, None)
    experts = min(8, N)  # the same weight as that of several experts, each with an adapter
    of_experts = op_arguments(qn.quantize(weight.view(experts, N // experts, K)))
    groups = (torch.arange(experts + 1) * M // experts, experts)
    loras = (torch.zeros(experts, 16, K), torch.zeros(experts, N // experts, 16), 1.0, 0.0, None)
    dy_of_experts = torch.ones(M, N // experts, dtype=dtype)
    ops = torch.ops.qlora_native
    function = {
        "quantize": lambda: ops.quantize(weight, q.code, q.nested_code, 4, 64),
        "dequantize": lambda: (q.dequantize(dtype),),
        "forward": lambda: ops.linear_forward(x, *op_arguments(q), None, *lora),
        "dx": lambda: ops.linear_backward_input(dy, *op_arguments(q), *lora, True),
        "experts": lambda: ops.linear_forward(x, *of_experts, None, *loras, *groups),
        "dx of experts": lambda: ops.linear_backward_input(dy_of_experts, *of_experts, *loras, True, *groups),
        "adapter": lambda: ops.lora_gradients(x, dy, u, u, 1.0, 0.0, None, torch.float32),
    }[what]
    for tensor in (weight, x, dy):
        tensor.fill_(1)  # touch it: an untouched zero takes no memory
    rows, cols = {
        "forward": (x, N),
        "dx": (dy, K),
        "experts": (x[: M // experts], N // experts),
        "dx of experts": (dy_of_experts[: M // experts], K),
    }.get(what, (x[:0], 0))
    y, low_rank = torch.ones(len(rows), cols, dtype=dtype), torch.ones(16, cols, dtype=dtype)
    of_panel = min(cols, 8 * 2**20 // rows[:1].nbytes) if cols else 0
    inner = rows.shape[1]
    panel = torch.ones(inner, of_panel, dtype=dtype) if "dx" in what else torch.ones(of_panel, inner, dtype=dtype).t()

    def products_of_torch():
        # In 16 bits, on a processor that does not multiply them, torch has a copy of the result in fp32.
        torch.mm(u[: len(rows)], low_rank, out=y)
        torch.addmm(y[:, :of_panel], rows, panel, out=y[:, :of_panel])
        return ()

    by_torch = peak(products_of_torch)
    return peak(function), by_torch

call(2, 2, 64)  # threads, code
print(*call(M, N, K))
"""


def measure(program, what, shape, dtype, environment=None):
    """(bytes that the call takes, bytes that torch's product of a panel takes, the kernel of the call)."""
    environment = {**ENVIRONMENT, "QLN_PRINT_CONFIG": "1", "OMP_NUM_THREADS": "2", **(environment or {})}
    shown = process.succeed("-c", program, what, *shape, dtype, **environment)
    kernels = [line.rsplit(": ", 1)[1] for line in shown.stderr.splitlines() if line.startswith(("Y [", "dX ["))]
    extra, by_torch = map(int, shown.stdout.split())
    return extra, by_torch, kernels[-1] if kernels else None


def assert_within_bound(extra, bound):
    assert extra <= bound + SLACK, f"{extra / MEGABYTE:.1f} MB, {bound / MEGABYTE:.1f} MB are promised"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", ["quantize", "dequantize", "forward", "dx", "adapter", "experts", "dx of experts"])
def test_call_takes_no_more_memory_than_stated(what, dtype):
    scalar = _C.current_isa() == "scalar"
    M, N, K = (64, 256, 4096) if scalar and what != "dequantize" else (2048, 4096, 4096)
    extra, by_torch, kernel = measure(PROGRAM, what, (M, N, K), dtype)
    assert_within_bound(extra, BOUND + by_torch * (kernel == "panels"))


@pytest.mark.skipif(_C.current_isa() == "scalar", reason="plain C++ copies no operand")
def test_gradient_of_logits_takes_no_more_memory_than_stated():
    extra, *_ = measure(PROGRAM, "dx", (64, 2**18, 64), "bfloat16")  # one row of them is 512 KB
    assert_within_bound(extra, BOUND)


@pytest.mark.skipif(_C.current_isa() == "scalar", reason="plain C++ has one kernel")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", ["forward", "dx", "experts", "dx of experts"])
def test_panels_take_no_more_memory_than_stated(what, dtype):
    extra, by_torch, kernel = measure(PROGRAM, what, (2048, 4096, 4096), dtype, {"QLN_FORCE_KERNEL": "panels"})
    assert kernel == "panels"
    assert_within_bound(extra, BOUND + by_torch)


def flags_of(address):
    """The flags of the mapping that holds an address (VmFlags of smaps, proc(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_large_result_has_huge_pages():
    q = qn.quantize(torch.ones(4096, 8192, dtype=torch.bfloat16))
    result = q.dequantize(torch.float32)  # 128 MB: a mapping of its own
    other = torch.empty_like(result)
    assert "hg" in flags_of(result.data_ptr() + result.nbytes // 2)
    assert "hg" not in flags_of(other.data_ptr() + other.nbytes // 2)


# Bytes of the heap that are in use, by glibc, before and after interleaved calls. The resident memory would not do: it
# may grow for a while because freed pieces are not adjacent, and may stay as it is while lost ones fill what was free.
HEAP = """
import ctypes, gc, sys
import torch
import qlora_native as qn
from qlora_native import functional as F

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

def in_use():
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd

torch.set_num_threads(1)
ones = torch.ones
weight = {format: qn.quantize(ones(48, 64), format) for format in ("nf4", "int8", "mxfp4")}
experts = qn.quantize(ones(2, 48, 64))
a, b = (torch.nn.Parameter(ones(*shape)) for shape in ((4, 64), (48, 4)))
a2, b2 = (torch.nn.Parameter(ones(*shape)) for shape in ((2, 4, 64), (2, 48, 4)))

def optimizer(name):
    params = [torch.nn.Parameter(ones(70, 64)), torch.nn.Parameter(ones(9))]
    for param in params:
        param.grad = torch.ones_like(param)
    return getattr(qn.optim, name)(params)

def heads(count=2):
    return ones(1, count, 5, 8, requires_grad=True)

def trained(rows, dtype=torch.float32):
    return ones(rows, 64, dtype=dtype, requires_grad=True)

def refused():
    try:
        qn.linear(ones(3, 63), weight["nf4"])
    except ValueError:
        pass

calls = [
    lambda: qn.linear(trained(3), weight["nf4"], None, a, b, 1.0, 0.1).sum().backward(),
    lambda: qn.linear(trained(17, torch.bfloat16), weight["int8"], ones(48), a, b).sum().backward(),
    lambda: F.linear_grouped(trained(5), experts, torch.tensor([0, 2, 5]), None, a2, b2).sum().backward(),
    lambda: F.linear_cross_entropy(trained(5), weight["nf4"], torch.arange(5)).backward(),
    lambda: F.attention(heads(), heads(), heads(), is_causal=True).sum().backward(),
    lambda: F.rotary_embedding(heads(), ones(1, 5, 8), ones(1, 5, 8)).sum().backward(),
    lambda: F.gated_activation(trained(3), trained(3)).sum().backward(),
    lambda: F.rms_norm(trained(3), ones(64)).sum().backward(),
    lambda: F.embedding(torch.arange(3), weight["nf4"]),
    lambda: qn.quantize(ones(33, 70)).dequantize(),
    lambda: weight["mxfp4"].dequantize(),
    *(optimizer(name).step for name in ("AdamW8bit", "Lion8bit", "AdEMAMix8bit")),
    refused,
]
rounds = int(sys.argv[1])
for _ in range(rounds // 4):
    for call in calls:
        call()
before = in_use()
for _ in range(rounds):
    for call in calls:
        call()
print(in_use() - before)
"""


def test_interleaved_calls_leave_nothing_in_the_heap():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("a C library without mallinfo2")
    rounds = 300
    lost = int(process.succeed("-c", HEAP, rounds).stdout) / rounds  # the smallest piece that malloc has is of 32 bytes
    assert lost < 16, f"{lost:.0f} bytes in each round"
