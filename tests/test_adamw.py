"""Guards the arithmetic of each algorithm: that of float64, and always the same bits."""

import copy
import math

import oracle
import pytest
import torch
from torch import nn

import qlora_native as qn
from qlora_native import _C
from qlora_native.testing import SUM_FACTOR, assert_close_by_norm, unit_roundoff

BLOCKSIZE = 256
MAPS = [torch.tensor(_C.dynamic_map(signed)) for signed in (True, False)]  # of the first and the second moment
U32 = unit_roundoff(torch.float32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 31, 255, 256, 257, 5000, 65536)  # 8-bit moments from 256 on: see `small`
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "min_8bit_size": 256}
# One class for each algorithm of the core (test_optimizers.py has the others), with options for it.
ALGORITHMS = {
    qn.optim.AdamW8bit: OPTIONS,
    qn.optim.Lion8bit: {name: OPTIONS[name] for name in OPTIONS if name != "eps"},
    qn.optim.AdEMAMix8bit: OPTIONS | {"betas": (0.9, 0.99, 0.999), "alpha": 4.0, "t_alpha": 3, "t_beta3": 3},
}


def parameters(sizes=SIZES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.02 * torch.randn(size, generator=generator)).to(dtype)) for size in sizes]


def set_gradients(params, seed, dtype=None, scale=1e-3):
    """Gradients whose sizes differ by orders of magnitude within a block, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        value = torch.randn(param.shape, generator=generator) * torch.randn(param.shape, generator=generator).exp()
        value *= scale * (torch.rand(param.shape, generator=generator) > 0.05)
        param.grad = None
        param.grad_dtype = dtype or param.dtype
        param.grad = value.to(param.grad_dtype)


def train(optimizer, steps=3, dtype=None):
    """Steps with gradients that depend on their number alone. Returns the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in range(steps):
        set_gradients(params, seed, dtype)
        optimizer.step()
    return [param.detach() for param in params]


