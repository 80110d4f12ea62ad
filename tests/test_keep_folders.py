"""Guards `KeepQuantized` over folders of GPTQ, AWQ, auto-round, compressed-tensors and FP8: which tensors become which
weights. What the bytes of a weight mean is the subject of test_files.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peak import megabytes, peaks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
import moe  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_files import affine_parts, awq_tensors, compressed, fp8_codes, gptq_tensors, scaled_fp8  # noqa: E402
from test_keep_quantized import EXPERTS, LOADED, adapt, assert_decodes_to, gradients, layers, logits  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from qlora_native.integrations.transformers import KeepQuantized  # noqa: E402
from qlora_native.nn import Experts4bit, size_report  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = models.MARKS
SIZES = {"vocab_size": models.VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64}


def affine(codes, zeros, scales, g_idx):
    """scale * (code - zero point) in fp32, which is exact with scales of 16 bits: W [N, K]."""
    return (torch.from_numpy(codes - zeros[g_idx]).float() * scales[g_idx].float()).t().contiguous()


def gptq(N, K, seed, act_order=False, **options):
    codes, zeros, scales = affine_parts(N, K, 32, 4, seed)
    g_idx = np.arange(K) // 32
    if act_order:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    tensors = {**gptq_tensors(codes, zeros, scales, 4, **options), "g_idx": torch.from_numpy(g_idx).int()}
    return tensors, affine(codes, zeros, scales, g_idx)


def auto_round(N, K, seed):
    tensors, value = gptq(N, K, seed, offset=0)
    del tensors["g_idx"]
    return tensors, value


def awq(N, K, seed):
    codes, zeros, scales = affine_parts(N, K, 32, 4, seed)
    return awq_tensors(codes, zeros, scales), affine(codes, zeros, scales, np.arange(K) // 32)


def fp8(N, K, seed):
    weight = fp8_codes(N, K, seed=seed)
    scale = 1e-4 * (1 + torch.rand(-(-N // 128), -(-K // 128), generator=torch.Generator().manual_seed(seed)))
    return {"weight": weight, "weight_scale_inv": scale}, scaled_fp8(weight, scale, 128, 128)


def fp8_of_powers_of_two(N, K, seed):
    weight, generator = fp8_codes(N, K, seed=seed), torch.Generator().manual_seed(seed)
    powers = torch.randint(110, 116, (-(-N // 128), -(-K // 128)), dtype=torch.uint8, generator=generator)
    scale = powers.view(torch.float8_e8m0fnu)
    return {"weight": weight, "weight_scale_inv": scale}, scaled_fp8(weight, scale, 128, 128)


PACKED = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def of_compressed_tensors(format, weights):
    def made(N, K, seed):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        tensors, _, _ = compressed(format, N, K, **weights)
        exact = {**tensors, "weight_scale": tensors["weight_scale"].float()}  # in whose dtype the package computes
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry(format)
        return tensors, compressor.decompress(exact, scheme)["weight"]

    return made


def compressed_config(format, weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
# {case: (makes (tensors, their values) from (N, K, seed), the quantization_config)}
CASES = {
    "gptq": (gptq, GPTQ),
    "gptq-v2": (lambda N, K, seed: gptq(N, K, seed, offset=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq-act-order": (lambda N, K, seed: gptq(N, K, seed, act_order=True), {**GPTQ, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "auto-round": (auto_round, {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round"}),
    "auto-round-awq": (awq, {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "compressed-int4": (of_compressed_tensors("pack-quantized", PACKED), compressed_config("pack-quantized", PACKED)),
    "compressed-fp8": (of_compressed_tensors("float-quantized", FLOAT), compressed_config("float-quantized", FLOAT)),
    "fp8": (fp8, FP8),
    "fp8-e8m0": (fp8_of_powers_of_two, {**FP8, "scale_fmt": "ue8m0"}),
}  # fmt: skip


def tiny(architecture="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **changes})
    return getattr(transformers, f"{architecture}ForCausalLM")(config).float()


def write(folder, model, case, skip=("lm_head",), changes=None, **config):
    """Save a model whose linear layers are quantized as in a case, and give it their values.

    Args:
        folder: a new folder.
        model: in fp32, changed in place to what the files hold.
        case: a key of CASES.
        skip: parts of the names of layers that stay in 16 bits.
        changes: a function that changes the tensors before they are saved.
        config: changes of the quantization_config.
    """
    if case.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
    make, quantization = CASES[case]
    tensors = {}

    def quantized(name, shape, seed):
        parts, value = make(*shape, seed)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        return value

    tied = model.all_tied_weights_keys
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        path = name.removesuffix(".weight")
        if parameter.dim() == 3:
            _write_experts(name, parameter, seed, quantized)
        elif name != path and parameter.dim() == 2 and not any(s in name for s in (*skip, "embed", "mlp.gate.")):
            parameter.data = quantized(path, parameter.shape, seed)
        elif name not in tied:
            tensors[name] = parameter.data.clone()
    if changes is not None:
        changes(tensors)
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)  # scales and codes of one layer in different files
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save_file({name: tensors[name].clone().contiguous() for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = {**model.config.to_dict(), "quantization_config": {**quantization, **config}}
    (folder / "config.json").write_text(json.dumps(fields))


def _write_experts(name, parameter, seed, quantized):
    """Write the experts of a stack one by one, as files have them."""
    parent, _, own = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if own == "gate_up_proj" else ("down_proj",)
    for e, expert in enumerate(parameter.data):
        for i, rows in enumerate(expert.chunk(len(parts))):
            rows.copy_(quantized(f"{parent}.{e}.{parts[i]}", rows.shape, 1000 * seed + 10 * e + i))


def load(folder, dtype=torch.float32, config=None, **options):
    config = KeepQuantized() if config is None else config
    options = {"quantization_config": config, "dtype": dtype, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("case", CASES)
def test_folder_is_the_model_of_its_values(case, tmp_path):
    dense = tiny()
    write(tmp_path, dense, case)
    model = load(tmp_path)
    assert len(layers(model)) == 14
    assert_decodes_to(model, dense)
    assert relative_error(logits(model), logits(dense)) <= 2**-16


@pytest.mark.parametrize("case", ["gptq", *(pytest.param(case, marks=pytest.mark.thorough) for case in ("awq", "fp8"))])
def test_loading_takes_five_percent_of_the_files_beside_the_model(case, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "num_attention_heads": 8}
    write = f"import test_keep_folders\npath, file = {str(tmp_path)!r}, {{}}\n"
    write += f"test_keep_folders.write(Path(path), test_keep_folders.tiny(**{sizes}), {case!r})"
    (extra,) = peaks(LOADED.format(tests=str(Path(__file__).parent), write=write), "load()")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 10 * 2**20
    assert extra <= 0.05 * size + 2**20, megabytes([extra, size])


@pytest.mark.parametrize("case", ["gptq", "awq", "auto-round", "fp8", "fp8-e8m0", "compressed-int4", "compressed-fp8"])
def test_experts_of_a_folder_become_stacks(case, tmp_path):
    dense = tiny("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=192)
    write(tmp_path, dense, case)
    model = load(tmp_path)
    assert sum(isinstance(layer, Experts4bit) for layer in layers(model).values()) == 4
    assert_decodes_to(model, dense)
    assert relative_error(logits(model), logits(dense)) <= 2**-16


@pytest.mark.parametrize("order", ["of the model", "of the hub"])
def test_stacks_that_a_conversion_may_transpose_are_those_of_the_model(order, tmp_path):
    """Blocks of 128 x 128 are transposed with the codes: both sides of a matrix have several, one of them cut off."""
    dense = moe.make_qwen3_vl(hidden=192, inner=160).float()
    tensors = {}
    for seed, (name, parameter) in enumerate(dense.named_parameters()):
        if "experts" not in name:
            tensors[name] = parameter.data.clone()
            continue
        parts = [fp8(*each.shape, 10 * seed + e) for e, each in enumerate(parameter)]
        parameter.data = torch.stack([value for _, value in parts])
        for suffix, part in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
            stack = torch.stack([tensors[part] for tensors, _ in parts])
            tensors[name + suffix] = stack.mT.contiguous() if order == "of the hub" else stack
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fields = {**dense.config.to_dict(), "quantization_config": FP8}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = type(dense).from_pretrained(tmp_path, quantization_config=KeepQuantized(), dtype=torch.float32)
    assert sum(isinstance(layer, Experts4bit) for layer in layers(model).values()) == 4
    assert_decodes_to(model, dense)


def test_adapter_of_experts_has_the_names_that_it_has_over_16_bits(tmp_path):
    dense = tiny("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=192)
    write(tmp_path, dense, "gptq")  # its names are sorted: down_proj is before gate_proj
    model = adapt(load(tmp_path), **EXPERTS)
    model.save_pretrained(tmp_path / "adapter")
    over_16_bits = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    assert relative_error(logits(model), logits(over_16_bits)) <= 2**-13


@pytest.mark.parametrize("case", ["fp8", "gptq"])
def test_codes_of_an_output_layer_are_not_saved_in_its_adapter(case, tmp_path):
    dense = tiny(tie_word_embeddings=False)
    write(tmp_path, dense, case, skip=())
    model = adapt(load(tmp_path), target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    over_16_bits = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    assert relative_error(logits(model), logits(over_16_bits)) <= 2**-13


def test_output_layer_of_its_own_stays_so_where_a_config_ties_it(tmp_path):
    dense = tiny(tie_word_embeddings=True)
    parts, value = CASES["gptq"][0](*dense.lm_head.weight.shape, 99)
    write(
        tmp_path,
        dense,
        "gptq",
        changes=lambda tensors: tensors.update({f"lm_head.{part}": each for part, each in parts.items()}),
    )
    dense.lm_head.weight = torch.nn.Parameter(value)
    model = load(tmp_path)
    assert relative_error(logits(model), logits(dense)) <= 2**-16
    model.resize_token_embeddings(models.VOCABULARY)  # it has as many, so this ties weights and does nothing else
    assert relative_error(logits(model), logits(dense)) <= 2**-16


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merge_that_is_refused_changes_no_layer(method, tmp_path):
    dense = tiny()
    write(tmp_path, dense, "gptq", skip=("lm_head", "layers.0"))  # PEFT meets layers in 16 bits first
    model = adapt(load(tmp_path))
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    with pytest.raises(ValueError, match="merge: .*, the bytes of a file"):
        getattr(model, method)()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys() and torch.equal(logits(model), expected)
    only_16_bits = adapt(load(tmp_path), target_modules=r".*layers\.0\.mlp\.up_proj")
    expected = logits(only_16_bits)
    assert relative_error(logits(getattr(only_16_bits, method)() or only_16_bits), expected) <= 2**-13


def test_experts_of_which_half_is_quantized_are_decoded_if_asked_for(tmp_path):
    dense = tiny("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=192)

    def changes(tensors):
        for layer in range(2):
            for e, down in enumerate(dense.model.layers[layer].mlp.experts.down_proj.data):
                name = f"model.layers.{layer}.mlp.experts.{e}.down_proj"
                for part in ("qweight", "qzeros", "scales", "g_idx"):
                    del tensors[f"{name}.{part}"]
                tensors[f"{name}.weight"] = down.clone()

    write(tmp_path, dense, "gptq", changes=changes)
    with pytest.raises(ValueError, match="the other stack of its experts is in 16 bits"):
        load(tmp_path)
    model = load(tmp_path, config=KeepQuantized(dequantize_others=True))
    assert len(layers(model)) == 8
    assert_decodes_to(model, dense)
    assert relative_error(logits(model), logits(dense)) <= 2**-16


def test_adapter_over_columns_in_another_order_trains(tmp_path):
    dense = tiny()
    write(tmp_path, dense, "gptq-act-order")
    model, dense = adapt(load(tmp_path)), adapt(dense)
    assert model.model.model.layers[0].mlp.up_proj.base_layer.quantized_weight.column_order is not None
    expected = gradients(dense)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) <= 2**-13, name


def test_layers_that_a_config_leaves_out_stay_in_16_bits(tmp_path):
    dense = tiny()
    write(tmp_path, dense, "gptq", skip=("lm_head", "layers.0.mlp"), dynamic={"-:.*layers\\.0\\.mlp.*": {}})
    model = load(tmp_path, torch.bfloat16)
    assert len(layers(model)) == 11
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert "affine4 in blocks of 32, scales in fp16" in str(size_report(model))


def test_options_of_single_layers_are_found_by_their_names(tmp_path):
    dense = tiny()
    group = {"targets": ["re:.*down_proj$"], "weights": FLOAT, "format": "float-quantized"}
    make, config = CASES["compressed-int4"]

    def changes(tensors):
        for i in range(2):
            name = f"model.layers.{i}.mlp.down_proj"
            for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
                del tensors[f"{name}.{part}"]
            parts, value = CASES["compressed-fp8"][0](128, 192, 0)
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            dense.get_submodule(name).weight.data = value

    write(
        tmp_path, dense, "compressed-int4", changes=changes, format="mixed-precision",
        config_groups={"group_0": {**config["config_groups"]["group_0"], "format": "pack-quantized"}, "group_1": group},
    )  # fmt: skip
    model = load(tmp_path)
    assert_decodes_to(model, dense)
    assert {layer.format for layer in layers(model).values()} == {"affine4", "fp8"}


@pytest.mark.parametrize(("case", "packing"), [
    ("gptq", "auto"), ("gptq", "auto_round:gptq"), ("gptq", "auto_round:gptq:exllamav2"), ("awq", "auto_round:awq"),
])  # fmt: skip
def test_packings_of_auto_round_have_several_names(case, packing, tmp_path):
    dense = tiny()
    write(tmp_path, dense, case, quant_method="auto-round", packing_format=packing)
    assert_decodes_to(load(tmp_path), dense)


def test_options_of_auto_round_are_those_of_the_name_before_those_of_a_pattern(tmp_path):
    dense = tiny()
    write(tmp_path, dense, "auto-round", extra_config={UP[:-3]: {"bits": 3}, UP: {"bits": 4}})
    assert_decodes_to(load(tmp_path), dense)
    write(tmp_path, dense, "auto-round", extra_config={"mlp.up_proj": {"bits": 3}})
    with pytest.raises(ValueError, match="up_proj.*: bits: expected 4 or 8"):
        load(tmp_path)


def test_parameter_that_is_called_as_a_scale_is_the_models(tmp_path, monkeypatch):
    class Scaled(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Scaled)
    dense = tiny()
    dense.model.layers[1].mlp.scale.data.fill_(0.5)
    write(tmp_path, dense, "fp8")
    assert_decodes_to(load(tmp_path), dense)


def test_experts_in_nvfp4_with_scales_of_their_own_are_refused_by_name(tmp_path):
    dense = tiny("Qwen3Moe", num_experts=2, num_experts_per_tok=2, moe_intermediate_size=192)
    group = {"targets": ["re:.*experts.*"], "weights": {}, "format": "nvfp4-pack-quantized"}

    def changes(tensors):
        for i, name in enumerate(sorted({name.rpartition(".")[0] for name in tensors if ".experts." in name})):
            N, K = tensors.pop(f"{name}.weight").shape
            del tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight_packed"] = torch.zeros(N, K // 2, dtype=torch.uint8)
            tensors[f"{name}.weight_scale"] = torch.ones(N, K // 16).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_global_scale"] = torch.tensor([1.0 + i])

    group_0 = CASES["compressed-fp8"][1]["config_groups"]["group_0"]
    groups = {"group_0": {**group_0, "format": "float-quantized"}, "group_1": group}
    write(tmp_path, dense, "compressed-fp8", changes=changes, format="mixed-precision", config_groups=groups)
    with pytest.raises(ValueError, match="experts.0.down_proj.weight_global_scale: expected one scale of all weights"):
        load(tmp_path)


def rename(old, new):
    def changes(tensors):
        tensors[new] = tensors.pop(old)

    return changes


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    def changes(tensors):
        tensors[name] = change(tensors[name])

    return changes


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def under_another_name(tensors):
    tensors.update({name.replace(UP, "model.x"): tensor for name, tensor in tensors.items() if UP in name})


def of_another_layer(tensors):
    tensors.update({name: tensors[name.replace(UP, DOWN)] for name in tensors if UP in name})


def nan_codes(codes):
    return torch.full(codes.shape, 0x7F, dtype=torch.uint8).view(codes.dtype)


def in_fp8(tensors):
    for name in [name for name in tensors if name.startswith(f"{UP}.")]:
        del tensors[name]
    tensors.update({f"{UP}.{part}": tensor for part, tensor in fp8(192, 128, 0)[0].items()})


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
OF_ACT = "model.layers.0.mlp.act.scales"
BAD = {
    "no scale": ("gptq", remove(f"{UP}.scales"), f"{UP}.scales: expected a tensor beside {UP}"),
    "no scale of FP8": ("fp8", remove(f"{UP}.weight_scale_inv"), f"{UP}.weight: .*expected one scale"),
    "a scale that no weight has": ("fp8", rename(f"{UP}.weight_scale_inv", "x.weight_scale_inv"), "x.weight_scale_inv"),
    "a scale of activations in AWQ": ("awq", rename("model.norm.weight", OF_ACT), f"{OF_ACT}: expected the quantized"),
    "an unknown tensor": ("gptq", rename(f"{UP}.g_idx", f"{UP}.perm"), f"{UP}.perm: expected one of .*g_idx"),
    "a layer that the model lacks": ("gptq", under_another_name, "model.x.*expected a weight that LlamaForCausalLM"),
    "NaN": ("gptq", put(f"{UP}.scales", filled(torch.nan)), f"{UP}.*: scales.* NaN"),
    "infinite": ("awq", put(f"{UP}.scales", filled(torch.inf)), f"{UP}.*: scales.* Inf"),
    "NaN codes": ("fp8", put(f"{UP}.weight", nan_codes), f"{UP}.*NaN"),
    "g_idx out of range": ("gptq", put(f"{UP}.g_idx", filled(9)), f"{UP}.*: g_idx"),
    "zero points of 16": ("gptq", put(f"{UP}.qzeros", filled(-1)), f"{UP}.*: qzeros"),
    "another shape": ("gptq", of_another_layer, rf"{UP}.*\[192, 128\]"),
    "another method's codes": ("gptq", in_fp8, f"{UP}.weight: expected F64, F32, .* of gptq, got F8_E4M3 without"),
    "a dense weight that is missing": ("gptq", remove("model.norm.weight"), "none of model.norm.weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_model_are_refused_by_name(name, tmp_path):
    case, changes, message = BAD[name]
    write(tmp_path, tiny(), case, changes=changes)
    with pytest.raises((ValueError, TypeError), match=message):
        load(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    ({"quant_method": "hqq"}, "quant_method of config.json: expected one of gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "use BitsAndBytesConfig"),
    ({"quant_method": "gptq", "bits": 3}, "bits: expected 4 or 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int16"}, "pack_dtype: expected int32"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version: expected gemm"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}, "x": 1}, "transform_config"),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "rotation_config": {"size": 32}}, "rotation_config"),
])  # fmt: skip
def test_methods_that_are_not_read_are_refused_by_name(config, message, tmp_path):
    write(tmp_path, tiny(), "awq" if config["quant_method"] == "awq" else "gptq")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_file_that_is_cut_off_is_refused_by_name(tmp_path):
    write(tmp_path, tiny(), "gptq")
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name}: expected a whole file of safetensors"):
        load(tmp_path)


def test_folder_in_16_bits_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected gguf_file, or a config.json that names one of gptq, awq"):
        load(tmp_path)


def test_quantized_embedding_and_tied_head_share_one_tensor(tmp_path):
    dense = tiny(tie_word_embeddings=True)
    make, _ = CASES["fp8"]

    def changes(tensors):
        parts, value = make(models.VOCABULARY, 128, 99)
        del tensors["model.embed_tokens.weight"]
        tensors.update({f"model.embed_tokens.{part}": tensor for part, tensor in parts.items()})
        dense.model.embed_tokens.weight.data = value

    write(tmp_path, dense, "fp8", changes=changes)
    dense.tie_weights()
    model = load(tmp_path)
    assert_decodes_to(model, dense)
    assert model.lm_head.quantized_weight.codes is model.model.embed_tokens.quantized_weight.codes
    assert relative_error(logits(model), logits(dense)) <= 2**-16


def test_what_cannot_be_kept_is_decoded_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["up_proj"])
    dense = tiny()
    write(tmp_path, dense, "fp8")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.*layers.1.*KeepQuantized\(dequantize_others=True\)"):
        load(tmp_path)
    model = load(tmp_path, config=KeepQuantized(dequantize_others=True))
    assert len(layers(model)) == 12
    assert_decodes_to(model, dense)
