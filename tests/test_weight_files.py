"""Guards experts, MXFP4, NVFP4 and mixtures of formats in files: written and read with the same bits, or refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
import moe  # noqa: E402
from models import assert_same_bits, layers_of, tensors_of  # noqa: E402
from peak import megabytes  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_experts import families, relative  # noqa: E402
from test_experts_peft import names_of  # noqa: E402
from test_transformers import config  # noqa: E402
from transformers import core_model_loading  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native.integrations.transformers import _weight_files  # noqa: E402
from qlora_native.nn import Embedding4bit, quantize_model, size_report  # noqa: E402

pytestmark = models.MARKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in moe.FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        moe.make(family, torch.bfloat16).save_pretrained(made[family], max_shard_size="60KB")
        assert len(list(made[family].glob("*.safetensors"))) > 2
    return made


def load(folder, family, **options):
    return type(moe.make(family)).from_pretrained(folder, **{"dtype": torch.bfloat16, **options})


@families
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"blocksize": 128}], ids=str)
def test_experts_quantized_while_loading_are_those_of_the_live_model(folders, family, options):
    loaded = load(folders[family], family, quantization_config=config(**options))
    live = quantize_model(load(folders[family], family), progress=False, **options)
    assert moe.experts_of(loaded).keys() == moe.experts_of(live).keys() != set()
    assert_same_bits(loaded.state_dict(), live.state_dict())
    assert not any("not known" in row.what for row in size_report(loaded).rows)


@pytest.mark.parametrize("order", ["of the model", "of the hub"])
def test_experts_that_a_conversion_may_transpose_are_read_and_saved(order, tmp_path):
    """Files of Qwen3-VL-MoE on the hub have transposed experts, those that transformers writes the model's."""
    made = moe.make_qwen3_vl()
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    shapes = {name: parameter.shape for name, parameter in made.named_parameters() if "experts" in name}
    assert all(N != K for _, N, K in shapes.values())
    tensors = tensors_of(tmp_path)
    assert all(tensors[name].shape == shape for name, shape in shapes.items())
    if order == "of the hub":
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in shapes}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(made).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config())
    assert len(moe.experts_of(loaded)) == len(shapes) == 4
    live = quantize_model(made, progress=False)
    assert_same_bits(loaded.state_dict(), live.state_dict())
    loaded.save_pretrained(tmp_path / "saved")
    again = type(made).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, quantization_config=config())
    assert_same_bits(again.state_dict(), live.state_dict())


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "llama4"])
def test_layer_that_is_skipped_stays_in_16_bits(folders, family, tmp_path):
    name = f"model.layers.1.{'feed_forward' if family == 'llama4' else 'mlp'}.experts"
    model = load(folders[family], family, quantization_config=config(llm_int8_skip_modules=["lm_head", name]))
    plain = moe.make(family, torch.bfloat16)
    assert {path.split(".")[2] for path in moe.experts_of(model)} == {"0"}
    for path in (f"{name}.gate_up_proj", f"{name}.down_proj"):
        assert torch.equal(model.get_parameter(path), plain.get_parameter(path))
    assert "named in llm_int8_skip_modules: " in str(size_report(model))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, family, quantization_config=config(strict=True))
    assert_same_bits(model.state_dict(), again.state_dict())


