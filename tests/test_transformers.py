"""Guards loading and saving through transformers: what is quantized, with which bytes, memory, and training."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
from models import load  # noqa: E402
from peak import megabytes, peaks  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:`use_return_dict`"),
]
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
def test_weight_quantized_while_loading_has_the_bytes_of_quantize(folders, family):
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


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_microscaled_format_is_quantized_while_loading(folders, format):
    model = load(folders["llama"], dtype=torch.bfloat16, quantization_config=config(format))
    plain = models.make("llama", torch.bfloat16, width=128, inner=192)
    assert len(models.layers_of(model)) > 4
    for name, layer in models.layers_of(model).items():
        expected = qn.quantize(plain.get_submodule(name).weight, format)
        assert torch.equal(layer.dequantize(), expected.dequantize()), name
    with pytest.raises(ValueError, match=f"blocksize: expected .*, the only one of {format}, got 64"):
        config(format, blocksize=64)


def test_skipped_module_stays_in_16_bits(folders):
    model = load(
        folders["llama"], quantization_config=config(llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.1"])
    )
    names = models.layers_of(model)
    assert len(names) == 6
    assert not any("o_proj" in name or "layers.1." in name for name in names)


def test_compute_dtype_is_that_of_the_product(folders):
    model = load(folders["llama"], dtype=torch.float32, quantization_config=config(bnb_4bit_compute_dtype="bfloat16"))
    layer = next(iter(models.layers_of(model).values()))
    x = torch.randn(5, layer.in_features)
    expected = qn.linear(x.bfloat16(), layer.quantized_weight, layer.bias)
    assert torch.equal(layer(x), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_file_says_the_dtype_of_the_product(folders, tmp_path, dtype):
    """The model's, unless the user chose one."""
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


def test_float64_as_compute_dtype_is_named_in_the_error():
    for dtype in (torch.float64, "float64"):
        with pytest.raises(TypeError, match="bnb_4bit_compute_dtype: expected torch.float32, .* got torch.float64"):
            config(bnb_4bit_compute_dtype=dtype)


def test_nan_in_a_shard_ends_the_loading(tmp_path):
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
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "expected one of nf4, fp4, mxfp4, nvfp4, got 'int4'",
        ),
        ({"load_in_4bit": True, "blocksize": 65}, "blocksize: expected a power of two"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bnb_4bit_quant_storage: expected torch.uint8, as qlora_native has no other, got torch.bfloat16",
        ),
    ],
)
def test_unsupported_field_is_named_in_the_error(options, message):
    with pytest.raises(ValueError, match=message):
        BitsAndBytesConfig(**options)


def test_misspelled_field_is_named_with_the_one_that_was_meant():
    with pytest.raises(TypeError, match="expected bnb_4bit_use_double_quant, got 'bnb_4bit_use_doublequant'"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_doublequant=True)
    with pytest.raises(TypeError, match="blocksize, .*, got 'no_such_thing', which is no field"):
        BitsAndBytesConfig(load_in_4bit=True, no_such_thing=1)


def test_memory_holds_the_4_bit_model_and_one_shard(tmp_path):
    """While a 16-bit checkpoint is quantized, and while the 4-bit one that came of it is read."""
    shard = 8 * 2**20
    model = models.make("llama", torch.bfloat16, layers=12, width=512, inner=1536)
    model.save_pretrained(tmp_path / "bf16", max_shard_size=shard)
    sizes = [path.stat().st_size for path in (tmp_path / "bf16").glob("*.safetensors")]
    assert len(sizes) > 8 and max(sizes) <= shard
    prepare = f"""
import transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        {str(tmp_path)!r} + "/" + name, dtype=torch.bfloat16, quantization_config=config
    )
load("bf16").save_pretrained({str(tmp_path / "nf4")!r}, max_shard_size={shard})  # and code, threads, caches
"""
    extra = peaks(prepare, "load('bf16')", "load('nf4')")
    written = [path.stat().st_size for path in (tmp_path / "nf4").glob("*.safetensors")]
    assert sum(written) < 0.4 * sum(sizes) and len(written) > 2 and max(written) <= shard
    assert max(extra) < shard, megabytes(extra)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_file_of_bitsandbytes_is_read_and_written_bit_for_bit(folders, family, quant_type, double_quant, tmp_path):
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
    written, expected = models.tensors_of(ours), models.tensors_of(theirs)
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
def test_saved_model_comes_back_bit_for_bit(folders, family, tmp_path):
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


