"""Guards the fused loss in transformers' models: the same loss and gradients as before, and no logits."""

import copy
import warnings

import numpy as np
import pytest
import torch
from fuse_models import COMMON, batch, make, step, transformers
from models import assert_same
from test_adamw_resume import pickled

import qlora_native as qn
from qlora_native.integrations.fuse import fuse_loss
from qlora_native.integrations.fuse._loss import DeferredLogits
from qlora_native.testing import relative_error, unit_roundoff

peft = pytest.importorskip("peft")

families = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox", "granite", "cohere"])


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(29)}], ids=["mean", "items"])
def test_loss_and_gradients_are_the_models_own(family, dtype, more):
    model, inputs = make(family, dtype), batch("padded at the end")
    expected = step(copy.deepcopy(model), inputs, **more)
    assert fuse_loss(model)
    assert_same(step(model, inputs, **more), expected, dtype)
    assert_deferred(model(**inputs, **more))


def assert_deferred(outputs):
    assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.computed is None


@families
def test_logits_are_computed_where_they_are_used(family):
    model = make(family)
    expected = copy.deepcopy(model)(**batch()).logits
    fuse_loss(model)
    logits = model(**batch()).logits
    assert logits.shape == expected.shape and logits.dtype == expected.dtype and len(logits) == 3
    for use in (
        lambda z: z[..., :-1, :].argmax(-1),
        lambda z: torch.softmax(z, dim=-1),
        lambda z: z.float().sum(-1),
        lambda z: torch.cat([z, z], dim=1),
        lambda z: z * torch.ones(()),
        lambda z: z / torch.tensor(2.0),
    ):
        torch.testing.assert_close(use(logits), use(expected))


def test_operators_are_those_of_the_logits():
    model = make("llama")
    expected = copy.deepcopy(model)(**batch()).logits.detach()
    fuse_loss(model)
    for use in (
        lambda z: 1 - z,
        lambda z: z - 1,
        lambda z: 1 / z,
        lambda z: 2**z,
        lambda z: z**2,
        lambda z: z // 0.5,
        lambda z: 1 // z,
        lambda z: z % 0.5,
        lambda z: 1 % z,
        lambda z: abs(z),
        lambda z: +z,
        lambda z: -z,
        lambda z: z > 0,
        lambda z: 0 >= z,
        lambda z: z == 0,
        lambda z: z != z,
        lambda z: ~(z < 0) & (z <= 1) | (z > 1),
        lambda z: z @ torch.ones(96, 2),
        lambda z: np.float32(0.5) - z,
        lambda z: np.asarray(z.detach()),
        lambda z: torch.stack(list(z)),
    ):
        torch.testing.assert_close(use(model(**batch()).logits), use(expected))
    logits = model(**batch()).logits
    assert len({logits, logits}) == 1 and expected[0, 0, 0].item() in logits
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        bool(logits)
    logits[:, 0] = 0.0
    assert not logits[:, 0].any() and logits[:, 1].any()
    total = logits
    total += 1
    torch.testing.assert_close(total, logits + 1)


def test_loss_is_that_of_logits_whose_elements_were_changed():
    model = make("llama")
    expected = copy.deepcopy(model)(**batch()).logits
    fuse_loss(model)
    outputs = model(**batch())
    labels = batch()["labels"]
    expected[..., 3] = outputs.logits[..., 3] = -5.0
    losses = [model.loss_function(each, labels, 96) for each in (outputs.logits, expected)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "no labels"])
