"""Guards AdamW8bit against bad input, as tables of input and error. Each error leaves everything as it was."""

import copy
import functools
import re

import pytest
import torch
from test_aliasing import step as arguments_of_step
from torch import nn, testing

import qlora_native as qn
from qlora_native._optim import base as _optim_base
from qlora_native._optim import step as _optim_step

NAN, INF = float("nan"), float("inf")
FLOAT = "expected torch.float32, torch.bfloat16 or torch.float16, got "
SIZE = "expected a finite number >= 0, got "


def parameter(size=(64, 70), dtype=torch.float32, **options):
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(size).numel()).view(size).to(dtype), **options)


def stepped(params):
    optimizer = qn.optim.AdamW8bit(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


assert_equal = functools.partial(testing.assert_close, rtol=0, atol=0)


# ---- options and parameters ------------------------------------------------------------------------------------------

OPTIONS = [
    ({"lr": -1e-3}, ValueError, f"lr: {SIZE}-0.001"),
    ({"lr": NAN}, ValueError, f"lr: {SIZE}nan"),
    ({"lr": INF}, ValueError, f"lr: {SIZE}inf"),
    ({"lr": "1e-3"}, TypeError, "lr: expected a number, got str"),
    ({"lr": None}, TypeError, "lr: expected a number, got NoneType"),
    ({"lr": torch.tensor(-1.0)}, ValueError, f"lr: {SIZE}-1.0"),
    ({"lr": torch.ones(2)}, ValueError, f"lr: {SIZE}tensor([1., 1.])"),
    ({"eps": -1e-8}, ValueError, f"eps: {SIZE}-1e-08"),
    ({"weight_decay": -0.1}, ValueError, f"weight_decay: {SIZE}-0.1"),
    ({"betas": (1.0, 0.999)}, ValueError, "betas: expected two numbers in [0, 1), got (1.0, 0.999)"),
    ({"betas": (0.9, NAN)}, ValueError, "betas: expected two numbers in [0, 1), got (0.9, nan)"),
    ({"betas": (0.9, "x")}, ValueError, "betas: expected two numbers in [0, 1), got (0.9, 'x')"),
    ({"betas": 0.9}, TypeError, "betas: expected two numbers, got 0.9"),
    ({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas: expected two numbers, got (0.9, 0.99, 0.999)"),
    ({"min_8bit_size": 4096.0}, TypeError, "min_8bit_size: expected an int, got float"),
    ({"params": [parameter(dtype=torch.complex64)]}, TypeError, f"params: {FLOAT}torch.complex64"),
    ({"params": [parameter(dtype=torch.float64)]}, TypeError, f"params: {FLOAT}torch.float64"),
    ({"params": []}, ValueError, "optimizer got an empty parameter list"),
    ({"params": [torch.ones(3)[0] * parameter()]}, ValueError, "can't optimize a non-leaf Tensor"),
    ({"params": parameter()}, TypeError, "params argument given to the optimizer should be an iterable"),
]

ARGUMENTS_OF_BITSANDBYTES = [
    ({"amsgrad": True}, ValueError, "amsgrad: expected False, as this optimizer has nothing else, got True"),
    ({"optim_bits": 16}, ValueError, "optim_bits: expected 32, as this optimizer has nothing else, got 16"),
    ({"percentile_clipping": 5}, ValueError, "percentile_clipping: expected 100, as this"),
    ({"block_wise": False}, ValueError, "block_wise: expected True, as this"),
    ({"args": object()}, ValueError, "args: expected None, as this"),
    ({"momentum": 0.9}, TypeError, "momentum: expected an argument of this optimizer, got another"),
]


@pytest.mark.parametrize("cls", [qn.optim.AdamW8bit, qn.optim.PagedAdamW8bit])
@pytest.mark.parametrize(("options", "error", "message"), OPTIONS + ARGUMENTS_OF_BITSANDBYTES)
@pytest.mark.filterwarnings("ignore")
def test_bad_option_is_named_in_the_error(cls, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cls(**{"params": [parameter()], **options})


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": [parameter()], **options}, error, message)
        for options, error, message in OPTIONS
        if "params" not in options
    ]
    + [({"params": [parameter(dtype=torch.float64)]}, TypeError, f"params: {FLOAT}torch.float64")],
    ids=lambda value: str(value)[-60:],
)
def test_bad_group_is_named_in_the_error_and_left_out(group, error, message):
    optimizer = qn.optim.AdamW8bit([parameter()])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_frozen_weights_stay_without_state():
    """The parameters of a quantized layer, whose uint8 codes `model.parameters()` returns too."""
    layer = qn.nn.Linear4bit.from_linear(nn.Linear(64, 8))
    layer.bias.requires_grad_(True)
    optimizer = qn.optim.AdamW8bit(layer.parameters())
    layer.bias.grad = torch.ones(8)
    optimizer.step()
    assert len(optimizer.state) == 1


# ---- a step ----------------------------------------------------------------------------------------------------------


def sparse(param):
    return param.detach().to_sparse()


STEP = [
    (lambda o, p: setattr(p, "grad", sparse(p)), TypeError, "grad: expected a dense gradient, got torch.sparse_coo"),
    (lambda o, p: o.param_groups[0].update(lr=-1.0), ValueError, f"groups[0].lr: {SIZE}-1"),
    (lambda o, p: o.param_groups[0].update(lr=NAN), ValueError, f"groups[0].lr: {SIZE}nan"),
    (lambda o, p: o.param_groups[0].update(lr=torch.tensor(-1.0)), ValueError, f"groups[0].lr: {SIZE}-1"),
    (lambda o, p: o.param_groups[0].update(lr=torch.tensor([NAN])), ValueError, f"groups[0].lr: {SIZE}nan"),
    (lambda o, p: o.param_groups[0].update(lr=torch.ones(2)), ValueError, "lr: expected a number or a one-element"),
    (lambda o, p: o.param_groups[0].update(betas=(0.9, 1.0)), ValueError, "groups[0].beta2: expected a number in"),
    (lambda o, p: o.param_groups[0].update(eps=-1.0), ValueError, f"groups[0].eps: {SIZE}-1"),
    (lambda o, p: o.state[p].update(state1=torch.zeros(4480)), ValueError, "state"),
    (lambda o, p: o.state[p].update(state2=torch.zeros(4479, dtype=torch.uint8)), ValueError, "state2"),
    (lambda o, p: o.state[p].update(absmax2=torch.zeros(17)), ValueError, "absmax2"),
    (lambda o, p: o.state[p].update(step=torch.tensor(-1)), ValueError, "step: expected >= 0, got -1"),
    (lambda o, p: o.state[p].update(step=torch.tensor(1.0)), ValueError, "steps[1]: expected Long, got Float"),
]


@pytest.mark.parametrize(("change", "error", "message"), STEP, ids=[case[2] for case in STEP])
def test_bad_step_is_named_in_the_error_and_changes_nothing(change, error, message):
    params = [parameter((300,)), parameter(), parameter((5000,))]
    optimizer = stepped(params)
    change(optimizer, params[1])
    before = copy.deepcopy([(param.detach(), optimizer.state[param]) for param in params])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert_equal([(param.detach(), optimizer.state[param]) for param in params], before)


def codes(*sizes):
    return [torch.zeros(size, dtype=torch.uint8) for size in sizes]


# Lists for two parameters of 300 elements, which have two blocks each.
LISTS = [
    ({"steps": []}, "steps: expected one for each parameter, got fewer"),
    ({"steps": [torch.zeros(3, dtype=torch.int64)]}, "steps: expected what belongs to the parameters, got more"),
    ({"state1": codes(300)}, "state1: expected one for each parameter, got fewer"),
    ({"state1": codes(300, 300, 300)}, "state1: expected what belongs to the parameters, got more"),
    ({"state1": codes(300, 299)}, "state1[1]: expected 300 elements, got 299"),
    ({"state2": codes(1023)}, "state2[0]: expected 1024 elements, got 1023"),
    ({"state2": codes(301, 300)}, "state2[0]: expected 512 elements, got 301"),
    ({"absmax2": [torch.zeros(3)]}, "absmax2[0]: expected 4 elements, got 3"),
    ({"absmax1": [torch.zeros(2), torch.zeros(3)]}, "absmax1: expected what belongs to the parameters, got more"),
    ({"lr_tensors": [torch.tensor(1e-3)], "lr_groups": []}, "lr_tensors: expected 0 items, got 1"),
    ({"lr_tensors": [torch.tensor(1e-3)], "lr_groups": [1]}, "lr_groups: expected indices below 1, got 1"),
    ({"lr_tensors": [torch.tensor(1e-3)], "lr_groups": [-1]}, "lr_groups: expected indices below 1, got -1"),
    ({"lr_tensors": [torch.ones(2)]}, "lr_tensors[0]: expected 1 elements, got 2"),
    ({"lr_tensors": [torch.ones(1).double()]}, "lr_tensors[0]: expected Float, got Double"),
    ({"lr_tensors": [torch.tensor(INF)]}, f"groups[0].lr: {SIZE}inf"),
]


@pytest.mark.parametrize(("change", "message"), LISTS, ids=[case[1] for case in LISTS])
def test_bad_list_is_named_in_the_error_of_the_op(change, message):
    arguments = arguments_of_step() | {
        "params": [torch.ones(300), torch.ones(300)],
        "grads": [torch.ones(300), torch.ones(300)],
        "state1": codes(1024),
        "state2": codes(300, 300),
        "absmax1": [torch.zeros(2), torch.zeros(2)],
        "absmax2": [torch.zeros(4)],
        "steps": [torch.zeros(2, dtype=torch.int64)],
        "group_sizes": [2],
    }
    step = torch.ops.qlora_native.optimizer_8bit_step
    step(**arguments)
    before = arguments["params"][0].clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        step(**(arguments | change))
    assert torch.equal(arguments["params"][0], before)


# ---- a step that raises ----------------------------------------------------------------------------------------------

CLASSES = [getattr(qn.optim, name) for name in qn.optim.__all__ if name != "Optimizer8bit"]


def several():
    """Parameters in two groups, the second of which breaks in the tests below, with their gradients."""
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((300,), (64, 70), (9,), (20, 15))]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def optimizer_of(cls, params):
    return cls([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}], lr=1e-3, min_8bit_size=256)


