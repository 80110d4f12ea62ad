"""Guards the budget of `calibrate`: it is kept, it goes where rounding costs most, and files say what it chose."""

import copy
import itertools
import json
import random

import pytest

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import moe  # noqa: E402
import torch  # noqa: E402
from models import ids, load, make, save_with_adapter, tensors_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native._calibrate.budget import Item, choose  # noqa: E402
from qlora_native.convert import _calibration  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 3


def batches(count=8):
    return [ids(4, 16, seed) for seed in range(count)]


def small(**options):
    return make("llama", dtype=torch.bfloat16, layers=LAYERS, **options)


def calibrated(bits, model=None):
    model = small() if model is None else model
    return model, qn.calibrate(model, batches(), bits=bits, progress=False)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def stored_bits(model):
    layers = list(linears(model).values())
    quantized = [isinstance(layer, qn.nn.Linear4bit) for layer in layers]
    size = sum(m.quantized_weight.nbytes if q else m.weight.nbytes for m, q in zip(layers, quantized, strict=True))
    return 8 * size / sum(layer.in_features * layer.out_features for layer in layers)


def test_weights_take_no_more_than_the_budget_and_use_it():
    for bits in (6, 8, 12):
        model, report = calibrated(bits)
        assert bits - 0.5 < stored_bits(model) <= bits
        assert report.bits == pytest.approx(stored_bits(model), rel=1e-12)
        for each in report.weights:
            layer = model.get_submodule(each.name)
            assert each.format == (layer.format if isinstance(layer, qn.nn.Linear4bit) else "bfloat16")
    assert {each.format for each in report.weights} >= {"int8", "bfloat16"}
    assert "bits an element: " in str(report)


def test_codebook_of_the_users_own_stands_beside_8_bits():
    report = qn.calibrate(small(), batches(), codebook=torch.linspace(-1, 1, 16), bits=6, progress=False)
    assert {each.format for each in report.weights} >= {"codebook", "int8"}


def test_all_weights_stay_as_they_are_with_16_bits():
    model, report = calibrated(16)
    assert report.bits == 16 and {each.format for each in report.weights} == {"bfloat16"}
    before = small().state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_weight_whose_rounding_moves_its_layer_most_gets_more_bits(layer):
    model = small()
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.down_proj.weight *= 20
        # Every block gets outliers, for which its other elements are rounded coarsely; their own inputs are 0.
        mlp.down_proj.weight[:, ::32] *= 20
        mlp.up_proj.weight[::32] = 0
    _, report = calibrated(5.6, model)
    found = {each.name: each for each in report.weights}
    name = f"model.layers.{layer}.mlp.down_proj"
    assert max(found, key=lambda each: found[each].sensitivity[0]) == name
    assert found[name].format == "int8"


def test_measure_is_how_far_the_layers_output_moves_when_one_weight_is_rounded():
    model = make("llama", layers=1).eval()
    _, report = calibrated(6, copy.deepcopy(model))
    text = torch.cat(batches())

    def output(each):
        found = []
        with each.model.layers[0].register_forward_hook(lambda *args: found.append(args[-1])), torch.no_grad():
            each(text)
        return found[0].double()

    for each in report.weights:
        rounded = copy.deepcopy(model)
        parent, _, child = each.name.rpartition(".")
        dense = rounded.get_submodule(each.name)
        for format, sensitivity in zip(("nf4", "int8"), each.sensitivity, strict=True):
            q = qn.quantize(dense.weight, format)
            layer = (qn.nn.Linear4bit if format == "nf4" else qn.nn.Linear8bit).from_quantized(q)
            setattr(rounded.get_submodule(parent), child, layer)
            y = output(model)
            ratio = (output(rounded) - y).square().sum(-1) / y.square().sum(-1)
            assert sensitivity == pytest.approx(ratio.mean().item(), rel=1e-2)  # fp32 outputs of which little changes


def test_weights_are_measured_by_the_rows_within_the_mask():
    text, mask = batches(), torch.ones(4, 16, dtype=torch.long)
    mask[:, 12:] = 0
    padded = qn.calibrate(small(), [{"input_ids": t, "attention_mask": mask} for t in text], bits=6, progress=False)
    plain = qn.calibrate(small(), [t[:, :12] for t in text], bits=6, progress=False)
    for ours, theirs in zip(padded.weights, plain.weights, strict=True):
        assert ours.sensitivity[0] == pytest.approx(theirs.sensitivity[0], rel=0.1)  # outputs are rounded to bf16


def items(seed, formats=3):
    numbers = random.Random(seed)
    return [
        Item(
            tuple(itertools.accumulate(numbers.randint(1, 9) for _ in range(formats))),
            (*(numbers.random() for _ in range(formats - 1)), 0.0),
        )
        for _ in range(6)
    ]


