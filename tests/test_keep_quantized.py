"""Guards `KeepQuantized`: quantized files load into layers that keep their bytes, and adapters train over them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peak import megabytes, peaks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import models  # noqa: E402
import numpy as np  # noqa: E402
from gguf_files import READ, make, write_random  # noqa: E402
from lora import fused_layers  # noqa: E402
from test_files import FLOAT16_AT, gguf_bytes  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native._files.gguf import GGUF_TYPES  # noqa: E402
from qlora_native._layers.base import QuantizedLayer  # noqa: E402
from qlora_native.convert.gguf import export_model  # noqa: E402
from qlora_native.integrations.transformers import KeepQuantized  # noqa: E402
from qlora_native.integrations.transformers._gguf_config import complete_config  # noqa: E402
from qlora_native.nn import Experts4bit  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = models.MARKS
IDS = models.ids(2, 8)
# The types that transformers decodes in architectures of its newer mapping.
NEWER = ("lfm2", "qwen35", "qwen35moe")
BOTH_DECODE = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_XS")
NEEDS_OTHERS = ("mamba", "t5")  # these have weights whose dtype the model reads


def auto(architecture):
    return transformers.AutoModelForSeq2SeqLM if architecture == "t5" else transformers.AutoModelForCausalLM


def load(path, quantization=None, architecture="llama", dtype=torch.float32, **options):
    quantization = KeepQuantized() if quantization is None else quantization
    options = {"quantization_config": quantization, "gguf_file": path.name, "dtype": dtype, **options}
    return auto(architecture).from_pretrained(path.parent, **options)


def load_dense(path, architecture="llama", dtype=torch.float32):
    """The model as transformers decodes it."""
    return load(path, transformers.GgufConfig(dequantize=True), architecture, dtype)


def layers(model):
    """{path: quantized layer}. Tied layers are listed each."""
    return {path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLayer)}


@torch.no_grad()
def logits(model):
    labels = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(IDS, **labels).logits


def assert_decodes_to(model, dense):
    """Check that the quantized layers decode to the parameters of `dense`, and that all else is equal to the bit."""
    assert layers(model)
    for path, layer in layers(model).items():
        if isinstance(layer, Experts4bit):
            actual, expected = layer.parameter(), dense.get_parameter(path)
        else:
            actual, expected = layer.dequantize(), dense.get_submodule(path).weight
            actual = actual.t() if layer.transposed_source else actual
        assert torch.equal(actual, expected), path
    codes = {f"{path}.{name}" for path, layer in layers(model).items() for name in layer.weight_names()}
    others = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in codes}
    for name, parameter in others.items():
        assert torch.equal(parameter, dense.get_parameter(name)), name


@pytest.mark.parametrize("architecture", READ)
def test_gguf_model_is_the_one_that_transformers_decodes(architecture, tmp_path):
    path = tmp_path / "model.gguf"
    types = BOTH_DECODE if architecture in NEWER else [t for t in GGUF_TYPES if t not in ("MXFP4", "NVFP4")]
    written = write_random(path, architecture, types, gguf_bytes)
    model = load(path, KeepQuantized(dequantize_others=architecture in NEEDS_OTHERS), architecture)
    dense = load_dense(path, architecture)
    assert_decodes_to(model, dense)
    # fp32 throughout, in sums of another order, and what two layers make of that.
    assert relative_error(logits(model), logits(dense)) <= 2**-16
    if architecture not in NEEDS_OTHERS:
        found = {layer.format.upper() for layer in layers(model).values()}
        assert found == set(written.values())


def test_microscaled_tensors_keep_their_bytes_and_the_scale_of_the_tensor(tmp_path):
    path = tmp_path / "model.gguf"
    scale = np.array([0.25], dtype=np.float32)
    changes = {"blk.0.attn_v.weight": "NVFP4", "blk.0.attn_output.weight": "NVFP4"}
    write_random(path, "llama", ["Q8_0", "MXFP4"], small_bytes, changes, {"blk.0.attn_v.scale": scale})
    model, dense = load(path), load_dense(path)
    dense.model.layers[0].self_attn.v_proj.weight.data *= 0.25  # transformers leaves the scale out
    assert_decodes_to(model, dense)
    assert {layer.format for layer in layers(model).values()} == {"q8_0", "mxfp4", "nvfp4"}


# ---- what the configuration lacks ------------------------------------------------------------------------------------

ROPE = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_scaling_of_rope_is_that_of_the_exported_model(kind, tmp_path):
    rope = {"rope_theta": 10000.0, "rope_type": kind, **ROPE[kind]}
    own = make("LlamaForCausalLM", rope_parameters=rope)
    own.save_pretrained(tmp_path / "own")
    export_model(tmp_path / "own", tmp_path / "model.gguf", "q8_0")
    model = load(tmp_path / "model.gguf")
    assert {name: model.config.rope_parameters[name] for name in rope} == rope
    assert torch.equal(model.model.rotary_emb.inv_freq, own.model.rotary_emb.inv_freq)
    # The weights are rounded to 8 bits, whose step is 1/127 of a block's largest.
    assert relative_error(logits(model), logits(own)) <= 0.05


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_factor_without_a_type_scales_rope_linearly(key, tmp_path):
    path = tmp_path / "model.gguf"
    write_random(path, "llama", ["Q8_0"], small_bytes, keys={key: 4.0})
    rope = load(path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(("architecture", "extra", "keys", "message"), [
    ("llama", {}, {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: .*got 'longrope'"),
    ("llama", {}, {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type: .*got 'yarn'"),
    ("phi3", {"rope_factors_long.weight": np.ones(32, np.float32)}, {}, "got longrope's factors"),
    ("llama", {"rope_freqs.weight": np.arange(1, 33, dtype=np.float32)}, {}, "rope_freqs.weight: expected the div"),
    ("starcoder2", {}, {"starcoder2.rope.freq_base": 1e6}, "rope.freq_base: expected 10000.0, .*got 1000000.0"),
    ("phi3", {}, {"phi3.rope.dimension_count": 48}, "rope.dimension_count: expected 64, .*got 48"),
], ids=str)  # fmt: skip
def test_rope_that_the_configuration_lacks_is_refused_with_what_to_do(architecture, extra, keys, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_random(path, architecture, ["Q8_0"], small_bytes, extra=extra, keys=keys)
    with pytest.raises(ValueError, match=message + ".*config=AutoConfig"):
        load(path, architecture=architecture)


def test_configuration_with_a_scaling_of_rope_keeps_it(tmp_path):
    path = tmp_path / "model.gguf"
    write_random(path, "llama", ["Q8_0"], small_bytes, extra={"rope_freqs.weight": np.ones(32, np.float32)})
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}
    assert load(path, config=config).config.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma2", 46, 144), ("gemma2", 42, 256), ("gemma3", 62, 168)]
)
def test_gemma_of_27b_scales_attention_as_llama_cpp_does(architecture, layers, scalar):
    config = {"gemma2": transformers.Gemma2Config, "gemma3": transformers.Gemma3TextConfig}[architecture]()
    values = {"general.architecture": architecture, f"{architecture}.block_count": layers}
    complete_config(SimpleNamespace(path="a file", values=values, tensors={}), config)
    assert config.query_pre_attn_scalar == scalar


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"blk.1.ffn_up_exps.weight": "Q8_0"}, r"ffn_gate_exps.weight, blk.1.ffn_up_exps.weight .Q4_1 and Q8_0 in one"),
    ({"blk.1.ffn_down_exps.weight": "F32"}, "ffn_up_exps.weight .the other stack of its experts cannot be kept"),
], ids=str)  # fmt: skip
def test_experts_that_cannot_be_kept_are_decoded_if_asked_for(changes, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_random(path, "qwen3moe", ["Q4_1"], small_bytes, changes)
    with pytest.raises(ValueError, match=message):
        load(path, architecture="qwen3moe")
    model, dense = load(path, KeepQuantized(dequantize_others=True), "qwen3moe"), load_dense(path, "qwen3moe")
    assert sum(isinstance(layer, Experts4bit) for layer in layers(model).values()) == 2
    assert_decodes_to(model, dense)
    assert relative_error(logits(model), logits(dense)) <= 2**-16


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A Llama in K-quants, and its adapter would train over rows that the loader has moved."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    write_random(path, "llama", ["Q4_K", "Q6_K", "Q5_K", "Q4_1"], small_bytes)
    return path


def small_bytes(type, rows, K, seed=0):
    """Random blocks whose values are about as large as a model's weights, so that no softmax is saturated."""
    blocks = gguf_bytes(type, rows, K, seed).reshape(-1, GGUF_TYPES[type].bytes)
    for at in FLOAT16_AT.get(type, (0,)):
        numbers = blocks[:, at : at + 2].copy().view(np.float16)
        blocks[:, at : at + 2] = (numbers / (2048 if type.endswith("K") else 64)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "model.gguf"
    write_random(path, "qwen3moe", ["Q4_1", "Q8_0", "Q5_0"], small_bytes)
    return path


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def adapt(model, **options):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.0, "use_rslora": True}], ids=str)
def test_adapter_has_the_gradients_of_one_over_the_decoded_model(path, options, monkeypatch):
    model, dense = adapt(load(path), **options), adapt(load_dense(path), **options)
    assert fused_layers(model, monkeypatch) == 14
    expected = gradients(dense)
    assert expected.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) <= 2**-13, name


