"""Guards the classes of optimizers: their options, bitsandbytes' classes of the same names, and state dicts.

test_adamw*.py tests the arithmetic, blocks and skipped steps.
"""

import copy
import io
import itertools
import re
import warnings

import pytest
import torch
from test_adamw import MAPS, OPTIONS, U32, check_step, decoded, lion, parameters, set_gradients, slots, train
from test_adamw_resume import assert_same
from torch import nn

import qlora_native as qn
from qlora_native.testing import assert_close_by_norm

CLASSES = {"AdamW8bit": 1e-2, "Adam8bit": 0.0, "Lion8bit": 0.0, "AdEMAMix8bit": 1e-2}  # and their weight_decay
pytestmark = pytest.mark.filterwarnings("ignore:Paged.*8bit. no GPU")


def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes").optim


# ---- arithmetic ------------------------------------------------------------------------------------------------------


UNSCHEDULED = {"betas": (0.9, 0.99, 0.999), "alpha": 4.0, "t_alpha": None, "t_beta3": None}


@pytest.mark.parametrize("options", [{}, {"t_alpha": 0}, {"t_alpha": 4}, {"t_beta3": 2.5}], ids=str)
def test_schedule_of_ademamix_is_that_of_the_paper(options):
    """None of either, one alone, and over a number of steps that is not whole."""
    optimizer = qn.optim.AdEMAMix8bit(parameters(), **{**OPTIONS, **UNSCHEDULED, **options})
    for seed in range(5):
        set_gradients(optimizer.param_groups[0]["params"], seed)
        check_step(optimizer)