def sensitivity_in_all(items, chosen):
    return sum(item.sensitivity[index] for item, index in zip(items, chosen, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_larger_budget_never_moves_the_outputs_more(seed):
    weights = items(seed)
    least = sum(item.sizes[0] for item in weights)
    before = float("inf")
    for spare in range(100):
        chosen = choose(weights, spare)
        assert sum(item.sizes[index] for item, index in zip(weights, chosen, strict=True)) <= least + spare
        sensitivity = sensitivity_in_all(weights, chosen)
        assert sensitivity <= before + 1e-12
        before = sensitivity
    assert before == 0


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_within_one_weight_of_the_best(seed):
    weights = items(seed)
    for spare in range(0, 60, 5):
        possible = [
            sensitivity_in_all(weights, chosen)
            for chosen in itertools.product(range(3), repeat=len(weights))
            if sum(w.sizes[i] - w.sizes[0] for w, i in zip(weights, chosen, strict=True)) <= spare
        ]
        largest = max(max(item.sensitivity) for item in weights)
        assert sensitivity_in_all(weights, choose(weights, spare)) <= min(possible) + largest


def test_equal_weights_are_chosen_in_the_order_of_the_model():
    assert choose([Item((1, 2), (1.0, 0.0))] * 4, 2) == [1, 1, 0, 0]


def calibrated_beside_torch():
    """(what each weight became, the outputs of torch's own linear layers meanwhile)."""
    outputs = []

    def note(module, args, output):
        if type(module) is nn.Linear and "forward" not in vars(module):  # else it is ours for a moment
            outputs.append(output.detach())

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        return calibrated(6)[1].weights, outputs
    finally:
        hook.remove()


@pytest.mark.parametrize("threads", [2, 3])
def test_choice_is_the_same_for_any_number_of_threads(threads):
    before = torch.get_num_threads()
    found, by_torch = [], []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            weights, outputs = calibrated_beside_torch()
            found.append(weights)
            by_torch.append(outputs)
    finally:
        torch.set_num_threads(before)
    assert by_torch[0]
    if all(map(torch.equal, *by_torch)):
        assert found[0] == found[1]
    # Else torch's own products differ with the number of threads, as on an Intel Xeon without instructions for bf16.
    assert [(each.name, each.format) for each in found[0]] == [(each.name, each.format) for each in found[1]]


def test_weights_that_stay_in_4_bits_are_those_without_a_budget():
    without, report = calibrated(None)
    assert report.bits is None and {each.format for each in report.weights} == {"nf4"}
    model, _ = calibrated(6)
    same = [
        torch.equal(layer.weight, without.get_submodule(name).weight)
        for name, layer in linears(model).items()
        if type(layer) is qn.nn.Linear4bit
    ]
    assert all(same) and 0 < len(same) < 7 * LAYERS


def test_model_is_nearer_to_its_16_bits_with_a_larger_budget():
    held = ids(8, 16, 99)
    with torch.no_grad():
        wanted = small()(held).logits.float()
        errors = [(calibrated(bits)[0](held).logits.float() - wanted).norm() for bits in (None, 7, 9)]
    assert errors[0] > errors[1] > errors[2]


def test_shared_weights_stay_shared_and_count_once():
    for bits in (6, 16):
        model = small()
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight = mlp.gate_proj.weight
        _, report = calibrated(bits, model)
        assert mlp.up_proj.weight is mlp.gate_proj.weight
        assert len(report.weights) == 7 * LAYERS - 1
        assert sum("layers.1.mlp" in each.name for each in report.weights) == 2


def test_experts_stay_in_4_bits_and_count():
    model = moe.make("mixtral")
    report = qn.calibrate(model, batches(16), bits=6, progress=False)
    experts = [each for each in report.weights if each.name.endswith("]")]
    assert experts and all(each.format == "nf4" and each.sensitivity is None for each in experts)
    assert {each.format for each in report.weights} > {"nf4"}
    assert report.bits <= 6


def test_model_with_8_bits_is_trained_and_names_what_saving_it_lacks(tmp_path):
    model, report = calibrated(7)
    assert "int8" in {each.format for each in report.weights}
    with pytest.raises(ValueError, match="format: expected one of nf4, .*, which have files, got int8"):
        model.save_pretrained(tmp_path)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=ids(2), labels=ids(2)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 4.1}, ValueError, r"bits: expected at least \d\.\d\d, which all weights in nf4 have, got 4.1"),
        ({"bits": 16.5}, ValueError, "bits: expected a number up to 16, got 16.5"),
        ({"bits": float("nan")}, ValueError, "bits: expected a number up to 16, got nan"),
        ({"bits": "4.5"}, TypeError, "bits: expected a number or None, got str"),
        (
            {"bits": 9, "format": "int8"},
            ValueError,
            "bits: expected None with a format other than nf4 and fp4, got 9 with",
        ),
    ],
)
def test_impossible_budget_is_refused_before_anything_is_run(options, error, message):
    model = small()
    before = dict(model.named_modules())
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=message):
        qn.calibrate(model, batches(), progress=False, **options)
    assert dict(model.named_modules()) == before


