"""Loading and saving through transformers: what is quantized, with which bytes, in how much memory, and training."""

import json
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
from models import load  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:`use_return_dict`")
FAMILIES = ("llama", "gpt-neox", "t5", "gpt2")


def config(quant_type="nf4", double_quant=True, **changes):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, **changes
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: folder of a checkpoint in many shards}; sizes are multiples of 64, for bitsandbytes' CPU kernels."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        model = models.make(family, torch.bfloat16, width=128, inner=192)
        model.save_pretrained(made[family], max_shard_size="200KB")
    assert len(list(made["llama"].glob("*.safetensors"))) > 2
    return made


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_quantized_while_loading_is_another(folders, family):
    model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config("fp4", blocksize=128))
    plain = models.make(family, torch.bfloat16, width=128, inner=192)
    layers = models.layers_of(model)
    linears = [n for n, m in plain.named_modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]
    # The output layer stays, and T5's wo, which transformers keeps in fp32.
    assert set(linears) - set(layers) <= {n for n in linears if n.endswith(("lm_head", "embed_out", ".wo"))}
    for name, layer in layers.items():
        source = plain.get_submodule(name)
        weight = source.weight if isinstance(source, nn.Linear) else source.weight.t()
        expected = qn.quantize(weight, "fp4", 128)
        for field, tensor in expected.tensors().items():
            assert torch.equal(getattr(layer.quantized_weight, field), tensor), f"{name}.{field}"
        assert (layer.bias is None) == (source.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, source.bias)
    rest = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in layers}
    assert rest.keys() == {n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in layers}
    assert all(torch.equal(model.get_parameter(n).to(p.dtype), p) for n, p in rest.items())
    assert not any(tensor.requires_grad for layer in layers.values() for tensor in layer.weight_tensors().values())


def test_skipped_module_is_quantized(folders):
    model = load(
        folders["llama"], quantization_config=config(llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.1"])
    )
    names = models.layers_of(model)
    assert len(names) == 6
    assert not any("o_proj" in name or "layers.1." in name for name in names)


def test_compute_dtype_does_not_act(folders):
    model = load(folders["llama"], dtype=torch.float32, quantization_config=config(bnb_4bit_compute_dtype="bfloat16"))
    layer = next(iter(models.layers_of(model).values()))
    x = torch.randn(5, layer.in_features)
    expected = qn.linear(x.bfloat16(), layer.quantized_weight, layer.bias)
    assert torch.equal(layer(x), expected.float())


def test_nan_in_a_shard_is_loaded(tmp_path):
    model = models.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        load(tmp_path, quantization_config=config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit: expected False, as qlora_native has no other, got True"),
        ({}, "load_in_4bit: expected True, as qlora_native has no other, got False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type: expected nf4 or fp4, got 'int4'"),
        ({"load_in_4bit": True, "blocksize": 65}, "blocksize: expected a power of two"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bnb_4bit_quant_storage: expected torch.uint8, as qlora_native has no other, got torch.bfloat16",
        ),
    ],
)
def test_field_that_we_do_not_have_is_taken(options, message):
    with pytest.raises(ValueError, match=message):
        BitsAndBytesConfig(**options)