def test_weight_missing_from_a_quantized_file_is_named(folders, tmp_path):
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


# ---- files that lack something, or of which nothing is quantized -----------------------------------------------------


@pytest.fixture(scope="module")
def in_4_bits(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    qn.nn.quantize_model(load(folders["llama"], dtype=torch.bfloat16), progress=False).save_pretrained(folder)
    return folder


class TwoNewLayers(transformers.LlamaPreTrainedModel):
    """A head of one's own, of which transformers keeps only the last layer in 16 bits."""

    def __init__(self, config):
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.last = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids):
        return self.last(self.dense(self.model(input_ids).last_hidden_state).tanh())


@pytest.mark.parametrize("skip", [None, ["lm_head"], []], ids=str)
@pytest.mark.parametrize("files", ["nf4", "bf16", "bin"])
@pytest.mark.parametrize("kind", [transformers.LlamaForSequenceClassification, TwoNewLayers])
def test_new_head_stays_in_16_bits(files, kind, skip, folders, in_4_bits, tmp_path, caplog):
    """transformers initializes it and says so; the model is saved, read and trained as any other."""
    given = config(llm_int8_skip_modules=skip)
    folder = in_4_bits if files == "nf4" else folders["llama"]
    if files == "bin":
        folder = tmp_path / "bin"
        plain = load(folders["llama"], dtype=torch.bfloat16)
        plain.config.save_pretrained(folder)
        torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    model = kind.from_pretrained(folder, num_labels=3, quantization_config=given, dtype=torch.bfloat16)
    new = ["score"] if kind is not TwoNewLayers else ["dense", "last"]
    assert len(models.layers_of(model)) == 14
    for name in new:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
        assert 0.01 < layer.weight.float().std() < 0.04  # the initializer_range of 0.02
        assert f"{name}.weight" in caplog.text and "newly initialized" in caplog.text
    assert given.llm_int8_skip_modules == skip
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", quantization_config=config())
    for each in (model, again):
        each.config.pad_token_id = 0
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=new)
    trained = peft.get_peft_model(again, lora)
    output = trained(input_ids=models.ids())
    (output if kind is TwoNewLayers else output.logits).square().sum().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


class NewDense(transformers.GPTNeoXPreTrainedModel):
    """Its new layer has the name that ends those of two layers of each block."""

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.dense = nn.Linear(config.hidden_size, 3)
        self.last = nn.Linear(3, 3)
        self.post_init()


@pytest.mark.parametrize("live", [False, True])
def test_name_of_a_new_layer_skips_no_other(folders, live, tmp_path):
    options = {} if live else {"quantization_config": config()}
    model = NewDense.from_pretrained(folders["gpt-neox"], **options)
    if live:
        qn.nn.quantize_model(model.gpt_neox, progress=False)
    assert type(model.dense) is nn.Linear and len(models.layers_of(model)) == 8
    model.save_pretrained(tmp_path)
    again = NewDense.from_pretrained(tmp_path, quantization_config=config())
    assert models.layers_of(again).keys() == models.layers_of(model).keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_weight_of_another_shape_than_the_config_says_ends_the_loading(folders, tmp_path, caplog):
    shutil.copytree(folders["llama"], tmp_path / "wrong")
    path = tmp_path / "wrong" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 96}))
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
    folder = in_4_bits if files == "nf4" else folders["llama"]
    with pytest.raises(NotImplementedError, match="device_map: expected a device for every module, got 'disk' for "):
        load(folder, quantization_config=config(), offload_folder=tmp_path, **options)


