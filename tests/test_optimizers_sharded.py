"""Guards the optimizers over parameters that FSDP2 has sharded (gloo): each process steps its shards."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharding import leave
from test_adamw_resume import pickled
from torch import nn, testing

import qlora_native as qn

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
PROCESSES = 2
# Shards of whole blocks; of broken ones; of two sizes; one that is empty in the second process; and fp32 moments.
SIZES = ((128, 64), (64, 70), (33, 130), (1, 600), (9, 3), (5,))
UNSHARDED_ALIKE = (0, 4, 5)  # the blocks are those of the whole parameter, or there are none
CLASSES = [qn.optim.AdamW8bit, qn.optim.Lion8bit, qn.optim.AdEMAMix8bit, qn.optim.PagedAdamW8bit]
every_optimizer = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
OPTIONS = {"lr": 1e-2, "min_8bit_size": 256}
STEPS = 3
UNUSABLE = (torch.nan, torch.inf, 2e19)


class Model(nn.Module):
    """Its loss is linear in each parameter, so that its gradients are `factors`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList([torch.randn(size, generator=generator) for size in SIZES])

    def forward(self, factors):
        return sum((weight * factor).sum() for weight, factor in zip(self.weights, factors, strict=True))


def factors(number):
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(size, generator=generator) for size in SIZES]


def sharded(cls, dim=0):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(param):  # FSDP2 has uneven shards along the first dim alone
        return Shard(dim if param.dim() > dim and param.shape[dim] % PROCESSES == 0 else 0)

    model = fully_shard(Model(), shard_placement_fn=placement)
    return model, cls(model.parameters(), **OPTIONS)


