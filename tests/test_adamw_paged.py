"""Guards PagedAdamW8bit where moments are paged: on a GPU, and in CI on the emulated one (QLN_BACKEND=cuda_emulated).

tests/cpp/test_paged.cpp tests the order in which an arena calls the driver.
"""

import copy
import ctypes
import gc

import process
import pytest
import torch
from test_adamw_resume import assert_same, pickled
from torch import nn

import qlora_native as qn
from qlora_native import _C, optim
from qlora_native._core.paging import is_pageable

ON_GPU = torch.cuda.is_available() and not _C.cuda_unavailable_reason()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
PAGED = is_pageable(DEVICE)
paged = pytest.mark.skipif(not PAGED, reason="neither a GPU nor the emulated one: see the first test")
gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")
every_optimizer = pytest.mark.parametrize(
    "cls", [optim.PagedAdamW8bit, optim.PagedAdam8bit, optim.PagedLion8bit, optim.PagedAdEMAMix8bit]
)

SIZES = ((16, 70), (0,), (5000,), (96, 130), (1,), (40_000,))


def test_paged_tests_pass_over_the_emulated_gpu():
    """This file once more, and what test_adamw_resume.py has of PagedAdamW8bit, over the emulator."""
    if PAGED:
        pytest.skip("it is what runs")
    files = ("test_adamw_paged.py", "test_adamw_resume.py")
    assert " passed" in process.pytest_of(*files, "-k", "paged", QLN_BACKEND="cuda_emulated").stdout


