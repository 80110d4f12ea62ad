"""Guards `calibrate`: what it observes, that outputs change less by it, and what it refuses."""

import copy
import warnings
from functools import partial

import pytest

transformers = pytest.importorskip("transformers")

import moe  # noqa: E402
import torch  # noqa: E402
from models import VOCABULARY, ids, load, make  # noqa: E402
from torch import nn  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native._calibrate.batches import checked_batches  # noqa: E402
from qlora_native._calibrate.feedback import Options, _best_neighbours, calibrated, factored  # noqa: E402
from qlora_native._calibrate.layers import Layers  # noqa: E402
from qlora_native._calibrate.observe import Inputs, count_within, rows_within  # noqa: E402
from qlora_native._core.microscaling import MICROSCALED  # noqa: E402
from qlora_native._core.quantize import decoded_scales  # noqa: E402
from qlora_native.convert._compressed_tensors import with_rounded_scales  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = ["nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4"]


def batches(count=4, rows=4, length=16):
    return [ids(rows, length, seed) for seed in range(count)]


def inputs_of_rank(tokens, columns, rank=8, seed=0):
    """X [tokens, columns] whose columns depend on each other and differ in size, as those of a model do."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, rank, generator=random) @ torch.randn(rank, columns, generator=random)
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=random)]
    return (mixed + 0.3 * torch.randn(tokens, columns, generator=random)) * sizes


def output_error(x, weight, q):
    y = x @ weight.T
    return ((x @ qn.dequantize(q, torch.float32).T - y).norm() / y.norm()).item()


def oracle(weight, factored, scales, code, blocksize):
    """The codes by algorithm 1 of GPTQ in float64, with fixed scales, a column at a time."""
    w, factor = weight.double().clone(), factored.factor.double()
    of_element = scales.double().repeat_interleave(blocksize)[: w.numel()].view_as(w)
    codes = torch.empty(w.shape, dtype=torch.long)
    for i, column in enumerate(factored.order.tolist()):
        scale = of_element[:, column]
        codes[:, column] = (w[:, column, None] / scale[:, None] - code.double()).abs().argmin(dim=1)
        error = (w[:, column] - code.double()[codes[:, column]] * scale) / factor[i, i]
        w[:, factored.order[i + 1 :]] -= error[:, None] * factor[i, i + 1 :]
    return codes


def nibbles(q):
    return torch.stack((q.codes >> 4, q.codes & 15), dim=-1).view(q.shape).long()


@pytest.mark.parametrize("columns", [64, 72])
@pytest.mark.parametrize(
    "options",
    [
        Options("nf4", 32, True, None),
        Options("nf4", 32, False, None),
        Options("int4", 32, False, None, partial(with_rounded_scales, dtype=torch.bfloat16)),
    ],
    ids=["8-bit scales", "fp32 scales", "bf16 scales"],
)
def test_codes_are_those_of_the_method_in_float64_for_the_stored_scales(columns, options):
    x = inputs_of_rank(400, columns)
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    found = factored(x.T @ x)
    q = calibrated(weight, [found], options)
    if options.stored is not None:
        assert torch.equal(options.stored(q).absmax, q.absmax)
    expected = oracle(weight, found, decoded_scales(q), q.code, 32)
    assert torch.equal(nibbles(q), expected)


@pytest.mark.parametrize("columns", [40, 601])
def test_factor_is_that_of_the_inverse_of_the_damped_matrix(columns):
    x = inputs_of_rank(8 * columns, columns)
    gram = x.T @ x
    found = factored(gram)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(columns)
    inverse = damped[found.order][:, found.order].inverse()
    torch.testing.assert_close((found.factor.T @ found.factor).double(), inverse, rtol=1e-4, atol=1e-7)
    assert torch.equal(found.factor, found.factor.triu())


@pytest.mark.parametrize("format", FORMATS)
def test_output_changes_less_than_by_plain_rounding(format):
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    x, others = inputs_of_rank(4000, 192).chunk(2)
    options = Options(format, None, True, None)
    plain, better = options.round_to_nearest(weight), calibrated(weight, [factored(x.T @ x)], options)
    assert (better.format, better.nbytes, better.absmax.dtype) == (plain.format, plain.nbytes, plain.absmax.dtype)
    assert output_error(x, weight, better) < 0.7 * output_error(x, weight, plain)
    assert output_error(others, weight, better) < 0.8 * output_error(others, weight, plain)


def test_codebook_of_the_users_own_is_calibrated():
    weight, x = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)), inputs_of_rank(1000, 128)
    options = Options("codebook", 64, True, torch.linspace(-3, 4, 16))
    plain, better = options.round_to_nearest(weight), calibrated(weight, [factored(x.T @ x)], options)
    assert output_error(x, weight, better) < 0.8 * output_error(x, weight, plain)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("columns", [64, 72])
def test_neighbours_of_a_stored_scale_have_no_smaller_error(format, columns):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(40, columns, generator=generator) * torch.randn(40, 1, generator=generator).exp()
    importance = torch.rand(columns, generator=generator)
    q = qn.quantize(weight, format)
    padding = (0, -weight.numel() % q.blocksize)
    w, cost = (
        nn.functional.pad(each.reshape(-1).double(), padding).view(-1, q.blocksize)
        for each in (weight, importance.expand(40, columns))
    )

    def error(stored):
        scales = q.nested_code.double()[stored.int()][:, None]
        nearest = (w[..., None] - scales[..., None] * q.code.double()).square().min(-1).values
        return (cost * nearest).sum(-1)

    chosen = _best_neighbours(q, q.absmax, weight, importance)
    others = torch.stack([error((q.absmax.int() + step).clamp(0, len(MICROSCALED[format]) - 1)) for step in (-1, 0, 1)])
    torch.testing.assert_close(error(chosen), others.min(0).values, rtol=1e-5, atol=0)
    assert not torch.equal(chosen, q.absmax)


def test_layers_that_a_text_reaches_are_run_one_after_another_beside_those_of_images():
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 2}
    images = transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=192, image_size=28, patch_size=14, **sizes)
    text = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, pad_token_id=0, **sizes | {"num_hidden_layers": 3}
    )
    config = transformers.LlavaConfig(vision_config=images, text_config=text, image_token_id=127)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        layers = Layers(model, checked_batches(model, [torch.randint(1, 120, (2, 16))]), linears)
    assert layers.modules == list(model.model.language_model.layers)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "falcon"])
def test_layers_are_run_over_the_inputs_that_the_whole_model_gives_them(family):
    model = make(family, layers=3).eval()
    given = checked_batches(model, batches(3))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    del linears[next(name for name in linears if name.endswith(("lm_head", "embed_out")))]
    with torch.no_grad():
        layers = Layers(model, given, linears.values())
        assert len(layers.modules) == 3
        with Inputs(linears).observed() as whole:
            assert list(layers.run(None, advance=False)) == [0, 1, 2]
        by_layer = Inputs(linears)
        for index in range(3):
            with by_layer.observed():
                assert list(layers.run(index, advance=True)) == [0, 1, 2]
    for name in linears:
        assert by_layer.tokens[name] == whole.tokens[name] == 3 * 64
        assert torch.equal(by_layer.gram([by_layer.key(name)], name), whole.gram([whole.key(name)], name)), name
    assert all("forward" not in layer.__dict__ for layer in layers.modules)


def test_layers_with_the_same_input_share_its_matrix():
    model = make("llama").eval()
    attention = model.model.layers[0].self_attn
    projections = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    inputs = Inputs(projections)
    with inputs.observed(), torch.no_grad():
        for batch in batches(2):
            inputs.begin({})
            model(batch)
    assert [inputs.key(name) for name in projections] == ["q_proj", "q_proj", "q_proj", "o_proj"]


def test_input_that_is_shared_in_the_first_batch_alone_is_refused():
    one, other, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(4, 8)
    inputs = Inputs({"one": one, "other": other})
    with inputs.observed():
        for shared in (x, x + 1):
            inputs.begin({})
            one(shared), other(shared)
        inputs.begin({})
        one(x)
        with pytest.raises(RuntimeError, match="other shared its input with others in the first batch"):
            other(x + 2)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "falcon", "t5"])
@pytest.mark.parametrize("sequential", [True, False])
def test_model_is_nearer_to_its_16_bits_than_by_plain_rounding(family, sequential):
    given = [{"input_ids": each, "decoder_input_ids": each} if family == "t5" else each for each in batches(8)]

    def logits(model):
        with torch.no_grad():
            held = ids(8, 16, 99)
            return model(input_ids=held, **({"decoder_input_ids": held} if family == "t5" else {})).logits

    dense, plain, better = (make(family).eval() for _ in range(3))
    plain = qn.nn.quantize_model(plain, progress=False)
    report = qn.calibrate(better, given, sequential=sequential, progress=False)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    assert {name: type(module) for name, module in better.named_modules()} == kinds
    assert not report.fallbacks
    assert len(report.weights) == sum(kind is qn.nn.Linear4bit for kind in kinds.values())
    assert all(each.after < each.before for each in report.weights)
    wanted = logits(dense)
    assert (logits(better) - wanted).norm() < (logits(plain) - wanted).norm()


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_are_the_same_for_any_number_of_threads(threads):
    models = [make("llama", dtype=torch.bfloat16) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        for model, count in zip(models, (1, threads), strict=True):
            torch.set_num_threads(count)
            qn.calibrate(model, batches(8), progress=False)
    finally:
        torch.set_num_threads(before)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_within_the_mask_alone_count():
    padded, plain = make("llama"), make("llama")
    text = batches(8)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 12:] = 0
    report = qn.calibrate(padded, [{"input_ids": each, "attention_mask": mask} for each in text], progress=False)
    qn.calibrate(plain, [each[:, :12] for each in text], progress=False)
    assert report.weights[0].tokens == 8 * 48
    errors = [
        (ours.dequantize().float() - theirs.dequantize().float()).norm() / theirs.dequantize().float().norm()
        for ours, theirs in zip(padded.modules(), plain.modules(), strict=True)
        if isinstance(ours, qn.nn.Linear4bit)
    ]
    assert max(errors) < 0.05  # fp32 sums in another order flip few codes


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 2, 3)], ids=str)
def test_inputs_that_are_no_rows_of_tokens_count_whole(shape):
    x, mask = torch.randn(shape), torch.ones(4, 8, dtype=torch.bool)
    mask[:, 6:] = False
    assert torch.equal(rows_within(mask, x), x.reshape(-1, shape[-1]))
    assert count_within(mask, x) == x.numel() // shape[-1]


def test_tied_weights_stay_tied():
    model = make("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    report = qn.calibrate(model, batches(8), progress=False)
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
    assert sum("up_proj" in each.name for each in report.weights) == 1


def test_file_is_loaded_by_stock_bitsandbytes(tmp_path, eager):
    pytest.importorskip("bitsandbytes")
    model = make("llama", dtype=torch.bfloat16, width=128, inner=128)
    qn.calibrate(model, batches(8), progress=False)
    model.save_pretrained(tmp_path)
    stock = load(tmp_path, dtype=torch.bfloat16)
    held = ids(2, 16, 99)
    with torch.no_grad():
        ours, theirs = model.eval()(held).logits.float(), stock(held).logits.float()
    assert type(stock.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    # The adapter-free products round to bf16 alike, up to the order of sums.
    assert (ours - theirs).norm() <= 2**-6 * theirs.norm()


def small(**options):
    return make("llama", **options), batches(8)


def refused(error, message, model, given, **options):
    """The call raises, and leaves the model as it was."""
    before = {name: id(module) for name, module in model.named_modules()}
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        qn.calibrate(model, given, progress=False, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "batches: expected at least one batch"),
        (ids(), TypeError, "batches: expected an iterable of tensors or mappings, got Tensor"),
        (["text"], TypeError, r"batches\[0\]: expected a tensor or a mapping, got str"),
        ([ids(1, 9)], ValueError, r"batches: expected at least 96 tokens \(1536 are enough\), got 9"),
        ([ids(), ids() + VOCABULARY], ValueError, r"batches\[1\]: input_ids: .* 0 ... 127, got \d+: the tokenizer is"),
        ([ids().float()], ValueError, r"batches\[0\]: input_ids: expected int32 or int64 \[B, T\]"),
        ([ids() > 0], ValueError, r"batches\[0\]: input_ids: expected int32 or int64 .*, got torch.bool"),
        ([ids(), ids(1, 0)], ValueError, r"batches\[1\]: input_ids: expected .* not empty, got torch.int64 \[1, 0\]"),
    ],
)
def test_unusable_batches_are_refused(given, error, message):
    refused(error, message, make("llama"), given)


def test_linear_layer_is_refused_as_a_model():
    refused(ValueError, "model: expected a module that contains nn.Linear layers", nn.Linear(8, 8), batches())


def test_nan_in_an_input_is_refused_with_the_name_of_the_layer():
    model, given = small()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    refused(ValueError, r"the inputs of model.layers.1.self_attn.q_proj: expected finite values, got NaN", model, given)


def test_weight_of_another_dtype_is_refused_with_its_name():
    model, given = small()
    model.unused = nn.Linear(64, 32).double()
    refused(TypeError, "unused.weight: expected torch.float32, torch.bfloat16 or torch.float16", model, given)


def test_nan_in_a_weight_is_refused_with_its_name():
    model, given = small()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    refused(ValueError, r"model.layers.1.mlp.down_proj.weight: expected finite values", model, given)


@pytest.mark.parametrize(("make", "family"), [(make, "llama"), (moe.make, "gpt-oss")], ids=["llama", "gpt-oss"])
def test_interruption_leaves_the_model_as_it_was(monkeypatch, make, family):
    from qlora_native._calibrate import quantizer as module

    model, given = make(family), batches(8)
    seen = []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return calibrated(*args)

    monkeypatch.setattr(module, "calibrated", interrupted)
    refused(KeyboardInterrupt, "", model, given)


def test_columns_that_are_always_zero_are_quantized():
    model, given = small()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:5] = 0
    report = qn.calibrate(model, given, progress=False)
    assert not report.fallbacks


def test_layer_that_no_batch_reaches_is_rounded_plainly_and_named():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Gated()
    expected = qn.quantize(model.unused.weight)
    with pytest.warns(UserWarning, match="unused was rounded plainly: no batch reached it"):
        report = qn.calibrate(model, [{"x": torch.randn(200, 64)}], progress=False)
    assert [each.name for each in report.fallbacks] == ["unused"]
    assert torch.equal(model.unused.quantized_weight.codes, expected.codes)
    assert "rounded plainly: unused: no batch reached it" in str(report)


def test_layer_whose_inputs_are_all_zero_is_rounded_plainly_and_named():
    model, given = small()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = qn.calibrate(model, given, progress=False)
    assert {each.name.rpartition(".")[2]: each.fallback for each in report.fallbacks} == dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), "its inputs are all 0"
    )


def test_matrix_that_is_singular_is_damped():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    found = factored(x.T @ x)
    assert found is not None and found.factor.isfinite().all()
    assert factored(torch.zeros(8, 8)) is None


def test_lack_of_memory_is_said_before_it_starts(monkeypatch):
    from qlora_native._calibrate import model as module

    model, given = small()
    monkeypatch.setattr(module, "available_memory", lambda: 10_000)
    refused(ValueError, r"fit in memory \(10,000 bytes\), got [\d,]+ bytes", model, given)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
def test_experts_are_calibrated_each_with_its_own_tokens(family):
    dense, plain, better = (moe.make(family) for _ in range(3))
    qn.nn.quantize_model(plain, progress=False)
    report = qn.calibrate(better, batches(16), progress=False)
    assert moe.experts_of(better).keys() == moe.experts_of(plain).keys() != set()
    experts = [each for each in report.weights if "experts." in each.name and each.name.endswith("]")]
    assert len(experts) == 2 * 2 * moe.E
    # Llama 4 gives all experts all tokens, times 0 where it has not chosen them.
    of_token = moe.E if family == "llama4" else dense.config.num_experts_per_tok
    assert sum(each.tokens for each in experts) == 2 * 2 * 16 * 64 * of_token
    assert all(each.after < each.before for each in experts if each.fallback is None)
    held = ids(8, 16, 99)
    with torch.no_grad():
        wanted, rounded, ours = (model(held).logits for model in (dense, plain, better))
    assert (ours - wanted).norm() < (rounded - wanted).norm()


def test_expert_with_too_few_tokens_is_rounded_plainly_and_named():
    model = moe.make("mixtral")
    expected = qn.quantize(model.model.layers[0].mlp.experts.gate_up_proj)
    with torch.no_grad():  # the router never chooses expert 3
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs() * 10
            layer.post_attention_layernorm.weight.fill_(1)
            layer.mlp.register_forward_pre_hook(lambda _, args: (args[0].abs(), *args[1:]))
    with pytest.warns(
        UserWarning, match=r"layers.0.mlp.experts.gate_up_proj\[3\] was rounded plainly: no batch reached"
    ):
        report = qn.calibrate(model, batches(8), progress=False)
    assert {each.name[-3:] for each in report.fallbacks} == {"[3]"} and len(report.fallbacks) == 4
    codes = model.model.layers[0].mlp.experts.gate_up_proj.quantized_weight.codes
    assert torch.equal(codes[3], expected.codes[3]) and not torch.equal(codes[0], expected.codes[0])


def test_refusal_puts_experts_back():
    model = moe.make("mixtral")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    before = dict(model.named_parameters())
    refused(ValueError, "layers.1.self_attn.q_proj: expected finite values", model, batches(8))
    assert {name: id(each) for name, each in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert model.config._experts_implementation != "qlora_native"


def test_model_with_adapters_gets_the_weights_that_it_gets_without():
    peft = pytest.importorskip("peft")
    model, given = small()
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    qn.calibrate(model, given, progress=False)
    qn.calibrate(adapted, given, progress=False)
    expected = [layer.quantized_weight for layer in model.modules() if isinstance(layer, qn.nn.Linear4bit)]
    found = [layer.quantized_weight for layer in adapted.modules() if isinstance(layer, qn.nn.Linear4bit)]
    assert len(found) == len(expected) == 14
    assert all(torch.equal(ours.codes, theirs.codes) for ours, theirs in zip(found, expected, strict=True))


def test_training_mode_is_kept():
    model, given = small()
    model.train()
    qn.calibrate(model, given, progress=False)
    assert all(module.training for module in model.modules())


def test_calibrated_model_is_trained_under_peft():
    peft = pytest.importorskip("peft")
    model, given = small()
    qn.calibrate(model, given, progress=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    text = ids(4, 16, 5)
    model(input_ids=text, labels=text).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(text).logits, model.eval()(text).logits)