def test_experts_of_a_file_train_by_target_parameters(moe):
    model, dense = (
        adapt(each, **EXPERTS) for each in (load(moe, architecture="qwen3moe"), load_dense(moe, "qwen3moe"))
    )
    expected = gradients(dense)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) <= 2**-13, name


def test_training_leaves_the_bytes_of_the_file_as_they_are(path):
    model = adapt(load(path, dtype=torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


def test_adapter_saves_and_loads_over_the_file(path, tmp_path):
    model = adapt(load(path))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(path), tmp_path)
    assert torch.equal(logits(loaded), expected)
    over_dense = peft.PeftModel.from_pretrained(load_dense(path), tmp_path)
    assert relative_error(logits(over_dense), expected) <= 2**-15


def test_adapter_of_add_adapter_saves_and_loads_over_the_file(path, tmp_path, monkeypatch):
    # transformers 5.25 asks for PEFT 0.22, which is newer than the newest.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    torch.manual_seed(1)
    model = load(path)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert sorted(each.name for each in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    loaded = load(path)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="bytes of another file"):
        model.save_pretrained(tmp_path / "whole")


def test_rows_of_a_batch_use_adapters_of_their_own(path):
    model = adapt(load(path))
    torch.manual_seed(2)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    names = ["default", "other"]
    with torch.no_grad():
        together = model.eval()(input_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter(name)
            assert relative_error(together[row], model(input_ids=IDS[row : row + 1]).logits[0]) <= 2**-16


def test_trainer_trains_an_adapter_over_a_file(path, tmp_path):
    model = peft.prepare_model_for_kbit_training(load(path, dtype=torch.bfloat16))
    model = adapt(model)
    arguments = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    trainer = transformers.Trainer(
        model=model,
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        args=transformers.TrainingArguments(output_dir=tmp_path, **arguments),
    )
    trainer.train()
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)


def test_fused_model_has_the_same_gradients(path):
    model = adapt(load(path))
    expected = gradients(model)
    qn.fuse(model)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) <= 2**-15, name


