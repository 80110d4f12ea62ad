"""Guards docs/peft.md: its table has every method that PEFT registers, and each cell says what happens."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import models  # noqa: E402
from lora import assert_close, dequantized, fused_layers, relative_error  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.tuners.lora import Linear as PeftLoraLinear  # noqa: E402
from peft_rows import ROWS, base_model  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora_native.integrations.peft import _methods as peft_methods  # noqa: E402
from qlora_native.integrations.peft._dequantized import DequantizedLinear4bit  # noqa: E402
from qlora_native.integrations.peft._methods import METHODS  # noqa: E402
from qlora_native.nn import Linear4bit  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parent.parent / "docs" / "peft.md"
SAME_AS_16_BITS, REFUSED, NONE = "✓", "refused", "–"
ORDER = 4e-5  # fp32 in another order of addition, through one layer
SAME = 1e-6
ADD = "add a row to tests/peft_rows.py and to docs/peft.md"


def table():
    """{method: its cells: forward and training, save and load, merge, unmerge, remark}."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    start = next(i for i, row in enumerate(rows) if row[0].strip() == "method")
    cells = [[cell.strip() for cell in row] for row in rows[start + 2 :]]
    return {row[0]: row[1:] for row in cells if len(row) == 6}


TABLE = table()


@pytest.fixture(scope="module", autouse=True)
def environment():
    """PEFT sets CC and CXX to gcc to compile BOFT's CUDA kernel, and where that fails leaves them for later tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def bases():
    """(quantized model, the same values in plain layers)."""
    base = base_model()
    return base, dequantized(base)


def adapted(base, row, folder):
    """A copy of `base` with the row's adapter, which has been trained a little: nothing is what it started from."""
    torch.manual_seed(3)
    base = copy.deepcopy(base)
    row.prepare(base)
    model = row.make(base, folder) if row.make else peft.get_peft_model(base, row.config(folder))
    row.finish(model)
    generator = torch.Generator().manual_seed(4)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model, row):
    return model.eval()(input_ids=models.ids(), **row.inputs).logits


def step(model, row):
    """A training step; its gradients, in the order of the parameters' names."""
    model.train()
    torch.manual_seed(5)
    optimizer = row.optimizer(model)
    loss = model(**models.inputs(), **row.inputs).loss
    if not loss.requires_grad:  # Arrow has nothing to train
        return torch.ones(1)
    loss.backward()
    grads = [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None]
    optimizer.step()
    return torch.cat([grad.flatten() for grad in grads])


def layers(model):
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, Linear4bit) and n.endswith("base_layer")}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} changed"


def test_table_has_every_method_that_peft_registers():
    shown = {kind for row in ROWS.values() for kind in row.types}
    registered = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not registered - shown, f"PEFT has {sorted(registered - shown)}: {ADD}"
    assert not shown - registered, f"PEFT has no {sorted(shown - registered)} any more"
    assert METHODS <= registered
    assert list(TABLE) == list(ROWS), "docs/peft.md and tests/peft_rows.py have other rows, or in another order"


def test_table_has_every_start_and_every_variant_of_lora():
    """Each value of a field of LoRA: a new one in PEFT fails here."""
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    starts = {value for part in typing.get_args(hint) for value in typing.get_args(part)}
    rows = Path(__file__).with_name("peft_rows.py").read_text(encoding="utf-8")
    for start in starts:
        assert f'init_lora_weights="{start.partition("[")[0]}' in rows, f"init_lora_weights={start!r}: {ADD}"
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    layer = next(module for module in layer.modules() if isinstance(module, PeftLoraLinear))
    for variant in {name for names in layer.lora_variants for name in names} - starts:
        assert f"{variant}=" in rows, f"{variant}: {ADD}"


