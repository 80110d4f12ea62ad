"""Guards docs/bitsandbytes.md: its code runs unchanged on a small model, and its statements about differences hold.

The code of README.md, docs/formats.md, docs/experts.md and docs/peft.md runs too, as do the commands of
docs/serving.md. test_package.py has the C++ program of docs/cpp.md, and test_site.py the links of all pages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import models  # noqa: E402

bnb = models.bitsandbytes()
import moe  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gguf_files import write_random  # noqa: E402
from lora import assert_close  # noqa: E402
from sharding import needs_fsdp_of_bytes, prepared_by_accelerate  # noqa: E402
from test_files import gguf_bytes  # noqa: E402
from test_keep_folders import tiny, write  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.bitsandbytes import _backend as backend  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = [*models.MARKS, pytest.mark.usefixtures("eager")]
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "bitsandbytes.md"
LINEARS = 14
PAIRS = [{"prompt": f"What is {i} plus 1?", "response": f"It is {i + 1}.", "group": str(i // 4)} for i in range(40)]


def blocks(language, page=PAGE):
    """(the line it starts in, its text) of each code block of that language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def run_python(page, **found):
    """What the Python blocks of a page have defined, run from the first to the last in one program."""
    found |= {"__name__": "docs"}
    for line, text in blocks("python", page):
        exec(compile("\n" * (line - 1) + text, page, "exec"), found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader has: a model, data, a program that uses bitsandbytes, the examples."""
    folder = tmp_path_factory.mktemp("docs")
    texts = [f"{pair['prompt']} {pair['response']}" for pair in PAIRS]
    tokenizer = models.tokenizer(texts)
    model = models.make("llama", torch.bfloat16, width=64, inner=128)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "my-model", max_shard_size="100KB")
    tokenizer.save_pretrained(folder / "my-model")
    (folder / "my-texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "my-pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "train.py").write_text(
        "import bitsandbytes\nfrom qlora_native.integrations.bitsandbytes import enabled\nassert enabled()\n"
    )
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("build*", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def names(folder):
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        return run_python(PAGE)


def test_python_on_the_page_of_bitsandbytes_runs(folder, names):
    assert len(models.layers_of(names["model"])) == LINEARS
    assert sum(isinstance(module, LoraLinear4bit) for module in names["peft_model"].modules()) == 8
    assert (folder / "my-adapter" / "adapter_model.safetensors").exists()
    assert (folder / "out" / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert len(models.layers_of(names["replaced"])) == LINEARS
    assert not backend.enabled()
    assert type(names["trainer"].create_optimizer()) is qn.optim.AdamW8bit
    assert len(models.layers_of(names["again"])) == LINEARS
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in names["theirs"].modules()) == LINEARS


def test_python_in_the_readme_runs(folder, tmp_path, monkeypatch):
    (tmp_path / "path/or").mkdir(parents=True)
    (tmp_path / "path/or/hub-id").symlink_to(folder / "my-model")
    monkeypatch.chdir(tmp_path)
    found = run_python(ROOT / "README.md")
    assert sum(isinstance(module, LoraLinear4bit) for module in found["model"].modules()) == LINEARS
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_python_on_the_page_of_formats_runs(tmp_path, monkeypatch):
    (tmp_path / "my-models").mkdir()
    write_random(tmp_path / "my-models" / "my-model.gguf", "llama", ["Q4_K", "Q6_K"], gguf_bytes)
    write(tmp_path / "my-gptq-model", tiny(), "gptq")
    monkeypatch.chdir(tmp_path)
    found = run_python(ROOT / "docs" / "formats.md")
    assert found["y"].shape == (4, 256)
    assert found["expert"].format == "mxfp4"
    assert found["layer"].format == "nvfp4"
    assert {layer.format for layer in models.layers_of(found["model"]).values()} == {"q4_k", "q6_k"}
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_python_on_the_page_of_experts_runs(tmp_path, monkeypatch):
    moe.make("qwen3-moe", torch.bfloat16).save_pretrained(tmp_path / "my-mixture")
    monkeypatch.chdir(tmp_path)
    found = run_python(ROOT / "docs" / "experts.md")
    assert len(moe.experts_of(found["model"])) == len(moe.experts_of(found["again"])) == 4
    assert found["report"].quantized > 0
    assert len(moe.experts_of(found["merged"])) == 4


def test_python_on_the_page_of_pefts_methods_runs():
    found = run_python(ROOT / "docs" / "peft.md", model=models.make("llama", torch.bfloat16))
    assert len(models.layers_of(found["merged"])) == LINEARS
    assert type(found["merged"].hf_quantizer).__name__ == "Quantizer"


@pytest.mark.parametrize("text", [text for _, text in blocks("bash")], ids=lambda text: text.split("\n")[0])
def test_commands_of_the_page_run(folder, names, text):
    run_commands(folder, text)


def test_commands_of_the_page_on_serving_run(folder, names):
    pytest.importorskip("gguf")
    texts = [text for _, text in blocks("bash", ROOT / "docs" / "serving.md")]
    assert len(texts) == 3
    for text in texts:
        run_commands(folder, text)


def run_commands(folder, text):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    shown = subprocess.run(["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for out in re.findall(r"--out (\S+)", text):
        assert (folder / out).is_file() if out.endswith(".gguf") else (folder / out / "config.json").exists()


# ---- what is different: the lines of the table, in its order ---------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    models.make("llama", torch.bfloat16, width=128, inner=192).save_pretrained(folder)
    return folder


def config(**changes):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **changes)


def stock_config(**changes):
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **changes)


def lora(**changes):
    return peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)


def load(folder, quantization=None, dtype=torch.bfloat16):
    options = {} if quantization is None else {"quantization_config": quantization}
    return models.load(folder, dtype=dtype, **options)


def both(folder, **changes):
    return load(folder, stock_config(**changes)), load(folder, config(**changes))


def first(model):
    return next(m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, qn.nn.Linear4bit)))


def test_field_has_other_values(checkpoint, tmp_path):
    assert first(load(checkpoint, config(blocksize=128))).blocksize == 128
    theirs = load(checkpoint, stock_config(bnb_4bit_quant_storage=torch.bfloat16))
    assert first(theirs).weight.quant_state.blocksize == 64
    for change in (
        {"load_in_4bit": False, "load_in_8bit": True},
        {"llm_int8_enable_fp32_cpu_offload": True},
        {"bnb_4bit_quant_storage": torch.bfloat16},
    ):
        transformers.BitsAndBytesConfig(**{"load_in_4bit": True, **change})
        with pytest.raises(ValueError, match="as qlora_native has no other"):
            BitsAndBytesConfig(**{"load_in_4bit": True, **change})
    assert first(theirs).weight.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path)
    q = first(load(tmp_path, config())).quantized_weight
    assert torch.equal(q.codes.view(-1), first(theirs).weight.view(torch.uint8).view(-1))


def test_misspelled_field_is_ignored_there_and_named_here():
    transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_typ="nf4")
    with pytest.raises(TypeError, match="expected bnb_4bit_quant_type, got 'bnb_4bit_quant_typ'"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_typ="nf4")


def test_nan_spoils_a_block_there_and_is_named_here(tmp_path, caplog):
    model = models.make("llama", torch.bfloat16, width=128, inner=192)
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    layer = first(load(tmp_path, stock_config()))
    weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert weight.view(-1, 64).isnan().all(dim=1).nonzero().tolist() == [[6]]
    with pytest.raises(RuntimeError):
        load(tmp_path, config())
    assert "model.layers.0.self_attn.q_proj.weight: expected finite values" in caplog.text


def test_product_has_another_dtype(checkpoint, monkeypatch):
    seen = []
    for module, name in ((bnb, "matmul_4bit"), (qn.functional, "linear")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, *a, original=original, **k: seen.append(x.dtype) or original(x, *a, **k)
        )
    for model, expected in zip(both(checkpoint), (torch.float32, torch.bfloat16), strict=True):
        seen.clear()
        assert model.train()(models.ids()).logits.dtype == torch.bfloat16
        assert set(seen) == {expected} and len(seen) == LINEARS


def test_dtype_beside_a_quantized_file_acts(checkpoint, tmp_path):
    load(checkpoint, config()).save_pretrained(tmp_path)
    theirs, ours = (load(tmp_path, quantization, torch.float32) for quantization in (None, config()))
    assert theirs.model.norm.weight.dtype == ours.model.norm.weight.dtype == torch.bfloat16
    assert first(theirs).weight.quant_state.dtype == first(ours).dtype == torch.bfloat16


def test_experts_stay_in_16_bits_there_and_are_quantized_here(tmp_path):
    moe.make("mixtral", torch.bfloat16, intermediate_size=64).save_pretrained(tmp_path)
    theirs, ours = both(tmp_path)
    experts = {name: p for name, p in theirs.named_parameters() if ".experts." in name}
    assert experts and {p.dtype for p in experts.values()} == {torch.bfloat16}
    assert {p.dim() for p in experts.values()} == {3}
    assert moe.experts_of(ours).keys() == experts.keys()
    assert not any(p.dim() == 3 and p.is_floating_point() for p in ours.parameters())


def test_falcon_stays_in_16_bits_there_and_is_quantized_here(tmp_path):
    models.make("falcon", torch.bfloat16, width=64, inner=128).save_pretrained(tmp_path / "bf16")
    theirs, ours = both(tmp_path / "bf16")
    names = {name for name, m in theirs.named_modules() if type(m).__name__ == "FalconLinear"}
    assert models.layers_of(ours).keys() == names and len(names) == 8
    ours.save_pretrained(tmp_path / "nf4")
    assert torch.equal(models.logits(load(tmp_path / "nf4", config())), models.logits(ours))
    with pytest.raises(RuntimeError):
        load(tmp_path / "nf4", stock_config())


def test_preparation_casts_there_alone(checkpoint):
    for model, expected in zip(both(checkpoint), (torch.float32, torch.bfloat16), strict=True):
        prepared = peft.prepare_model_for_kbit_training(model)
        rest = [p for p in prepared.parameters() if p.is_floating_point()]
        assert {p.dtype for p in rest} == {expected}
        assert prepared.is_gradient_checkpointing


def test_parameters_are_counted_as_the_page_says(checkpoint):
    elements = sum(parameter.numel() for parameter in models.make("llama", width=128, inner=192).parameters())
    linears = sum(m.in_features * m.out_features for m in models.layers_of(load(checkpoint, config())).values())
    for model, counted in zip(both(checkpoint), (elements, elements - linears // 2), strict=True):
        trainable, everything = peft.get_peft_model(model, lora()).get_nb_trainable_parameters()
        assert everything - trainable == pytest.approx(counted, rel=0.02)  # scales are parameters too


def test_trl_rounds_the_adapter_there_alone(checkpoint, folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "my-model")
    for model, expected in zip(both(checkpoint), (torch.bfloat16, torch.float32), strict=True):
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=datasets.Dataset.from_dict({"text": ["What is 1 plus 1?"]}),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {expected}


def test_model_says_of_itself_what_the_page_says(checkpoint):
    theirs, ours = both(checkpoint)
    assert theirs.is_loaded_in_4bit and not getattr(ours, "is_loaded_in_4bit", False)
    assert theirs.quantization_method == "bitsandbytes" and ours.quantization_method == "qlora_native"
    assert theirs.is_quantized and ours.is_quantized


def test_unmerging_restores_the_weight_here_alone(checkpoint):
    for model, same in zip(both(checkpoint), (False, True), strict=True):
        adapted = peft.get_peft_model(model, lora(init_lora_weights=False))
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        after = adapted.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) == same


def test_ia3_is_merged_here_alone(checkpoint):
    theirs, ours = both(checkpoint)
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Cannot merge ia3"):
        peft.get_peft_model(theirs, ia3).merge_and_unload()
    assert len(models.layers_of(peft.get_peft_model(ours, ia3).merge_and_unload())) == LINEARS


def test_loftq_begins_nearer_to_the_weight(checkpoint):
    errors = initialize_loftq(peft.get_peft_model(load(checkpoint, config()), lora()), checkpoint)
    assert len(errors) == 2 and all(after < before for before, after in errors.values())
    loftq = lora()
    loftq.init_lora_weights = "loftq"
    with pytest.raises(NotImplementedError, match="initialize_loftq"):
        peft.get_peft_model(load(checkpoint, config()), loftq)


@pytest.fixture
def group(monkeypatch):
    """A process group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@needs_fsdp_of_bytes
def test_accelerate_prepares_it_with_efficient_loading(checkpoint, group, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # accelerate sets it, for transformers to see
    theirs, ours, other = (model.requires_grad_(False) for model in (*both(checkpoint), load(checkpoint, config())))
    expected = models.logits(ours)
    try:
        dist.broadcast(torch.zeros(1, dtype=torch.bfloat16), 0)
    except RuntimeError as error:  # as of Debian's, torch 2.14
        pytest.skip(f"gloo sends no bf16: {error}")
    prepared_by_accelerate(theirs, cpu_ram_efficient_loading=True)
    for model, efficient in ((ours, False), (other, True)):
        sharded = prepared_by_accelerate(model, cpu_ram_efficient_loading=efficient)
        assert_close(models.logits(sharded).float(), expected.float(), 1e-2)


@needs_gloo
def test_fsdp1_refuses_bytes(checkpoint, group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(ValueError, match="Cannot flatten integer dtype|Must flatten tensors with"):
        FullyShardedDataParallel(load(checkpoint, config()), device_id=torch.device("cpu"))


@needs_gloo
def test_optimizer_of_dtensors_is_here_alone(group):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    whole = torch.ones(64, 64)
    param = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
    param.grad = distribute_tensor(whole, param.device_mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        bnb.optim.AdamW8bit([param]).step()
    qn.optim.AdamW8bit([param], lr=0.5).step()
    assert (param.to_local() < 0.6).all()


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512_BF16 alone")
def test_evaluation_changes_the_weight_there_alone(checkpoint):
    for model, changes in zip(both(checkpoint), (True, False), strict=True):
        layer, x = first(model), torch.randn(4, 128).bfloat16()
        codes = layer.weight.clone()
        trained, evaluated = layer.train()(x), layer.eval()(x)
        assert torch.equal(layer.weight, codes) == (not changes)
        assert torch.equal(trained, evaluated) or changes


def test_row_of_broken_blocks_is_decoded_with_its_own_scales_here():
    weight = torch.randn(64, 96) * torch.logspace(-3, 0, 64)[:, None]
    ours = qn.quantize(weight, double_quant=False).dequantize()
    theirs = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    assert (ours - weight).norm() < 0.15 * weight.norm()
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    assert ((theirs - weight).norm() < 0.15 * weight.norm()) != avx512


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_agree_and_scales_are_within_a_level(format):
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(weight, quant_type=format, compress_statistics=True)
    q = qn.quantize(weight, format)
    assert (q.codes.view(-1) != codes.view(-1)).float().mean() < 1e-3
    distance = (q.absmax.int() - state.absmax.int()).abs()
    assert distance.max() == 1 and (distance > 0).float().mean() < 0.03
    scales = qn.quantize(weight, format, double_quant=False).absmax
    nested = q.nested_absmax.repeat_interleave(256)
    ours, theirs = (
        (q.nested_code[codes.long()] * nested + q.offset - scales).abs() for codes in (q.absmax, state.absmax)
    )
    assert (ours <= theirs + 1e-6).all() and (ours < theirs).any()


def test_zero_of_fp4_has_the_code_of_bitsandbytes():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = 1.0, 1e-4
    codes, _ = bnb.functional.quantize_4bit(weight, quant_type="fp4")
    q = qn.quantize(weight, "fp4", double_quant=False)
    assert codes[0].item() & 15 == q.codes[0, 0].item() & 15 == 8
    assert q.dequantize()[0, 1] == 0


def test_step_with_a_nan_is_made_there_alone():
    for optimizer, skipped in ((bnb.optim.AdamW8bit, False), (qn.optim.AdamW8bit, True)):
        param = torch.nn.Parameter(torch.ones(64, 64))
        param.grad = torch.full_like(param, 1e-2)
        param.grad[1, 2] = float("nan")
        made = optimizer([param], lr=1e-2)
        made.step()
        assert torch.equal(param.data, torch.ones(64, 64)) == skipped
    assert made.stats()["skipped_steps"] == 1