def test_budget_of_a_model_without_layers_is_refused():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="bits: expected None for a model without layers that are run one after"):
        qn.calibrate(model, [{"input": torch.randn(200, 64)}], bits=9, progress=False)
    assert type(model[0]) is nn.Linear


def words(count):
    numbers = random.Random(5)
    return " ".join(numbers.choice(["def", "return", "quantize", "layer", "weight", "the"]) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with a tokenizer, text, and an adapter."""
    folder = tmp_path_factory.mktemp("budget")
    save_with_adapter(folder, words(2000), width=128, inner=192, layers=LAYERS)
    (folder / "text.txt").write_text(words(4000))
    return folder


def converted(folder, out, bits=6.0, **options):
    return convert(folder / "model", out, to="nf4", progress=False, calibrate=folder / "text.txt", bits=bits, **options)


def kept_in(folder):
    """The linear layers of a layer that a file has in 16 bits."""
    tensors = load_file(folder / "model.safetensors")
    return {
        n.removesuffix(".weight")
        for n, t in tensors.items()
        if n.endswith("_proj.weight") and t.dim() == 2 and t.dtype == torch.bfloat16
    }


def test_file_is_loaded_by_stock_bitsandbytes_with_the_same_logits(folder, tmp_path, eager):
    pytest.importorskip("bitsandbytes")
    argv = ["quantize", "--model", folder / "model", "--out", tmp_path / "out", "--calibrate", folder / "text.txt"]
    main([*map(str, argv), "--bits", "6"])
    kept = kept_in(tmp_path / "out")
    assert 0 < len(kept) < 7 * LAYERS
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(config["llm_int8_skip_modules"]) == kept | {"lm_head"}
    stock = load(tmp_path / "out", dtype=torch.bfloat16)
    from qlora_native.integrations.transformers import BitsAndBytesConfig

    ours = load(tmp_path / "out", dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    for name, layer in linears(stock).items():
        assert type(layer).__module__.startswith("bitsandbytes") == (name not in kept)
        assert isinstance(ours.get_submodule(name), qn.nn.Linear4bit) == (name not in kept)
    text = torch.arange(24).view(2, 12) % stock.config.vocab_size
    with torch.no_grad():
        expected, logits = stock(text).logits.float(), ours(text).logits.float()
    assert (logits - expected).norm() <= 2**-6 * expected.norm()


def test_merged_layers_that_stay_in_16_bits_are_those_of_a_merge_into_16_bits(folder, tmp_path):
    report = converted(folder, tmp_path / "out", adapter=folder / "adapter")
    convert(folder / "model", tmp_path / "merged", adapter=folder / "adapter", to="bf16", progress=False)
    kept = kept_in(tmp_path / "out")
    ours, merged = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "merged")
    assert kept and all(torch.equal(ours[f"{name}.weight"], merged[f"{name}.weight"]) for name in kept)
    assert report.quantized == 7 * LAYERS - len(kept)
    assert f"{len(kept)} weights in bfloat16" in str(report)


def test_file_takes_no_more_than_the_budget(folder, tmp_path):
    converted(folder, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    size = sum(t.nbytes for name, t in tensors.items() if "_proj.weight" in name and "quant_state" not in name)
    elements = LAYERS * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 192 * 128)
    assert 5 < 8 * size / elements <= 6


@pytest.mark.parametrize("layer", range(LAYERS))
def test_interrupted_run_makes_the_same_choice(folder, tmp_path, monkeypatch, layer):
    converted(folder, tmp_path / "whole")
    save = _calibration.CalibratedWeights._save

    def interrupted(self, index, *args):
        save(self, index, *args)
        if index == layer:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_calibration.CalibratedWeights, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(folder, tmp_path / "out")
    converted(folder, tmp_path / "out")
    whole, again = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_run_with_a_budget_begins_anew_after_one_without(folder, tmp_path, monkeypatch):
    save = _calibration.CalibratedWeights._save

    def interrupted(self, index, *args):
        save(self, index, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_calibration.CalibratedWeights, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(folder, tmp_path / "out", bits=None)
    converted(folder, tmp_path / "out")
    converted(folder, tmp_path / "whole")
    assert kept_in(tmp_path / "out") == kept_in(tmp_path / "whole") != set()


def test_budget_needs_a_file_to_calibrate_by(folder, tmp_path):
    with pytest.raises(ValueError, match="bits: expected None without a file to calibrate by, got 4.5"):
        convert(folder / "model", tmp_path / "out", to="nf4", progress=False, bits=4.5)
    with pytest.raises(ValueError, match=r"bits: expected at least \d.\d\d, which all weights in nf4 have, got 4"):
        converted(folder, tmp_path / "out", bits=4)
    assert not any("out" in path.name for path in tmp_path.iterdir())