def test_model_with_a_new_head_keeps_the_rest(path):
    options = {"gguf_file": path.name, "quantization_config": KeepQuantized(), "num_labels": 2}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path.parent, **options)
    assert len(layers(model)) == 15 and model.score.weight.std() > 0
    assert len(layers(transformers.AutoModel.from_pretrained(path.parent, **options))) == 15


def test_saving_and_merging_say_what_to_do(path, moe, tmp_path):
    model = load(path)
    with pytest.raises(ValueError, match="save the adapter"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"merge: .*, the bytes of a file: use the adapter beside that file"):
        adapt(model).merge_and_unload()
    with pytest.raises(ValueError, match="merge: .*, the bytes of a file"):
        adapt(load(moe, architecture="qwen3moe"), target_modules=[], **EXPERTS).merge_and_unload()


def test_dequantized_model_merges(path):
    adapted = adapt(load(path).dequantize())
    expected = logits(adapted)
    assert relative_error(logits(adapted.merge_and_unload()), expected) <= 2**-14


@pytest.mark.parametrize("use_dora", [False, True])
def test_model_that_is_dequantized_below_its_adapter_merges(path, use_dora):
    adapted = adapt(load(path), use_dora=use_dora)
    expected = logits(adapted)
    adapted.dequantize()
    assert relative_error(logits(adapted), expected) <= 2**-14
    adapted.merge_adapter()
    assert relative_error(logits(adapted), expected) <= 2**-14
    adapted.unmerge_adapter()
    assert relative_error(logits(adapted.merge_and_unload()), expected) <= 2**-14


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen3moe"])
def test_dequantized_model_is_saved_as_one_in_16_bits(architecture, tmp_path):
    path = tmp_path / "model.gguf"
    write_random(path, architecture, ["Q4_1", "Q8_0", "Q5_0"], small_bytes)
    model = load(path, architecture=architecture).dequantize()
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    # Not by their logits, whose bits depend on where torch's products find a weight and on its strides.
    expected = load_dense(path, architecture).state_dict()
    for found in (model.state_dict(), saved.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- memory ----------------------------------------------------------------------------------------------------------

LOADED = """
import sys, transformers
sys.path.insert(0, {tests!r})
from pathlib import Path
from qlora_native.integrations.transformers import KeepQuantized
{write}
options = {{"config": transformers.AutoConfig.from_pretrained(path, **file), **file, "dtype": torch.bfloat16}}
def load():
    config = KeepQuantized()
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options)
load()  # code, threads, caches
"""
WRITE_GGUF = """
import gguf_files, test_files
path, file = Path({folder!r}), {{"gguf_file": "model.gguf"}}
gguf_files.READ["llama"][1].update(hidden_size=1024, intermediate_size=3072, head_dim=256)
gguf_files.write_random(path / "model.gguf", "llama", {types!r}, test_files.gguf_bytes)
"""


@pytest.mark.parametrize(
    "types", [["Q4_1", "Q8_0"], pytest.param(["Q4_K", "IQ4_XS"], marks=pytest.mark.thorough)], ids=str
)
def test_loading_takes_five_percent_of_the_file_beside_the_model(types, tmp_path):
    write = WRITE_GGUF.format(folder=str(tmp_path), types=types)
    prepare = LOADED.format(tests=str(Path(__file__).parent), write=write)
    (extra,) = peaks(prepare, "load()")
    size = (tmp_path / "model.gguf").stat().st_size
    assert size > 10 * 2**20
    assert extra <= 0.05 * size + 2**20, megabytes([extra, size])  # and what Python's own objects take


# ---- files that are no model -----------------------------------------------------------------------------------------


def changed(path, tmp_path, change):
    """A copy of a file whose bytes `change` has changed."""
    data = bytearray(path.read_bytes())
    change(data)
    copy = tmp_path / "changed.gguf"
    copy.write_bytes(data)
    return copy


def entry(data, name):
    """Where the row of a tensor in the table goes on after its name: at its number of dimensions."""
    return data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)