@pytest.mark.parametrize("name", ROWS)
def test_row_says_what_happens(name, bases, tmp_path, monkeypatch):
    row, (forward, save, merge, unmerge, remark) = ROWS[name], TABLE[name]
    try:
        row.config(tmp_path)
    except ImportError as error:
        pytest.skip(str(error))  # AdaMSS wants scikit-learn, LoftQ scipy
    if forward == REFUSED:
        check_refused(name, bases[0], row, tmp_path)
        return
    ours, theirs = (adapted(base, row, tmp_path) for base in bases)
    assert forward == SAME_AS_16_BITS
    check_forward_and_training(ours, theirs, row)
    check_remark(remark, ours, row, monkeypatch)
    again = saved_and_loaded(bases[0], ours, row, tmp_path / "adapter")
    if save == NONE:
        again = saved_and_loaded(bases[1], theirs, row, tmp_path / "dense")
        assert relative_error(logits(again, row), logits(theirs, row)) > ORDER, "PEFT loads it now"
    else:
        assert save == SAME_AS_16_BITS
        assert_close(logits(again, row), logits(ours, row), SAME)
    before, expected = state_of(ours), logits(ours, row)
    if merge == NONE:
        with pytest.raises((RuntimeError, AttributeError)):
            theirs.merge_adapter()
        with pytest.raises((RuntimeError, AttributeError), match="."):
            ours.merge_adapter()
        assert unmerge == NONE
        assert_same_state(ours, before)
        return
    assert merge == SAME_AS_16_BITS
    check_merge(ours, theirs, again if save == SAME_AS_16_BITS else None, row)
    if unmerge == NONE:
        for model in (theirs, ours):
            with pytest.raises(NotImplementedError):
                model.unmerge_adapter()
        return
    assert unmerge == SAME_AS_16_BITS
    ours.unmerge_adapter()
    assert_same_state(ours, before)
    assert torch.equal(logits(ours, row), expected)


def check_remark(remark, ours, row, monkeypatch):
    """Whether base and adapter run as one product, and whether the forward pass decodes W, is what the row says."""
    decoded, dequantize = [], Linear4bit.dequantize
    with monkeypatch.context() as patch:
        patch.setattr(Linear4bit, "dequantize", lambda *args: decoded.append(args) or dequantize(*args))
        fused = fused_layers(ours.eval(), monkeypatch, **row.inputs)
    assert ("fused" in remark) == bool(fused), f"{fused} fused products"
    assert ("decodes W" in remark) == bool(decoded), f"decoded {len(decoded)} times"


def check_refused(name, base, row, folder):
    base = copy.deepcopy(base)
    before = state_of(base)
    with pytest.raises((NotImplementedError, ValueError)) as error:
        peft.get_peft_model(base, row.config(folder))
    wanted = re.split(r"[, `]", name)[0]
    shown = str(error.value).lower().replace("_", "").replace("-", "")
    assert wanted.lower().replace("-", "") in shown, f"{wanted} is not named in: {error.value}"
    assert_same_state(base, before)
    assert not any(isinstance(module, DequantizedLinear4bit) for module in base.modules())


def check_forward_and_training(ours, theirs, row):
    assert_close(logits(ours, row), logits(theirs, row), ORDER)
    if any(parameter.requires_grad for parameter in ours.parameters()):
        assert_close(step(ours, row), step(theirs, row), 2 * ORDER)
    assert_close(logits(ours, row), logits(theirs, row), ORDER)
    if hasattr(ours.base_model, "disable_adapter_layers") and not row.inputs:
        with ours.disable_adapter(), theirs.disable_adapter():
            assert_close(logits(ours, row), logits(theirs, row), ORDER)


def saved_and_loaded(base, ours, row, folder):
    ours.save_pretrained(folder, save_embedding_layers=False)
    base = copy.deepcopy(base)
    row.prepare(base)
    again = row.make(base, folder.parent) if row.make else peft.PeftModel.from_pretrained(base, folder)
    assert len(layers(again)) == len(layers(ours))
    return again


def check_merge(ours, theirs, again, row):
    """The merged weight is PEFT's, rounded once; the bias is PEFT's; unloading leaves plain layers."""
    theirs.merge_adapter()
    ours.merge_adapter()
    for name, layer in layers(ours).items():
        dense = theirs.get_submodule(name)
        q = qn.quantize(dense.weight, double_quant=layer.double_quant)
        # PEFT adds in another order: an element beside a midpoint may go to the other level.
        assert (layer.dequantize() - q.dequantize()).norm() < 0.02 * q.dequantize().norm(), name
        assert (layer.quantized_weight.codes != q.codes).float().mean() < 5e-3, name
        assert_close(layer.bias, dense.bias, SAME)
        dense.weight.data = layer.dequantize()
    assert_close(logits(ours, row), logits(theirs, row), ORDER)
    if again is not None:
        merged = again.merge_and_unload()
        assert all(type(module) is Linear4bit for module in merged.modules() if isinstance(module, Linear4bit))
        assert_close(logits(merged, row), logits(ours, row), SAME)


