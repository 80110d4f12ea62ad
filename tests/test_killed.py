"""Guards conversions that are killed and run again with the same process ID, as in a container (tests/killed.py)."""

import os
import sys
from pathlib import Path

import process
import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import models  # noqa: E402

from qlora_native.convert._staging import new_file, new_folder  # noqa: E402

RUNS = os.environ.get("QLN_KILLS", "20")  # of each command; bench/results/fuzz.md has figures of 200


@pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces are Linux's")
@pytest.mark.filterwarnings("ignore")
def test_killed_conversion_can_be_run_again(tmp_path):
    model = models.make("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    done = process.run("killed.py", tmp_path, RUNS)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


DEAD = ".out.partial-0123456789abcdef"


def test_leftover_of_a_dead_run_is_removed_and_of_a_live_one_kept(tmp_path):
    (tmp_path / DEAD).mkdir()
    (tmp_path / DEAD / "model.safetensors").write_text("half")
    (tmp_path / ".other.partial-0123456789abcdef").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial-fedcba9876543210").symlink_to("precious")
    with pytest.raises(FileExistsError, match="another run has filled it"), new_folder(tmp_path / "out") as first:
        assert not (tmp_path / DEAD).exists()
        with new_folder(tmp_path / "out") as second:
            assert first.is_dir() and second.is_dir() and first != second
            (second / "file").write_text("second")
        (first / "file").write_text("first")
    assert (tmp_path / "out/file").read_text() == "second"
    expected = {".other.partial-0123456789abcdef", "precious", ".out.partial-fedcba9876543210", "out"}
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("opened", [new_folder, new_file])
@pytest.mark.parametrize("name", [".out.partial-mine", ".out.partial-", f"{DEAD}0", DEAD[:-1], DEAD.upper()])
def test_folder_with_a_name_of_its_owner_stays(tmp_path, name, opened):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine")
    with opened(tmp_path / "out") as path:
        (path / "file" if opened is new_folder else path).write_text("")
    assert (tmp_path / name / "notes").read_text() == "mine"


def test_folder_with_more_than_files_stays_whatever_its_name_is(tmp_path):
    (tmp_path / DEAD / "inner").mkdir(parents=True)
    (tmp_path / DEAD / "notes").write_text("mine")
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / DEAD / "inner").is_dir() and (tmp_path / DEAD / "notes").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_link_is_written_through(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk/models").mkdir()
    (tmp_path / "out").symlink_to("disk/models")
    with new_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"  # on the file system where it is to stay
        (folder / "file").write_text("text")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/models/file").read_text() == "text"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_place_where_no_folder_can_appear_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FileExistsError, match="circle: expected a new or empty"), new_folder(tmp_path / "circle"):
        pytest.fail("the work has begun")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mount")
    with pytest.raises(FileExistsError, match="mount: .* got a mount point"), new_folder(tmp_path / "mount"):
        pytest.fail("the work has begun")
    assert {path.name for path in tmp_path.iterdir()} == {"circle", "mount"}


def test_name_with_the_letters_of_a_pattern_is_a_name(tmp_path):
    (tmp_path / ".o.partial-0123456789abcdef").mkdir()
    with new_folder(tmp_path / "[o]*?") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / ".o.partial-0123456789abcdef").exists() and (tmp_path / "[o]*?/file").exists()