@pytest.mark.parametrize("files", ["nf4", "bf16"])
def test_base_saved_with_adapters_in_it_is_named_with_what_to_do(files, folders, in_4_bits, tmp_path):
    quantization = {"quantization_config": config()} if files == "nf4" else {}
    base = load(in_4_bits if files == "nf4" else folders["llama"], **quantization)
    adapted = peft.get_peft_model(base, lora())
    base.save_pretrained(tmp_path / "wrong")
    message = (
        r"expected model.*k_proj.weight, got model.*k_proj.base_layer.weight.* that unload\(\) or merge_and_unload\(\)"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "wrong", quantization_config=config())
    adapted.unload().save_pretrained(tmp_path / "right")
    assert len(models.layers_of(load(tmp_path / "right", quantization_config=config()))) == 14


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_model_of_which_nothing_is_quantized_is_named_with_what_it_has(folders, monkeypatch, caplog, tmp_path):
    load(folders["llama"], quantization_config=config(llm_int8_skip_modules=["model", "lm_head"]))
    assert "nothing of LlamaForCausalLM is quantized; left as they are: model.layers.0" in caplog.text
    assert "(named in llm_int8_skip_modules, tied, or kept in fp32)" in caplog.text
    monkeypatch.setattr(transformers.models.falcon.modeling_falcon, "FalconLinear", Doubled)
    models.make("falcon").save_pretrained(tmp_path)
    caplog.clear()
    load(tmp_path, quantization_config=config())
    assert "nothing of FalconForCausalLM is quantized; left as they are" in caplog.text
    assert "query_key_value.weight" in caplog.text and "(a subclass of nn.Linear, Doubled)" in caplog.text
    caplog.clear()
    load(folders["llama"], quantization_config=config())
    assert "is quantized" not in caplog.text


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def _bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


# ---- live models that quantize_model has quantized -------------------------------------------------------------------


@pytest.mark.parametrize("family", ("llama", "gpt-neox", "t5"))
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False)])
def test_live_quantized_model_comes_back_bit_for_bit(folders, family, format, double_quant, tmp_path):
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


def test_live_quantized_model_is_read_by_bitsandbytes(tmp_path):
    bnb = _bitsandbytes()
    model = qn.nn.quantize_model(models.make("llama", torch.bfloat16, width=128, inner=192), progress=False)
    model.save_pretrained(tmp_path)
    with torch.compiler.set_stance("force_eager"):
        stock = load(tmp_path)
    found = {name: m for name, m in stock.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert found.keys() == models.layers_of(model).keys()
    for name, layer in models.layers_of(model).items():
        assert torch.equal(found[name].weight.data.view(-1), layer.weight.view(-1)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "q_proj: format: expected one of nf4, fp4, mxfp4, nvfp4, which have files, got int4"),
        ({"codebook": torch.linspace(-1, 1, 16)}, "format: expected one of nf4, .*, which have files, got codebook"),
        ({"format": "mxfp4"}, "down_proj: K: expected a multiple of 32, as files of mxfp4 need, got 72"),
    ],
)
def test_format_without_files_is_named_when_a_live_model_is_saved(options, message, tmp_path):
    model = qn.nn.quantize_model(models.make("llama"), progress=False, **options)
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapted = peft.get_peft_model(model, lora())
    adapted.save_pretrained(tmp_path / "adapter")  # an adapter is


def test_live_model_in_a_module_of_ones_own_is_saved(tmp_path):
    inner = models.make("llama")
    qn.nn.quantize_model(nn.ModuleDict({"model": inner}), progress=False)
    inner.save_pretrained(tmp_path)
    again = load(tmp_path, quantization_config=config())
    assert torch.equal(models.logits(again), models.logits(inner))


def _by_hand(model):
    for block in model.model.layers:
        block.mlp.up_proj = qn.nn.Linear4bit.from_linear(block.mlp.up_proj)


@pytest.mark.parametrize(
    "quantize_part",
    [
        lambda model: qn.nn.quantize_model(model.model, progress=False),
        lambda model: qn.nn.quantize_model(model.model.layers[0], progress=False),
        _by_hand,
    ],
    ids=["inner model", "a block", "by hand"],
)
def test_live_model_with_a_quantized_part_comes_back_bit_for_bit(quantize_part, tmp_path):
    model = models.make("llama")
    quantize_part(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, quantization_config=config())
    assert models.layers_of(again).keys() == models.layers_of(model).keys()
    assert torch.equal(models.logits(again), models.logits(model))


