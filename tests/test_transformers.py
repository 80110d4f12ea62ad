"""Guards loading and saving through transformers: what is quantized, with which bytes, memory, and training."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
from models import load  # noqa: E402
from peak import megabytes  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = models.MARKS
FAMILIES = ("llama", "gpt-neox", "t5", "gpt2")


def config(quant_type="nf4", double_quant=True, **changes):
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant, **changes}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


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


def test_layers_that_16_bit_files_join_are_saved_one_by_one(tmp_path):
    models.joined().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options = {"dtype": torch.bfloat16, "quantization_config": config()}
    loaded = transformers.NomicBertModel.from_pretrained(tmp_path / "base", **options)
    replaced = transformers.NomicBertModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    qn.nn.quantize_model(replaced, progress=False)
    for name, model in {"loaded": loaded, "replaced": replaced}.items():
        model.save_pretrained(tmp_path / name)
        again = transformers.NomicBertModel.from_pretrained(tmp_path / name, **options)
        models.assert_same_bits(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize(
    ("family", "format", "blocksize"),
    [*((family, "fp4", 128) for family in FAMILIES), ("llama", "mxfp4", None), ("llama", "nvfp4", None)],
)
def test_weight_quantized_while_loading_has_the_bytes_of_quantize(folders, family, format, blocksize):
    model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config(format, blocksize=blocksize))
    plain = models.make(family, torch.bfloat16, width=128, inner=192)
    layers = models.layers_of(model)
    linears = [n for n, m in plain.named_modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]
    # The output layer stays, and T5's wo, which transformers keeps in fp32.
    assert set(linears) - set(layers) <= {n for n in linears if n.endswith(("lm_head", "embed_out", ".wo"))}
    for name, layer in layers.items():
        source = plain.get_submodule(name)
        weight = source.weight if isinstance(source, nn.Linear) else source.weight.t()
        expected = qn.quantize(weight, format, blocksize)
        models.assert_same_bits(layer.quantized_weight.tensors(), expected.tensors())
        assert (layer.bias is None) == (source.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, source.bias)
    rest = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in layers}
    assert rest.keys() == {n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in layers}
    assert all(torch.equal(model.get_parameter(n).to(p.dtype), p) for n, p in rest.items())
    assert not any(tensor.requires_grad for layer in layers.values() for tensor in layer.weight_tensors().values())


def test_skipped_module_stays_in_16_bits(folders):
    skip = ["lm_head", "o_proj", "model.layers.1"]
    names = models.layers_of(load(folders["llama"], quantization_config=config(llm_int8_skip_modules=skip)))
    assert len(names) == 6 and not any("o_proj" in name or "layers.1." in name for name in names)


def test_compute_dtype_is_that_of_the_product(folders):
    model = load(folders["llama"], dtype=torch.float32, quantization_config=config(bnb_4bit_compute_dtype="bfloat16"))
    layer = next(iter(models.layers_of(model).values()))
    x = torch.randn(5, layer.in_features)
    expected = qn.linear(x.bfloat16(), layer.quantized_weight, layer.bias)
    assert torch.equal(layer(x), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_file_says_the_dtype_of_the_product(folders, tmp_path, dtype):
    loaded = load(folders["llama"], dtype=dtype, quantization_config=config())
    replaced = qn.nn.quantize_model(models.make("llama", dtype), progress=False)
    cast = qn.nn.quantize_model(models.make("llama"), progress=False).to(dtype)
    chosen = load(folders["llama"], dtype=dtype, quantization_config=config(bnb_4bit_compute_dtype=torch.float16))
    for name, model in {"loaded": loaded, "replaced": replaced, "cast": cast, "chosen": chosen}.items():
        model.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        expected = torch.float16 if name == "chosen" else dtype
        assert f"torch.{written['bnb_4bit_compute_dtype']}" == str(expected), name
    again = load(tmp_path / "loaded", dtype=dtype, quantization_config=config())
    assert torch.equal(models.logits(again), models.logits(loaded))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"load_in_8bit": True}, ValueError, "load_in_8bit: expected False, as qlora_native has no other, got True"),
        ({"load_in_4bit": False}, ValueError, "load_in_4bit: expected True, as qlora_native has no other, got False"),
        ({"bnb_4bit_quant_type": "int4"}, ValueError, "expected one of nf4, fp4, mxfp4, nvfp4, got 'int4'"),
        ({"bnb_4bit_quant_type": "nf5"}, ValueError, "expected one of nf4, fp4, mxfp4, nvfp4, got 'nf5'"),
        ({"blocksize": 65}, ValueError, "blocksize: expected a power of two"),
        ({"bnb_4bit_quant_type": "mxfp4", "blocksize": 64}, ValueError, "expected .*, the only one of mxfp4, got 64"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ValueError, "expected torch.uint8, as .* got torch.bfloat16"),
        ({"bnb_4bit_compute_dtype": torch.float64}, TypeError, "expected torch.float32, .* got torch.float64"),
        ({"bnb_4bit_compute_dtype": "float64"}, TypeError, "expected torch.float32, .* got torch.float64"),
        ({"no_such_thing": 1}, TypeError, "blocksize, .*, got 'no_such_thing', which is no field"),
    ],
)
def test_unsupported_field_is_named_in_the_error(options, error, message):
    with pytest.raises(error, match=message):
        BitsAndBytesConfig(**{"load_in_4bit": not options.get("load_in_8bit"), **options})


def test_memory_holds_the_4_bit_model_and_one_shard(tmp_path):
    shard = 8 * 2**20
    model = models.make("llama", torch.bfloat16, layers=12, width=512, inner=1536)
    model.save_pretrained(tmp_path / "bf16", max_shard_size=shard)
    sizes = [path.stat().st_size for path in (tmp_path / "bf16").glob("*.safetensors")]
    assert len(sizes) > 8 and max(sizes) <= shard
    extra = models.loading_peaks(tmp_path, shard, "load('bf16')", "load('nf4')")
    written = [path.stat().st_size for path in (tmp_path / "nf4").glob("*.safetensors")]
    assert sum(written) < 0.4 * sum(sizes) and len(written) > 2 and max(written) <= shard
    assert max(extra) < shard, megabytes(extra)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_file_of_bitsandbytes_is_read_and_written_bit_for_bit(folders, family, quant_type, double_quant, tmp_path):
    bnb = models.bitsandbytes()
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    stock_config = transformers.BitsAndBytesConfig(**options)
    with torch.compiler.set_stance("force_eager"):
        stock = load(folders[family], family, dtype=torch.bfloat16, quantization_config=stock_config)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    stock.save_pretrained(theirs, max_shard_size="100KB")
    model = load(theirs, family, quantization_config=config())
    layers = models.layers_of(model)
    assert len(layers) == sum(isinstance(m, bnb.nn.Linear4bit) for m in stock.modules()) > 0
    assert {layer.double_quant for layer in layers.values()} == {double_quant}
    model.save_pretrained(ours)
    expected = models.tensors_of(theirs)
    models.assert_same_bits(models.tensors_of(ours), expected)
    # And back into stock transformers with bitsandbytes: its layers with the same bytes.
    reloaded = load(ours, family)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in reloaded.modules()) == len(layers)
    back = reloaded.state_dict()
    models.assert_same_bits({n: back[n.replace("embed_out", "lm_head")] for n in expected}, expected)  # GPT-NeoX's name
    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization.items() >= options.items()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_reloaded_bit_for_bit(folders, family, tmp_path):
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
    assert error < 2e-2  # two orders of addition in bf16


def test_file_of_bitsandbytes_is_read_without_bitsandbytes(folders, tmp_path):
    for family in FAMILIES:
        model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config())
        model.save_pretrained(tmp_path / family)
        torch.save((len(models.layers_of(model)), models.logits(model)), tmp_path / f"{family}.pt")
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
import torch
from qlora_native.integrations.transformers import BitsAndBytesConfig
import models
for family in {FAMILIES!r}:
    count, logits = torch.load({str(tmp_path)!r} + f"/{{family}}.pt")
    for options in ({{}}, {{"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}):
        model = models.load({str(tmp_path)!r} + f"/{{family}}", family, **options)
        assert len(models.layers_of(model)) == count > 0
        assert torch.equal(models.logits(model), logits)
assert "bitsandbytes" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=models.__file__[:-9])
    assert shown.returncode == 0, shown.stderr


@pytest.fixture(scope="module")
def in_4_bits(folders, tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in ("llama", "gpt-neox")}
    for family, folder in made.items():
        qn.nn.quantize_model(load(folders[family], dtype=torch.bfloat16), progress=False).save_pretrained(folder)
    return made


class NewDense(transformers.GPTNeoXPreTrainedModel):
    """A new layer with the name that ends those of two layers of each block, and a last one."""

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.dense = nn.Linear(config.hidden_size, 3)
        self.last = nn.Linear(3, 3)
        self.post_init()


HEADS = [
    ("llama", transformers.LlamaForSequenceClassification, ["score"], 14),
    ("gpt-neox", NewDense, ["dense", "last"], 8),
]


@pytest.mark.parametrize("skip", [None, ["lm_head"], []], ids=str)
@pytest.mark.parametrize("files", ["nf4", "bf16", "bin"])
@pytest.mark.parametrize(("family", "kind", "new", "quantized"), HEADS)
def test_new_head_stays_in_16_bits(family, kind, new, quantized, files, skip, folders, in_4_bits, tmp_path, caplog):
    given = config(llm_int8_skip_modules=skip)
    folder = in_4_bits[family] if files == "nf4" else folders[family]
    if files == "bin":
        folder = tmp_path / "bin"
        plain = load(folders[family], dtype=torch.bfloat16)
        plain.config.save_pretrained(folder)
        torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    model = kind.from_pretrained(folder, num_labels=3, quantization_config=given, dtype=torch.bfloat16)
    assert len(models.layers_of(model)) == quantized
    for name in new:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
        assert 0 < layer.weight.float().std() < 0.04  # the initializer_range of 0.02
        assert f"{name}.weight" in caplog.text and "newly initialized" in caplog.text
    assert given.llm_int8_skip_modules == skip
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", quantization_config=config())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_weight_in_16_bits_in_a_quantized_file_ends_the_loading(in_4_bits, tmp_path):
    folder, name = shutil.copytree(in_4_bits["llama"], tmp_path / "copy"), "model.layers.0.mlp.up_proj.weight"
    parts = dict.fromkeys(part for part in models.tensors_of(folder) if part.startswith(name))
    models.edit_tensors(folder / "model.safetensors", {**parts, name: torch.zeros(192, 128, dtype=torch.bfloat16)})
    with pytest.raises(RuntimeError):
        load(folder, quantization_config=config())


def test_weight_of_another_shape_than_the_config_says_ends_the_loading(folders, tmp_path, caplog):
    shutil.copytree(folders["llama"], tmp_path / "wrong")
    models.edit_json(tmp_path / "wrong/config.json", intermediate_size=96)
    with pytest.raises(RuntimeError):
        load(tmp_path / "wrong", quantization_config=config())
    assert "up_proj.weight: expected [96, 128], as config.json says, got [192, 128]" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"device_map": {"": "cpu", "model.layers.1": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 200_000}}],
    ids=["map", "auto"],
)
@pytest.mark.parametrize("files", ["nf4", "bf16"])
def test_module_that_would_lie_on_the_disk_is_named(files, options, folders, in_4_bits, tmp_path):
    folder = (in_4_bits if files == "nf4" else folders)["llama"]
    with pytest.raises(NotImplementedError, match="device_map: expected a device for every module, got 'disk' for "):
        load(folder, quantization_config=config(), offload_folder=tmp_path, **options)


@pytest.mark.parametrize("files", ["nf4", "bf16"])
def test_base_saved_with_adapters_in_it_is_named_with_what_to_do(files, folders, in_4_bits, tmp_path):
    quantization = {"quantization_config": config()} if files == "nf4" else {}
    base = load((in_4_bits if files == "nf4" else folders)["llama"], **quantization)
    adapted = peft.get_peft_model(base, lora())
    base.save_pretrained(tmp_path / "wrong")
    message = r"expected .*k_proj.weight, got .*k_proj.base_layer.weight.* that unload\(\) or merge_and_unload\(\)"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "wrong", quantization_config=config())
    adapted.unload().save_pretrained(tmp_path / "right")
    assert len(models.layers_of(load(tmp_path / "right", quantization_config=config()))) == 14


class Subclass(nn.Linear):
    """What may compute something else."""


def test_model_of_which_nothing_is_quantized_is_named_with_what_it_has(folders, monkeypatch, caplog, tmp_path):
    load(folders["llama"], quantization_config=config(llm_int8_skip_modules=["model", "lm_head"]))
    assert "nothing of LlamaForCausalLM is quantized; left as they are: model.layers.0" in caplog.text
    assert "(named in llm_int8_skip_modules, tied, or kept by the model)" in caplog.text
    monkeypatch.setattr(transformers.models.falcon.modeling_falcon, "FalconLinear", Subclass)
    models.make("falcon").save_pretrained(tmp_path)
    caplog.clear()
    load(tmp_path, quantization_config=config())
    assert "nothing of FalconForCausalLM is quantized; left as they are" in caplog.text
    assert "query_key_value.weight" in caplog.text and "(a subclass of nn.Linear, Subclass)" in caplog.text


@pytest.mark.parametrize("family", ("llama", "gpt-neox", "t5"))
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False)])
def test_live_quantized_model_is_reloaded_bit_for_bit(folders, family, format, double_quant, tmp_path):
    model = load(folders[family], family, dtype=torch.bfloat16)
    skip = ("lm_head", "layers.1", "o_proj", "block.0")
    qn.nn.quantize_model(model, skip, format, 128, double_quant, progress=False)
    layers = models.layers_of(model)
    assert layers and type(model.hf_quantizer).__name__ == "Quantizer"
    expected = models.logits(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    for options in ({"quantization_config": config()}, {"quantization_config": config("fp4", False, blocksize=32)}):
        again = load(tmp_path, family, **options)
        assert models.layers_of(again).keys() == layers.keys()
        state = again.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(models.logits(again), expected)


SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 8}


@pytest.mark.parametrize("how", ["live", "while loading"])
@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_models_that_multiply_by_weights_themselves_compute(name, how, tmp_path):
    """Mamba reads the weights of dt_proj and of its head, FalconMamba asks its config whether it may read them."""
    torch.manual_seed(0)
    options = {"tie_word_embeddings": False, "initializer_range": 0.3}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL, **options)
    ).eval()
    expected = model(models.ids() % 64).logits
    if how == "live":
        qn.nn.quantize_model(model, skip=(), progress=False)
    else:
        model.save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    assert isinstance(model.backbone.layers[0].mixer.in_proj, qn.nn.Linear4bit)
    assert type(model.lm_head) is nn.Linear
    assert relative_error(model(models.ids() % 64).logits, expected) < 0.3
    assert model.config._is_quantized and model.hqq_quantized
    model.dequantize()
    assert not hasattr(model, "hqq_quantized") and not hasattr(model.config, "_is_quantized")


TINY = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
# {model: (its config, layers whose weights it reads, a layer that is quantized)}
READING = {
    "DebertaModel": (
        {**TINY, "intermediate_size": 96, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ("encoder.layer.0.attention.self.in_proj",),
        "encoder.layer.0.intermediate.dense",
    ),
    "MobileBertForMaskedLM": (
        {**TINY, "intermediate_size": 96, "embedding_size": 32, "intra_bottleneck_size": 32},
        ("cls.predictions.dense", "cls.predictions.decoder"),
        "cls.predictions.transform.dense",
    ),
    "ReformerModelWithLMHead": (
        {**TINY, "attention_head_size": 32, "attn_layers": ["lsh"], "num_buckets": 2, "lsh_attn_chunk_length": 8}
        | {"axial_pos_embds": False, "feed_forward_size": 96, "hash_seed": 0, "is_decoder": True},
        tuple(f"reformer.encoder.layers.0.attention.self_attention.{name}" for name in ("query_key", "value")),
        "reformer.encoder.layers.0.attention.output.dense",
    ),
    "WavLMForXVector": (
        {**TINY, "intermediate_size": 96, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (32, 48)}
        | {"tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 32},
        tuple(f"wavlm.encoder.layers.0.attention.{name}_proj" for name in "qkv") + ("tdnn.0.kernel", "tdnn.1.kernel"),
        "wavlm.encoder.layers.0.feed_forward.intermediate_dense",
    ),
    "Gemma3nForCausalLM": (
        {**TINY, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32, "vocab_size_per_layer_input": 64}
        | {"hidden_size_per_layer_input": 32, "layer_types": ["full_attention"], "num_kv_shared_layers": 0}
        | {"laurel_rank": 8, "altup_num_inputs": 2, "altup_coef_clip": 0.1, "activation_sparsity_pattern": [0.0]},
        tuple(f"model.layers.0.altup.{name}_coefs" for name in ("prediction", "correction")),
        "model.layers.0.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("how", ["live", "while loading"])
@pytest.mark.parametrize("name", READING)
def test_layers_whose_weights_a_model_reads_stay(name, how, tmp_path):
    """Such a module is found by its name. Gemma3n limits the coefficients of its layers while it trains."""
    options, read, quantized = READING[name]
    kind = getattr(transformers, name)
    options = {**options, "pad_token_id": 0, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    inputs = torch.randn(1, 400) if name.startswith("WavLM") else models.ids(length=16) % 64
    expected = model(inputs)[0]
    if how == "live":
        qn.nn.quantize_model(model, progress=False)
    else:
        model.save_pretrained(tmp_path)
        model = kind.from_pretrained(tmp_path, quantization_config=config())
    assert all(type(model.get_submodule(path)) is nn.Linear for path in read)
    assert isinstance(model.get_submodule(quantized), qn.nn.Linear4bit)
    assert relative_error(model(inputs)[0], expected) < 0.3
    model.train()(inputs)


NARROW = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 2}


@pytest.mark.parametrize("how", ["live", "while loading"])
def test_model_that_casts_to_the_dtype_of_a_weight_computes_and_is_saved(how, tmp_path):
    """LongT5 casts to the dtype of `wo`, and does not keep it in fp32 as T5 does."""
    torch.manual_seed(0)
    kind = transformers.LongT5ForConditionalGeneration
    model = kind(transformers.LongT5Config(**NARROW, dropout_rate=0.0, decoder_start_token_id=0)).eval()
    inputs = {"input_ids": models.ids() % 64, "decoder_input_ids": models.ids() % 64}
    expected = model(**inputs).logits
    if how == "live":
        qn.nn.quantize_model(model, progress=False)
    else:
        model.save_pretrained(tmp_path / "dense")
        model = kind.from_pretrained(tmp_path / "dense", quantization_config=config())
    feed_forward = model.encoder.block[1].layer[1].DenseReluDense
    assert isinstance(feed_forward.wi, qn.nn.Linear4bit) and type(feed_forward.wo) is nn.Linear
    assert relative_error(logits := model(**inputs).logits, expected) < 0.3
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", quantization_config=config())
    assert torch.equal(again(**inputs).logits, logits)


def test_weights_that_an_inner_model_keeps_in_fp32_stay():
    model = models.make("t5").to(torch.bfloat16)
    wrapped = nn.ModuleDict({"encoder": model.encoder})
    qn.nn.quantize_model(wrapped, progress=False)
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wo) is nn.Linear
    wrapped["encoder"](models.ids())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int8"}, "q_proj: format: expected one of nf4, fp4, mxfp4, nvfp4, which have files, got int8"),
        ({"codebook": torch.linspace(-1, 1, 16)}, "format: expected one of nf4, .*, which have files, got codebook"),
        ({"format": "mxfp4"}, "down_proj: K: expected a multiple of 32, as files of mxfp4 need, got 72"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_format_without_files_is_named_when_a_live_model_is_saved(options, message, whole, tmp_path):
    model = models.make("llama")
    qn.nn.quantize_model(model if whole else model.model, progress=False, **options)
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapted = peft.get_peft_model(model, lora())
    adapted.save_pretrained(tmp_path / "adapter")  # an adapter is


def _by_hand(model):
    for block in model.model.layers:
        block.mlp.up_proj = qn.nn.Linear4bit.from_linear(block.mlp.up_proj)


PARTS = {
    "outer module": lambda model: qn.nn.quantize_model(nn.ModuleDict({"model": model}), progress=False),
    "inner model": lambda model: qn.nn.quantize_model(model.model, progress=False),
    "a block": lambda model: qn.nn.quantize_model(model.model.layers[0], progress=False),
    "by hand": _by_hand,
}


@pytest.mark.parametrize("quantize_part", PARTS.values(), ids=PARTS)
def test_live_model_with_a_quantized_part_is_reloaded_bit_for_bit(quantize_part, tmp_path):
    model = models.make("llama")
    quantize_part(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, quantization_config=config())
    assert models.layers_of(again).keys() == models.layers_of(model).keys()
    assert torch.equal(models.logits(again), models.logits(model))


def test_layers_of_another_method_are_named_when_a_live_model_is_saved(folders, tmp_path):
    models.bitsandbytes()
    options = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]}
    with torch.compiler.set_stance("force_eager"):
        model = load(folders["llama"], quantization_config=transformers.BitsAndBytesConfig(**options))
    qn.nn.quantize_model(model, progress=False)
    with pytest.raises(ValueError, match="expected all quantized layers to be ours, got others, of bitsandbytes"):
        model.save_pretrained(tmp_path / "out")


# {family: the layers that get an adapter, how many they are, its task, the trainer and its arguments}
TRAINED = {
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj"], 8, "CAUSAL_LM", "Trainer", "TrainingArguments"),
    "gpt-neox": (["query_key_value", "dense"], 4, "CAUSAL_LM", "Trainer", "TrainingArguments"),
    "t5": (["q", "k", "v", "o"], 24, "SEQ_2_SEQ_LM", "Seq2SeqTrainer", "Seq2SeqTrainingArguments"),
}
STEPS = 10


def lora(family="llama", **changes):
    targets, _, task, *_ = TRAINED[family]
    options = {"r": 8, "lora_alpha": 32, "target_modules": targets, "lora_dropout": 0.05, "bias": "none"}
    return peft.LoraConfig(**options, task_type=task, **changes)


def fused(model):
    return sum(isinstance(module, LoraLinear4bit) for module in model.modules())


@pytest.mark.parametrize("family", TRAINED)
def test_trainer_learns_and_resumes(folders, family, tmp_path, capsys):
    *_, trainer, kind = TRAINED[family]
    options = {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1}
    options |= {"learning_rate": 2e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in models.ids(2, 12).repeat(4, 1)]
    arguments = getattr(transformers, kind)(output_dir=str(tmp_path), **options)

    steps = []

    def run(**options):
        transformers.set_seed(0)
        model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config())
        model = peft.prepare_model_for_kbit_training(model)
        assert model.is_gradient_checkpointing
        model = peft.get_peft_model(model, lora(family))
        model.print_trainable_parameters()
        made = getattr(transformers, trainer)(model=model, args=arguments, train_dataset=data)
        step = made.training_step
        made.training_step = lambda *args: steps.append(args) or step(*args)
        made.train(**options)
        return made.model, [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    whole, losses = run()
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0], losses
    expected = peft.get_peft_model_state_dict(whole)
    fresh = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config())
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / f"checkpoint-{STEPS}")
    assert fused(again) == fused(whole) == TRAINED[family][1]
    whole.gradient_checkpointing_disable()
    assert torch.equal(models.logits(again), models.logits(whole))
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")  # as if it had been interrupted before that
    rest, more = run(resume_from_checkpoint=True)
    assert more == losses and len(steps) == STEPS + STEPS // 2
    for name, tensor in peft.get_peft_model_state_dict(rest).items():
        assert torch.equal(tensor, expected[name]), name
    assert family != "llama" or "trainable params: 14,336" in capsys.readouterr().out


@pytest.mark.parametrize("family", TRAINED)
def test_merged_model_is_saved_as_it_is(folders, family, tmp_path):
    model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config())
    adapted = peft.get_peft_model(model, lora(family, init_lora_weights=False))
    before = models.logits(adapted)
    merged = adapted.merge_and_unload()
    expected = models.logits(merged)
    assert not torch.equal(expected, before)
    merged.save_pretrained(tmp_path)
    assert torch.equal(models.logits(load(tmp_path, family, quantization_config=config())), expected)