def shrink(tensor):
    tensor.untyped_storage().resize_(8)
    return tensor


def grad_of(size, dtype=torch.float32):
    """A gradient that torch's setter would refuse."""

    def change(param):
        param.grad.data = torch.zeros(size, dtype=dtype)

    return change


def data_of(tensor):
    def change(param):
        param.data = tensor

    return change


# (how the last parameter breaks, the error)
BROKEN = [
    (data_of(torch.zeros(1).expand(20, 15)), "elements that each have memory of their own, got shape [20, 15] with st"),
    (data_of(torch.zeros(400).as_strided((20, 15), (1, 1))), "elements that each have memory of their own, got shape"),
    (lambda p: shrink(p.data), "expected a tensor with memory, got one whose storage was freed"),
    (lambda p: shrink(p.grad), "expected a tensor with memory, got one whose storage was freed"),
    (lambda p: setattr(p, "data", torch.zeros(40, 15)[::2]) or shrink(p.data), "expected a tensor with memory"),
    (data_of(torch.zeros(20, 14)), "expected shape [20, 14], as the parameter's, got [20, 15]"),
    (grad_of((15, 20)), "expected shape [20, 15], as the parameter's, got [15, 20]"),
    (grad_of((20, 15), torch.float64), f"grad: {FLOAT}torch.float64"),
    (data_of(torch.zeros(20, 15, dtype=torch.float64)), f"params: {FLOAT}torch.float64"),
]