def test_beta3_below_beta1_is_used_at_once():
    """As in bitsandbytes: the schedule is at most beta3."""
    options = {**OPTIONS, **UNSCHEDULED, "betas": (0.99, 0.9, 0.5)}
    assert_same(*(train(qn.optim.AdEMAMix8bit(parameters(), **options | {"t_beta3": t}), 5) for t in (None, 3)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_adamw_with_another_default(weight_decay):
    """As in bitsandbytes, whose Adam decouples its weight decay too."""
    assert qn.optim.Adam8bit(parameters()).param_groups[0]["weight_decay"] == 0.0
    states = []
    for cls in (qn.optim.Adam8bit, qn.optim.AdamW8bit):
        optimizer = cls(parameters(), **{**OPTIONS, "weight_decay": weight_decay})
        states.append((train(optimizer), optimizer.state_dict()))
    assert_same(*states)


def test_ademamix_without_its_slow_moment_is_adamw():
    adamw = qn.optim.AdamW8bit(parameters(), **OPTIONS)
    mixed = qn.optim.AdEMAMix8bit(parameters(), **OPTIONS | {"betas": (*OPTIONS["betas"], 0.9), "alpha": 0.0})
    assert_same(train(mixed, 4), train(adamw, 4))
    assert_same(*([state["state2"] for state in each.state.values()] for each in (mixed, adamw)))


# ---- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_8bit_size", [1, 10**6])
def test_state_has_the_layout_of_bitsandbytes(min_8bit_size):
    shapes = {"Lion8bit": {"state1": (3, 100), "absmax1": (2,)}}
    shapes["AdamW8bit"] = shapes["Adam8bit"] = {**shapes["Lion8bit"], "state2": (3, 100), "absmax2": (2,)}
    shapes["AdEMAMix8bit"] = {**shapes["AdamW8bit"], "state1": (2, 3, 100), "absmax1": (2, 2)}
    for name, expected in shapes.items():
        if min_8bit_size > 300:
            expected = {key: shape for key, shape in expected.items() if key.startswith("state")}
        param = nn.Parameter(torch.zeros(3, 100))
        results = []
        for module in (qn.optim, peers()):
            optimizer = getattr(module, name)([param], min_8bit_size=min_8bit_size)
            param.grad = torch.ones(3, 100)
            optimizer.step()
            state = optimizer.state[param]
            results.append({k: (t.shape, t.dtype, t.is_contiguous()) for k, t in state.items() if k in expected})
            assert {key for key in state if not key.startswith(("step", "qmap"))} == expected.keys()
        assert {key: tuple(value[0]) for key, value in results[0].items()} == expected
        assert results[0] == results[1]
        assert qn.optim.__dict__[name]([param]).stats() == {"skipped_steps": 0, "state_bytes": 0}


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------

# Its quantizer on the CPU looks values up in a table of 65,536 entries over [-1, 1], which are wider than the distances
# of the smallest levels: below this fraction of a block's absmax its codes are up to 7 off the nearest level's.
COARSE = 2**-13
MAX_COARSE = 0.01  # of all entries, so far off
MAX_DIFFERENT = 0.03  # of the entries above COARSE, by one code
SCHEDULES = {"t_alpha": 6, "t_beta3": 8, "alpha": 3.0}


def pair(name, seed=0, lr=1e-2, **options):
    """Our optimizer and bitsandbytes' over parameters of the same values, of which one keeps fp32 moments."""
    params = [parameters((100, 4096, 5000), seed=seed) for _ in range(2)]
    modules = zip((qn.optim, peers()), params, strict=True)
    return (*params, *(getattr(module, name)(each, lr=lr, **options) for module, each in modules))


def give(seed, *lists):
    """Gradients of one size, the same for each list of parameters."""
    for params in lists:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = 1e-3 * torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW8bit", {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
        ("Adam8bit", {"weight_decay": 0.1}),
        ("Lion8bit", {"weight_decay": 0.1}),
        ("AdEMAMix8bit", {"betas": (0.9, 0.99, 0.999), "weight_decay": 0.1}),
        ("AdEMAMix8bit", {"betas": (0.9, 0.99, 0.999), "weight_decay": 0.1, **SCHEDULES}),
    ],
    ids=str,
)
def test_step_is_that_of_bitsandbytes(name, options):
    """From its state, each time: parameters up to roundings, and the codes that its CPU quantizer can tell apart."""
    ours, theirs, optimizer, peer = pair(name, **options)
    count = sum(optimizer.algorithm.moments)
    for step in range(12):
        with torch.no_grad():
            for param, other in zip(ours, theirs, strict=True):
                param.copy_(other)
        give(step, ours, theirs)
        if step > 0:
            optimizer.load_state_dict(peer.state_dict())
        before = [copy.deepcopy(optimizer.state[param]) for param in ours]
        optimizer.step()
        peer.step()
        for param, other, state in zip(ours, theirs, before, strict=True):
            slow = optimizer.param_groups[0].get("alpha", 0.0)  # times the slow moment is added to a step of a few lr
            rounding = U32 * (4 * other.detach().abs() + 10 * optimizer.defaults["lr"] * (1 + slow))
            if name == "Lion8bit":
                moments = decoded(state, 1) if state else [torch.zeros(param.shape).double()]
                *_, other_sign = lion(param.detach(), param.grad.double(), moments, 0, **optimizer.param_groups[0])
                rounding = rounding + other_sign
            assert_close_by_norm("parameter", param.detach(), other.detach().double(), rounding)
            found, expected = (slots(o.state[p], count) for o, p in ((optimizer, param), (peer, other)))
            for i, ((codes, scales), (their_codes, their_scales)) in enumerate(zip(found, expected, strict=True)):
                if scales is None:
                    torch.testing.assert_close(codes, their_codes)
                    continue
                torch.testing.assert_close(scales, their_scales)
                off = (codes.int() - their_codes.int()).abs()
                fine = MAPS[i == 1][codes.long()].abs() >= COARSE
                fractions = (off > 1).float().mean(), off[fine].float().mean()
                assert off[fine].max() <= 1, f"step {step}, moment {i}: {off[fine].max()} codes off"
                assert fractions[0] <= MAX_COARSE and fractions[1] <= MAX_DIFFERENT, f"{step}, {i}: {fractions}"


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def make_steps(params, optimizer, steps):
    for step in steps:
        give(step, params)
        optimizer.step()