def test_what_takes_no_gradient_gets_logits(mode):
    model = make("llama")
    fuse_loss(model)
    inputs = batch()
    if mode == "eval":
        model.eval()
    if mode == "no labels":
        del inputs["labels"]
    with torch.set_grad_enabled(mode != "no_grad"):
        outputs = model(**inputs)
    assert isinstance(outputs.logits, torch.Tensor)
    if mode != "no labels":
        plain = make("llama").train(mode != "eval")
        torch.testing.assert_close(outputs.loss, plain(**inputs).loss)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copy_of_a_fused_model_has_a_head_of_its_own(how):
    model = make("llama")
    fuse_loss(model)
    other = how(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=1e-6)
    assert model(**batch()).loss.item() != pytest.approx(torch.tensor(96.0).log().item(), rel=1e-6)
    assert fuse_loss(model) and fuse_loss(other)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_stay_deferred_under_mixed_precision(family, dtype):
    """accelerate computes the forward pass under autocast, and widens what the model returns. Its Accelerator is left
    out: a process has one precision for all of them.
    """
    operations = pytest.importorskip("accelerate.utils.operations")
    own = make(family, dtype)
    fused = copy.deepcopy(own)
    fuse_loss(fused)
    results = []
    for model in (own, fused):
        forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = operations.convert_outputs_to_fp32(forward)
        outputs = model(**batch())
        if model is fused:
            assert_deferred(outputs)
        assert outputs.logits.dtype == torch.float32 and outputs.logits.device.type == "cpu"
        outputs.loss.backward()
        results.append((outputs.loss, outputs.logits + 0, next(model.parameters()).grad))
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < 4 * unit_roundoff(torch.bfloat16)


@pytest.mark.parametrize("head", ["dense", "adapted", "4 bits", "4 bits, adapted"])
def test_heads_of_a_quantized_model_are_fused(head):
    model = make("llama")
    qn.nn.quantize_model(model, skip=() if "4 bits" in head else ("lm_head",), progress=False)
    targets = ["q_proj", "down_proj"] + ["lm_head"] * ("adapted" in head)
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    expected = step(copy.deepcopy(model))
    assert fuse_loss(model)
    assert_same(step(model), expected)
    assert_deferred(model(**batch()))


def test_head_that_multiplies_in_the_dtype_of_its_input_is_fused():
    model = qn.nn.quantize_model(make("llama"), skip=(), progress=False)
    assert fuse_loss(model)
    for dtype, fused in ((None, True), (torch.float32, True), (torch.bfloat16, False)):
        model.lm_head.compute_dtype = dtype
        assert isinstance(model(**batch()).logits, DeferredLogits) == fused


def test_head_whose_adapter_has_dropout_keeps_the_models_own_loss():
    model = make("llama")
    qn.nn.quantize_model(model, skip=(), progress=False)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not fuse_loss(model)
    assert any("keeps its own loss: its head is LoraLinear4bit" in str(each.message) for each in caught)
    assert isinstance(model(**batch()).logits, torch.Tensor)


def test_hook_within_the_heads_adapter_is_called():
    model = qn.nn.quantize_model(make("llama"), skip=(), progress=False)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    assert fuse_loss(model)
    called = []
    model.base_model.lm_head.lora_A["default"].register_forward_hook(lambda *_: called.append(True))
    assert isinstance(model(**batch()).logits, torch.Tensor) and called


def test_logits_that_a_hook_reads_without_gradients_have_the_graph_of_the_loss():
    model = make("llama")
    expected = step(copy.deepcopy(model))
    fuse_loss(model)

    @torch.no_grad()
    def largest(_, __, logits):
        assert logits.abs().max() > 0

    model.lm_head.register_forward_hook(largest)
    assert_same(step(model), expected)


def test_logits_are_refused_once_the_head_has_changed():
    model = make("llama")
    fuse_loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = model(**batch())
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="logits: the output layer has changed since the forward pass"):
        outputs.logits.argmax(-1)
    optimizer.zero_grad()
    for parameter in (model.lm_head.weight, model.get_input_embeddings().weight):
        parameter.requires_grad_(False)
    outputs = model(**batch())
    expected = outputs.logits + 0
    outputs = model(**batch())
    outputs.loss.backward()
    optimizer.step()
    assert torch.equal(outputs.logits + 0, expected)


def test_model_with_another_loss_is_left_as_it_was():
    config = transformers.BertConfig(**COMMON)
    model = transformers.BertForMaskedLM(config)
    forward = model.get_output_embeddings().forward
    with pytest.warns(UserWarning, match="BertForMaskedLM keeps its own loss: its loss function is ForMaskedLMLoss"):
        assert not fuse_loss(model)
    assert model.get_output_embeddings().forward == forward
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        fuse_loss(torch.nn.Linear(2, 2))