def everything(params, optimizer):
    """What a step changes, in a copy. A tensor without memory has no values."""
    tensors = [t for p in params for t in (p.detach(), p.grad)]
    values = [t.clone() if t.untyped_storage().nbytes() > 8 else None for t in tensors]
    return copy.deepcopy((values, optimizer.state_dict(), optimizer.stats()["skipped_steps"]))


@pytest.mark.parametrize(("breaks", "message"), BROKEN)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.filterwarnings("ignore")
def test_failed_step_changes_nothing_and_its_retry_is_an_undisturbed_step(cls, steps, breaks, message):
    params, undisturbed = several(), several()
    optimizer, other = optimizer_of(cls, params), optimizer_of(cls, undisturbed)
    for _ in range(steps):
        optimizer.step()
        other.step()
    data, grad = params[-1].detach().clone(), params[-1].grad.clone()
    breaks(params[-1])
    before = everything(params, optimizer)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            optimizer.step()
        assert_equal(everything(params, optimizer), before)
    params[-1].data, params[-1].grad = data, grad
    for _ in range(2):
        optimizer.step()
        other.step()
    assert_equal(everything(params, optimizer), everything(undisturbed, other))


@pytest.fixture
def two_devices(monkeypatch):
    """(parameters, their optimizer), whose second group stands for another device, which this machine may lack."""
    found = _optim_step.by_device

    def by_device(params):
        ((device, lists),) = found(params).items()
        return {torch.device("cpu", 0) if len(params[0].shape) == 2 else device: lists}

    monkeypatch.setattr(_optim_base, "by_device", by_device)
    params = [parameter((300,)), parameter((64, 70))]
    optimizer = qn.optim.AdamW8bit([{"params": [param]} for param in params])
    return params, optimizer