def step(model, optimizer, number):
    """A step as a training loop makes it. Returns what this process had of parameters and gradients before it."""
    model(factors(number)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    before = shards(model), [p.grad.to_local().clone() for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    return before


def shards(model):
    return [p.to_local().detach().clone() for p in model.parameters()]


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


# ---- what each process does ------------------------------------------------------------------------------------------


def continued(cls, model, optimizer, folder):
    """{how a state dict is saved: the parameters after one more step of a run that was loaded from it}."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    def direct(other, second):
        other.load_state_dict(model.state_dict())
        second.load_state_dict(optimizer.state_dict())

    def file_of_each_process(other, second):
        other.load_state_dict(model.state_dict())
        second.load_state_dict(pickled(optimizer.state_dict()))

    def checkpoint(other, second):
        model_state, optimizer_state = states.get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / cls.__name__)
        model_state, optimizer_state = states.get_state_dict(other, second)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / cls.__name__)
        states.set_state_dict(other, second, model_state_dict=model_state, optim_state_dict=optimizer_state)

    def full(other, second):
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # the first process has them then
        model_state, optimizer_state = states.get_state_dict(model, optimizer, options=options)
        options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        states.set_model_state_dict(other, model_state, options=options)
        states.set_optimizer_state_dict(other, second, optimizer_state, options=options)

    loaded = {}
    for load in (direct, file_of_each_process, checkpoint, full):
        loaded[load.__name__] = sharded(cls)
        load(*loaded[load.__name__])
    loaded["undisturbed"] = model, optimizer
    for other, second in loaded.values():
        step(other, second, STEPS)
    return {how: (shards(other), second.state_dict()["state"][1]["step"]) for how, (other, second) in loaded.items()}


def refusals(optimizer, folder):
    """{case: the error}. `optimizer` has made steps, and its checkpoint is in `folder`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    alone = qn.optim.AdamW8bit(Model().parameters(), **OPTIONS)
    found = {"whole": message(ValueError, alone.load_state_dict, optimizer.state_dict())}
    for param in alone.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    alone.step()
    found["plain"] = message(ValueError, optimizer.load_state_dict, alone.state_dict())
    model, other = sharded(qn.optim.AdamW8bit, dim=1)
    found["another dim"] = message(ValueError, other.load_state_dict, optimizer.state_dict())
    states = {"optimizer": get_optimizer_state_dict(model, other)}
    found["checkpoint"] = message(BaseException, lambda: dcp.load(states, checkpoint_id=folder / "AdamW8bit"))
    found["bitsandbytes"] = message(ValueError, optimizer.to_bitsandbytes)
    return found


def skips():
    """What happens if the second process alone has a gradient that is not usable."""
    model, optimizer = sharded(qn.optim.AdamW8bit)
    step(model, optimizer, 0)
    found = {"before": shards(model)}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for value in UNUSABLE:
        model(factors(1)).backward()
        if dist.get_rank() == 1:
            model.weights[1].grad.to_local()[3, 4] = value
        optimizer.step()
        optimizer.zero_grad()
    scaler.scale(model(factors(1))).backward()
    if dist.get_rank() == 1:
        model.weights[1].grad.to_local()[3, 4] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    found |= {"after": shards(model), "skipped": optimizer.stats()["skipped_steps"], "scale": scaler.get_scale()}
    scaler.scale(model(factors(1))).backward()  # and a usable one, scaled and not
    scaler.step(optimizer)
    other, second = sharded(qn.optim.AdamW8bit)
    step(other, second, 0)
    other(factors(1)).backward()
    second.step()
    return found | {"scaled": shards(model), "unscaled": shards(other)}


def gradients():
    """A moment after a step with a gradient whose partial sums are on several processes."""
    from torch.distributed.tensor import DTensor, Partial

    model, optimizer = sharded(qn.optim.AdamW8bit)
    param = model.weights[5]
    param.grad = DTensor.from_local(torch.full((5,), 1.0 + dist.get_rank()), param.device_mesh, [Partial()])
    optimizer.step()
    return {"added up": optimizer.state[param]["state1"]}


def mixture():
    """A parameter beside sharded ones that each process has whole, and the same one stepped alone."""
    model, _ = sharded(qn.optim.AdamW8bit)
    whole, alone = (nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(2))
    both = qn.optim.AdamW8bit([*model.parameters(), whole], **OPTIONS)
    one = qn.optim.AdamW8bit([alone], **OPTIONS)
    for number in range(STEPS):
        model(factors(number)).backward()
        whole.grad, alone.grad = (torch.linspace(1, 2, 300) for _ in range(2))
        both.step()
        one.step()
    return {"beside": whole.detach(), "alone": alone.detach()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = {}
    for cls in CLASSES:
        model, optimizer = sharded(cls)
        before = [step(model, optimizer, number) for number in range(STEPS)]
        found[cls.__name__] = {
            "before": before,
            "after": shards(model),
            "states": [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()],
            "continued": continued(cls, model, optimizer, folder),
        }
        if cls is qn.optim.AdamW8bit:
            found["refusals"] = refusals(optimizer, folder)
    found |= {"skips": skips(), "gradients": gradients(), "mixture": mixture()}
    torch.save(found, folder / f"{rank}.pt")
    leave()


# ---- the results -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process has found; they start once, for all tests."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(worker, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def assert_equal(actual, expected):
    testing.assert_close(actual, expected, rtol=0, atol=0)


def stepped(cls, before):
    """Parameters and optimizer of one process after steps with the gradients that are listed."""
    params = [nn.Parameter(param.clone()) for param in before[0][0]]
    optimizer = cls(params, **OPTIONS)
    for _, grads in before:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


def test_whole_parameter_beside_sharded_ones_is_stepped_as_alone(processes):
    for found in processes:
        assert_equal(found["mixture"]["beside"], found["mixture"]["alone"])


@every_optimizer
@pytest.mark.filterwarnings("ignore")
def test_shard_is_stepped_as_a_parameter_of_its_own(cls, processes):
    for found in processes:
        found = found[cls.__name__]
        params, optimizer = stepped(cls, found["before"])
        assert_equal(found["after"], [param.detach() for param in params])
        for param, state in zip(params, found["states"], strict=True):
            if param.numel() > 0:
                assert_equal(state, optimizer.state[param])
    assert [len(processes[1][cls.__name__]["after"][i]) for i in (2, 3)] == [16, 0]


@every_optimizer
@pytest.mark.filterwarnings("ignore")
def test_shards_of_whole_blocks_are_stepped_as_the_whole_parameter_is(cls, processes):
    first, second = (found[cls.__name__] for found in processes)
    joined = [
        tuple([torch.cat(pair) for pair in zip(*lists, strict=True)] for lists in zip(*pairs, strict=True))
        for pairs in zip(first["before"], second["before"], strict=True)
    ]
    params, _ = stepped(cls, joined)
    for i in UNSHARDED_ALIKE:
        assert_equal(torch.cat([first["after"][i], second["after"][i]]), params[i].detach())


@every_optimizer
@pytest.mark.parametrize("how", ["direct", "file_of_each_process", "checkpoint", "full"])
def test_state_dict_of_shards_continues_with_the_same_bits(cls, how, processes):
    for found in processes:
        found = found[cls.__name__]["continued"]
        assert_equal(found[how], found["undisturbed"])
        assert int(found[how][1]) == STEPS + 1


SHARDED = "a DTensor [128, 64] with placements (Shard(dim=0),) on (2,) processes"
BLOCKS = "as the blocks of 8-bit moments belong to shards"
REFUSALS = {
    "whole": "state[0].state1: expected a plain tensor, as the parameter is, got a DTensor",
    "plain": f"state[0].state1: expected {SHARDED}, {BLOCKS}, got a plain tensor",
    "another dim": f"expected {SHARDED.replace('=0', '=1')}, {BLOCKS}, got {SHARDED}",
    "checkpoint": "Size mismatch between saved torch.Size([2, 1, 16]) and current: torch.Size([1, 2, 16])",
    "bitsandbytes": "params: expected plain tensors, as bitsandbytes takes their states, got DTensors",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_state_dict_of_another_sharding_is_named_in_the_error(case, processes):
    for found in processes:
        assert REFUSALS[case] in found["refusals"][case]


def test_step_that_one_process_has_to_skip_is_skipped_by_all(processes):
    for found in processes:
        found = found["skips"]
        assert_equal(found["after"], found["before"])
        assert found["skipped"] == len(UNUSABLE) + 1 and found["scale"] == 2.0**9
        assert_equal(found["scaled"], found["unscaled"])


def test_gradient_is_added_up_before_the_step(processes):
    for found, size in zip(processes, (3, 2), strict=True):
        testing.assert_close(found["gradients"]["added up"], torch.full((size,), 0.1 * 3))
