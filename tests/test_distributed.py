"""Guards DDP and FSDP2 (gloo) over a quantized model with a PEFT adapter: two processes compute what one does."""

import copy
import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import models  # noqa: E402
from lora import LINEARS, assert_close, config, families  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sharding import FSDP_SHARDS_BYTES, leave, needs_fsdp_of_bytes, prepared_by_accelerate  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.fuse import fuse_loss  # noqa: E402
from qlora_native.integrations.fuse._loss import DeferredLogits  # noqa: E402
from qlora_native.integrations.peft import register  # noqa: E402

pytestmark = [*models.MARKS, pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")]
PROCESSES = 2
RATE = 1000.0  # so that a step is no small change
CASES = {  # name: (scales double-quantized, FSDP2's parameter dtype, or None for DDP)
    "ddp": (True, None),
    "fsdp2": (True, torch.float32),
    "fsdp2-bf16": (True, torch.bfloat16),
    "fsdp2-bf16-absmax": (False, torch.bfloat16),
    "fsdp2-adapters": (True, torch.float32),  # each of an adapter's modules is a unit of its own, as with PEFT's policy
    "accelerate": (True, torch.bfloat16),  # accelerate calls fully_shard
    "accelerate-efficient": (True, torch.bfloat16),  # with cpu_ram_efficient_loading, from the first process's weights
}
# The head is a unit of its own, which is in parts again when the loss is computed; whether it is quantized, too.
HEAD_UNITS = {"fsdp2-head": False, "fsdp2-head-4bit": True}
# From version 1.16 on accelerate makes a unit of the last norm and the head, which stays whole.
FUSED = ("ddp", "fsdp2", *HEAD_UNITS, "accelerate")
# accelerate does not prepare T5, quantized or not: it knows of no tie between three embeddings.
RUNS = [
    (case, family)
    for case, family in itertools.product(CASES, LINEARS)
    if family != "t5" or not case.startswith("accelerate")
]


def marked(case, *family):
    return pytest.param(case, *family, marks=() if case == "ddp" else needs_fsdp_of_bytes)


def make(family, double_quant, **options):
    model = qn.nn.quantize_model(models.make(family), double_quant=double_quant, progress=False, **options)
    torch.manual_seed(1)
    return peft.get_peft_model(model, register(config(family)))


def ids():
    return torch.randint(0, 128, (2 * PROCESSES, 9), generator=torch.Generator().manual_seed(2))


def step(model, rows):
    """Logits and the adapter's gradients by name; the model has made a step then."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    logits = model(input_ids=rows, labels=rows).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    return logits.detach(), gradients


def forget_weights(model):
    """Move all of a model that files would have to the meta device."""
    kept = {name: b for name, b in model.named_buffers() if name not in model.state_dict()}
    model.to("meta")
    for name, buffer in kept.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = buffer


def sharded(model, dtype, case):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if case.startswith("accelerate"):
        efficient = case == "accelerate-efficient"
        if efficient and dist.get_rank() > 0:
            forget_weights(model)
        return prepared_by_accelerate(model, cpu_ram_efficient_loading=efficient)
    policy = MixedPrecisionPolicy(param_dtype=dtype if dtype != torch.float32 else None)
    blocks = model.get_base_model()._no_split_modules
    if case == "fsdp2-adapters":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lora_" in name:
                fully_shard(module, mp_policy=policy)
    for block in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def to_fuse(case):
    return make("llama", True, skip=() if HEAD_UNITS.get(case) else ("lm_head",))


def fused_step(model, rows, case=None):
    """The loss of `fuse_loss` in a second pass, after whose first one nothing is left behind, and the gradients."""
    model.train()
    assert fuse_loss(model)
    wrapped, of_unit = model, case in HEAD_UNITS
    if case == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif case is not None:
        if of_unit:
            torch.distributed.fsdp.fully_shard(model.get_output_embeddings())
        wrapped = sharded(model, torch.float32, case)
    for _ in range(2):
        model.zero_grad()
        outputs = wrapped(input_ids=rows, labels=rows)
        assert isinstance(outputs.logits, DeferredLogits) != of_unit
        outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if case not in (None, "ddp"):
        gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    return outputs.loss.detach(), gradients


def trained(family, output, processes):
    """The adapter after three steps of transformers' Trainer; a batch is what all processes together take."""
    model, data = make(family, double_quant=True), [{"input_ids": row, "labels": row} for row in ids()]
    options = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    options |= {"output_dir": str(output), "per_device_train_batch_size": len(data) // processes}
    arguments = transformers.TrainingArguments(ddp_backend="gloo" if processes > 1 else None, **options)
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    return peft.get_peft_model_state_dict(model)


def worker(rank, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.set_num_threads(1)
    for name, value in (("RANK", rank), ("WORLD_SIZE", PROCESSES)):  # as a launcher does
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    rows = ids().chunk(PROCESSES)[rank]
    for case, family in RUNS:
        if case != "ddp" and not FSDP_SHARDS_BYTES:
            continue
        double_quant, dtype = CASES[case]
        name = f"{case}-{family}"
        model = make(family, double_quant)
        frozen = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
        if dtype is None:
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            logits, gradients = step(wrapped, rows)
            state = None
        else:
            wrapped = sharded(model, dtype, case)
            local = sum(p.to_local().numel() for p in wrapped.parameters() if p.dtype == torch.uint8)
            assert local < 0.6 * frozen, "the codes were not sharded"
            logits, gradients = step(wrapped, rows)
            gradients = {key: gradient.full_tensor() for key, gradient in gradients.items()}
            state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        gradients = {key.removeprefix("module."): gradient for key, gradient in gradients.items()}
        torch.save((logits, gradients), folder / f"{name}-{rank}.pt")
        if rank == 0:
            model.save_pretrained(folder / name, save_embedding_layers=False, state_dict=state)
    for case in FUSED if FSDP_SHARDS_BYTES else ("ddp",):
        torch.save(fused_step(to_fuse(case), rows, case), folder / f"fused-{case}-{rank}.pt")
    for family in LINEARS:
        torch.save(trained(family, folder / "trainer", PROCESSES), folder / f"trainer-{family}-{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes wrote; they start once, for all cases."""
    folder = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(worker, (folder,), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize(("case", "family"), [marked(*run) for run in RUNS])
def test_two_processes_compute_what_one_does(case, family, folder):
    double_quant, dtype = CASES[case]
    # 2^-9 a rounding; PEFT's own forward, as a unit's hooks want it called; rows added in another order
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5 if case == "fsdp2-adapters" else 1e-6
    case = f"{case}-{family}"
    model = make(family, double_quant)
    computed = copy.deepcopy(model).to(dtype) if dtype is not None else copy.deepcopy(model)
    logits, expected = step(computed, ids())
    results = [torch.load(folder / f"{case}-{rank}.pt") for rank in range(PROCESSES)]
    assert_close(torch.cat([rows for rows, _ in results]), logits, tolerance)
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert_close(gradient, expected[name], 3 * tolerance)
    saved = load_file(folder / case / "adapter_model.safetensors")
    model.save_pretrained(folder / "before", save_embedding_layers=False)
    before = load_file(folder / "before" / "adapter_model.safetensors")
    assert saved.keys() == before.keys() == {name.replace(".default", "") for name in expected}
    for name, gradient in expected.items():
        key = name.replace(".default", "")
        assert_close(saved[key] - before[key], -RATE * gradient.float(), 10 * tolerance)


@pytest.mark.parametrize("case", [marked(case) for case in FUSED])
def test_fused_loss_in_two_processes_is_that_of_one(case, folder):
    model, tolerances = to_fuse(case), (1e-6, 1e-5)  # of the loss and the gradients
    if case == "accelerate":
        model, tolerances = model.bfloat16(), (1e-2, 3e-2)  # 2^-9 a rounding
    loss, expected = fused_step(model, ids())
    results = [torch.load(folder / f"fused-{case}-{rank}.pt") for rank in range(PROCESSES)]
    assert_close(torch.stack([part for part, _ in results]).mean(), loss, tolerances[0])
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], tolerances[1])


@families
def test_trainer_in_two_processes_learns_what_one_does(family, folder, tmp_path):
    expected, before = trained(family, tmp_path, 1), peft.get_peft_model_state_dict(make(family, double_quant=True))
    for rank in range(PROCESSES):
        actual = torch.load(folder / f"trainer-{family}-{rank}.pt")
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            assert_close(tensor - before[name], expected[name] - before[name], 1e-3)