def test_memory_holds_the_4_bit_model_and_one_shard(tmp_path):
    """The largest parameter of experts in 16 bits is as large as a shard, and stays below it while it is quantized."""
    shard = 8 * 2**20
    sizes = {"num_hidden_layers": 6, "hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 8}
    model = moe.make("qwen3-moe", torch.bfloat16, **sizes)
    assert model.model.layers[0].mlp.experts.gate_up_proj.nbytes < shard
    model.save_pretrained(tmp_path / "bf16", max_shard_size=shard)
    extra = models.loading_peaks(tmp_path, shard, "load('bf16')", "load('bf16', False)", "load('nf4')")
    assert extra[2] < shard, megabytes(extra)
    assert max(extra[:2]) < shard / 2, megabytes(extra)  # one expert at a time


def test_strict_config_names_experts_of_an_unknown_family(tmp_path):
    experts = {"kv_channels": 16, "num_local_experts": 4}
    options = transformers.JetMoeConfig(**{**moe.COMMON, **experts, "intermediate_size": 32, "num_hidden_layers": 1})
    transformers.JetMoeForCausalLM(options).save_pretrained(tmp_path)
    model = transformers.JetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    model.save_pretrained(tmp_path / "4bit")
    for folder in (tmp_path, tmp_path / "4bit"):
        with pytest.raises(ValueError, match="strict: .* got model.layers.0.mlp.input_linear.weight, 65,536 bytes"):
            transformers.JetMoeForCausalLM.from_pretrained(folder, quantization_config=config(strict=True))
    assert "a parameter of JetMoeParallelExperts, whose use is not known" in str(size_report(model))
    assert "strict" not in model.config.to_json_string()


def test_expert_of_another_shape_or_with_nan_is_named(folders, tmp_path):
    state = tensors_of(folders["olmoe"])
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    values = state[name]
    (tmp_path / "config.json").write_text((folders["olmoe"] / "config.json").read_text())
    nan = values.clone()
    nan[1, 2] = torch.nan
    for tensor, message in (
        (values[:-1].clone(), "expected experts of one shape"),
        (nan, "expected finite values, got 1 NaN or Inf"),
        (None, "expected 4 experts"),
    ):
        changed = {n: t for n, t in state.items() if n != name} | ({} if tensor is None else {name: tensor})
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        errors = errors_of_loading(tmp_path, "olmoe")
        assert any(message in text and "layers.1.mlp.experts.gate_up_proj" in text for text in errors), message


def errors_of_loading(folder, family, **changes):
    """What transformers' table says of the parameters for which loading fails."""
    from transformers.utils.loading_report import LoadStateDictInfo

    found, create = [], LoadStateDictInfo.create_loading_report

    def created(self, *args, **kwargs):
        found.extend(self.conversion_errors.values())
        return create(self, *args, **kwargs)

    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadStateDictInfo, "create_loading_report", created)
        load(folder, family, quantization_config=config(**changes))
    return found


@families
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("nf4", False), ("nvfp4", True)])
def test_saved_experts_are_reloaded_bit_for_bit(folders, family, format, double_quant, tmp_path):
    loaded = load(folders[family], family, quantization_config=config(format, double_quant))
    live = quantize_model(load(folders[family], family), format=format, double_quant=double_quant, progress=False)
    for name, model in (("loaded", loaded), ("live", live)):
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        again = load(tmp_path / name, family, quantization_config=config("fp4", not double_quant, blocksize=128))
        assert_same_bits(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(again(**moe.batch()).logits, model(**moe.batch()).logits)


@families
def test_dequantized_model_is_one_of_transformers(folders, family):
    model = load(folders[family], family, dtype=torch.float32, quantization_config=config())
    with torch.no_grad():
        expected = model(**moe.batch()).logits
        dense = model.dequantize(torch.float32)
        assert not moe.experts_of(dense) and not layers_of(dense)
        assert relative(expected, dense(**moe.batch()).logits) < 1e-5


def test_experts_that_a_file_has_in_16_bits_stay_in_16_bits(folders, tmp_path):
    """As bitsandbytes writes them through transformers: linear layers in 4 bits, experts in 16."""
    skip = ["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    model = load(folders["qwen3-moe"], "qwen3-moe", quantization_config=config(llm_int8_skip_modules=skip))
    model.save_pretrained(tmp_path)
    models.edit_json(tmp_path / "config.json", quantization_config=config().to_dict())
    model = load(tmp_path, "qwen3-moe", quantization_config=config())
    assert not moe.experts_of(model) and layers_of(model)
    assert "experts that the file has in 16 bits: model.layers.0.mlp.experts.gate_up_proj" in str(size_report(model))


def replace_experts(model):
    """bitsandbytes' own quantization of experts; {name: the decoded parameter}."""
    models.bitsandbytes()
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    decoded = {}
    for name in [name for name, p in model.named_parameters() if p.dim() == 3]:
        path, _, parameter = name.rpartition(".")
        replace_parameter_4bit(model.get_submodule(path), parameter, compress_statistics=True, quant_type="nf4")
        decoded[name] = getattr(model.get_submodule(path), parameter).clone()
    return decoded


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_layout_of_bitsandbytes_own_experts_is_read(folders, family, tmp_path):
    # Rows of whole blocks, for which bitsandbytes' kernels on a CPU are right.
    model = moe.make(family, torch.bfloat16, intermediate_size=64)
    expected = replace_experts(model)
    state = model.state_dict()
    assert "model.layers.0.mlp.experts.down_proj.nested_absmax" in state
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = model.config.to_dict()
    skip = ["lm_head", "model.layers.0.self_attn", "model.layers.1.self_attn"]
    written["quantization_config"] = config(llm_int8_skip_modules=skip, bnb_4bit_compute_dtype="float32").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(written, default=str))
    if family == "gpt-oss":  # its blocks run along the other dimension than those of the product
        assert any("blocks along the rows of [4, 64, 128]" in text for text in errors_of_loading(tmp_path, family))
        return
    read = load(tmp_path, family, quantization_config=config())
    experts = moe.experts_of(read)
    assert experts.keys() == expected.keys()
    for name, layer in experts.items():
        assert torch.equal(layer.parameter(), expected[name])
        assert torch.equal(layer.weight.flatten(), state[name].flatten())


@pytest.mark.usefixtures("eager")
def test_stock_transformers_raises_an_error_for_quantized_experts(folders, tmp_path):
    models.bitsandbytes()
    load(folders["qwen3-moe"], "qwen3-moe", quantization_config=config()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, "qwen3-moe")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
@torch.no_grad()
def test_live_parameters_of_bitsandbytes_are_shared(family):
    from qlora_native.integrations.bitsandbytes import replace

    model = moe.make(family, moe_intermediate_size=64)
    replace_experts(model)
    expected = model(**moe.batch()).logits
    experts = model.model.layers[0].mlp.experts
    pointer = experts.parametrizations.down_proj.original.data_ptr()
    if family == "gpt-oss":
        with pytest.warns(UserWarning, match="left gate_up_proj, down_proj of model.layers.0.mlp.experts"):
            replace(model)
        assert not moe.experts_of(model)
        return
    replace(model)
    assert len(moe.experts_of(model)) == 4 and experts.down_proj.weight.data_ptr() == pointer
    assert relative(model(**moe.batch()).logits, expected) < 1e-5


def described(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


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
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "lm_head"]}
    models.edit_json(folder / "config.json", quantization_config=method)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, weights