def options_of(name):
    return SCHEDULES if name == "AdEMAMix8bit" else {}


@pytest.mark.parametrize("paged", ["", "Paged"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_ours_continues_in_bitsandbytes(name, paged):
    """It takes what we return and steps; from what it returns ours continues with the same bits."""
    name = paged + name
    options = options_of(name.removeprefix("Paged"))
    ours, theirs, optimizer, peer = pair(name, lr=torch.tensor(2.0**-7), **options)
    make_steps(ours, optimizer, range(5))
    peer.load_state_dict(through_a_file(optimizer.to_bitsandbytes()))
    for param, other in zip(ours, theirs, strict=True):
        state, taken = optimizer.state[param], peer.state[other]
        assert taken["step"] == 5 and type(taken["step"]) is int
        for key in state.keys() - {"step"}:
            assert torch.equal(state[key], taken[key]), key
        other.data.copy_(param.data)
    assert {key: peer.param_groups[0][key] for key in options} == options and peer.param_groups[0]["lr"] == 2.0**-7
    twins, _, twin, _ = pair(name, **options)
    twin.load_state_dict(through_a_file(peer.state_dict()))
    for param, other in zip(twins, ours, strict=True):
        param.data.copy_(other.data)
    make_steps(theirs, peer, [5])
    assert not any(torch.equal(param, other) for param, other in zip(ours, theirs, strict=True))
    make_steps(twins, twin, range(5, 10))
    make_steps(ours, optimizer, range(5, 10))
    assert_same([p.detach() for p in twins], [p.detach() for p in ours])
    assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("paged", ["", "Paged"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_continues_in_ours(name, paged):
    """We take what it returns and step; from what we return it continues with the same bits."""
    name = paged + name
    options = options_of(name.removeprefix("Paged"))
    ours, theirs, optimizer, peer = pair(name, lr=3e-3, **options)
    make_steps(theirs, peer, range(5))
    optimizer.load_state_dict(through_a_file(peer.state_dict()))
    for param, other in zip(ours, theirs, strict=True):
        state, taken = peer.state[other], optimizer.state[param]
        assert int(taken["step"]) == 5
        assert taken.keys() == {key for key in state if not key.startswith("qmap")}
        for key in taken.keys() - {"step"}:
            assert taken[key].dtype == state[key].dtype and torch.equal(taken[key], state[key]), key
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert {key: optimizer.param_groups[0].get(key) for key in options} == options
    _, twins, _, twin = pair(name, **options)
    twin.load_state_dict(through_a_file(optimizer.to_bitsandbytes()))
    for param, other in zip(twins, theirs, strict=True):
        param.data.copy_(other.data)
    make_steps(ours, optimizer, [5])  # in place, which is not the peer's place
    make_steps(theirs, peer, range(5, 10)), make_steps(twins, twin, range(5, 10))
    assert_same([p.detach() for p in twins], [p.detach() for p in theirs])


# ---- what is refused -------------------------------------------------------------------------------------------------

NAN = float("nan")
SIZE = "expected a finite number >= 0, got "
REFUSED = [
    ("Lion8bit", {"betas": (0.9, 0.99, 0.999)}, TypeError, "betas: expected two numbers, got (0.9, 0.99, 0.999)"),
    ("Lion8bit", {"eps": 1e-8}, TypeError, "eps: expected an argument of this optimizer, got another"),
    ("Lion8bit", {"amsgrad": False}, TypeError, "amsgrad: expected an argument of this optimizer, got another"),
    ("Lion8bit", {"is_paged": True}, ValueError, "the other of Lion8bit and PagedLion8bit is meant"),
    ("PagedLion8bit", {"is_paged": False}, ValueError, "is_paged: expected True, as this"),
    ("AdamW8bit", {"is_paged": True}, ValueError, "the other of AdamW8bit and PagedAdamW8bit is meant"),
    ("Adam8bit", {"is_paged": True}, ValueError, "the other of Adam8bit and PagedAdam8bit is meant"),
    ("AdEMAMix8bit", {"betas": (0.9, 0.999)}, TypeError, "betas: expected three numbers, got (0.9, 0.999)"),
    ("AdEMAMix8bit", {"betas": (0.9, 0.999, 1.0)}, ValueError, "betas: expected three numbers in [0, 1), got (0.9, 0."),
    ("AdEMAMix8bit", {"alpha": -1.0}, ValueError, f"alpha: {SIZE}-1.0"),
    ("AdEMAMix8bit", {"alpha": None}, TypeError, "alpha: expected a number, got NoneType"),
    ("AdEMAMix8bit", {"t_alpha": -5}, ValueError, f"t_alpha: {SIZE}-5"),
    ("AdEMAMix8bit", {"t_beta3": NAN}, ValueError, f"t_beta3: {SIZE}nan"),
    ("AdEMAMix8bit", {"t_beta3": "x"}, TypeError, "t_beta3: expected a number, got str"),
    ("AdEMAMix8bit", {"t_beta3": 9, "betas": (0.0, 0.9, 0.9)}, ValueError, "betas: expected the first and the third"),
    ("AdEMAMix8bit", {"optim_bits": 8}, TypeError, "optim_bits: expected an argument of this optimizer, got another"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_bad_option_is_named_in_the_error(name, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        getattr(qn.optim, name)(parameters((300,)), **options)
    optimizer = getattr(qn.optim, name)(parameters((300,)))
    if options.keys() <= optimizer.defaults.keys() - {"eps"}:
        with pytest.raises(error, match=re.escape(message)):
            optimizer.add_param_group({"params": parameters((300,)), **options})


def test_arguments_of_bitsandbytes_that_mean_the_same_are_taken():
    old = {"args": None, "block_wise": True, "percentile_clipping": 100}
    for paged in (False, True):
        names = [("Paged" if paged else "") + name for name in CLASSES]
        for name, arguments in zip(names, (old | {"amsgrad": False, "optim_bits": 32},) * 2 + (old, {}), strict=True):
            getattr(qn.optim, name)(parameters((3,)), is_paged=paged, **arguments)


def test_option_that_becomes_bad_later_is_named_in_the_error():
    optimizer = qn.optim.AdEMAMix8bit(parameters((300,)))
    set_gradients(optimizer.param_groups[0]["params"], 0)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    for change, message in (
        ({"alpha": -1.0}, f"groups[0].alpha: {SIZE}-1"),
        ({"betas": (0.9, 0.999, 1.0)}, "groups[0].beta3: expected a number in [0, 1), got 1"),
        ({"betas": (0.0, 0.9, 0.9), "t_beta3": 5}, "groups[0].beta1: expected a number in (0, 1), as t_beta3"),
        ({"t_alpha": NAN}, f"groups[0].t_alpha: {SIZE}nan"),
    ):
        kept = dict(optimizer.param_groups[0])
        optimizer.param_groups[0].update(change)
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step()
        optimizer.param_groups[0].update(kept)
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "other"), list(itertools.permutations(("AdamW8bit", "Lion8bit", "AdEMAMix8bit"), 2)), ids=str
)
@pytest.mark.parametrize("module", ["ours", "bitsandbytes"])
def test_state_dict_of_another_algorithm_raises_and_changes_nothing(name, other, module):
    """Its groups lack an option, or its states are others."""
    source = getattr(qn.optim if module == "ours" else peers(), other)(parameters((300, 5000)))
    train(source, 1)
    optimizer = getattr(qn.optim, name)(parameters((300, 5000)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"betas|param_groups|state\[0\]"):
        optimizer.load_state_dict(source.state_dict())
    assert_same(optimizer.state_dict(), before)