def start(cls):
    """Parameters in two groups, the same each time."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).to(DEVICE)) for size in SIZES]
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}]
    return params, cls(groups, lr=1e-2, min_8bit_size=256)


def step(params, optimizer, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        if i in without:
            param.grad = None
    optimizer.step()


def assert_same_as_ordinary(params, optimizer, steps, without=()):
    """After `steps` steps from start(), the first without gradients for some."""
    others, ordinary = start(getattr(optim, type(optimizer).__name__.removeprefix("Paged")))
    for seed in range(steps):
        step(others, ordinary, seed, without if seed == 0 else ())
    assert_same([p.detach() for p in params], [p.detach() for p in others])
    assert_same(optimizer.state_dict(), ordinary.state_dict())


@paged
@every_optimizer
def test_paged_moments_have_the_bits_of_ordinary_ones(cls):
    params, optimizer = start(cls)
    for seed in range(3):
        step(params, optimizer, seed)
    assert_same_as_ordinary(params, optimizer, 3)


@paged
@every_optimizer
def test_paged_moments_are_as_before_after_a_failed_step(cls):
    """At the first step and at a later one, where a parameter joins."""
    params, optimizer = start(cls)
    for seed, without in enumerate(((0,), ())):
        before = copy.deepcopy(optimizer.state_dict())
        params[2].data, good = torch.ones(1, device=DEVICE).expand(5000), params[2].data
        with pytest.raises(ValueError, match="expected elements that each have memory of their own"):
            step(params, optimizer, seed, without)
        assert_same(optimizer.state_dict(), before)
        params[2].data = good
        step(params, optimizer, seed, without)
    assert_same_as_ordinary(params, optimizer, 2, without=(0,))


@paged
def test_all_paged_moments_are_in_the_arena():
    """None is too small; and each keeps its alignment."""
    params, optimizer = start(optim.PagedAdamW8bit)
    assert optimizer.stats()["bytes_managed"] == 0
    step(params, optimizer, 0)
    stats = optimizer.stats()
    assert stats["bytes_resident"] == stats["bytes_managed"] >= stats["state_bytes"] > 0
    assert stats["prefetches"] == 2  # a segment a group
    assert 0 <= stats["stalls"] <= 2
    step(params, optimizer, 1)
    assert optimizer.stats()["prefetches"] == 4


@paged
@every_optimizer
def test_loaded_moments_are_paged_again(cls):
    params, optimizer = start(cls)
    step(params, optimizer, 0)
    managed = optimizer.stats()["bytes_managed"]
    saved = copy.deepcopy(optimizer.state_dict())
    twins, twin = start(cls)
    for param, other in zip(twins, params, strict=True):
        param.data.copy_(other.data)
    state = optimizer.state_dict()
    twin.load_state_dict(state)
    assert twin.stats()["bytes_managed"] == managed
    step(twins, twin, 1)
    assert twin.stats()["prefetches"] == 2
    assert_same_as_ordinary(twins, twin, 2)
    assert_same(optimizer.state_dict(), saved)  # the twin has moments of its own
    optimizer.load_state_dict(optimizer.state_dict())  # into itself
    step(params, optimizer, 1)
    assert_same_as_ordinary(params, optimizer, 2)


@paged
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copy_of_paged_moments_is_paged(how):
    params, optimizer = start(optim.PagedAdamW8bit)
    step(params, optimizer, 0)
    twins, twin = how((params, optimizer))
    assert twin.stats()["bytes_managed"] == optimizer.stats()["bytes_managed"]
    step(twins, twin, 1)
    assert_same_as_ordinary(twins, twin, 2)


@paged
def test_late_parameter_gets_paged_moments():
    """One without a gradient at first has its place already; one that is added or unfrozen makes a new arena."""
    params, optimizer = start(optim.PagedAdamW8bit)
    step(params, optimizer, 0, without=(0, 2))
    managed = optimizer.stats()["bytes_managed"]
    step(params, optimizer, 1)
    assert optimizer.stats()["bytes_managed"] == managed
    assert_same_as_ordinary(params, optimizer, 2, without=(0, 2))

    frozen = nn.Parameter(torch.ones(5000, device=DEVICE), requires_grad=False)
    optimizer.add_param_group({"params": [frozen, nn.Parameter(torch.ones(300, device=DEVICE))]})
    optimizer.param_groups[2]["params"][1].grad = torch.ones(300, device=DEVICE)
    before = copy.deepcopy(optimizer.state[params[2]])
    optimizer.step()
    assert optimizer.stats()["bytes_managed"] > managed
    managed = optimizer.stats()["bytes_managed"]
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(5000, device=DEVICE)
    moments = optimizer.state[optimizer.param_groups[2]["params"][1]]
    codes = moments["state1"].clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.param_groups[2]["params"][1].grad = None
    optimizer.step()
    assert optimizer.stats()["bytes_managed"] > managed
    assert torch.equal(moments["state1"], codes)
    assert not torch.equal(before["state1"], optimizer.state[params[2]]["state1"])


@paged
def test_paged_state_that_is_cleared_begins_at_zero():
    params, optimizer = start(optim.PagedAdamW8bit)
    step(params, optimizer, 7)
    optimizer.state.clear()
    fresh, other = start(optim.AdamW8bit)
    for param, value in zip(fresh, params, strict=True):
        param.data.copy_(value.data)
    step(params, optimizer, 0)
    step(fresh, other, 0)
    assert_same(optimizer.state_dict(), other.state_dict())


@paged
def test_paged_moments_outlive_their_optimizer():
    params, optimizer = start(optim.PagedAdamW8bit)
    step(params, optimizer, 0)
    moments = optimizer.state[params[5]]["state1"]
    codes = moments.clone()
    del optimizer
    gc.collect()
    assert torch.equal(moments, codes)


@paged
def test_bad_input_of_a_paged_arena_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"states\[1\].elements: expected >= 0, got -1"):
        _C.PagedArena([(1, True), (-1, False)], DEVICE.type == "cuda", 0)
    with pytest.raises(ValueError, match="segment_bytes: expected >= 1, got 0"):
        _C.PagedArena([(1, True)], DEVICE.type == "cuda", 0, segment_bytes=0)
    with pytest.raises(ValueError, match="algorithm: expected adamw, lion or ademamix, got sgd"):
        _C.PagedArena([(1, True)], DEVICE.type == "cuda", 0, "sgd")
    with pytest.raises(IndexError):
        _C.PagedArena([], DEVICE.type == "cuda", 0).arrays(0)
    unused = _C.PagedArena([(3, False)], DEVICE.type == "cuda", 0).arrays(0)
    assert len(unused) == 2 and torch.from_dlpack(unused[0]).device == DEVICE


@paged
@pytest.mark.parametrize(
    ("algorithm", "elements"), [("adamw", [3, 3, 1, 1]), ("lion", [3, 1]), ("ademamix", [6, 3, 2, 1])]
)
def test_paged_arena_has_the_arrays_of_an_algorithm(algorithm, elements):
    """The moments in 8 bits, then their scales; of ademamix the first of either are two moments'."""
    arrays = _C.PagedArena([(3, True)], DEVICE.type == "cuda", 0, algorithm).arrays(0)
    assert [torch.from_dlpack(array).numel() for array in arrays] == elements