def put(name, at, number, size):
    """Write a number into the row of a tensor with two dimensions: `at` bytes after its name."""

    def change(data):
        begin = entry(data, name) + at
        data[begin : begin + size] = number.to_bytes(size, "little")

    return change


def scale_is(bits):
    def change(data):
        data[-20:-18] = bits.to_bytes(2, "little")  # the first number of the last block, of Q4_1

    return change


Q = "blk.0.attn_q.weight"
DAMAGE = {
    "truncated": (lambda data: data.__delitem__(slice(-40, None)), "is truncated"),
    "truncated in the table": (lambda data: data.__delitem__(slice(entry(data, Q) + 8, None)), "is truncated"),
    "big-endian": (lambda data: data.__setitem__(slice(4, 8), data[4:8][::-1]), "little-endian GGUF file, got a big"),
    "another version": (lambda data: data.__setitem__(4, 9), "version 2 or 3, got version 9"),
    "another file": (lambda data: data.__setitem__(slice(0, 4), b"GGML"), "begins with b'GGUF'"),
    "a type out of range": (put(Q, 20, 4711, 4), f"{Q}: expected a type that .*, got type 4711"),
    "a type that is not supported": (put(Q, 20, 34, 4), f"{Q} .TQ1_0, which is not among Q4_0"),
    "an offset behind the file": (put(Q, 24, 1 << 40, 8), f"{Q}: expected data up to byte"),
    "a row that is no whole blocks": (put(Q, 4, 250, 8), f"{Q}: expected rows of a multiple of 256"),
    "a row of another length": (put(Q, 4, 512, 8), rf"{Q}: expected \[256, 256\], as the model's .*q_proj"),
    "no rows": (put(Q, 12, 0, 8), f"{Q}: expected sizes above 0"),
    "too many dimensions": (put(Q, 0, 5, 4), f"{Q}: expected 1 ... 4 dimensions, got 5"),
    "a name that the model lacks": (
        lambda data: data.__setitem__(slice(entry(data, Q) - 12, entry(data, Q)), b"_x.weight" + b"abc"),
        "expected tensors that LlamaForCausalLM has",
    ),
    "an infinite scale": (scale_is(0x7C00), "output.weight: data, absmax: .*NaN or Inf"),
    "a scale that is NaN": (scale_is(0x7E00), "output.weight: data, absmax: .*NaN or Inf"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused_by_name(name, path, tmp_path):
    change, message = DAMAGE[name]
    copy = changed(path, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load(copy)
    assert str(copy) in str(error.value)