def test_failed_step_on_a_second_device_changes_nothing_on_the_first(two_devices):
    params, optimizer = two_devices
    for steps in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        good = params[1].grad
        params[1].grad = torch.ones(70, 64).t()
        before = everything(params, optimizer)
        shrink(params[1].grad)
        with pytest.raises(ValueError, match="expected a tensor with memory"):
            optimizer.step()
        assert_equal(everything(params, optimizer)[1:], before[1:])
        assert torch.equal(params[0], before[0][0])
        params[1].grad = good
        optimizer.step()
        assert [int(optimizer.state[param]["step"]) for param in params] == [steps + 1] * 2


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("scaler", [False, True])
def test_infinite_gradient_on_one_device_skips_the_step_on_all(where, scaler, two_devices):
    params, optimizer = two_devices
    if scaler:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for value, steps in ((1.0, 1), (INF, 1), (1.0, 2)):
        for param in params:
            param.grad = torch.ones_like(param)
        params[where].grad.view(-1)[7] = value
        before = [param.clone() for param in params]
        optimizer.step()
        assert [int(optimizer.state[param]["step"]) for param in params] == [steps] * 2
        assert [torch.equal(*pair) for pair in zip(params, before, strict=True)] == [value == INF] * 2
    assert optimizer.stats()["skipped_steps"] == 1


# ---- state dicts -----------------------------------------------------------------------------------------------------


def state_of(state_dict, **changes):
    """Its first parameter's state, changed; a None is left out."""
    state = {**state_dict["state"][0], **changes}
    state = {name: value for name, value in state.items() if value is not None}
    return {**state_dict, "state": {**state_dict["state"], 0: state}}


def group_of(state_dict, **changes):
    return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], **changes}]}


def state_of_adamw(state_dict):
    params = [parameter(), parameter((9,))]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


