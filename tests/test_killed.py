"""Guards conversions that are killed and run again with the same process ID, as in a container (tests/killed.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import models  # noqa: E402

from qlora_native.integrations.staging import new_folder  # noqa: E402

RUNS = os.environ.get("QLN_KILLS", "20")  # of each command; bench/results/fuzz.md has figures of 200


@pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces are Linux's")
@pytest.mark.filterwarnings("ignore")
def test_killed_conversion_can_be_run_again(tmp_path):
    model = models.make("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run([sys.executable, script, tmp_path, RUNS], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_leftover_of_a_dead_run_is_removed_and_of_a_live_one_kept(tmp_path):
    (tmp_path / ".out.partial-123").mkdir()
    (tmp_path / ".out.partial-123/model.safetensors").write_text("half")
    (tmp_path / ".other.partial-123").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial-link").symlink_to("precious")
    with pytest.raises(FileExistsError, match="another run has filled it"), new_folder(tmp_path / "out") as first:
        assert not (tmp_path / ".out.partial-123").exists()
        with new_folder(tmp_path / "out") as second:
            assert first.is_dir() and second.is_dir() and first != second
            (second / "file").write_text("second")
        (first / "file").write_text("first")
    assert (tmp_path / "out/file").read_text() == "second"
    left = {".other.partial-123", "precious", ".out.partial-link", "out"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_name_with_the_letters_of_a_pattern_is_a_name(tmp_path):
    (tmp_path / ".o.partial-1").mkdir()
    with new_folder(tmp_path / "[o]*?") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / ".o.partial-1").exists() and (tmp_path / "[o]*?/file").exists()