@pytest.fixture(scope="module")
def saved(gpt_oss, tmp_path_factory):
    model = load(gpt_oss[0], "gpt-oss", quantization_config=config())
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder


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


def test_mxfp4_experts_beside_nf4_are_reloaded_bit_for_bit(gpt_oss, saved, tmp_path):
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
    assert described(folder) == described(tmp_path)


def test_merged_experts_are_saved_in_their_format(gpt_oss, tmp_path):
    lora = peft.LoraConfig(r=4, target_parameters=names_of("gpt-oss"), init_lora_weights=False)
    model = peft.get_peft_model(load(gpt_oss[0], "gpt-oss", quantization_config=config()), lora).merge_and_unload()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "gpt-oss", quantization_config=config())
    assert_same_bits(again.state_dict(), model.state_dict())
    assert {layer.format for layer in moe.experts_of(again).values()} == {"mxfp4"}


def check_reloaded(model, family, folder, **options):
    model.save_pretrained(folder, max_shard_size="50KB")
    again = models.load(folder, family, **options)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert torch.equal(models.logits(again), models.logits(model))
    assert described(folder)["quant_method"] == "qlora_native"


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "t5", "gpt2"])
def test_microscaled_linear_layers_are_reloaded_bit_for_bit(family, format, tmp_path):
    models.make(family, torch.bfloat16, width=128, inner=192).save_pretrained(tmp_path / "16")
    loaded = models.load(tmp_path / "16", family, quantization_config=config(format))
    assert len(layers_of(loaded)) > 4
    check_reloaded(loaded, family, tmp_path / "loaded")
    if family != "gpt2":  # quantize_model replaces no Conv1D
        live = quantize_model(models.load(tmp_path / "16", family), format=format, progress=False)
        check_reloaded(live, family, tmp_path / "live", quantization_config=config())


def in_16_bits(family, folder, **changes):
    """A mixture of experts that was loaded, so that transformers keeps in fp32 what it keeps so in every load."""
    moe.make(family, torch.bfloat16, **changes).save_pretrained(folder)
    return load(folder, family)