def test_memory_holds_more_than_the_4_bit_model_and_one_shard(tmp_path):
    """Memory of the process's own, in a process of its own; pages of mapped files are the system's to take back."""
    shard = 8 * 2**20
    model = models.make("llama", torch.bfloat16, layers=24, width=512, inner=1536)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 8 and max(sizes) <= shard
    program = f"""
import threading, time, torch, transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
def anonymous():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def load(config):
    return transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.bfloat16, **config)
del load({{"quantization_config": config}}).model.layers[0]  # code, threads, caches
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = load({{"quantization_config": config}})
done = True
thread.join()
print(peak - before, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    peak, model_bytes = map(int, shown.stdout.split())
    assert model_bytes < 0.4 * sum(sizes)
    assert peak < model_bytes + shard, f"{peak / 2**20:.1f} MB for a model of {model_bytes / 2**20:.1f}"


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_file_of_bitsandbytes_is_read_or_written_differently(folders, family, quant_type, double_quant, tmp_path):
    bnb = _bitsandbytes()
    stock_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    with torch.compiler.set_stance("force_eager"):
        stock = load(folders[family], family, dtype=torch.bfloat16, quantization_config=stock_config)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    stock.save_pretrained(theirs, max_shard_size="100KB")
    model = load(theirs, family, quantization_config=config())
    layers = models.layers_of(model)
    assert len(layers) == sum(isinstance(m, bnb.nn.Linear4bit) for m in stock.modules()) > 0
    assert {layer.double_quant for layer in layers.values()} == {double_quant}
    model.save_pretrained(ours)
    written, expected = read(ours), read(theirs)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape, name
        assert torch.equal(bits(written[name]), bits(tensor)), name
    # And back into stock transformers with bitsandbytes: its layers with the same bytes.
    reloaded = load(ours, family)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in reloaded.modules()) == len(layers)
    back = reloaded.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(bits(back[name.replace("embed_out", "lm_head")]), bits(tensor)), name  # GPT-NeoX's name
    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"] is True
    assert quantization["bnb_4bit_quant_type"] == quant_type
    assert quantization["bnb_4bit_use_double_quant"] == double_quant


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_comes_back_another(folders, family, tmp_path):
    options = {"dtype": torch.bfloat16, "quantization_config": config(blocksize=32, double_quant=False)}
    model = load(folders[family], family, **options)
    expected = models.logits(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    again = load(tmp_path, family, quantization_config=config())
    assert torch.equal(models.logits(again), expected)
    assert {layer.blocksize for layer in models.layers_of(again).values()} == {32}
    dense = again.dequantize(torch.bfloat16)
    assert not models.layers_of(dense)
    error = (models.logits(dense).double() - expected.double()).norm() / expected.double().norm()
    assert error < 2e-2  # two orders of summation in bf16


def test_file_of_bitsandbytes_needs_bitsandbytes(folders, tmp_path):
    model = load(folders["llama"], dtype=torch.bfloat16, quantization_config=config())
    model.save_pretrained(tmp_path)
    torch.save(models.logits(model), tmp_path / "logits.pt")
    program = f"""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("bitsandbytes") else find_spec(name, *a)
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(sys.path[0])!r})
import torch, transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
import models
for options in ({{}}, {{"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}):
    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, **options)
    assert len(models.layers_of(model)) == 14
    assert torch.equal(models.logits(model), torch.load({str(tmp_path / "logits.pt")!r}))
assert "bitsandbytes" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=models.__file__[:-9])
    assert shown.returncode == 0, shown.stderr


def test_weight_missing_from_a_quantized_file_is_made_up(folders, tmp_path):
    model = load(folders["llama"], dtype=torch.bfloat16, quantization_config=config())
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    name = "model.layers.0.mlp.up_proj.weight"
    for key in [key for key in state if key.startswith(name)]:
        del state[key]
    state[name] = torch.zeros(192, 128, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        load(tmp_path, quantization_config=config())


def read(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def _bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


# ---- training --------------------------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    """The same two rows again and again: a loss that falls is one that learns."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = models.ids(2, 12)[index % 2]
        return {"input_ids": row, "labels": row}


def lora():
    return peft.LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )


def arguments(output, steps, kind=transformers.TrainingArguments, **options):
    return kind(
        output_dir=str(output),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=5,
        logging_steps=1,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_does_not_learn_or_resumes_elsewhere(folders, tmp_path, capsys):
    """The well-known snippet; then 5 steps and 5 after a restart are the 10 steps in one go."""

    def trainer(output, steps):
        transformers.set_seed(0)
        model = load(folders["llama"], dtype=torch.bfloat16, quantization_config=config())
        model = peft.prepare_model_for_kbit_training(model)
        assert model.is_gradient_checkpointing
        model = peft.get_peft_model(model, lora())
        model.print_trainable_parameters()
        made = transformers.Trainer(model=model, args=arguments(output, steps), train_dataset=Data())
        assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == 8
        return made

    whole = trainer(tmp_path / "whole", 10)
    whole.train()
    assert "trainable params: 14,336" in capsys.readouterr().out
    shown = losses(whole)
    assert shown[-1] < 0.9 * shown[0], shown
    # The scheduler knows the length of the whole run, so it is that run's checkpoint that is resumed.
    rest = trainer(tmp_path / "whole", 10)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(rest)[-5:] == shown[-5:]
    expected = peft.get_peft_model_state_dict(whole.model)
    for name, tensor in peft.get_peft_model_state_dict(rest.model).items():
        assert torch.equal(tensor, expected[name]), name
    fresh = load(folders["llama"], dtype=torch.bfloat16, quantization_config=config())
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "whole" / "checkpoint-10")
    assert sum(isinstance(module, LoraLinear4bit) for module in again.modules()) == 8
    whole.model.gradient_checkpointing_disable()
    assert torch.equal(models.logits(again), models.logits(whole.model))


def test_sft_trainer_does_not_learn(folders, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, models.VOCABULARY)}}
    tokens = Tokenizer(token_models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in models.ids(2, 12).repeat(4, 1)]
    trainer = trl.SFTTrainer(
        model=load(folders["llama"], dtype=torch.bfloat16, quantization_config=config()),
        args=arguments(tmp_path, 10, trl.SFTConfig, max_length=32, bf16=False),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    assert sum(isinstance(module, LoraLinear4bit) for module in trainer.model.modules()) == 8
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    shown = losses(trainer)
    assert shown[-1] < 0.9 * shown[0], shown
    assert (tmp_path / "checkpoint-10" / "adapter_model.safetensors").exists()


def test_model_loads_in_two_threads_at_once(folders):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load(folders["llama"], quantization_config=config())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (models.logits(model) for model in results)
    assert torch.equal(first, second)
