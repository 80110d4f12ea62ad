"""Small language models whose names, biases and layers differ: Llama, GPT-NeoX, T5, GPT-2, Falcon; and their files."""

import json
import warnings

import pytest
import torch
import transformers
from peak import peaks
from safetensors.torch import load_file, save_file

from qlora_native.nn import Linear4bit
from qlora_native.testing import SUM_FACTOR, unit_roundoff

# Small models, which threads slow down, and what transformers and PEFT say of their own interfaces, files and merges.
MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`", "ignore:Adapter 'default'", "ignore:merg", "ignore:Already merged"),
]
VOCABULARY = 128
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
MODEL = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
AUTO = dict.fromkeys(("t5", "bart"), transformers.AutoModelForSeq2SeqLM)


def bitsandbytes():
    """The package, without the warnings of its import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def make(family, dtype=torch.float32, layers=2, width=96, inner=72):
    """A model with random weights and ragged sizes: 96 and 72 are no multiples of 64."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    name, options = {
        "llama": ("Llama", {**sizes, "intermediate_size": inner, "num_key_value_heads": 2}),
        "gpt-neox": ("GPTNeoX", {**sizes, "intermediate_size": inner, "max_position_embeddings": 64}),
        "falcon": ("Falcon", {**sizes, "ffn_hidden_size": inner, **ENDS}),
        "gpt2": ("GPT2", {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64, **ENDS}),
        "t5": (
            "T5",
            {"d_model": width, "d_kv": width // 4, "d_ff": inner, "num_layers": layers, "num_heads": 4}
            | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
        ),
    }[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **options)
    model = getattr(transformers, MODEL.get(family, f"{name}ForCausalLM"))(config).to(dtype)
    with torch.no_grad():  # biases start at 0, where one that gets lost is not missed
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def save_with_adapter(folder, text, width, inner, layers, **options):
    """Save a Llama in bf16 with a tokenizer of `text` in FOLDER/model, and an adapter of its layers in FOLDER/adapter.

    `options` are those of save_pretrained.
    """
    peft = pytest.importorskip("peft")
    made = tokenizer([text])
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(made), num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model", **options)
    made.save_pretrained(folder / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")


def joined():
    """A model whose files have several of its layers in one tensor."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.NomicBertModel(transformers.NomicBertConfig(**sizes, intermediate_size=96))


def load(folder, family="llama", **options):
    return AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder, **options)


def tokenizer(texts, size=300):
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, size, special_tokens=["<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def loading_peaks(folder, shard, *expressions):
    """Peak memory of loading the checkpoint `bf16` in a folder, and `nf4`, which is made of it, beside the models."""
    prepare = f"""
import transformers
from qlora_native.integrations.transformers import BitsAndBytesConfig
def load(name, double_quant=True):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    return transformers.AutoModelForCausalLM.from_pretrained(
        {str(folder)!r} + "/" + name, dtype=torch.bfloat16, quantization_config=config
    )
load("bf16").save_pretrained({str(folder / "nf4")!r}, max_shard_size={shard})  # and code, threads, caches
"""
    return peaks(prepare, *expressions)


def save_adapter(folder, out, family="llama", **changes):
    """Save a PEFT adapter with random values over the checkpoint in `folder`; the model with it."""
    import peft

    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    model = peft.get_peft_model(load(folder, family, dtype=torch.float32), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # modules_to_save, biases
            parameter.data *= 1.5
    model.save_pretrained(out)
    return model


def tensors_of(folder):
    """{name: tensor} of the files of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(one, other):
    """Of {name: tensor}; of tables too, whose NaN equals no NaN."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        a, b = (t.contiguous().flatten().view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(a, b), name


def edit_tensors(path, changes):
    """Replace or add tensors of a file, and drop those that are None."""
    state = {**load_file(path), **changes}
    save_file({name: t.contiguous() for name, t in state.items() if t is not None}, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ids(rows=2, length=9, seed=1):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs():
    """What a forward pass takes: for an encoder and decoder too, and for the loss."""
    return {"input_ids": ids(), "labels": ids()}


@torch.no_grad()
def logits(model):
    model.eval()
    return model(**inputs()).logits


def rounding_of_logits(products):
    """The relative error that logits in bf16 may have after so many products. Each rounds once, by at most 2**-8 and by
    less than half of that on average, and the roundings add up like random numbers."""
    return 2**-9 * products**0.5


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def step(model, **given):
    """(loss, {name of a trained parameter: its gradient})."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, dtype=torch.float32):
    """Compare the results of two steps, but for the roundings of the dtype."""
    (loss, gradients), (expected, wanted) = ours, theirs
    assert gradients.keys() == wanted.keys()
    allowed = SUM_FACTOR * unit_roundoff(dtype)
    assert (loss - expected).abs() <= allowed * expected.abs()
    for name, gradient in wanted.items():
        # Gradients pass through the layers, each of which rounds.
        assert (gradients[name] - gradient).norm() <= 8 * allowed * gradient.norm() + 1e-12, name
