"""Guards against bases that other quantizers have written: none is read as if its codes were its weights."""

import json
import shutil

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

import models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

E4M3 = torch.float8_e4m3fn


def fp8_in_blocks(weight):
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(E4M3), "weight_scale_inv": scale.reshape(1, 1)}


def fp8_in_rows(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight.float() / scale).to(E4M3), "weight_scale": scale.bfloat16()}


def nvfp4_of_modelopt(weight):
    N, K = weight.shape
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    scales = torch.ones(N, K // 16).to(E4M3)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": torch.tensor(0.01)}


def llm_int8(weight):
    largest = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def int4_in_groups(weight):
    """compressed-tensors' pack-quantized."""
    N, K = weight.shape
    packed = torch.randint(-(2**31), 2**31 - 1, (N, K // 8), dtype=torch.int32)
    return {"weight_packed": packed, "weight_scale": torch.ones(N, 1).bfloat16(), "weight_shape": torch.tensor([N, K])}


def gptq(weight):
    N, K = weight.shape
    words = torch.randint(-(2**31), 2**31 - 1, (K // 8, N), dtype=torch.int32)
    zeros, scales = torch.zeros(1, N // 8, dtype=torch.int32), torch.ones(1, N).half()
    return {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": torch.zeros(K, dtype=torch.int32)}


def scaled_beside_16_bits(weight):
    """A weight of the right dtype that is one after a product with its scale, as compressed-tensors' "frozen" ones."""
    return {"weight": weight * 64, "weight_scale": torch.tensor(1 / 64)}


# {format: (tensors of a layer in place of its weight, config, a word of the error by config, and of that by tensors)}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
LLM_INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": ["lm_head"]}
NOT_FLOAT, MISSING = "weight: expected float32, bfloat16 or float16, got ", "expected all tensors of a Llama"
FORMATS = {
    "fp8": (fp8_in_blocks, FP8, "'fp8'", NOT_FLOAT + "float8_e4m3fn"),
    "modelopt-nvfp4": (nvfp4_of_modelopt, {"quant_method": "modelopt"}, "'modelopt'", "expected the shape"),
    "llm.int8": (llm_int8, LLM_INT8, "the method 'bitsandbytes', in 8 bits (LLM.int8)", NOT_FLOAT + "int8"),
    "compressed-tensors-int4": (int4_in_groups, PACKED, "'compressed-tensors'", MISSING),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": -1}, "'gptq'", MISSING),
    "scaled": (scaled_beside_16_bits, {"quant_method": "quark"}, "'quark'", "weight_scale: expected a tensor that a "),
    "unnamed": (fp8_in_rows, {}, "None", NOT_FLOAT),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = models.make("llama", torch.bfloat16)
    model.save_pretrained(folder / "base")
    for name, (quantized, config, *_) in FORMATS.items():
        shutil.copytree(folder / "base", folder / name)
        state = load_file(folder / "base/model.safetensors")
        for layer in [key.removesuffix("weight") for key in state if "_proj" in key]:
            state |= {layer + part: tensor for part, tensor in quantized(state.pop(f"{layer}weight")).items()}
        save_file(state, folder / name / "model.safetensors")
        models.edit_json(folder / name / "config.json", quantization_config=config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder


COMMANDS = {
    "merge": ["merge", "--base", "BASE", "--adapter", "ADAPTER", "--out", "OUT"],
    "quantize": ["quantize", "--model", "BASE", "--out", "OUT"],
    "gguf": ["export", "--model", "BASE", "--out", "OUT"],
    "adapter": ["export", "--base", "BASE", "--adapter", "ADAPTER", "--out", "OUT"],
    "int4": ["export", "--model", "BASE", "--out", "OUT", "--to", "int4", "--blocksize", "32"],
}


def refused(command, base, made, tmp_path):
    """What the command says; it writes nothing."""
    places = {"BASE": base, "ADAPTER": made / "adapter", "OUT": tmp_path / "out/result"}
    with pytest.raises(SystemExit) as error:
        main([str(places.get(word, word)) for word in COMMANDS[command]])
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("format", FORMATS)
def test_base_of_another_quantizer_is_refused_by_its_method_or_a_tensor(made, format, command, tmp_path):
    _, _, method, tensor = FORMATS[format]
    text = refused(command, made / format, made, tmp_path)
    assert "config.json: quantization_config: expected weights in 16 or 32 bits, or nf4 and fp4 of" in text
    assert method in text
    base = shutil.copytree(made / format, tmp_path / "base")
    models.edit_json(base / "config.json", quantization_config=None)
    text = refused(command, base, made, tmp_path)
    assert "_proj" in text and tensor in text, text


@pytest.mark.parametrize("described", ["fp8", [], 7])
def test_quantization_config_that_is_no_object_is_named(made, described, tmp_path):
    base = shutil.copytree(made / "base", tmp_path / "base")
    models.edit_json(base / "config.json", quantization_config=described)
    assert "quantization_config: expected an object, got" in refused("quantize", base, made, tmp_path)


def test_base_in_4_bits_of_bitsandbytes_is_read(made, tmp_path):
    """Also by the config of its older versions, which names no method."""
    convert(made / "base", tmp_path / "nf4", to="nf4", progress=False)
    convert(tmp_path / "nf4", tmp_path / "first", progress=False)
    config = json.loads((tmp_path / "nf4/config.json").read_text())["quantization_config"]
    models.edit_json(
        tmp_path / "nf4/config.json", quantization_config={k: v for k, v in config.items() if k != "quant_method"}
    )
    convert(tmp_path / "nf4", tmp_path / "second", progress=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.int64, torch.float64, torch.complex64, E4M3])
@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
def test_dtype_that_no_weight_has_is_named(made, name, dtype, tmp_path):
    base = shutil.copytree(made / "base", tmp_path / "base")
    tensor = load_file(base / "model.safetensors")[name].float().to(dtype)
    models.edit_tensors(base / "model.safetensors", {name: tensor})
    expected = f"{name}: expected float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    for command in ("merge", "quantize", "gguf"):
        assert expected in refused(command, base, made, tmp_path)


@pytest.mark.parametrize(("dtype", "size"), [("F6_E2M3", 72), ("F4", 48)])
def test_dtype_of_less_than_a_byte_is_named(made, dtype, size, tmp_path):
    base = shutil.copytree(made / "base", tmp_path / "base")
    text = json.dumps({NORM: {"dtype": dtype, "shape": [96], "data_offsets": [0, size]}}).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    models.edit_json(base / "config.json", num_hidden_layers=0, layer_types=[])
    assert f"{NORM}: expected" in refused("quantize", base, made, tmp_path)


def test_integers_of_a_model_stay_integers(tmp_path):
    """MobileNet's count of batches is an integer of the model's own."""
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base/model.safetensors")
    counts = {name: tensor for name, tensor in before.items() if not tensor.is_floating_point()}
    convert(tmp_path / "base", tmp_path / "out", to="bf16", progress=False)
    after = load_file(tmp_path / "out/model.safetensors")
    assert counts and all(after[name].dtype == tensor.dtype for name, tensor in counts.items())
    wrong = next(iter(counts))
    save_file({**before, wrong: counts[wrong].float()}, tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match=f"{wrong}: expected int64, got float32"):
        convert(tmp_path / "base", tmp_path / "again", to="bf16", progress=False)


@pytest.mark.parametrize("format", FORMATS)
def test_loftq_takes_weights_alone(made, format):
    with pytest.raises(ValueError, match="quantization_config: expected"):
        initialize_loftq(torch.nn.Module(), made / format)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "unnamed"])
def test_files_of_another_quantizer_are_not_quantized_while_they_are_read(made, format, described, tmp_path):
    base = shutil.copytree(made / format, tmp_path / "base")
    if not described:
        models.edit_json(base / "config.json", quantization_config=None)
    by_tensor = "model.safetensors: model.layers.0.*expected (F32, BF16 or F16|a weight or a bias of a layer)"
    by_method = "quantization_config: expected files in 16 or 32 bits.* got the method"
    with pytest.raises(ValueError, match=f"{by_method}|{by_tensor}" if described else by_tensor):
        models.load(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16)
