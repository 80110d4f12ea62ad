"""Guards files of MXFP4, NVFP4 and mixtures of formats: read with their bytes, written and read again, or refused."""

import json
import re
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
import moe  # noqa: E402
from models import layers_of, tensors_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_experts_files import errors_of_loading, load  # noqa: E402
from test_experts_peft import names_of  # noqa: E402
from test_transformers import config  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.nn import Embedding4bit, quantize_model  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing`", "ignore:`use_return_dict`", "ignore:merging into", "ignore:Already merged"
    ),
]


def assert_same_bits(one, other):
    """Of tables too, whose NaN equals no NaN."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        a, b = (t.contiguous().flatten().view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A checkpoint as gpt-oss has it, with experts in MXFP4, and these by name."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    moe.make("gpt-oss", torch.bfloat16).save_pretrained(folder)
    state, weights = tensors_of(folder), {}
    for name in [n for n, t in state.items() if t.dim() == 3]:
        q = weights[name] = qn.quantize(state.pop(name).transpose(1, 2), "mxfp4")
        E, N, K = q.shape
        state[f"{name}_blocks"] = ((q.codes >> 4) | (q.codes << 4)).view(E, N, K // 32, 16)
        state[f"{name}_scales"] = q.absmax.view(E, N, K // 32)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, weights


@pytest.fixture(scope="module")
def saved(gpt_oss, tmp_path_factory):
    """A model of that checkpoint with its linear layers in nf4, and the files of many shards that it was saved to."""
    model = load(gpt_oss[0], "gpt-oss", quantization_config=config())
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder


# ---- gpt-oss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mxfp4_of_gpt_oss_is_read_with_its_bytes(gpt_oss, dtype):
    folder, weights = gpt_oss
    model = load(folder, "gpt-oss", dtype=dtype, quantization_config=config())
    experts = moe.experts_of(model)
    assert experts.keys() == weights.keys()
    for name, layer in experts.items():
        assert layer.format == "mxfp4" and layer.dtype == dtype
        assert torch.equal(layer.weight, weights[name].codes) and torch.equal(layer.absmax, weights[name].absmax)
    assert {layer.format for layer in layers_of(model).values()} == {"nf4"}
    stock = load(folder, "gpt-oss", quantization_config=transformers.Mxfp4Config(dequantize=True))
    for name, layer in experts.items():
        assert torch.equal(layer.parameter(torch.bfloat16), stock.get_parameter(name))


def test_mxfp4_experts_beside_nf4_come_back_bit_for_bit(gpt_oss, saved, tmp_path):
    model, folder = saved
    assert len(list(folder.glob("*.safetensors"))) > 4
    written, original = tensors_of(folder), tensors_of(gpt_oss[0])
    of_experts = [name for name in original if name.endswith(("_blocks", "_scales"))]
    assert_same_bits({n: written[n] for n in of_experts}, {n: original[n] for n in of_experts})
    expected = models.logits(model)
    for options in ({}, {"quantization_config": config("fp4", False, blocksize=128)}):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        assert_same_bits(again.state_dict(), model.state_dict())
        assert torch.equal(models.logits(again), expected)
        assert {layer.format for layer in moe.experts_of(again).values()} == {"mxfp4"}
    again.save_pretrained(tmp_path)
    assert_same_bits(tensors_of(tmp_path), written)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_adapter_trained_on_the_reloaded_model_is_that_of_the_model(gpt_oss, saved, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "o_proj"], "target_parameters": names_of("gpt-oss")}
    trained = []
    for folder in (gpt_oss[0], saved[1]):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load(folder, "gpt-oss", quantization_config=config()), peft.LoraConfig(**lora, init_lora_weights=False)
        )
        optimizer = qn.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(**moe.batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        trained.append((losses, peft.get_peft_model_state_dict(model)))
    assert trained[0][0] == trained[1][0]
    assert_same_bits(trained[0][1], trained[1][1])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, "gpt-oss", quantization_config=config())
    assert_same_bits(again.state_dict(), merged.state_dict())
    assert {layer.format for layer in moe.experts_of(again).values()} == {"mxfp4"}


# ---- other models ----------------------------------------------------------------------------------------------------


def comes_back(model, family, folder, **options):
    """Save a model, and check what is read from the files."""
    model.save_pretrained(folder, max_shard_size="50KB")
    of_auto = models.AUTO.get(family, transformers.AutoModelForCausalLM)
    again = of_auto.from_pretrained(folder, **options)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert torch.equal(models.logits(again), models.logits(model))
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == "qlora_native"


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "t5", "gpt2"])
def test_microscaled_linear_layers_come_back_bit_for_bit(family, format, tmp_path):
    models.make(family, torch.bfloat16, width=128, inner=192).save_pretrained(tmp_path / "16")
    loaded = models.load(tmp_path / "16", family, quantization_config=config(format))
    assert len(layers_of(loaded)) > 4
    comes_back(loaded, family, tmp_path / "loaded")
    if family != "gpt2":  # quantize_model replaces no Conv1D
        live = quantize_model(models.load(tmp_path / "16", family), format=format, progress=False)
        comes_back(live, family, tmp_path / "live", quantization_config=config())


def in_16_bits(family, folder, **changes):
    """A mixture of experts that was loaded, so that transformers keeps in fp32 what it keeps so in every load."""
    moe.make(family, torch.bfloat16, **changes).save_pretrained(folder)
    return load(folder, family)


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_experts_of_every_family_in_nvfp4_come_back_bit_for_bit(family, tmp_path):
    live = quantize_model(in_16_bits(family, tmp_path / "16"), format="nvfp4", progress=False)
    loaded = load(tmp_path / "16", family, quantization_config=config("nvfp4"))
    assert moe.experts_of(live).keys() == moe.experts_of(loaded).keys() != set()
    for name, model in (("live", live), ("loaded", loaded)):
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        again = load(tmp_path / name, family, quantization_config=config())
        assert_same_bits(again.state_dict(), live.state_dict())


def test_each_layer_of_a_mixture_of_formats_comes_back_in_its_own(tmp_path):
    model = in_16_bits("qwen3-moe", tmp_path / "16")
    quantize_model(model.model.layers[0].mlp, format="mxfp4", progress=False)
    quantize_model(model.model.layers[1].mlp, format="nvfp4", progress=False)
    quantize_model(model.model.layers[1], format="mxfp4", progress=False)
    quantize_model(model, format="fp4", double_quant=False, progress=False)
    layers = {**moe.experts_of(model), **layers_of(model)}
    formats = {name: layer.format for name, layer in layers.items()}
    assert set(formats.values()) == {"mxfp4", "nvfp4", "fp4"}
    comes_back(model, "qwen3-moe", tmp_path / "4")
    again = load(tmp_path / "4", "qwen3-moe", quantization_config=config())
    assert formats == {name: layer.format for name, layer in {**moe.experts_of(again), **layers_of(again)}.items()}


def test_part_that_was_quantized_later_in_another_format_comes_back(tmp_path):
    model = in_16_bits("qwen3-moe", tmp_path / "16")
    quantize_model(model, skip=("model",), format="mxfp4", progress=False)  # the output layer
    quantize_model(model.model, progress=False)
    assert model.lm_head.format == "mxfp4"
    comes_back(model, "qwen3-moe", tmp_path / "4")


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_microscaled_embedding_and_the_layer_tied_to_it_come_back_bit_for_bit(format, tmp_path):
    model = in_16_bits("qwen3-moe", tmp_path / "16", tie_word_embeddings=True)
    quantize_model(model, skip=(), format=format, progress=False, embeddings=True)
    comes_back(model, "qwen3-moe", tmp_path / "4")
    again = load(tmp_path / "4", "qwen3-moe", quantization_config=config())
    assert isinstance(again.model.embed_tokens, Embedding4bit)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["experts and linear layers", "experts", "linear layers"])
def test_stock_transformers_refuses_the_files_before_it_reads_a_weight(gpt_oss, which, tmp_path):
    if which == "linear layers":
        quantize_model(models.make("llama", width=128, inner=192), format="mxfp4", progress=False).save_pretrained(
            tmp_path
        )
    else:
        skip = (
            {"llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]} if which == "experts" else {}
        )
        model = load(gpt_oss[0], "gpt-oss", quantization_config=config(**skip))
        assert bool(layers_of(model)) == (which != "experts")
        model.save_pretrained(tmp_path)
    program = f"""
import sys, transformers
for options in (
    {{}},
    {{"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}},
    {{"quantization_config": transformers.Mxfp4Config(dequantize=True)}},
):
    try:
        transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, **options)
    except TypeError as error:
        assert str(error) == "bnb_4bit_quant_type must be a string", error
    else:
        raise SystemExit(f"read with {{options}}")
assert "qlora_native.integrations.transformers" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_config_of_stock_transformers_is_named_in_the_error(saved):
    message = "quantization_config: expected qlora_native.*, got transformers.*BitsAndBytesConfig"
    with pytest.raises(TypeError, match=message):
        load(saved[1], "gpt-oss", quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_rows_that_are_no_whole_blocks_are_named_and_nothing_is_written(format, tmp_path):
    model = quantize_model(moe.make("mixtral", intermediate_size=24), format=format, progress=False)
    message = "experts.down_proj: K: expected a multiple of .*, as files of .* need, got 24"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("experts.down_proj_scales", lambda t: t.index_fill(0, torch.tensor([1]), 255), "E8M0, of which 255 is NaN"),
        ("experts.down_proj_scales", lambda t: t[:, :-1], r"blocks: expected \[..., N, K/32, 16\] with scales"),
        ("experts.down_proj_scales", None, "expected blocks and scales, got no .*down_proj_scales"),
        ("experts.gate_up_proj_blocks", None, "expected blocks and scales, got no .*gate_up_proj_blocks"),
        ("experts.gate_up_proj_blocks", lambda t: t[..., :8], "blocks: expected .*, K/32, 16.* got .*, 2, 8"),
    ],
)
@pytest.mark.parametrize("whose", ["gpt-oss", "ours"])
def test_damaged_experts_are_named(gpt_oss, saved, name, change, message, whose, tmp_path):
    folder = gpt_oss[0] if whose == "gpt-oss" else saved[1]
    state = tensors_of(folder)
    name = f"model.layers.1.mlp.{name}"
    damaged = state.pop(name)
    if change is not None:
        state[name] = change(damaged).contiguous()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert any(re.search(message, text) for text in errors_of_loading(tmp_path, "gpt-oss"))


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["nf4", "int4"], "bnb_4bit_quant_type: expected"),
        ([], "bnb_4bit_quant_type"),
        ([["nf4"]], "bnb_4bit_quant_type"),
    ],
)
def test_error_names_the_types_that_files_have(saved, types, message, tmp_path):
    written = json.loads((saved[1] / "config.json").read_text())
    written["quantization_config"]["bnb_4bit_quant_type"] = types
    for path in saved[1].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises((TypeError, ValueError), match=message):
        load(tmp_path, "gpt-oss", quantization_config=config())


def test_error_names_skipped_experts_that_the_file_has_in_4_bits(gpt_oss):
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    errors = errors_of_loading(gpt_oss[0], "gpt-oss", llm_int8_skip_modules=skip)
    expected = "llm_int8_skip_modules: expected no experts.down_proj, which the file has in 4 bits"
    assert any(expected in text for text in errors)


def test_error_of_the_command_names_the_method_and_the_formats_it_takes(saved, tmp_path):
    command = [
        sys.executable,
        "-m",
        "qlora_native",
        "quantize",
        "--model",
        str(saved[1]),
        "--out",
        str(tmp_path / "out"),
    ]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode != 0
    assert "quantization_config: expected weights in 16 or 32 bits, or nf4 and fp4 of the method" in shown.stderr
    assert "got the method 'qlora_native'" in shown.stderr
