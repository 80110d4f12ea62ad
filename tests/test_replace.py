"""Guards `replace`: the layers of a live bitsandbytes model become ours; what is shared, and what must not change."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402

bnb = models.bitsandbytes()
from lora import LINEARS, TASK, assert_close, families, fused_layers, logits  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.bitsandbytes import quantized_weight, replace  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit  # noqa: E402

pytestmark = [*models.MARKS, pytest.mark.usefixtures("eager")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: checkpoint}; sizes are multiples of 64, where bitsandbytes' CPU kernels are right."""
    made = {}
    for family in LINEARS:
        made[family] = tmp_path_factory.mktemp(family)
        models.make(family, torch.float32, width=128, inner=192).save_pretrained(made[family])
    return made


def stock(folders, family="llama", dtype=torch.float32, double_quant=True):
    """A model that transformers has loaded into bitsandbytes' layers, in training: in evaluation it repacks weights."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": dtype}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    return models.load(folders[family], family, dtype=dtype, quantization_config=config).train()


def theirs(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def pointers(layer):
    state = layer.weight.quant_state
    nested = [state.state2.absmax, state.state2.code] if state.nested else []
    tensors = [layer.weight, state.absmax, *nested, state.code, *([] if layer.bias is None else [layer.bias])]
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("double_quant", [True, False], ids=["dq", "absmax"])
@families
def test_codes_are_shared_and_the_model_computes_the_same(folders, family, double_quant):
    model = stock(folders, family, double_quant=double_quant)
    before = {name: pointers(layer) for name, layer in theirs(model).items()}
    expected = logits(model)
    assert replace(model) is model
    assert not theirs(model)
    layers = models.layers_of(model)
    assert layers.keys() == before.keys()
    for name, layer in layers.items():
        tensors = [*layer.weight_tensors().values(), *([] if layer.bias is None else [layer.bias])]
        offset = [layer.offset] if double_quant else []
        assert {t.data_ptr() for t in tensors} - {t.data_ptr() for t in offset} == before[name], f"{name} was copied"
        assert layer.training
    assert_close(logits(model), expected, 1e-5)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_in_another_dtype_are_shared(storage):
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage)
    model = nn.Sequential(layer.to("cpu"), nn.Identity())
    pointer, weight = layer.weight.data_ptr(), bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    replace(model)
    assert model[0].weight.data_ptr() == pointer and model[0].weight.dtype == torch.uint8
    assert torch.equal(model[0].dequantize(), weight)
    assert model[0](torch.randn(2, 64)).dtype == torch.float32 and model[0].compute_dtype == torch.bfloat16


@families
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=lambda c: next(iter(c), "plain"))
def test_training_under_peft_continues(folders, family, changes, monkeypatch):
    def step(model, optimizer):
        model(**models.inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def begin():
        torch.manual_seed(1)
        options = {"task_type": TASK.get(family, "CAUSAL_LM"), "target_modules": "all-linear", **changes}
        model = peft.get_peft_model(stock(folders, family), peft.LoraConfig(r=4, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
        step(model, optimizer)
        return model, optimizer

    (ours, optimizer), (expected, other) = begin(), begin()
    adapters = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    wrappers = {name for name, m in ours.named_modules() if isinstance(m, peft.tuners.lora.bnb.Linear4bit)}
    replace(ours)
    assert {name for name, m in ours.named_modules() if isinstance(m, LoraLinear4bit)} == wrappers
    after = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert after.keys() == adapters.keys() and all(after[name] is p for name, p in adapters.items())
    assert fused_layers(ours, monkeypatch) == len(wrappers)
    step(ours, optimizer)
    step(expected, other)
    assert_close(logits(ours), logits(expected), 1e-4)
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert_close(after[name], parameter, 1e-4)


def test_replaced_model_is_saved_as_before_and_gets_our_adapters(folders, tmp_path, monkeypatch):
    model = stock(folders, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "before")
    replace(model)
    model.save_pretrained(tmp_path / "after")
    models.assert_same_bits(*(models.tensors_of(tmp_path / name) for name in ("before", "after")))
    assert model.num_parameters() > 0 and not model.is_loaded_in_4bit
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert fused_layers(model, monkeypatch) == 14
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(stock(folders, dtype=torch.bfloat16), tmp_path / "adapter")
    assert_close(logits(again).float(), logits(model).float(), 2e-2)


def test_model_that_may_be_offloaded_is_replaced(folders):
    model = stock(folders)
    model.hf_quantizer.quantization_config.llm_int8_enable_fp32_cpu_offload = True  # with it, those on a CPU stay dense
    replace(model)
    assert len(models.layers_of(model)) == 14 and not model.is_loaded_in_4bit
    assert not model.config.quantization_config.llm_int8_enable_fp32_cpu_offload


def test_repacked_layer_is_unpacked():
    """On a CPU with AVX512_BF16, one evaluation leaves another order of the codes, and scales in bf16."""
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    x = torch.randn(4, 128).bfloat16()
    layer(x)
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack on this machine")
    expected = layer(x)
    before = copy.deepcopy(vars(state)), layer.weight.data.clone()
    model = replace(nn.Sequential(layer))
    assert vars(state).keys() == before[0].keys() and torch.equal(layer.weight.data, before[1]), "the original changed"
    assert model[0].absmax.dtype == torch.float32 and not model[0].double_quant
    assert_close(model(x), expected, 2**-7)


def test_hooks_and_sharing_are_kept():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(64, 64)})
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))
    replace(model)
    assert model["a"] is model["b"][0] and isinstance(model["a"], qn.nn.Linear4bit)
    assert type(model["c"]) is nn.Linear
    model["a"](torch.randn(1, 64))
    assert called


def test_hooks_get_what_they_got_before_and_are_removed_by_their_handles():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    calls = []
    note = lambda name: lambda *args, **kwargs: calls.append((name, len(args)))  # noqa: E731
    handles = [
        layer.register_forward_pre_hook(note("before")),
        layer.register_forward_pre_hook(note("before, with keywords"), with_kwargs=True),
        layer.register_forward_hook(note("after"), always_call=True),
        layer.register_forward_hook(note("after, with keywords"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(note("before backward")),
        layer.register_full_backward_hook(note("after backward")),
    ]

    def calls_of(layer):
        calls.clear()
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.randn(2, 63))
        return sorted(calls)

    expected = calls_of(layer)
    assert len(expected) == 10
    replaced = replace(nn.Sequential(layer))[0]
    assert calls_of(replaced) == expected
    for handle in handles:
        handle.remove()
    assert calls_of(replaced) == []


def test_failed_replacement_leaves_the_model_as_it_was(folders):
    good = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.Sequential(good, bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match=r"1\.weight: expected one that is quantized, .* got torch.float32"):
        replace(model)
    assert model[0] is good
    with pytest.raises(ValueError, match="model: expected a module that contains bitsandbytes layers, got one"):
        replace(good)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got dict"):
        replace({})
    with pytest.warns(UserWarning, match=r"found no bitsandbytes.nn.Linear4bit, but 1 torch\.nn.*\.Linear"):
        replace(nn.Sequential(nn.Linear(2, 2)))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    merged = peft.get_peft_model(stock(folders), config)
    merged.merge_adapter()
    count = len(theirs(merged))
    with pytest.raises(ValueError, match=r"q_proj: expected adapters that are not merged, got \['default'\]"):
        replace(merged)
    assert len(theirs(merged)) == count
    loaded = stock(folders)
    loaded.hf_quantizer.quantization_config.llm_int8_threshold = "6"
    with pytest.raises(TypeError, match="llm_int8_threshold must be a float"):
        replace(loaded)
    assert len(theirs(loaded)) == count
    assert quantized_weight(good).shape == (64, 64)