def blocks_max(x):
    blocks = torch.nn.functional.pad(x.flatten().abs(), (0, -x.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    return blocks.max(dim=1).values


# ---- one step against float64 ----------------------------------------------------------------------------------------


def slots(state, count):
    """(codes or values, absmax or None) of each moment; the slow one of AdEMAMix comes last."""
    if count < 3:
        return [(state[f"state{i + 1}"], state.get(f"absmax{i + 1}")) for i in range(count)]
    scales = state.get("absmax1", (None, None))
    fast, slow = ((state["state1"][i], scales[i]) for i in (0, 1))
    return [fast, (state["state2"], state.get("absmax2")), slow]


def decoded(state, count):
    """The moments in float64."""
    found = []
    for i, (moment, scales) in enumerate(slots(state, count)):
        if scales is not None:
            scales = scales.double().repeat_interleave(BLOCKSIZE)[: moment.numel()]
            moment = MAPS[i == 1].double()[moment.long()] * scales.view(moment.shape)
        found.append(moment.double())
    return found


# Each oracle makes a step in float64 and returns the parameter, its moments, the sizes of the terms that these are sums
# of, and the largest change of the parameter by roundings of fp32, each at most U32 of its result.


def adamw(p, g, moments, t, lr, betas, weight_decay, eps, **_):
    """By torch's AdamW. The update's terms have twelve roundings."""
    m, v = moments
    sizes = [betas[0] * m.abs() + (1 - betas[0]) * g.abs(), betas[1] * v + (1 - betas[1]) * g * g]
    exact = nn.Parameter(p.clone())
    exact.grad = g
    optimizer = torch.optim.AdamW([exact], lr, betas, eps, weight_decay, foreach=False)
    optimizer.state[exact] = {"step": torch.tensor(t - 1.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    largest = lr / (1 - betas[0] ** t) * sizes[0] / ((sizes[1] / (1 - betas[1] ** t)).sqrt() + eps)
    return exact.detach(), [m, v], sizes, 12 * U32 * largest


def lion(p, g, moments, t, lr, betas, weight_decay, **_):
    (m,) = moments
    direction = betas[0] * m + (1 - betas[0]) * g
    # Four roundings may change the sign.
    uncertain = direction.abs() < 4 * U32 * (betas[0] * m.abs() + (1 - betas[0]) * g.abs())
    new = p * (1 - lr * weight_decay) - lr * direction.sign()
    sizes = [betas[1] * m.abs() + (1 - betas[1]) * g.abs()]
    return new, [betas[1] * m + (1 - betas[1]) * g], sizes, 2 * lr * uncertain + U32 * lr


def ademamix(p, g, moments, t, lr, betas, weight_decay, eps, alpha, t_alpha=None, t_beta3=None, **_):
    """As the paper has it: algorithm 1, with the schedules of its section 3.2."""
    m, v, slow = moments
    beta1, beta2, beta3 = betas
    if t_alpha:
        alpha = min(t * alpha / t_alpha, alpha)
    if t_beta3 and t < t_beta3:
        log1, log3 = math.log(beta1), math.log(beta3)
        beta3 = math.exp(log1 * log3 / ((1 - t / t_beta3) * log3 + t / t_beta3 * log1))

    def update(m, v, slow):
        return lr * (m / (1 - beta1**t) + alpha * slow) / ((v / (1 - beta2**t)).sqrt() + eps)

    sizes = [
        beta1 * m.abs() + (1 - beta1) * g.abs(),
        beta2 * v + (1 - beta2) * g * g,
        beta3 * slow.abs() + (1 - beta3) * g.abs(),
    ]
    m, v, slow = beta1 * m + (1 - beta1) * g, sizes[1], beta3 * slow + (1 - beta3) * g
    # As AdamW's twelve roundings of the update's terms, and four of the slow moment's.
    return p * (1 - lr * weight_decay) - update(m, v, slow), [m, v, slow], sizes, 16 * U32 * update(*sizes)


ORACLES = {qn.optim.AdamW8bit: adamw, qn.optim.Lion8bit: lion, qn.optim.AdEMAMix8bit: ademamix}


def check_step(optimizer):
    """Make a step, and compare every parameter and moment with the oracle's from the same state.

    A parameter has three roundings of its own, and a moment four: its decay, its level times absmax, 1 - beta times the
    gradient, the sum.
    """
    group, oracle = optimizer.param_groups[0], ORACLES[type(optimizer)]
    count = sum(optimizer.algorithm.moments)
    before = [(p.detach().double(), p.grad.double(), copy.deepcopy(optimizer.state[p])) for p in group["params"]]
    optimizer.step()
    for param, (p, g, state) in zip(group["params"], before, strict=True):
        name = f"{param.numel()} elements, {param.dtype}"
        moments = decoded(state, count) if state else [torch.zeros_like(p) for _ in range(count)]
        t = int(state["step"]) + 1 if state else 1
        exact, expected, sizes, roundings = oracle(p, g, moments, t, **group)
        tolerance = U32 * 3 * p.abs() + roundings + torch.finfo(torch.float32).smallest_normal
        if param.dtype != torch.float32:
            tolerance += unit_roundoff(param.dtype) * exact.abs() + torch.finfo(param.dtype).smallest_normal
        assert_close_by_norm(f"parameter of {name}", param.detach(), exact, tolerance)
        new = optimizer.state[param]
        assert int(new["step"]) == t
        for i, (found, *moment) in enumerate(zip(slots(new, count), expected, sizes, strict=True)):
            check_moment(f"moment {i} of {name}", *found, *moment, MAPS[i == 1])


def check_moment(name, moment, absmax, exact, terms, levels):
    if moment.dtype == torch.float32:
        assert_close_by_norm(name, moment, exact, 4 * U32 * terms + torch.finfo(torch.float32).smallest_normal)
        return
    assert_close_by_norm(f"{name}, absmax", absmax, blocks_max(exact), 4 * U32 * blocks_max(terms))
    largest = blocks_max(exact).clamp(min=1e-38).repeat_interleave(BLOCKSIZE)[: exact.numel()]
    ratio, terms = exact / largest, terms / largest
    midpoints = (levels.double()[1:] + levels.double()[:-1]) / 2
    infinity = torch.full((1,), float("inf"), dtype=torch.float64)
    code = moment.long()
    below, above = torch.cat((-infinity, midpoints))[code], torch.cat((midpoints, infinity))[code]
    # Two roundings more: of 1 / absmax and of the product.
    assert_close_by_norm(f"{name}, code", torch.minimum(torch.maximum(ratio, below), above), ratio, 10 * U32 * terms)


@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("cls", ORACLES)
def test_step_is_that_of_float64(cls, param, grad):
    optimizer = cls(parameters(dtype=param), **ALGORITHMS[cls])
    for seed in range(5):  # the schedules end after three
        set_gradients(optimizer.param_groups[0]["params"], seed, grad)
        check_step(optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.0)},
        {"lr": 0.0},
        {"eps": 0.0, "weight_decay": 0.0},
        {"lr": torch.tensor(0.01)},
        {"min_8bit_size": 0},
        {"min_8bit_size": 10**9},
    ],
    ids=str,
)
def test_each_option_reaches_the_step(options):
    optimizer = qn.optim.AdamW8bit(parameters(SIZES[1:]), **{**OPTIONS, **options})
    for seed in range(3):
        set_gradients(optimizer.param_groups[0]["params"], seed)
        for param in optimizer.param_groups[0]["params"]:
            param.grad += 1e-9  # no 0 / 0 where eps is 0
        check_step(optimizer)
        small = [p.numel() < optimizer.defaults["min_8bit_size"] for p in optimizer.state]
        assert [state["state1"].dtype == torch.float32 for state in optimizer.state.values()] == small


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_learning_rate_in_a_tensor_acts_as_a_number(cls):
    """Under a scheduler, which writes into the tensor; one of float64 keeps its precision."""

    def train(lr):
        first = float(lr)
        optimizer = cls(parameters(), **{**ALGORITHMS[cls], "lr": lr})
        scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)  # exact in every dtype
        assert optimizer.param_groups[0]["lr"] is lr
        for seed in range(3):
            set_gradients(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == first / 8
        return [param.detach() for param in optimizer.state]

    for number, tensor in ((0.01171875, torch.tensor(0.01171875)), (3e-3, torch.tensor(3e-3, dtype=torch.float64))):
        assert all(torch.equal(a, b) for a, b in zip(train(number), train(tensor), strict=True))


def test_fp32_moments_stay_close_to_exact_ones():
    """Every parameter below min_8bit_size: AdamW in fp32, so a thousand steps stay at rounding errors."""
    ours, theirs = parameters((1000,)), [nn.Parameter(p.double()) for p in parameters((1000,))]
    options = {name: OPTIONS[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizers = [qn.optim.AdamW8bit(ours, **options), torch.optim.AdamW(theirs, **options)]
    for seed in range(1000):
        set_gradients(ours, seed)
        theirs[0].grad = ours[0].grad.double()
        for optimizer in optimizers:
            optimizer.step()
    # A step rounds the parameter, each time up or down, and its update of about lr, perhaps always in one direction.
    steps, exact = 1000 * OPTIONS["lr"], theirs[0].detach()
    tolerance = SUM_FACTOR * 1000**0.5 * U32 * (exact.abs() + steps) + 12 * U32 * steps
    assert_close_by_norm("parameter", ours[0].detach(), exact, tolerance)


def test_strides_of_a_parameter_keep_the_bits():
    plain = parameters((96 * 130,))[0].detach().view(96, 130)
    set_gradients([source := nn.Parameter(plain.clone())], 0)
    results = []
    for layout in (lambda x: x.clone(), lambda x: x.t().contiguous().t(), lambda x: x.repeat(2, 2)[:96, :130]):
        param = nn.Parameter(layout(plain))
        param.grad = layout(source.grad)
        optimizer = qn.optim.AdamW8bit([param], **OPTIONS)
        for _ in range(3):
            optimizer.step()
        results.append((param.detach(), optimizer.state[param]["state1"]))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, results[0], strict=True))


def test_states_side_by_side_stay_separate():
    """States of a group are views of shared tensors. The same bits as from separate tensors, which is how they are
    stepped when somebody replaces them or their memory, or when only some of the group have gradients.
    """
    results = []
    for change in ("none", "replaced", "memory replaced"):
        groups = [parameters(), parameters(SIZES[::-1], torch.bfloat16, seed=1)]
        optimizer = qn.optim.AdamW8bit([{"params": groups[0]}, {"params": groups[1], "lr": 1e-2}], **OPTIONS)
        params = groups[0] + groups[1]
        for step in range(5):
            set_gradients(params, step)
            if step == 3:
                for param in params[::3]:
                    param.grad = None
            optimizer.step()
            for state in optimizer.state.values():
                if change == "replaced":
                    state.update({name: tensor.clone() for name, tensor in state.items()})
                for tensor in state.values() if change == "memory replaced" else ():
                    tensor.data = tensor.data.clone()
        for group in groups:
            in_8_bits = [optimizer.state[p]["state1"] for p in group if "absmax1" in optimizer.state[p]]
            storages = {codes.untyped_storage().data_ptr() for codes in in_8_bits}
            assert len(storages) == (1 if change == "none" else len(in_8_bits))
        results.append([tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())])
    for a, *others in zip(*results, strict=True):
        assert all(torch.equal(a, other) for other in others)


