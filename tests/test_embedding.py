"""Guards 4-bit embeddings, alone and tied to an output layer: values, files, training, and what is refused."""

import copy
import io

import pytest
import torch
import transformers
from models import VOCABULARY, ids, inputs, make
from peft import LoraConfig, get_peft_model
from torch import nn

import qlora_native as qn
from qlora_native._core.weight import op_arguments
from qlora_native.functional import embedding
from qlora_native.integrations.fuse import fuse_loss
from qlora_native.integrations.transformers import BitsAndBytesConfig
from qlora_native.nn import Embedding4bit, Linear4bit, quantize_model

OPTIONS = [
    {},
    {"double_quant": False, "blocksize": 256},
    {"format": "int8"},
    {"format": "mxfp4"},
    {"format": "nvfp4"},
    {"codebook": [i / 8 - 1 for i in range(16)]},
]


def embedding_of(rows=50, width=96, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Embedding(rows, width, dtype=dtype, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("width", [1, 63, 96, 256])
def test_rows_are_those_of_the_dequantized_weight(options, width):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = Embedding4bit.from_embedding(embedding_of(width=width, dtype=dtype), **options)
        for shape, kind in (((7,), torch.int64), ((2, 3, 5), torch.int32), ((0,), torch.int64), ((), torch.int64)):
            rows = torch.randint(50, shape, dtype=kind)
            found = layer(rows)
            assert found.dtype == dtype
            assert torch.equal(found, nn.functional.embedding(rows, layer.dequantize()))
    assert embedding(rows, layer.quantized_weight, torch.float32).dtype == torch.float32


def test_strided_and_many_ids_are_looked_up():
    layer = Embedding4bit.from_embedding(embedding_of())
    rows = torch.randint(50, (64, 300)).t()[::2]
    assert torch.equal(layer(rows), nn.functional.embedding(rows, layer.dequantize()))


def test_op_passes_opcheck_and_compiles():
    layer = Embedding4bit.from_embedding(embedding_of())
    rows = torch.tensor([3, 49, 3])
    operands = (*op_arguments(layer.quantized_weight), torch.float32, rows)
    torch.library.opcheck(torch.ops.qlora_native.dequantize_rows.default, operands)
    assert torch.equal(torch.compile(layer, fullgraph=True)(rows), layer(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: embedding(torch.tensor([3, 50]), q), "rows: expected 0 ... 49, got 50 at 1"),
        (lambda q: embedding(torch.tensor([-1]), q), "rows: expected 0 ... 49, got -1 at 0"),
        (lambda q: embedding(torch.tensor([1.0]), q), "ids: expected an int64 or int32 tensor"),
        (lambda q: embedding([1], q), "ids: expected an int64 or int32 tensor"),
        (lambda q: embedding(torch.tensor([1]), q.codes), "q: expected a QuantizedWeight"),
        (lambda q: embedding(torch.tensor([1], device="meta"), q), "ids: expected a tensor on cpu"),
        (lambda q: embedding(torch.tensor([1]), q, torch.int32), "dtype: expected"),
        (lambda q: Embedding4bit.from_quantized(q, 50), "padding_idx: expected a row of 50"),
        (lambda q: Embedding4bit(0, 5), "num_embeddings, embedding_dim: expected numbers above 0"),
        (lambda q: Embedding4bit.from_embedding(nn.Linear(3, 3)), "embedding: expected an nn.Embedding"),
        (lambda q: Embedding4bit.from_embedding(embedding_of(max_norm=1.0)), "max_norm: expected None"),
        (lambda q: Embedding4bit.from_quantized(qn.quantize(torch.ones(2, 3, 4))), "q: expected"),
    ],
)
def test_bad_argument_is_named(change, message):
    q = qn.quantize(embedding_of().weight)
    with pytest.raises((ValueError, TypeError), match=message.replace("...", r"\.\.\.")):
        change(q)


def test_state_dict_and_casts_keep_the_bits():
    layer = Embedding4bit.from_embedding(embedding_of(padding_idx=-1))
    other = Embedding4bit(50, 96, padding_idx=49, dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(ids().clamp(max=49)), layer(ids().clamp(max=49)))
    assert other.padding_idx == layer.padding_idx == 49
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(ids().clamp(max=49)).dtype == torch.bfloat16
    assert torch.equal(half.weight, layer.weight)


# ---- models ----------------------------------------------------------------------------------------------------------


def model_of(tied, family="llama", dtype=torch.float32):
    model = make(family, dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return model


def decoded(model):
    """A copy in which every quantized layer is a plain one with the decoded weight."""
    other = copy.deepcopy(model)
    return other.hf_quantizer._dequantize(other, torch.float32)


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_model_computes_what_its_decoded_weights_do(tied):
    model = quantize_model(model_of(tied), skip=(), embeddings=True, progress=False)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embed) is Embedding4bit and type(head) is Linear4bit
    assert all((one is other) == tied for one, other in zip(embed.parameters(), head.parameters(), strict=True))
    with torch.no_grad():
        found, expected = model(**inputs()), decoded(model)(**inputs())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    assert {row.what for row in qn.nn.size_report(model).rows if not row.quantized} <= {"a vector", "a buffer"}


def test_embedding_stays_while_anything_is_skipped():
    model = quantize_model(model_of(tied=True), skip=("layers.0",), progress=False)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_is_quantized_while_it_is_read_and_comes_back_bit_for_bit(tied, tmp_path):
    dense = model_of(tied)
    dense.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=[])
    config.bnb_4bit_quant_type = "nf4"
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=config)
    assert type(model.get_input_embeddings()) is Embedding4bit
    assert same_state(model, quantize_model(dense, skip=(), embeddings=True, progress=False))

    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert same_state(again, model)
    head, embed = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head._parameters["weight"] is embed._parameters["weight"]) == tied
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, model.eval()(**inputs()).logits)


def test_live_quantized_model_with_its_embedding_comes_back_bit_for_bit(tmp_path):
    model = quantize_model(model_of(tied=True), skip=(), embeddings=True, progress=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert same_state(again, model)


@pytest.mark.parametrize("tied", [False, True])
def test_adapter_trains_over_a_model_without_a_16_bit_matrix(tied):
    model = quantize_model(model_of(tied), skip=(), embeddings=True, progress=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model.enable_input_require_grads()
    assert fuse_loss(model)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "LORA over Embedding4bit: expected an embedding in 16 bits"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "modules_to_save: expected modules"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices: expected"),
    ],
)
def test_training_of_a_4_bit_embedding_is_named_in_the_error(config, message):
    model = quantize_model(model_of(tied=False), skip=(), embeddings=True, progress=False)
    with pytest.raises(NotImplementedError, match=message):
        get_peft_model(model, LoraConfig(r=4, **config))


def test_other_number_of_tokens_is_named_in_the_error():
    model = quantize_model(model_of(tied=True), skip=(), embeddings=True, progress=False)
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    for tokens in (None, VOCABULARY - 3):
        assert model.resize_token_embeddings(tokens, pad_to_multiple_of=64) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="resize_token_embeddings: expected 128 tokens"):
        model.resize_token_embeddings(VOCABULARY + 3)


def test_refused_resize_leaves_the_embedding_in_16_bits_as_it_is():
    model = quantize_model(model_of(tied=False), skip=(), progress=False)
    assert not isinstance(model.get_input_embeddings(), Embedding4bit)
    with pytest.raises(ValueError, match="resize_token_embeddings: expected 128 tokens, as Linear4bit has, got 140"):
        model.resize_token_embeddings(140)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == VOCABULARY
