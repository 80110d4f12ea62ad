"""Guards AdamW8bit as an optimizer of torch: saved states continue with the same bits, and trainers use it."""

import copy
import io

import process
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
    process.succeed("-c", code)
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
    parts, twin = start(), start()
    train(*parts, range(3))
    state = parts[1].state_dict()
    before = copy.deepcopy(state)
    twin[1].load_state_dict(state)
    train(*twin, range(3))
    assert_same(state, before)


# ---- what torch does with optimizers ---------------------------------------------------------------------------------


def linear(inputs=70, outputs=80):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def backward(model, seed=0):
    torch.manual_seed(seed)
    loss = model(torch.randn(8, model.in_features)).square().mean()
    loss.backward()
    return loss


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


def test_scheduler_changes_betas():
    """test_adamw.py has learning rates."""
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    backward(model)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    optimizer.step()


def test_autograd_notices_that_a_saved_parameter_changed():
    model = linear()
    optimizer = qn.optim.AdamW8bit(model.parameters())
    x = torch.randn(2, 70, requires_grad=True)
    loss = model(x).square().sum()
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    shown = process.succeed("-c", code).stdout.splitlines()
    assert len(shown) == 1 and shown[0].startswith("PagedAdamW8bit: no GPU on this machine"), shown


# ---- trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_trainer_resumes_with_the_same_bits(cls, tmp_path):
    """With its own schedule, clipping and checkpoint."""
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
    optimizer = steps(nn.parallel.DistributedDataParallel(model), lambda x: x.chunk(2)[rank])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{rank}.pt")
    leave()


def steps(model, part=lambda x: x):
    optimizer = qn.optim.AdamW8bit(model.parameters(), lr=1e-2)
    for step in range(10):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(part(torch.randn(8, 70))).square().mean().backward()
        optimizer.step()
    return optimizer


def test_processes_stay_together(tmp_path):
    torch.multiprocessing.spawn(distributed, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(*results)
    steps(model := linear())
    # The mean over two halves rounds differently, and where m is near 0 a step may change sign: ten of them by 0.01.
    moved = (model.weight - linear().weight).norm()
    assert (results[0]["model"]["weight"] - model.weight).norm() < 0.01 * moved
