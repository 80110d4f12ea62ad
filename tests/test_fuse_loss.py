"""Guards the fused loss in transformers' models: the same loss and gradients as before, and no logits."""

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.fuse import fuse_loss  # noqa: E402
from qlora_native.integrations.fuse._loss import DeferredLogits  # noqa: E402
from qlora_native.testing import SUM_FACTOR, unit_roundoff  # noqa: E402

COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON |= {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, num_key_value_heads=2),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "granite": lambda: transformers.GraniteConfig(**COMMON, num_key_value_heads=2, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**COMMON, num_key_value_heads=2, logit_scale=0.25),
}
families = pytest.mark.parametrize("family", CONFIGS)


def make(family, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).train()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 11))
    labels = ids.clone()
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **more):
    """(loss, the gradients of what is trained)."""
    model.zero_grad()
    outputs = model(**batch(), **more)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, dtype):
    (outputs, gradients), (expected, wanted) = ours, theirs
    assert gradients.keys() == wanted.keys()
    allowed = SUM_FACTOR * unit_roundoff(dtype)
    assert (outputs.loss - expected.loss).abs() <= allowed * expected.loss.abs()
    for name, gradient in wanted.items():
        # Gradients pass through the layers, each of which rounds.
        assert (gradients[name] - gradient).norm() <= 4 * allowed * gradient.norm(), name


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(29)}], ids=["mean", "items"])
def test_loss_and_gradients_are_the_models_own(family, dtype, more):
    model = make(family, dtype)
    expected = step(copy.deepcopy(model), **more)
    assert fuse_loss(model)
    outputs, gradients = step(model, **more)
    assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.computed is None
    assert_same((outputs, gradients), expected, dtype)


@families
def test_logits_are_made_for_who_asks(family):
    model = make(family)
    expected = copy.deepcopy(model)(**batch()).logits
    fuse_loss(model)
    logits = model(**batch()).logits
    assert logits.shape == expected.shape and logits.dtype == expected.dtype and len(logits) == 3
    for look in (
        lambda z: z[..., :-1, :].argmax(-1),
        lambda z: torch.softmax(z, dim=-1),
        lambda z: z.float().sum(-1),
        lambda z: torch.cat([z, z], dim=1),
        lambda z: z * torch.ones(()),
        lambda z: z / torch.tensor(2.0),
    ):
        torch.testing.assert_close(look(logits), look(expected))


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


def test_copy_of_a_fused_model_has_a_head_of_its_own():
    model = make("llama")
    fuse_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=1e-6)
    assert model(**batch()).loss.item() != pytest.approx(torch.tensor(96.0).log().item(), rel=1e-6)
    assert fuse_loss(model) and fuse_loss(other)


@pytest.mark.parametrize("head", ["dense", "adapted", "4 bits", "4 bits, adapted"])
def test_heads_of_a_quantized_model_are_fused(head):
    model = make("llama")
    qn.nn.quantize_model(model, skip=() if "4 bits" in head else ("lm_head",), progress=False)
    targets = ["q_proj", "down_proj"] + ["lm_head"] * ("adapted" in head)
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    expected = step(copy.deepcopy(model))
    assert fuse_loss(model)
    ours = step(model)
    assert isinstance(ours[0].logits, DeferredLogits) and ours[0].logits.computed is None
    assert_same(ours, expected, torch.float32)


def test_head_that_multiplies_in_the_dtype_of_its_input_is_fused():
    model = qn.nn.quantize_model(make("llama"), skip=(), progress=False)
    assert fuse_loss(model)
    for dtype, fused in ((None, True), (torch.float32, True), (torch.bfloat16, False)):
        model.lm_head.compute_dtype = dtype
        assert isinstance(model(**batch()).logits, DeferredLogits) == fused


def test_dropout_of_the_heads_adapter_takes_the_models_own_way():
    model = make("llama")
    qn.nn.quantize_model(model, skip=(), progress=False)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not fuse_loss(model)
    assert any("keeps its own loss: its head is LoraLinear4bit" in str(each.message) for each in caught)
    assert isinstance(model(**batch()).logits, torch.Tensor)


def test_trainer_takes_the_steps_that_it_took(tmp_path):
    inputs = batch()
    rows = [{name: values[i].tolist() for name, values in inputs.items()} for i in range(3)]
    losses = []
    for fused in (False, True):
        model = make("llama")
        if fused:
            fuse_loss(model)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=3,
            learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=0,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0]


def test_model_with_another_loss_is_left_as_it_was():
    config = transformers.BertConfig(**COMMON)
    model = transformers.BertForMaskedLM(config)
    forward = model.get_output_embeddings().forward
    with pytest.warns(UserWarning, match="BertForMaskedLM keeps its own loss: its loss function is ForMaskedLMLoss"):
        assert not fuse_loss(model)
    assert model.get_output_embeddings().forward == forward
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        fuse_loss(torch.nn.Linear(2, 2))
