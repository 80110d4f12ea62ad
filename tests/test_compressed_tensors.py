"""Guards folders in compressed-tensors' format: its library and transformers read the codes that quantize() makes."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("gguf")  # gguf_files
pytest.importorskip("compressed_tensors")

import models  # noqa: E402
import moe  # noqa: E402
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402
from gguf_files import make  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
LARGEST = {"int4": 7, "int8": 127}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make("LlamaForCausalLM", torch.bfloat16, intermediate_size=128).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def codes_of(q):
    """int8 [N, K]: what the codes of a weight mean, in steps."""
    if q.format == "int8":
        return q.codes.view(torch.int8)
    return torch.stack([q.codes >> 4, q.codes & 15], dim=-1).view(q.shape).to(torch.int8) - 8


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("to", LARGEST)
def test_codes_and_scales_are_those_of_quantize(base, to, blocksize, tmp_path):
    report = convert(base, tmp_path / "out", to=to, blocksize=blocksize, progress=False)
    files, config = models.tensors_of(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    layers = {name: m for name, m in models.load(base).named_modules() if isinstance(m, torch.nn.Linear)}
    assert config["quantization_config"]["ignore"] == ["lm_head"] and len(layers) == 15
    for name, layer in layers.items():
        if name == "lm_head":
            assert torch.equal(files["lm_head.weight"], layer.weight)
            continue
        q = qn.quantize(layer.weight.detach(), to, blocksize, double_quant=False)
        scale = (q.absmax / LARGEST[to]).to(torch.bfloat16).view(q.shape[0], -1)
        entries = {key.removeprefix(f"{name}."): files.pop(key) for key in list(files) if key.startswith(f"{name}.")}
        assert entries.keys() == {"weight_packed", "weight_scale", "weight_shape"}
        assert entries["weight_shape"].tolist() == list(q.shape)
        assert torch.equal(unpack_from_int32(entries["weight_packed"], scheme.weights.num_bits, q.shape), codes_of(q))
        assert torch.equal(entries["weight_scale"], scale)
        exact = codes_of(q).view(q.shape[0], -1, blocksize) * scale.float()[..., None]
        assert torch.equal(compressor.decompress(entries, scheme)["weight"], exact.view(q.shape).to(torch.bfloat16))
        error = (exact.view(q.shape) - layer.weight.float()).norm() / layer.weight.float().norm()
        assert report.errors[name] == pytest.approx(error.item(), rel=1e-4)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_is_read_back_by_transformers(architecture, tmp_path):
    make(architecture, torch.bfloat16).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out", to="int4", blocksize=32, progress=False)
    actual, expected = models.load(tmp_path / "out"), models.load(tmp_path / "base")
    for name, layer in expected.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            q = qn.quantize(layer.weight.detach(), "int4", 32, double_quant=False)
            scale = (q.absmax / 7).to(torch.bfloat16).float()
            layer.weight.data = (codes_of(q).view(-1, 32) * scale[:, None]).view(q.shape).to(torch.bfloat16)
    assert torch.equal(models.logits(actual), models.logits(expected))


@pytest.mark.parametrize("to", LARGEST)
def test_adapter_is_merged_before_the_one_rounding(base, to, tmp_path):
    models.save_adapter(base, tmp_path / "adapter")
    command = ["--base", str(base), "--adapter", str(tmp_path / "adapter")]
    main(["merge", *command, "--out", str(tmp_path / "out"), "--to", to, "--blocksize", "32"])
    convert(base, tmp_path / "merged", tmp_path / "adapter", "fp32", progress=False)
    files, merged = models.tensors_of(tmp_path / "out"), models.tensors_of(tmp_path / "merged")
    for name in {key.removesuffix(".weight_packed") for key in files if key.endswith("_packed")}:
        q = qn.quantize(merged[f"{name}.weight"], to, 32, double_quant=False)
        packed = files[f"{name}.weight_packed"]
        assert torch.equal(unpack_from_int32(packed, 4 if to == "int4" else 8, q.shape), codes_of(q)), name


def test_unsupported_layer_is_named_in_the_error(base, tmp_path):
    for family, kind in (("gpt2", "GPT2LMHeadModel"), ("falcon", "FalconForCausalLM")):
        models.make(family).save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=f"to: expected bf16, fp16, fp32, nf4 or fp4 for a {kind}, got int4"):
            convert(tmp_path / family, tmp_path / "out", to="int4", progress=False)
    moe.make("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(
        ValueError, match="to: expected nf4, fp4 or 16 bits for a MixtralForCausalLM, whose experts are"
    ):
        convert(tmp_path / "mixtral", tmp_path / "out", to="int4", progress=False)
    message = "blocksize: expected a divisor of 64, which a row of model.layers.0.mlp.gate_proj has, for compressed"
    with pytest.raises(ValueError, match=message):
        convert(base, tmp_path / "out", to="int8", blocksize=128, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2", "falcon", "mixtral"}
