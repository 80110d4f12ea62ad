"""Guards `MappedWeights`: layers over weights in files compute what copies do, those that come next are read ahead, and
a file that changes while it is mapped is an error. test_mapped_models.py has whole models.
"""

import copy
import os
import pickle
import shutil

import pytest
import torch
from peak import ENVIRONMENT
from process import succeed

pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import save_file

import qlora_native as qn
from qlora_native._core import mapped
from qlora_native._core.mapped import MappedFile, Region, mappings
from qlora_native.nn import Linear4bit, Linear8bit, MappedWeights

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, LAYERS = 128, 6


def write(folder, layers=LAYERS, width=WIDTH):
    """A file for every two layers, in bitsandbytes' format. Returns their paths."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for first in range(0, layers, 2):
        tensors = {}
        for i in (first, first + 1):
            weight = torch.randn(width, width, generator=generator) / width**0.5
            tensors |= qn.quantize(weight).to_bitsandbytes(f"{i}.")
        paths.append(folder / f"{first}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def read(paths):
    """The layers over tensors that are views of the mapped files."""
    layers = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        numbers = sorted({int(name.partition(".")[0]) for name in tensors})
        layers += [Linear4bit.from_quantized(qn.QuantizedWeight.from_bitsandbytes(tensors, f"{i}.")) for i in numbers]
    return torch.nn.Sequential(*layers)


@pytest.fixture
def paths(tmp_path):
    return write(tmp_path)


def x(width=WIDTH):
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1)).requires_grad_()


def outside(model):
    """The layers of a model whose codes are no view of a file, by the maps of the process."""
    maps = mappings()
    return [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit) and not in_file(layer, maps)]


def in_file(layer, maps):
    address = layer.weight.data_ptr()
    return any(each.begin <= address < each.end and each.path is not None for each in maps)


@pytest.mark.parametrize("ahead_bytes", [0, 20_000, 1 << 30])
def test_mapped_layers_compute_what_copies_do(paths, ahead_bytes):
    model = read(paths)
    copied = copy.deepcopy(model)
    weights = MappedWeights(model, ahead_bytes)
    assert weights.nbytes > LAYERS * WIDTH * WIDTH / 2
    for _ in range(2):
        results = []
        for each in (model, copied):
            rows = x()
            y = each(rows)
            y.square().sum().backward()
            results.append((y, rows.grad))
        assert all(map(torch.equal, *results))


def test_codes_of_fp8_stay_in_their_file(tmp_path):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    save_file({"weight": weight, "scale": torch.tensor([[0.5, 2.0], [1.0, 0.25]])}, tmp_path / "fp8.safetensors")
    with safe_open(tmp_path / "fp8.safetensors", framework="pt") as file:
        q = qn.functional.from_fp8(file.get_tensor("weight"), file.get_tensor("scale"), block_size=(128, 128))
    layer = Linear8bit.from_quantized(q)
    assert MappedWeights(layer).nbytes >= 256 * 256 and not outside(layer)
    assert torch.equal(layer(x(256)), copy.deepcopy(layer)(x(256)))


def test_forward_reads_upward_and_backward_downward(paths):
    model = read(paths)
    weights = MappedWeights(model, ahead_bytes=25_000)  # two layers of 8 KB with their scales and tables
    order = weights._order
    names = [[each.name for each in weights._next(order[i], backward)] for i, backward in ((1, False), (4, True))]
    assert names == [["2", "3"], ["3", "2"]]
    assert not weights._next(order[-1], backward=False), "backward begins with what was used last"
    assert not weights._next(order[0], backward=True)
    with torch.no_grad():  # an evaluation begins anew
        assert [each.name for each in weights._next(order[-1], backward=False)] == ["0", "1"]


def test_order_is_that_of_the_first_forward(paths):
    model = read(paths)
    weights = MappedWeights(model)
    rows = x()
    for layer in reversed(model):
        rows = layer(rows)
    assert [each.name for each in weights._order] == [str(i) for i in reversed(range(LAYERS))]
    assert [each.position for each in weights._order] == list(range(LAYERS))


def test_checkpointed_layers_are_read_downward_in_backward(paths, monkeypatch):
    model = read(paths)
    weights = MappedWeights(model)
    directions = []
    monkeypatch.setattr(weights, "_next", lambda region, down: directions.append((region.name, down)) or [])
    rows = x()
    y = rows
    for layer in model:
        y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
    assert directions == [(str(i), False) for i in range(LAYERS)]
    y.sum().backward()
    assert directions[LAYERS:] == [(str(i), True) for i in reversed(range(LAYERS)) for _ in range(2)]


def test_every_pass_reads_all_layers_that_memory_may_have_lost(paths, monkeypatch):
    model = read(paths)
    weights = MappedWeights(model, ahead_bytes=12_000)  # a layer, so that two are taken to be in memory
    for _ in range(2):
        found, own = [], Region.read
        monkeypatch.setattr(
            Region, "read", lambda region, found=found, own=own: found.append(region.name) or own(region)
        )
        with torch.no_grad():
            model(x())
        assert {str(i) for i in range(2, LAYERS)} <= set(found)
        monkeypatch.undo()
    assert weights.waited_s > 0


CHANGES = {
    "truncated": (
        lambda path: os.truncate(path, 1000),
        r"expected the file of [\d,]+ bytes that is mapped, got one of 1,000",
    ),
    "written": (lambda path: path.write_bytes(path.read_bytes()), "got one that was written to"),
    "replaced": (lambda path: shutil.copy(path, f"{path}.new") and os.replace(f"{path}.new", path), "got another"),
    "removed": (os.remove, r"got none \(No such file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changes_is_an_error_before_its_weights_are_used(paths, change):
    model = read(paths)
    weights = MappedWeights(model)
    model(x())
    make, text = CHANGES[change]
    make(paths[1])
    with pytest.raises(ValueError, match=text) as caught:
        model(x())
    assert str(paths[1]) in str(caught.value)
    model[:2](x())  # of another file
    weights.close()


def test_page_that_cannot_be_read_is_an_error_and_no_signal(paths, monkeypatch):
    model = read(paths)
    weights = MappedWeights(model, ahead_bytes=0)
    os.truncate(paths[-1], 0)
    monkeypatch.setattr(MappedFile, "check", lambda file: None)
    with pytest.raises(OSError, match="5 cannot be read"), torch.no_grad():
        model[-1](x())
    weights.close()


def test_file_of_a_network_is_refused(paths, monkeypatch):
    monkeypatch.setattr(mapped, "_NETWORK", ("",))  # which every type begins with
    with pytest.raises(ValueError, match="0.safetensors: expected a file on a local disk"):
        MappedWeights(read(paths))


def test_copy_in_memory_is_refused_by_its_name(paths):
    model = read(paths)
    model[3] = copy.deepcopy(model[3])
    with pytest.raises(ValueError, match="3: expected codes that are a view of a mapped file, got a copy in memory"):
        MappedWeights(model)
    with pytest.raises(ValueError, match="a module with quantized layers, got Linear"):
        MappedWeights(torch.nn.Linear(2, 2))


def test_file_that_has_been_deleted_is_refused(paths):
    model = read(paths)
    paths[0].unlink()
    with pytest.raises(ValueError, match=r"0: expected codes of a file that is there, got one of .*0.safetensors"):
        MappedWeights(model)


def test_files_of_a_folder_that_cannot_be_written_to_are_mapped(paths):
    for path in paths:
        path.chmod(0o400)
    paths[0].parent.chmod(0o500)
    model = read(paths)
    MappedWeights(model)
    model(x()).sum().backward()
    paths[0].parent.chmod(0o700)


def test_copies_and_pickles_have_the_values_and_no_file(paths):
    model = read(paths)
    MappedWeights(model)
    before = len(mapped.uses)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert outside(made) == [str(i) for i in range(LAYERS)]
        assert torch.equal(made(x()), model(x()))
    assert not outside(model) and len(mapped.uses) == before


def test_weight_that_is_written_to_leaves_the_file_as_it_is(paths):
    model = read(paths)
    MappedWeights(model)
    before = paths[0].read_bytes()
    y = model[0](x())
    model[0].weight.data.zero_()
    assert not torch.equal(model[0](x()), y)
    assert paths[0].read_bytes() == before
    assert torch.equal(read(paths)[0](x()), y)


def test_reading_ahead_ends_with_the_model(paths):
    model = read(paths)
    before = len(mapped.uses)
    weights = MappedWeights(model)
    assert len(mapped.uses) == before + LAYERS
    model(x())
    thread = weights._thread
    del model
    thread.join(10)
    assert not thread.is_alive() and len(mapped.uses) == before


def test_report_has_bytes_and_rate(paths):
    model = read(paths)
    weights = MappedWeights(model)
    for _ in range(2):
        model(x()).sum().backward()
    text = weights.report()
    assert text.startswith("mapped weights: 1 step in "), text  # a step is complete when the next one begins
    assert "GB" in text and "waited" in text


PROGRAM = """
import os, sys, pathlib
sys.path.insert(0, ".")
import torch
from test_mapped import *
paths = [pathlib.Path(each) for each in sys.argv[1:]]
model = read(paths)
weights = MappedWeights(model)
y = model(x())
"""


def test_forked_process_reads_ahead_with_a_thread_of_its_own(paths):
    program = PROGRAM + (
        "if (child := os.fork()) == 0:\n"
        "    same = torch.equal(model(x()), y)\n"
        "    os._exit(0 if same and weights._thread.is_alive() else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert torch.equal(model(x()), y)\n"
    )
    succeed("-c", program, *paths, **ENVIRONMENT)


def test_two_processes_share_the_pages(tmp_path):
    paths = write(tmp_path, layers=2, width=2048)
    program = PROGRAM.replace("x()", "x(2048)") + (
        "def shared():\n"
        "    found, inside = 0, False\n"
        "    for line in open('/proc/self/smaps'):\n"
        "        inside = line.rstrip().endswith('.safetensors') if '-' in line.split()[0] else inside\n"
        "        if inside and line.startswith(('Shared_Clean', 'Shared_Dirty')):\n"  # dirty: not yet on the disk
        "            found += 1024 * int(line.split()[1])\n"
        "    return found\n"
    )
    child = program + "print('ready', flush=True); sys.stdin.readline()\n"
    parent = program + (
        "import subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, *sys.argv[1:]], stdin=-1, stdout=-1, text=True)\n"
        "assert child.stdout.readline() == 'ready\\n'\n"
        "model(x(2048))\n"  # other programs may have taken the memory in the meantime
        "print(shared())\n"
        "child.communicate('\\n')\n"
    )
    done = succeed("-c", parent, *paths, **ENVIRONMENT)
    assert int(done.stdout.split()[-1]) > 0.95 * 2 * 2048 * 2048 / 2