def test_fan_in_fan_out_is_switched_off_by_every_method_that_has_it(bases, tmp_path):
    """Over a `Linear4bit`, whose weight is [out, in]: else a method would merge, or start from, the transpose."""
    tried = set()
    for name, row in ROWS.items():
        try:
            config = row.config(tmp_path)
        except ImportError:
            continue
        if TABLE[name][0] == REFUSED or row.make or not hasattr(config, "fan_in_fan_out"):
            continue
        config.fan_in_fan_out = True
        with pytest.warns(UserWarning, match="fan_in_fan_out is set to True .* Linear4bit"):
            peft.get_peft_model(copy.deepcopy(bases[0]), config)
        assert not config.fan_in_fan_out, name
        tried.add(config.peft_type.value)
    assert {"LORA", "IA3", "VERA", "BOFT", "OFT", "HIRA", "DEFT", "SHIRA", "ADALORA"} <= tried


@pytest.mark.parametrize("name", ROWS)
def test_model_quantized_below_its_adapters_computes_the_same(name, bases, tmp_path, monkeypatch):
    row, (forward, _, merge, _, remark) = ROWS[name], TABLE[name]
    try:
        ours, theirs = (adapted(bases[1], row, tmp_path) for _ in range(2))
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))  # CorDA wants to see activations first
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    adapters = {n for n, m in ours.named_modules() if type(m) is torch.nn.Linear and f"{n}.weight" in trained}
    qn.nn.quantize_model(ours, double_quant=False, progress=False, strict=True)
    after = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert after.keys() == trained.keys() and all(after[n] is p for n, p in trained.items())
    assert all(type(ours.get_submodule(n)) is torch.nn.Linear for n in adapters)
    if remark == "it starts by changing the weight":  # to one that is no longer the same in 4 bits
        assert relative_error(logits(ours, row), logits(theirs, row)) < 1e-2
        return
    # With fp32 scales the weights are the same again.
    assert len(models.layers_of(ours)) == len(models.layers_of(bases[0]))
    check_forward_and_training(ours, theirs, row)
    if forward == SAME_AS_16_BITS:
        check_remark(remark, ours, row, monkeypatch)
        if merge == SAME_AS_16_BITS:
            check_merge(ours, theirs, None, row)