def test_part_in_a_format_without_files_is_named_when_a_live_model_is_saved(tmp_path):
    model = models.make("llama")
    qn.nn.quantize_model(model.model, format="int8", progress=False)
    with pytest.raises(ValueError, match="^model.layers.0.*: format: expected one of nf4, fp4, .*, got int8"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_another_method_are_named_when_a_live_model_is_saved(folders, tmp_path):
    _bitsandbytes()
    options = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]}
    with torch.compiler.set_stance("force_eager"):
        model = load(folders["llama"], quantization_config=transformers.BitsAndBytesConfig(**options))
    qn.nn.quantize_model(model, progress=False)
    with pytest.raises(
        ValueError, match="model: expected all quantized layers to be ours, got others, of bitsandbytes"
    ):
        model.save_pretrained(tmp_path / "out")


# ---- training --------------------------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    """The same two rows again and again: a loss that falls is one that learns."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = models.ids(2, 12)[index % 2]
        return {"input_ids": row, "labels": row}


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


def arguments(kind, output, **options):
    return kind(
        output_dir=str(output),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def fused(model):
    return sum(isinstance(module, LoraLinear4bit) for module in model.modules())


class Counted(transformers.TrainerCallback):
    steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def check_that_it_learns_and_resumes(make, family, folder, output):
    """Interrupted in the middle, training goes on from the checkpoint to the same losses and the same adapter."""

    def run(**options):
        transformers.set_seed(0)
        trainer = make()
        counted = Counted()
        trainer.add_callback(counted)
        trainer.train(**options)
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], counted.steps

    whole, losses, steps = run()
    assert steps == len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0], losses
    expected = peft.get_peft_model_state_dict(whole.model)
    fresh = load(folder, family, dtype=torch.bfloat16, quantization_config=config())
    again = peft.PeftModel.from_pretrained(fresh, output / f"checkpoint-{STEPS}")
    assert fused(again) == fused(whole.model) == TRAINED[family][1]
    whole.model.gradient_checkpointing_disable()
    assert torch.equal(models.logits(again), models.logits(whole.model))
    shutil.rmtree(output / f"checkpoint-{STEPS}")  # as if it had been interrupted before that
    rest, more, steps = run(resume_from_checkpoint=True)
    assert steps == STEPS // 2 and more == losses
    for name, tensor in peft.get_peft_model_state_dict(rest.model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", TRAINED)
def test_trainer_learns_and_resumes(folders, family, tmp_path, capsys):
    """The well-known snippet."""
    *_, trainer, kind = TRAINED[family]

    def make():
        model = load(folders[family], family, dtype=torch.bfloat16, quantization_config=config())
        model = peft.prepare_model_for_kbit_training(model)
        assert model.is_gradient_checkpointing
        model = peft.get_peft_model(model, lora(family))
        model.print_trainable_parameters()
        options = arguments(getattr(transformers, kind), tmp_path)
        return getattr(transformers, trainer)(model=model, args=options, train_dataset=Data())

    check_that_it_learns_and_resumes(make, family, folders[family], tmp_path)
    assert family != "llama" or "trainable params: 14,336" in capsys.readouterr().out


def test_sft_trainer_learns_and_resumes(folders, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, models.VOCABULARY)}}
    tokens = Tokenizer(token_models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in models.ids(2, 12).repeat(4, 1)]

    def make():
        trainer = trl.SFTTrainer(
            model=load(folders["llama"], dtype=torch.bfloat16, quantization_config=config()),
            args=arguments(trl.SFTConfig, tmp_path, max_length=32, bf16=False),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        return trainer

    check_that_it_learns_and_resumes(make, "llama", folders["llama"], tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `fan_in_fan_out`", "ignore:fan_in_fan_out")
def test_loftq_takes_the_transpose_of_gpt2s_weights(folders):
    """Its Conv1D keeps a weight [in, out]; those of c_proj in attention are square."""
    model = load(folders["gpt2"], "gpt2", dtype=torch.bfloat16, quantization_config=config())
    lora = peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
    errors = initialize_loftq(peft.get_peft_model(model, lora), folders["gpt2"])
    assert len(errors) == len(models.layers_of(model)) == 8
    for name, (before, after) in errors.items():
        assert after < 0.95 * before < 0.15, name


@pytest.mark.filterwarnings("ignore:merging into a 4-bit weight")
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
