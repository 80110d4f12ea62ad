"""Guards AdamW8bit as an optimizer of torch: saved states continue with the same bits, and trainers can drive it."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharding import leave
from torch import nn

import qlora_native as qn

OPTIMIZERS = [qn.optim.AdamW8bit, qn.optim.PagedAdamW8bit]
EVERY_OPTIMIZER = [
    getattr(qn.optim, paged + name)
    for name in ("AdamW8bit", "Adam8bit", "Lion8bit", "AdEMAMix8bit")
    for paged in ("", "Paged")
]
pytestmark = pytest.mark.filterwarnings("ignore:Paged.*8bit. no GPU")


# ---- saving and loading ----------------------------------------------------------------------------------------------


def start(cls=qn.optim.AdamW8bit):
    """A model of two dtypes with 8-bit and fp32 moments in two groups, its optimizer and its schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 3).bfloat16())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3, "weight_decay": 0.0}]
    optimizer = cls(groups, lr=torch.tensor(1e-2))
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def train(model, optimizer, schedule, steps):
    """Steps that depend on their number alone."""
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(16, 70)
        optimizer.zero_grad()
        hidden = model[1](model[0](x))
        (model[2](hidden.bfloat16()).float() - x[:, :3]).square().mean().backward()
        optimizer.step()
        schedule.step()


def saved(model, optimizer, schedule):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}


def assert_same(actual, expected, path="state"):
    assert type(actual) is type(expected), path
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), path
    else:
        assert actual == expected, path


def resume(path, result):
    """What the new process does."""
    parts = start()
    stored = torch.load(path)
    for part, name in zip(parts, ("model", "optimizer", "schedule"), strict=True):
        part.load_state_dict(stored[name])
    train(*parts, range(10, 20))
    torch.save(saved(*parts), result)


def test_new_process_continues_with_the_same_bits(tmp_path):
    parts = start()
    train(*parts, range(10))
    torch.save(saved(*parts), tmp_path / "half.pt")
    train(*parts, range(10, 20))
    code = f"import test_adamw_resume as t; t.resume({str(tmp_path / 'half.pt')!r}, {str(tmp_path / 'end.pt')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert_same(torch.load(tmp_path / "end.pt"), saved(*parts))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda parts: pickled(parts)], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", EVERY_OPTIMIZER)
def test_copy_continues_with_the_same_bits(cls, how):
    parts = start(cls)
    train(*parts, range(5))
    twin = how(parts)
    train(*parts, range(5, 10))
    train(*twin, range(5, 10))
    assert_same(saved(*twin), saved(*parts))
    for name in ("skipped_steps", "state_bytes"):
        assert twin[1].stats()[name] == parts[1].stats()[name]


def pickled(parts):
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_loaded_state_is_a_copy_of_the_state_dict():
    parts = start()
    train(*parts, range(3))
    state = parts[1].state_dict()
    before = copy.deepcopy(state)
    twin = start()
    twin[1].load_state_dict(state)
    train(*twin, range(3))
    assert_same(state, before)


def test_state_of_bfloat16_parameters_keeps_its_dtypes():
    """torch casts what it loads to the parameter's dtype, which would round absmax and turn codes into floats."""
    parts = start()
    train(*parts, range(3))
    twin = start()
    twin[1].load_state_dict(parts[1].state_dict())
    for state in twin[1].state.values():
        dtype = state["state1"].dtype
        assert dtype in (torch.uint8, torch.float32) and state["state2"].dtype == dtype
        assert state["step"].dtype == torch.int64
    assert {state["state1"].dtype for state in twin[1].state.values()} == {torch.uint8, torch.float32}


# ---- what torch does with optimizers ---------------------------------------------------------------------------------


def linear(inputs=70, outputs=80):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def backward(model, seed=0):
    torch.manual_seed(seed)
    loss = model(torch.randn(8, model.in_features)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("cls", EVERY_OPTIMIZER)
def test_loss_falls(cls):
    model = linear()
    optimizer = cls(model.parameters(), lr=1e-2)
    first = backward(model).item()
    for _ in range(50):
        optimizer.step()
        optimizer.zero_grad()
        assert model.weight.grad is None
        last = backward(model).item()
    assert last < 0.3 * first


def test_closure_is_called_once_with_gradients():
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters())
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(backward(model))
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1 and int(optimizer.state[model.weight]["step"]) == 1
    assert optimizer.step() is None