U8 = torch.uint8
STATE = [
    (
        lambda s: stepped([parameter((70, 64)), parameter((9,))]).state_dict(),
        ValueError,
        "state[0].state1: expected shape [64, 70], as the parameter's, got [70, 64]",
    ),
    (lambda s: stepped([parameter()]).state_dict(), ValueError, "parameter group that doesn't match the size"),
    (lambda s: {**s, "param_groups": s["param_groups"] * 2}, ValueError, "different number of parameter groups"),
    (state_of_adamw, ValueError, "state[0]: expected step, state1 and state2 of AdamW8bit, got step, exp_avg,"),
    (lambda s: state_of(s, state2=None), ValueError, "state[0]: expected step, state1 and state2 of AdamW8bit"),
    (lambda s: state_of(s, state2=torch.zeros(64, 70)), TypeError, "state[0].state2: expected a tensor of"),
    (lambda s: state_of(s, state1=[0]), TypeError, "state[0].state1: expected a tensor of torch.float32, got list"),
    (lambda s: state_of(s, absmax1=None), TypeError, "state[0].absmax1: expected a tensor of torch.float32, got"),
    (lambda s: state_of(s, absmax1=torch.zeros(17)), ValueError, "state[0].absmax1: expected shape [18], as the"),
    (lambda s: state_of(s, absmax1=torch.full((18,), NAN)), ValueError, "state[0].absmax1: expected finite values,"),
    (lambda s: state_of(s, absmax2=torch.full((18,), -1.0)), ValueError, "state[0].absmax2: expected values >= 0, got"),
    (lambda s: state_of(s, step=-1), ValueError, "state[0].step: expected an integer >= 0, got -1"),
    (lambda s: state_of(s, step=1.5), ValueError, "state[0].step: expected an integer >= 0, got 1.5"),
    (lambda s: state_of(s, step=torch.ones(2)), ValueError, "state[0].step: expected an integer >= 0, got"),
    (lambda s: state_of(s, step="x"), TypeError, "state[0].step: expected an integer >= 0, got str"),
    (lambda s: state_of(s, qmap1=torch.zeros(256)), ValueError, "state[0].qmap1: expected the dynamic map of an 8-bit"),
    (lambda s: group_of(s, lr=-1.0), ValueError, f"lr: {SIZE}-1.0"),
    (lambda s: group_of(s, betas=(0.9, 1.0)), ValueError, "betas: expected two numbers in [0, 1), got (0.9, 1.0)"),
    (lambda s: s["param_groups"][0], ValueError, "state_dict: expected the key 'state', got only lr, betas"),
    (lambda s: {}, ValueError, "state_dict: expected the key 'state', got only no key"),
    (lambda s: [s], TypeError, "state_dict: expected a dict, got list"),
    (lambda s: {**s, "state": [3]}, TypeError, "state_dict['state']: expected a dict, got list"),
    (lambda s: {**s, "param_groups": {}}, TypeError, "state_dict['param_groups']: expected a list, got dict"),
    (lambda s: {**s, "param_groups": [3]}, TypeError, "state_dict['param_groups'][0]: expected a dict, got int"),
    (lambda s: group_of(s, params=3), ValueError, "['params']: expected a list of numbers or names, got 3"),
    (lambda s: group_of(s, params=[0, [1]]), ValueError, "expected a list of numbers or names, got [0, [1]]"),
    (lambda s: group_of(s, params=[0, 0]), ValueError, "state_dict: expected each parameter once, got 0 twice"),
    (lambda s: state_of(s, step=NAN), ValueError, "state[0].step: expected an integer >= 0, got nan"),
    (lambda s: state_of(s, step=2**63), ValueError, "state[0].step: expected an integer >= 0, got 9223372036854775808"),
    (lambda s: state_of(s, __bnb_optimizer_quant_state__=3), TypeError, "expected a dict, got int"),
    (lambda s: state_of(s, qmap1=[0.0]), ValueError, "state[0].qmap1: expected the dynamic map of an 8-bit optimizer,"),
    (lambda s: state_of(s, absmax1=shrink(torch.zeros(18))), ValueError, "absmax1: expected a tensor with memory"),
    (lambda s: state_of(s, state1=s["state"][0]["state1"].to("meta")), ValueError, "state[0].state1: expected a"),
    (lambda s: {**s, "param_groups": [{"params": [0, 1]}]}, ValueError, "param_groups: expected lr in each, got only"),
    (lambda s: {**s, "state": {**s["state"], 0: 3}}, TypeError, "state[0]: expected a dict, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), STATE, ids=[case[2][:60] for case in STATE])
def test_bad_state_dict_is_named_in_the_error_and_changes_nothing(change, error, message):
    params = [parameter(), parameter((9,))]
    optimizer = stepped(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert_equal(after["state"], before["state"])
    optimizer.step()  # and still works
