"""Guards experts in files: quantized while a checkpoint is read, saved and read with the same bits, or refused."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
import moe  # noqa: E402
from models import layers_of, tensors_of  # noqa: E402
from peak import megabytes, peaks  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_experts import families, relative  # noqa: E402

from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402
from qlora_native.nn import quantize_model, size_report  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:`use_return_dict`"),
]


def config(double_quant=True, **changes):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, **changes
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: checkpoint in 16 bits, of many shards}."""
    made = {}
    for family in moe.FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        moe.make(family, torch.bfloat16).save_pretrained(made[family], max_shard_size="60KB")
        assert len(list(made[family].glob("*.safetensors"))) > 2
    return made


def load(folder, family, **options):
    return type(moe.make(family)).from_pretrained(folder, **{"dtype": torch.bfloat16, **options})


def assert_same(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name].to(tensor.dtype)), name


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"blocksize": 128}], ids=str)
def test_experts_quantized_while_loading_are_those_of_the_live_model(folders, family, options):
    loaded = load(folders[family], family, quantization_config=config(**options))
    live = moe.make(family, torch.bfloat16)
    quantize_model(
        live, double_quant=options.get("double_quant", True), blocksize=options.get("blocksize"), progress=False
    )
    assert moe.experts_of(loaded).keys() == moe.experts_of(live).keys() != set()
    assert_same(loaded, live)
    assert not any("not known" in row.what for row in size_report(loaded).rows)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "llama4"])
def test_layer_that_is_skipped_stays_in_16_bits(folders, family, tmp_path):
    name = f"model.layers.1.{'feed_forward' if family == 'llama4' else 'mlp'}.experts"
    model = load(folders[family], family, quantization_config=config(llm_int8_skip_modules=["lm_head", name]))
    plain = moe.make(family, torch.bfloat16)
    assert {path.split(".")[2] for path in moe.experts_of(model)} == {"0"}
    for own in ("gate_up_proj", "down_proj"):
        assert torch.equal(model.get_parameter(f"{name}.{own}"), plain.get_parameter(f"{name}.{own}"))
    assert "named in llm_int8_skip_modules: " in str(size_report(model))
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path, family, quantization_config=config()))


def test_memory_holds_the_4_bit_model_and_one_shard(tmp_path):
    """The largest parameter of experts in 16 bits is as large as a shard, and stays below it while it is quantized."""
    shard = 8 * 2**20
    model = moe.make(
        "qwen3-moe", torch.bfloat16, num_hidden_layers=6, hidden_size=512, moe_intermediate_size=384, num_experts=8
    )
    assert model.model.layers[0].mlp.experts.gate_up_proj.nbytes < shard
    model.save_pretrained(tmp_path / "bf16", max_shard_size=shard)
    prepare = f"""
import transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
def load(name, double_quant=True):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    return transformers.AutoModelForCausalLM.from_pretrained(
        {str(tmp_path)!r} + "/" + name, dtype=torch.bfloat16, quantization_config=config
    )
load("bf16").save_pretrained({str(tmp_path / "nf4")!r}, max_shard_size={shard})  # and code, threads, caches
"""
    extra = peaks(prepare, "load('bf16')", "load('bf16', False)", "load('nf4')")
    assert extra[2] < shard, megabytes(extra)
    assert max(extra[:2]) < shard / 2, megabytes(extra)  # one expert at a time


def test_strict_config_names_experts_of_an_unknown_family(tmp_path):
    experts = {"kv_channels": 16, "num_local_experts": 4}
    options = transformers.JetMoeConfig(**{**moe.COMMON, **experts, "intermediate_size": 32, "num_hidden_layers": 1})
    transformers.JetMoeForCausalLM(options).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"strict: expected .* got model.layers.0.mlp.input_linear.weight, 65,536 bytes"
    ):
        transformers.JetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=config(strict=True))
    model = transformers.JetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=config())
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