def test_parameter_without_gradient_stays_as_it_was():
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters())
    optimizer.step()
    assert not optimizer.state and optimizer.stats() == {"skipped_steps": 0, "state_bytes": 0}
    backward(model)
    model.bias.grad = None
    bias = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.bias, bias) and model.bias not in optimizer.state
    backward(model)  # and its steps are counted apart
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (model.weight, model.bias)] == [2, 1]


def test_added_group_is_stepped_with_its_own_options():
    model, more = linear(), linear()
    optimizer = qn.optim.AdamW8bit(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()
    optimizer.add_param_group({"params": more.parameters(), "lr": 1e-3, "min_8bit_size": 1})
    before = [p.detach().clone() for p in more.parameters()]
    for each in (model, more):
        backward(each)
    optimizer.step()
    for param, old in zip(more.parameters(), before, strict=True):
        assert optimizer.state[param]["state1"].dtype == torch.uint8
        assert 0.9e-3 < (param.detach() - old).abs().max() < 1.1e-3


@pytest.mark.parametrize("schedule", ["StepLR", "OneCycleLR"])
def test_scheduler_reaches_the_step(schedule):
    """OneCycleLR also moves betas, which are a tuple."""
    model = linear()
    before = model.weight.detach().clone()
    optimizer = qn.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.0)
    if schedule == "StepLR":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    else:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    backward(model)
    optimizer.step()
    scheduler.step()
    moved = model.weight.detach().clone()
    assert not torch.equal(moved, before)
    optimizer.step()
    assert torch.equal(model.weight, moved) == (schedule == "StepLR")
    if schedule == "OneCycleLR":
        assert optimizer.param_groups[0]["betas"][0] != 0.9


def test_step_takes_the_clipped_gradients():
    models = [linear(), linear()]
    optimizers = [qn.optim.AdamW8bit(model.parameters(), eps=1e-3) for model in models]
    for model in models:
        backward(model)
    norm = nn.utils.clip_grad_norm_(models[0].parameters(), 0.01)
    for param in models[1].parameters():
        param.grad.mul_(0.01 / (norm + 1e-6))
    for optimizer in optimizers:
        optimizer.step()
    assert_same(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert torch.equal(models[0].weight, models[1].weight)


def test_autograd_notices_that_a_saved_parameter_changed():
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters())
    x = torch.randn(2, 70, requires_grad=True)
    loss = model(x).square().sum()
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    param, grad = torch.randn(300), torch.randn(300)
    codes = [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.zeros(2) for _ in range(2)]
    step, skipped = torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    arguments = (
        "adamw", [param], [grad], [codes[0]], [codes[1]], [absmax[0]], [absmax[1]], [step], [1], [1e-3], [0.9], [0.999],
        [1e-8], [0.01], None, None, skipped, [torch.tensor(2e-3)], [0],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.qlora_native.optimizer_8bit_step, arguments)


def test_machine_without_gpu_is_mentioned_once():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = (
        "import torch, warnings, qlora_native as qn\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): qn.optim.PagedAdamW8bit([torch.nn.Parameter(torch.ones(4096))])\n"
        "print(*[warning.message for warning in caught], sep='\\n')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 1 and said[0].startswith("PagedAdamW8bit: no GPU on this machine"), said


# ---- trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_trainer_drives_and_resumes_it(cls, tmp_path):
    """With its own schedule, clipping and a checkpoint from which it resumes with the same bits."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import models

    data = [{"input_ids": row, "labels": row} for row in models.ids(rows=16)]

    def trainer(steps):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=steps, per_device_train_batch_size=2, save_steps=3, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.5, lr_scheduler_type="cosine",
        )  # fmt: skip
        return transformers.Trainer(
            models.make("llama", layers=1), arguments, train_dataset=data,
            optimizer_cls_and_kwargs=(cls, {"lr": 1e-2, "min_8bit_size": 1024}),
        )  # fmt: skip

    whole = trainer(6)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert type(resumed.optimizer.optimizer) is cls
    for (name, param), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other), name


def distributed(rank, folder):
    """One of two processes; each sees half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = linear()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = qn.optim.AdamW8bit(wrapped.parameters(), lr=1e-2)
    for step in range(10):
        optimizer.zero_grad()
        torch.manual_seed(step)
        x = torch.randn(8, model.in_features)
        wrapped(x.chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{rank}.pt")
    leave()


def test_processes_stay_together(tmp_path):
    torch.multiprocessing.spawn(distributed, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(*results)
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters(), lr=1e-2)
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    # The mean over two halves rounds differently, and where m is near 0 a step may go another way: ten of them by 0.01.
    moved = (model.weight - linear().weight).norm()
    assert (results[0]["model"]["weight"] - model.weight).norm() < 0.01 * moved