def test_each_layer_of_a_mixture_of_formats_is_reloaded_in_its_own(tmp_path):
    model = in_16_bits("qwen3-moe", tmp_path / "16")
    quantize_model(model, skip=("model",), format="mxfp4", progress=False)  # the output layer
    quantize_model(model.model.layers[0].mlp, format="mxfp4", progress=False)
    quantize_model(model.model.layers[1].mlp, format="nvfp4", progress=False)
    quantize_model(model.model.layers[1], format="mxfp4", progress=False)
    quantize_model(model, format="fp4", double_quant=False, progress=False)
    layers = {**moe.experts_of(model), **layers_of(model)}
    formats = {name: layer.format for name, layer in layers.items()}
    assert set(formats.values()) == {"mxfp4", "nvfp4", "fp4"} and model.lm_head.format == "mxfp4"
    check_reloaded(model, "qwen3-moe", tmp_path / "4")
    again = load(tmp_path / "4", "qwen3-moe", quantization_config=config())
    assert formats == {name: layer.format for name, layer in {**moe.experts_of(again), **layers_of(again)}.items()}


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_microscaled_embedding_and_the_layer_tied_to_it_are_reloaded_bit_for_bit(format, tmp_path):
    model = in_16_bits("qwen3-moe", tmp_path / "16", tie_word_embeddings=True)
    quantize_model(model, skip=(), format=format, progress=False, embeddings=True)
    check_reloaded(model, "qwen3-moe", tmp_path / "4")
    again = load(tmp_path / "4", "qwen3-moe", quantization_config=config())
    assert isinstance(again.model.embed_tokens, Embedding4bit)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("which", ["experts and linear layers", "experts", "linear layers"])
def test_stock_transformers_refuses_the_files_before_it_reads_a_weight(gpt_oss, which, tmp_path):
    if which == "linear layers":
        model = quantize_model(models.make("llama", width=128, inner=192), format="mxfp4", progress=False)
    else:
        skip = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"] if which == "experts" else None
        model = load(gpt_oss[0], "gpt-oss", quantization_config=config(llm_int8_skip_modules=skip))
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
    name, state = f"model.layers.1.mlp.{name}", tensors_of(folder)
    shutil.copy(folder / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models.edit_tensors(tmp_path / "model.safetensors", {name: change and change(state[name])})
    assert any(re.search(message, text) for text in errors_of_loading(tmp_path, "gpt-oss"))


@pytest.mark.parametrize("types", [["nf4", "int4"], [], [["nf4"]]], ids=str)
def test_error_names_the_types_that_files_have(saved, types, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    models.edit_json(folder / "config.json", quantization_config={**described(folder), "bnb_4bit_quant_type": types})
    with pytest.raises((TypeError, ValueError), match="bnb_4bit_quant_type"):
        load(folder, "gpt-oss", quantization_config=config())


def test_error_names_skipped_experts_that_the_file_has_in_4_bits(gpt_oss):
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    errors = errors_of_loading(gpt_oss[0], "gpt-oss", llm_int8_skip_modules=skip)
    expected = "llm_int8_skip_modules: expected no experts.down_proj, which the file has in 4 bits"
    assert any(expected in text for text in errors)


def test_error_of_the_command_names_the_method_and_the_formats_it_takes(saved, tmp_path):
    message = "expected weights in 16 or 32 bits, or nf4 and fp4 of the method.*got the method 'qlora_native'"
    with pytest.raises(SystemExit, match=f"quantization_config: {message}"):
        main(["quantize", "--model", str(saved[1]), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("first", "expected"), [("fc0", "fc2"), ("fc3", "fc1")])
def test_renaming_that_depends_on_another_name_is_that_of_transformers(first, expected, tmp_path, monkeypatch):
    """Files of Kimi K2.5 count from fc0 on, and those that transformers writes from fc1 on."""
    if not hasattr(core_model_loading, "GroupWeightRename"):
        pytest.skip("transformers before 5.25 has no such renaming")
    renaming = core_model_loading.GroupWeightRename([r"mlp.fc0", r"mlp.fc1"], [r"mlp.fc1", r"mlp.fc2"])
    monkeypatch.setattr(_weight_files, "get_model_conversion_mapping", lambda _: [renaming])
    names = [f"0.mlp.{first}.weight", "0.mlp.fc1.weight", "0.mlp.fc1.weight.quant_state.bitsandbytes__nf4"]
    file = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names}, file)
    for _ in range(2):
        assert _weight_files.names_in_files([str(file)], torch.nn.Module()) == {f"0.mlp.{expected}.weight"}
