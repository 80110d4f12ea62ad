"""Guards `fuse`: it does what fuse_loss, fuse_blocks and fuse_attention do, and reports what it left."""

import copy
import subprocess
import sys
import warnings

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from models import VOCABULARY, make  # noqa: E402
from torch import nn  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.fuse import fuse_attention, fuse_blocks, fuse_loss  # noqa: E402


def loss_of(model):
    ids = torch.arange(24).reshape(2, 12) % VOCABULARY
    return model(input_ids=ids, labels=ids).loss


def test_fuse_computes_what_its_three_parts_do():
    ours, by_parts = make("llama"), make("llama")
    report = qn.fuse(ours)
    assert report.loss is fuse_loss(by_parts) is True
    assert report.blocks == fuse_blocks(by_parts) == 7
    assert report.attention is fuse_attention(by_parts) is True
    assert report.left == ()
    assert str(report) == "fused: the loss, attention, 7 activations and norms"
    assert torch.equal(loss_of(ours), loss_of(by_parts))


def test_loss_changes_by_rounding_alone():
    model = make("llama")
    before = loss_of(copy.deepcopy(model))
    qn.fuse(model)
    torch.testing.assert_close(loss_of(model), before)


def test_second_call_changes_nothing():
    model = make("llama")
    qn.fuse(model)
    again = qn.fuse(model)
    assert again.loss and again.attention and again.blocks == 0


def test_what_is_left_is_reported_with_the_reason_and_without_a_warning():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertForMaskedLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = qn.fuse(model)
    assert not report.loss and report.attention
    assert "left: BertForMaskedLM keeps its own loss: its loss function is ForMaskedLMLoss" in str(report).splitlines()


def test_model_within_another_module_keeps_its_loss_and_has_its_attention_replaced():
    outer = nn.ModuleList([make("llama")])
    report = qn.fuse(outer)
    assert (report.loss, report.attention, report.blocks) == (False, True, 7)
    assert report.left == ("ModuleList is no language model of transformers, whose loss could be replaced",)


def test_plain_module_needs_no_transformers():
    code = """if True:
        import sys, torch, qlora_native as qn
        report = qn.fuse(torch.nn.Sequential(torch.nn.RMSNorm(64, eps=1e-6)))
        assert report.blocks == 1 and not report.loss and not report.attention and len(report.left) == 1
        assert "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_that_is_no_module_is_named_in_the_error():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        qn.fuse("llama")