def test_model_that_cannot_be_quantized_below_its_adapters_stays_as_it_is(bases, monkeypatch):
    model = peft.get_peft_model(copy.deepcopy(bases[1]), peft.LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"q_proj: expected adapters that are not merged, got \['default'\]: unmerge"):
        qn.nn.quantize_model(model, progress=False)
    model.unmerge_adapter()
    monkeypatch.setattr(peft_methods, "METHODS", METHODS - {"LORA", "ADALORA"})
    with pytest.raises(NotImplementedError, match=r"q_proj, peft.tuners.lora.layer.Linear over Linear4bit: .* not"):
        qn.nn.quantize_model(model, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before


def one_layer(config, dtype=torch.float32):
    """(the PEFT layer over a quantized one, the quantized layer's weight decoded), the adapter with random values."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, dtype=dtype))
    model = qn.nn.quantize_model(model, skip=(), progress=False)
    weight = model[0].dequantize()
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.base_model.model[0], weight


def ia3():
    return peft.IA3Config(target_modules=["0"], feedforward_modules=[])


def test_layer_below_a_method_has_a_decoded_weight_and_saves_its_codes():
    layer, weight = one_layer(ia3())
    base = layer.base_layer
    assert type(base) is DequantizedLinear4bit and isinstance(base.weight, torch.nn.Parameter)
    assert torch.equal(base.weight, weight) and not base.weight.requires_grad
    assert torch.equal(base.weight.data, weight)
    names = dict(base.named_parameters())
    assert names["weight"] is base.W_q is base.quantized_weight.codes
    assert base.W_q.dtype == base.state_dict()["weight"].dtype == torch.uint8
    assert torch.equal(copy.deepcopy(base).weight, weight)
    for assign in (False, True):
        base.load_state_dict(state_of(base), assign=assign)
        assert torch.equal(base.weight, weight)
    base.half()
    assert base.weight.dtype == torch.float16 and base.W_q.dtype == torch.uint8
    for use_dora in (False, True):
        lora, _ = one_layer(peft.LoraConfig(target_modules=["0"], use_dora=use_dora))
        assert type(lora.base_layer) is Linear4bit


def test_writing_to_the_decoded_weight_raises():
    layer, weight = one_layer(ia3())
    base = layer.base_layer
    before = state_of(base)
    with pytest.raises(NotImplementedError, match=r"Linear4bit\.weight: expected to be read"):
        base.weight.data = weight
    with pytest.raises(NotImplementedError, match=r"Linear4bit\.weight: expected codes, got a weight"):
        base.weight = torch.nn.Parameter(weight)
    assert_same_state(base, before)


def test_start_that_writes_to_the_weight_is_named_by_its_method(monkeypatch):
    monkeypatch.setattr(peft_methods, "CHANGES_BASE", ())
    with pytest.raises(NotImplementedError, match=r"LORA.*: Linear4bit\.weight: expected to be read"):
        one_layer(peft.LoraConfig(target_modules=["0"], init_lora_weights="pissa"))


def test_unsupported_method_over_a_layer_is_named_in_the_error(monkeypatch):
    class Subclass(Linear4bit):
        """What may compute something else."""

    model = torch.nn.Sequential(Subclass.from_linear(torch.nn.Linear(64, 96)))
    with pytest.raises(NotImplementedError, match="IA3 over Subclass: expected a Linear4bit, got a subclass"):
        peft.get_peft_model(model, ia3())
    monkeypatch.setattr(peft_methods, "METHODS", METHODS - {"IA3"})
    with pytest.raises(NotImplementedError, match="IA3 over Linear4bit: expected one of the methods in docs/peft.md"):
        one_layer(ia3())
    peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 96)), ia3())  # without quantized layers, it is PEFT's


def test_failed_merge_changes_nothing():
    layer, _ = one_layer(ia3())
    layer.ia3_l["default"].data[1] = float("nan")
    before = state_of(layer)
    with pytest.raises(ValueError, match="weight: expected finite values, got"):
        layer.merge()
    assert not layer.merged and type(layer.base_layer) is DequantizedLinear4bit
    layer.ia3_l["default"].data[1] = 1
    for name, tensor in layer.state_dict().items():
        assert "ia3_l" in name or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight_in_another_format_is_the_methods_rounded_once(dtype):
    layer, weight = one_layer(ia3(), dtype)
    base = layer.base_layer
    base.replace_weight(qn.quantize(weight, "int4", 32, double_quant=False))
    scaled = base.dequantize() * layer.ia3_l["default"]
    q = qn.quantize(scaled.to(dtype), "int4", 32, double_quant=False)
    layer.merge()
    assert torch.equal(base.quantized_weight.codes, q.codes) and base.format == "int4" and base.dtype == dtype
    layer.merge()  # which has been merged
    assert torch.equal(base.quantized_weight.codes, q.codes)


def test_two_methods_on_a_layer_are_right_and_merged_one_after_the_other():
    torch.manual_seed(0)
    base = qn.nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 96)), skip=(), progress=False)
    adapted = []
    for start in (base, dequantized(base)):
        torch.manual_seed(1)
        loha = peft.LoHaConfig(target_modules=["0"], init_weights=False)
        model = peft.PeftMixedModel(copy.deepcopy(start), loha, "a")
        model.add_adapter("b", peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
        model.set_adapter(["a", "b"])
        adapted.append(model.eval())
    ours, theirs = adapted
    x = torch.randn(3, 64)
    before = state_of(ours)
    assert_close(ours(x), theirs(x), ORDER)
    with pytest.raises(NotImplementedError, match=r"LoraLinear4bit over loha\.Linear over Linear4bit"):
        next(module for module in ours.modules() if isinstance(module, LoraLinear4bit)).merge()
    assert_same_state(ours, before)
    merged = ours.merge_and_unload()  # which takes one after the other
    assert type(merged[0]) is Linear4bit
    assert relative_error(merged(x), theirs(x)) < 0.15


MAKE = "qn.nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 96)), skip=(), progress=False)"


@pytest.mark.parametrize(
    ("imports", "result"),
    [
        (f"import peft, qlora_native as qn\nmodel = {MAKE}", "LoraLinear4bit"),
        (f"import qlora_native as qn\nmodel = {MAKE}\nimport peft", "to be imported before get_peft_model"),
    ],
    ids=["peft first", "peft after the model"],
)
def test_order_of_imports_gives_the_fused_layer_or_an_error(imports, result):
    program = f"""
import torch
{imports}
try:
    print(type(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).base_model.model[0]))
except RuntimeError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0 and result in shown.stdout, shown.stderr + shown.stdout


def test_quantized_layer_to_be_trained_as_a_whole_is_named_in_the_error(bases):
    base = copy.deepcopy(bases[0])
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["o_proj"])
    with pytest.raises(NotImplementedError, match=r"modules_to_save: expected .*, got model\.layers\.0.*\.o_proj"):
        peft.get_peft_model(base, config)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert peft.get_peft_model(base, config).base_model.model.lm_head.weight.requires_grad