# ---- files of ours ---------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("double_quant", [True, False], ids=["dq", "absmax"])
def test_saved_experts_come_back_bit_for_bit(folders, family, double_quant, tmp_path):
    model = load(folders[family], family, quantization_config=config(double_quant))
    live = quantize_model(moe.make(family, torch.bfloat16), double_quant=double_quant, progress=False)
    for name, which in (("loaded", model), ("live", live)):
        which.save_pretrained(tmp_path / name, max_shard_size="50KB")
        again = load(tmp_path / name, family, quantization_config=config(not double_quant, blocksize=128))
        assert_same(again, which)
    with torch.no_grad():
        again = load(tmp_path / "loaded", family, quantization_config=config())
        assert torch.equal(again(**moe.batch()).logits, model(**moe.batch()).logits)


@families
def test_dequantized_model_is_one_of_transformers(folders, family):
    model = load(folders[family], family, dtype=torch.float32, quantization_config=config())
    with torch.no_grad():
        expected = model(**moe.batch()).logits
        dense = model.dequantize(torch.float32)
        assert not moe.experts_of(dense) and not layers_of(dense)
        assert relative(expected, dense(**moe.batch()).logits) < 1e-5


# ---- files of others -------------------------------------------------------------------------------------------------


def test_experts_that_a_file_has_in_16_bits_stay_so(folders, tmp_path):
    """As bitsandbytes writes them by way of transformers: linear layers in 4 bits, experts in 16."""
    skip = ["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    load(folders["qwen3-moe"], "qwen3-moe", quantization_config=config(llm_int8_skip_modules=skip)).save_pretrained(
        tmp_path
    )
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["llm_int8_skip_modules"] = None
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = load(tmp_path, "qwen3-moe", quantization_config=config())
    assert not moe.experts_of(model) and layers_of(model)
    assert "experts that the file has in 16 bits: model.layers.0.mlp.experts.gate_up_proj" in str(size_report(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_layout_of_bitsandbytes_own_experts_is_read(folders, family, tmp_path):
    """`replace_parameter_4bit`, which quantizes a parameter as it is laid out: along rows, if it is transposed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    # Rows of whole blocks, for which bitsandbytes' kernels on a CPU are right.
    model = moe.make(family, torch.bfloat16, intermediate_size=64)
    expected = {}
    with torch.compiler.set_stance("force_eager"):
        for layer in model.model.layers:
            for own in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, own, compress_statistics=True, quant_type="nf4")
                expected[own] = getattr(layer.mlp.experts, own).clone()
    state = model.state_dict()
    assert "model.layers.0.mlp.experts.down_proj.nested_absmax" in state and bnb
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = model.config.to_dict()
    skip = ["lm_head", "model.layers.0.self_attn", "model.layers.1.self_attn"]
    written["quantization_config"] = config(llm_int8_skip_modules=skip).to_dict() | {
        "bnb_4bit_compute_dtype": "float32"
    }
    (tmp_path / "config.json").write_text(json.dumps(written, default=str))
    if family == "gpt-oss":  # its blocks run along the other dimension than those of the product
        assert any("blocks along the rows of [4, 64, 128]" in text for text in errors_of_loading(tmp_path, family))
        return
    read = load(tmp_path, family, quantization_config=config())
    experts = moe.experts_of(read)
    assert len(experts) == 4
    for own, weight in expected.items():
        layer = experts[f"model.layers.1.mlp.experts.{own}"]
        assert torch.equal(layer.parameter(), weight)
        assert torch.equal(layer.weight.flatten(), state[f"model.layers.1.mlp.experts.{own}"].flatten())


def test_stock_transformers_raises_an_error_for_quantized_experts(folders, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
    load(folders["qwen3-moe"], "qwen3-moe", quantization_config=config()).save_pretrained(tmp_path)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, "qwen3-moe")


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_live_parameters_of_bitsandbytes_are_taken_over(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    from qlora_native.integrations.bitsandbytes import replace

    model = moe.make(family, moe_intermediate_size=64)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for layer in model.model.layers:
            for own in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, own, compress_statistics=True, quant_type="nf4")
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