def test_paged_arena_of_the_cpu_is_an_error():
    if _C.cpu_tensors_backend() == "cuda_emulated":
        pytest.skip("it can be")
    with pytest.raises(RuntimeError, match="PagedArena: the backend cpu pages nothing"):
        _C.PagedArena([(1, True)], False, 0)


# ---- on a GPU. All of it is a few megabytes: a card whose memory is over-subscribed can hang -------------------------


def last_prefetch(tensor):
    """The device to which all of it was prefetched last; -1 is the host, -2 several or none."""
    attribute, place = 4, ctypes.c_int(-3)  # CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION
    error = ctypes.CDLL("libcuda.so.1").cuMemRangeGetAttribute(
        ctypes.byref(place), ctypes.c_size_t(4), attribute, ctypes.c_uint64(tensor.data_ptr()),
        ctypes.c_size_t(tensor.nbytes),
    )  # fmt: skip
    assert error == 0
    return place.value


@gpu
def test_paged_moments_move_on_a_gpu():
    concurrent = ctypes.c_int()
    attribute = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
    ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(concurrent), attribute, DEVICE.index)
    if not concurrent:
        pytest.skip("here the ring is used: the next test")
    param = nn.Parameter(torch.randn(2 << 20, device=DEVICE))
    assert param.nbytes * 4 < torch.cuda.mem_get_info(DEVICE)[0] // 4, "too little free memory for this test"
    optimizer = qn.optim.PagedAdamW8bit([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    torch.cuda.synchronize(DEVICE)
    moments = optimizer.state[param]["state1"]
    assert moments.device == DEVICE and last_prefetch(moments) == DEVICE.index
    stats = optimizer.stats()
    assert stats["bytes_resident"] == stats["bytes_managed"]


@gpu
def test_paged_ring_gives_the_bits_of_ordinary_memory_on_a_gpu(monkeypatch):
    """Pinned memory and the ring, which managed memory that is not concurrent would need; segments of 64 KB."""
    make = _C.PagedArena
    monkeypatch.setattr(_C, "PagedArena", lambda *args: make(*args, segment_bytes=1 << 16, pinned=True))
    params, optimizer = start(optim.PagedAdamW8bit)
    for seed in range(3):
        step(params, optimizer, seed)
    assert_same_as_ordinary(params, optimizer, 3)
    stats = optimizer.stats()
    assert stats["bytes_resident"] == 0 and stats["bytes_managed"] > 0 and stats["prefetches"] > 6


@gpu
def test_paged_step_waits_for_its_own_stream_alone():
    """Work of another stream is still running when the step and all its prefetches are done."""
    params, optimizer = start(optim.PagedAdamW8bit)
    step(params, optimizer, 0)
    torch.cuda.synchronize(DEVICE)
    other, done = torch.cuda.Stream(DEVICE), torch.cuda.Event()
    with torch.cuda.stream(other):
        torch.cuda._sleep(4_000_000_000)  # cycles: two seconds
        done.record()
    step(params, optimizer, 1)
    torch.cuda.current_stream(DEVICE).synchronize()
    assert not done.query()
    done.synchronize()