# ---- the 8-bit quantizer ---------------------------------------------------------------------------------------------


def adjacent(x, count=40):
    """[len(x), 2 * count + 1] floats around each of x, in order: -0 and 0 count as one."""
    bits = x.view(torch.int32).long()
    position = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)[:, None] + torch.arange(-count, count + 1)
    return torch.where(position < 0, -position | -(2**31), position).to(torch.int32).view(torch.float32)


def probes(levels):
    """Floats in the map's range: both sides of every midpoint and tie, and a thousand between any two of them."""
    midpoints = (levels.double()[1:] + levels.double()[:-1]) / 2
    between = torch.lerp(
        levels[:-1, None], levels[1:, None], torch.rand(1000, generator=torch.Generator().manual_seed(0))
    )
    found = torch.cat((adjacent(midpoints.float()).flatten(), between.flatten(), levels)).clamp(float(levels[0]), 1.0)
    # A tie takes the lower level: bucketize counts the midpoints strictly below.
    return found, torch.bucketize(found.double(), midpoints)


def assert_nearest(values, found, expected):
    wrong = found != expected
    assert not wrong.any(), f"{values[wrong][:5]}: {found[wrong][:5]}, not {expected[wrong][:5]}"


def test_code_of_first_moment_is_the_nearest():
    """With beta1 = 0 m is the gradient; a 1 in every block makes its absmax 1."""
    values, expected = probes(MAPS[0])
    values = torch.cat((values, torch.zeros(-len(values) % 255)))
    param = nn.Parameter(torch.zeros(len(values) // 255, BLOCKSIZE))
    param.grad = torch.cat((torch.ones(len(param), 1), values.view(-1, 255)), dim=1)
    optimizer = qn.optim.AdamW8bit([param], lr=0.0, betas=(0.0, 0.0))
    optimizer.step()
    found = optimizer.state[param]["state1"][:, 1:].flatten()[: len(expected)].long()
    assert_nearest(values[: len(expected)], found, expected)


def test_code_of_second_moment_is_the_nearest():
    """One value a block, so that it can be any float: v is 1 * absmax / 2 without a gradient, and 2 where that is 2."""
    values, expected = probes(MAPS[1])
    values, order = values.unique(return_inverse=True)
    param = nn.Parameter(torch.zeros(len(values), BLOCKSIZE))
    param.grad = torch.zeros_like(param)
    optimizer = qn.optim.AdamW8bit([param], lr=0.0, betas=(0.0, 0.5))
    optimizer.step()
    state = optimizer.state[param]
    state["state2"][:, 7] = 255
    state["absmax2"].copy_(4 * values)
    param.grad[:, 200] = 2.0
    optimizer.step()
    assert (state["absmax2"] == 2).all()
    assert_nearest(values[order], state["state2"][:, 7].long()[order], expected)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def digest():
    """A hash over parameters and moments of every kind, after steps of each algorithm. test_isas.py compares it too."""
    tensors = []
    for cls, options in ALGORITHMS.items():
        params = [p for dtype in DTYPES for p in parameters((*SIZES[1:], 100_003), dtype)]
        optimizer = cls(params, **options)
        for seed in range(4):
            set_gradients(params, seed, DTYPES[seed % 3])
            optimizer.step()
        for param in params:
            tensors += [param, *optimizer.state[param].values()]
    return oracle.digest(tensors)


def test_bits_are_the_same_for_any_number_of_threads():
    found = set()
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        found.add(digest())
    assert len(found) == 1


# ---- gradients that are not numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "2e19"])
def test_unusable_gradient_skips_the_step(value, dtype, cls):
    if dtype == torch.float16 and value == "2e19":
        value = "65504"  # its largest, which a scale below takes beyond the limit
    params = parameters((300, 257, 70_001), dtype)
    optimizer = cls(params, **ALGORITHMS[cls])
    set_gradients(params, 0)
    optimizer.step()
    expected = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in params])
    for bad in (params[0], params[2]):
        set_gradients(params, 1)
        bad.grad[-1] = float(value)
        if value == "65504":
            optimizer.grad_scale = torch.tensor(1e-15)
        optimizer.step()
        for param, (value_before, state) in zip(params, expected, strict=True):
            assert torch.equal(param.detach(), value_before)
            assert all(torch.equal(optimizer.state[param][name], tensor) for name, tensor in state.items())
    assert optimizer.stats()["skipped_steps"] == 2
    optimizer.grad_scale = None
    set_gradients(params, 1)
    check_step(optimizer)
    assert optimizer.stats()["skipped_steps"] == 2


def test_largest_usable_gradient_is_stepped_with():
    param = nn.Parameter(torch.zeros(1000))
    param.grad = torch.full((1000,), 1.8e19)
    optimizer = qn.optim.AdamW8bit([param], **OPTIONS)
    optimizer.step()
    assert optimizer.stats()["skipped_steps"] == 0
    assert param.isfinite().all() and (param < 0).all()


# ---- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scale_leaves_the_bits_of_the_state(unscale, cls):
    """A power of two as scale, so that with it and without it the bits are the same."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)):
        params = parameters((300, 5000))
        optimizer = cls(params, **ALGORITHMS[cls])
        for seed in range(6):
            set_gradients(params, seed)
            if scaler is None:
                if seed != 3:
                    optimizer.step()
                continue
            scaler.scale(torch.ones(()))
            for param in params:
                param.grad *= scaler.get_scale()
            if seed == 3:
                params[1].grad[7] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, 1e9)
            scaler.step(optimizer)
            scaler.update()
        results.append(torch.cat([p.detach() for p in params]))
        if scaler is not None:
            assert optimizer.stats()["skipped_steps"] == 1
    assert torch.equal(*results)
