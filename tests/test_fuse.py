"""Guards `fuse`: it does what fuse_loss, fuse_blocks and fuse_attention do, and reports what it left."""

import copy
import warnings

import process
import pytest
from fuse_models import COMMON, losses_of_trainer, make, step, transformers
from models import assert_same
from torch import nn

import qlora_native as qn
from qlora_native.integrations.fuse import fuse_attention, fuse_blocks, fuse_loss


def test_fuse_computes_what_its_three_parts_do():
    ours, by_parts = make("llama"), make("llama")
    report = qn.fuse(ours)
    assert report.loss is fuse_loss(by_parts) is True
    assert report.blocks == fuse_blocks(by_parts) == 7
    assert report.attention is fuse_attention(by_parts) is True
    assert report.left == ()
    assert str(report) == "fused: the loss, attention, 7 activations and norms"
    assert step(ours)[0] == step(by_parts)[0]


def test_step_changes_by_rounding_alone():
    model = make("llama")
    expected = step(copy.deepcopy(model))
    qn.fuse(model)
    assert_same(step(model), expected)


def test_trainer_makes_the_steps_of_the_model_that_is_not_fused(tmp_path):
    fused = make("llama")
    qn.fuse(fused)
    expected, losses = (losses_of_trainer(model, tmp_path) for model in (make("llama"), fused))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0]


def test_second_call_changes_nothing():
    model = make("llama")
    qn.fuse(model)
    again = qn.fuse(model)
    assert again.loss and again.attention and again.blocks == 0


def test_what_is_left_is_reported_with_the_reason_and_without_a_warning():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**COMMON))
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
    process.succeed("-c", code)


def test_model_that_is_no_module_is_named_in_the_error():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        qn.fuse("llama")
