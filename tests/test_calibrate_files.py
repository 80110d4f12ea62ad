"""Guards `quantize --calibrate` and `merge --calibrate`: they do what `calibrate` does in memory, a layer at a time."""

import json
import re

import pytest

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import moe  # noqa: E402
import process  # noqa: E402
import torch  # noqa: E402
from models import save_with_adapter, tensors_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert import _calibration, merge  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 3
WORDS = ["def", "return", "quantize", "layer", "weight", "the", "of", "scale", "(x)", ":\n"]


def words(count):
    random = torch.Generator().manual_seed(5)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=random))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama in shards, with a tokenizer; text; and an adapter."""
    folder = tmp_path_factory.mktemp("calibrate")
    save_with_adapter(folder, words(2000), width=64, inner=96, layers=LAYERS, max_shard_size="60KB")
    (folder / "text.txt").write_text(words(3000))
    pairs = [{"prompt": words(20), "response": words(20)} for _ in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    return folder


def in_memory(folder, texts, skip=("lm_head",)):
    """The state dict of a model that `calibrate` has quantized."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    qn.calibrate(model, texts, skip, progress=False)
    model.save_pretrained(folder.with_name(f"{folder.name}-in-memory"))
    return tensors_of(folder.with_name(f"{folder.name}-in-memory"))


def assert_same_weights(folder, expected, count=7 * LAYERS):
    found = tensors_of(folder)
    assert found.keys() == expected.keys() and sum(name.endswith(".quant_map") for name in expected) == count
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(-1), tensor.view(-1)), name


def calibrated(folder, out, text="text.txt", **options):
    return convert(folder / "model", out, to="nf4", progress=False, calibrate=folder / text, **options)


@pytest.mark.parametrize("text", ["text.txt", "pairs.jsonl"])
def test_files_have_the_weights_that_calibrate_makes_in_memory(folder, tmp_path, text):
    options = {"--model": folder / "model", "--out": tmp_path / "out", "--calibrate": folder / text}
    main(["quantize", *(str(word) for option in options.items() for word in option)])
    texts = _calibration.read_texts(folder / text, folder / "model", 96)
    assert_same_weights(tmp_path / "out", in_memory(folder / "model", texts))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merged_files_have_the_weights_that_calibrate_makes_of_the_merged_model(folder, tmp_path):
    calibrated(folder, tmp_path / "out", adapter=folder / "adapter")
    convert(folder / "model", tmp_path / "merged", adapter=folder / "adapter", to="bf16", progress=False)
    texts = _calibration.read_texts(folder / "text.txt", folder / "model", 96)
    assert_same_weights(tmp_path / "out", in_memory(tmp_path / "merged", texts))


