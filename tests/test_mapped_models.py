"""Guards models whose weights stay in their files (`mapped=True`): they train as copied ones do and take no memory,
also in several processes, and nothing changes the files.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peak import megabytes, peaks
from sharding import FSDP_SHARDS_BYTES, leave
from torch.distributed.fsdp import fully_shard

pytest.importorskip("peft")
pytest.importorskip("transformers")

import models
from mapped_training import adapted, load, train
from test_mapped import outside

import qlora_native as qn
from qlora_native._core import mapped
from qlora_native.integrations.transformers import BitsAndBytesConfig

pytestmark = models.MARKS
LINEARS = 6 * 7
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 44 MB in 4 bits, in files of 10 MB."""
    path = tmp_path_factory.mktemp("mapped")
    model = models.make("llama", torch.bfloat16, layers=6, width=1024, inner=3072)
    qn.nn.quantize_model(model, progress=False).save_pretrained(path, max_shard_size="10MB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.mark.parametrize("checkpoint", [False, True])
def test_mapped_model_trains_as_a_copied_one(folder, checkpoint):
    model = load(folder, mapped=True)
    assert not outside(model) and len(mapped.uses) >= LINEARS
    copied = load(folder, mapped=False, disable_mmap=True)
    assert len(outside(copied)) == LINEARS
    results = [train(each, checkpoint) for each in (model, copied)]
    assert len(results[0]) == 2 * (1 + 2 * LINEARS) and all(map(torch.equal, *results))


def test_mapped_model_takes_no_memory_of_its_own(folder):
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    prepare = f"from mapped_training import load, train\nfolder = {str(folder)!r}\n"
    prepare += "train(load(folder, mapped=False))\n"  # what is imported and allocated once
    own, copied = peaks(
        prepare,
        "train(load(folder, mapped=True))",
        "train(load(folder, mapped=False, disable_mmap=True))",
    )
    assert own < size / 4 and copied > size, f"{megabytes([own, copied])} of {megabytes([size])}"


def test_merge_leaves_the_files_as_they_are(folder):
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    base = load(folder, mapped=True)
    model = adapted(base)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.merge_adapter()
        assert len(outside(base)) == LINEARS
        model(input_ids=ids)
        model.unmerge_adapter()
        assert not outside(base)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert all(path.read_bytes() == content for path, content in before.items())


def loss(model, rank):
    ids = torch.arange(8)[None] + rank
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def copied_bytes():
    """The bytes of mapped safetensors files of which this process has copies, because it has written to them."""
    copied, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0]:
                inside = line.rstrip().endswith(".safetensors")
            elif inside and line.startswith("Anonymous"):
                copied += 1024 * int(line.split()[1])
    return copied


def work(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=PROCESSES)
    model = adapted(load(folder, mapped=True))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    loss(wrapped, rank).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save((gradients, copied_bytes()), results / f"ddp-{rank}.pt")
    if FSDP_SHARDS_BYTES:
        model = adapted(load(folder, mapped=True))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        loss(fully_shard(model), rank).backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        torch.save((gradients, 0), results / f"fsdp2-{rank}.pt")
    leave()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_compute_what_one_does(folder, tmp_path):
    mp.spawn(work, (folder, tmp_path), nprocs=PROCESSES)
    model = adapted(load(folder, mapped=False))
    for rank in range(PROCESSES):
        (loss(model, rank) / PROCESSES).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for way in ("ddp", *["fsdp2"] * FSDP_SHARDS_BYTES):
        for rank in range(PROCESSES):
            gradients, copied = torch.load(tmp_path / f"{way}-{rank}.pt")
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():  # rows of bf16 are added in another order
                assert (gradient - expected[name]).norm() <= 1e-2 * expected[name].norm(), (way, name)
            assert copied < 1e6, f"DDP has copied {copied / 1e6:.1f} MB of the weights"


def test_folder_in_16_bits_is_refused(tmp_path):
    models.make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mapped: expected a folder in 4 bits \(python -m qlora_native quantize"):
        load(tmp_path, mapped=True)
    assert "mapped" not in BitsAndBytesConfig(load_in_4bit=True, mapped=True).to_dict()