def test_model_whose_output_layer_the_adapter_unties_is_calibrated(folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder / "model", tie_word_embeddings=True)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for each in (model, transformers.AutoTokenizer.from_pretrained(folder / "model")):
        each.save_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted.get_output_embeddings().weight.data *= 1.5
    adapted.save_pretrained(tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter", "progress": False}
    convert(tmp_path / "model", tmp_path / "out", to="nf4", calibrate=folder / "text.txt", **options)
    convert(tmp_path / "model", tmp_path / "merged", to="bf16", **options)
    texts = _calibration.read_texts(folder / "text.txt", folder / "model", 96)
    assert_same_weights(tmp_path / "out", in_memory(tmp_path / "merged", texts))


@pytest.mark.parametrize("to", ["nf4", "int4"])
def test_plain_merge_into_4_bits_says_what_is_lost_and_what_to_type(folder, tmp_path, to):
    options = {"adapter": folder / "adapter", "blocksize": 32, "progress": False}
    plain = convert(folder / "model", tmp_path / "out", to=to, **options)
    assert re.search(
        r"rounding to 4 bits moved the weights \d+\.\d times as far .*: --calibrate FILE keeps", str(plain)
    )
    better = convert(folder / "model", tmp_path / "better", to=to, calibrate=folder / "text.txt", **options)
    assert "--calibrate" not in str(better)


def test_stock_transformers_loads_the_files(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    report = calibrated(folder, tmp_path / "out")
    assert f"calibrated {7 * LAYERS} of {7 * LAYERS} weights" in str(report)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize(("to", "largest"), [("int4", 7), ("int8", 127)])
def test_compressed_tensors_have_the_codes_and_scales_that_were_chosen(folder, tmp_path, monkeypatch, to, largest):
    pytest.importorskip("compressed_tensors")
    chosen, get = {}, _calibration.CalibratedWeights.__getitem__
    monkeypatch.setattr(
        _calibration.CalibratedWeights, "__getitem__", lambda self, path: chosen.setdefault(path, get(self, path))
    )
    command = ["export", "--model", str(folder / "model"), "--to", to, "--blocksize", "32"]
    main([*command, "--out", str(tmp_path / "plain")])
    main([*command, "--out", str(tmp_path / "out"), "--calibrate", str(folder / "text.txt")])
    files = tensors_of(tmp_path / "out")
    assert len(chosen) == 7 * LAYERS
    dense, plain, out = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for path in (folder / "model", tmp_path / "plain", tmp_path / "out")
    )
    given = {"input_ids": _calibration.read_texts(folder / "pairs.jsonl", folder / "model", 96)[0]}
    with torch.no_grad():
        expected = dense(**given).logits
        errors = [(model(**given).logits - expected).norm() for model in (plain, out)]
        assert errors[1] < 0.8 * errors[0]
        for path, q in chosen.items():
            scale = files[f"{path}.weight_scale"].float().view(-1, 1)
            assert torch.equal(scale.view(-1) * largest, q.absmax), path
            steps = (q.dequantize(torch.float32).view(-1, 32) / scale).round()
            dense.get_submodule(path).weight.copy_((steps * scale).view(q.shape))
        assert torch.equal(out(**given).logits, dense(**given).logits)


def test_memory_holds_one_layer_at_a_time(folder, tmp_path, monkeypatch):
    load, held = _calibration._Loader._load, []

    def loaded(self, layer):
        load(self, layer)
        held.append([i for i, each in enumerate(self._model.model.layers) if not next(each.parameters()).is_meta])

    monkeypatch.setattr(_calibration._Loader, "_load", loaded)
    calibrated(folder, tmp_path / "out")
    assert held == [[0], [1], [2], [0], [1], [2]]  # one pass with the first batch finds the layers


@pytest.mark.parametrize("at", [0, 5, 7, 16, 20])
def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch, at):
    from qlora_native._calibrate import quantizer as module

    calibrated(folder, tmp_path / "whole")
    quantize, calls = module.calibrated, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return quantize(*args)

    monkeypatch.setattr(module, "calibrated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    calibrated(folder, tmp_path / "out")
    assert len(calls) == at + 1 + 7 * (LAYERS - at // 7)
    whole, again = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_killed_run_goes_on_and_ends_with_the_same_bytes(folder):
    print(process.succeed("killed_calibration.py", folder, OMP_NUM_THREADS="1").stdout)


def test_report_has_what_was_done_before_an_interruption(folder, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge._Conversion, "tensors", interrupted)
        calibrated(folder, tmp_path / "out")
    assert f"calibrated {7 * LAYERS} of {7 * LAYERS} weights" in str(calibrated(folder, tmp_path / "out"))


def test_run_with_other_text_begins_anew(folder, tmp_path, monkeypatch):
    save = _calibration.CalibratedWeights._save

    def interrupted(self, index, *args):
        save(self, index, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_calibration.CalibratedWeights, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrated(folder, tmp_path / "out")
    calibrated(folder, tmp_path / "out", "pairs.jsonl")
    calibrated(folder, tmp_path / "whole", "pairs.jsonl")
    whole, again = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file of text, found none at"),
        ("too short", r"expected at least 512 tokens \(1536 are enough\), got \d+"),
        (b"\xff\xfe\x00", "expected text in UTF-8"),
    ],
)
def test_unusable_text_is_refused_in_one_sentence(folder, tmp_path, text, message):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(folder / "model", tmp_path / "out", to="nf4", progress=False, calibrate=path)
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_fewest_tokens_are_whole_sequences(folder, tmp_path):
    (tmp_path / "text.txt").write_text(words(300))
    with pytest.raises(ValueError, match=r"expected at least 1024 tokens \(8208 are enough\), got \d+"):
        _calibration.read_texts(tmp_path / "text.txt", folder / "model", 513)
    (tmp_path / "text.txt").write_text(words(40_000))
    texts = _calibration.read_texts(tmp_path / "text.txt", folder / "model", 513)
    assert sum(text.numel() for text in texts) >= 513


@pytest.mark.parametrize("characters", [_calibration.CHARACTERS, 1])
def test_first_tokens_of_a_long_text_are_those_of_the_whole_text(folder, tmp_path, monkeypatch, characters):
    text = words(40_000)
    (tmp_path / "text.txt").write_text(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    whole = tokenizer(text, add_special_tokens=False).input_ids
    read = []

    class Counting:
        def __call__(self, part, **options):
            read.append(len(part))
            return tokenizer(part, **options)

    monkeypatch.setattr(_calibration.AutoTokenizer, "from_pretrained", lambda *args, **options: Counting())
    monkeypatch.setattr(_calibration, "CHARACTERS", characters)
    ids = torch.cat(_calibration.read_texts(tmp_path / "text.txt", folder / "model", 96)).view(-1)
    assert ids.tolist() == whole[: 16 * 96]
    assert sum(read) < len(text) / 4


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}', '{"prompt": "x", "response": 3}'])
def test_bad_line_is_named(folder, tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: expected an object with texts"):
        convert(folder / "model", tmp_path / "out", to="nf4", progress=False, calibrate=path)


@pytest.mark.parametrize("to", ["bf16", None])
def test_file_without_a_format_is_refused(folder, tmp_path, to):
    with pytest.raises(
        ValueError, match="calibrate: expected a file with one of the formats nf4, fp4, int4, int8, got"
    ):
        convert(folder / "model", tmp_path / "out", to=to, progress=False, calibrate=folder / "text.txt")


@pytest.mark.parametrize("to", [["--to", "q4_0"], []])
def test_calibrated_export_to_gguf_is_refused_by_name(folder, tmp_path, to, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--model", str(folder / "model"), "--out", str(tmp_path / "m.gguf"), "--calibrate", "x", *to])
    expected = "export: --calibrate: expected --model and --to int4 or int8: the codes of a GGUF file are made by"
    assert expected in capsys.readouterr().err


def test_result_that_exists_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    monkeypatch.setattr(_calibration.CalibratedWeights, "make", lambda *args: pytest.fail("the work has begun"))
    with pytest.raises(FileExistsError, match="out: expected a new or empty folder"):
        calibrated(folder, tmp_path / "out")


def test_error_of_the_calibration_is_one_sentence_of_the_command(folder, tmp_path, monkeypatch):
    def run(*args):
        raise RuntimeError("model.layers.0: expected the modules that it calls for the first batch, got others")

    monkeypatch.setattr(_calibration.Calibration, "run", run)
    given = ["--model", folder / "model", "--out", tmp_path / "out", "--calibrate", folder / "text.txt"]
    with pytest.raises(SystemExit, match="^quantize: model.layers.0: expected the modules that it calls"):
        main(["quantize", *map(str, given)])


def test_model_without_a_tokenizer_is_refused_in_one_sentence(folder, tmp_path):
    moe.make("mixtral", torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="calibrate: .*model: expected the model's tokenizer, got none [^\n]*$"):
        convert(tmp_path / "model", tmp_path / "out", to="nf4", progress=False, calibrate=folder / "text.txt")


def mixture(family, folder, out):
    """A mixture of experts, which is saved in the folder `out` with the tokenizer of another folder."""
    made = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": _calibration.SEQUENCE}
    model = moe.make(family, torch.bfloat16, vocab_size=len(made), **sizes)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if re.search("|".join(model._keep_in_fp32_modules_strict) or "$^", name):
            tensor.data = torch.randn(tensor.shape) * 0.1
    for each in (model, made):
        each.save_pretrained(out)
    return model


# Files that have experts one by one, under other names, in one tensor, and with a buffer and weights in fp32.
@pytest.mark.parametrize("family", ["mixtral", "llama4", "gpt-oss", "deepseek-v3"])
def test_linear_layers_of_a_mixture_are_calibrated_and_experts_stay(folder, tmp_path, family):
    model = mixture(family, folder / "model", tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "out", to="nf4", progress=False, calibrate=folder / "text.txt")
    assert re.search(r"tensors of experts, [\d,]+ elements, stay in 16 bits", str(report))
    assert f"calibrated {report.quantized} of {report.quantized} weights" in str(report)
    widest = max(layer.in_features for layer in model.modules() if type(layer) is torch.nn.Linear)
    texts = _calibration.read_texts(folder / "text.txt", tmp_path / "model", widest)
    expected = in_memory(tmp_path / "model", texts, ("lm_head", "experts"))
    assert_same_weights(tmp_path / "out", expected, report.quantized)


def test_experts_are_merged_before_the_layers_around_them_are_calibrated(folder, tmp_path):
    model = mixture("qwen3-moe", folder / "model", tmp_path / "model")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **targets))
    adapted.save_pretrained(tmp_path / "adapter")
    calibrate = {"calibrate": folder / "text.txt", "progress": False}
    report = convert(tmp_path / "model", tmp_path / "out", tmp_path / "adapter", "nf4", **calibrate)
    convert(tmp_path / "model", tmp_path / "merged", tmp_path / "adapter", "bf16", progress=False)
    texts = _calibration.read_texts(folder / "text.txt", tmp_path / "model", 64)
    expected = in_memory(tmp_path / "merged", texts, ("lm_head", "experts"))
    assert_same_weights(tmp_path / "out", expected, report.quantized)


def test_missing_expert_is_named(folder, tmp_path):
    mixture("mixtral", folder / "model", tmp_path / "model")
    tensors = tensors_of(tmp_path / "model")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: expected parts of a tensor \[4, 64, 32\]"):
        convert(tmp_path / "model", tmp_path / "out", to="nf4", progress=False, calibrate=folder / "text.txt")
