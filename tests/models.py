"""Small language models from configs, whose names, biases and layers differ: Llama, GPT-NeoX, T5, GPT-2, Falcon."""

import torch
import transformers
from safetensors.torch import load_file

from qlora_native.nn import Linear4bit
from qlora_native.testing import SUM_FACTOR, unit_roundoff

VOCABULARY = 128
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
MODEL = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
AUTO = dict.fromkeys(("t5", "bart"), transformers.AutoModelForSeq2SeqLM)


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


def load(folder, family="llama", **options):
    """The checkpoint of a family's model in `folder`."""
    return AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder, **options)


def tensors_of(folder):
    """{name: tensor} of the files of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def ids(rows=2, length=9, seed=1):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs():
    """What a forward pass takes: for an encoder and decoder too, and for the loss."""
    return {"input_ids": ids(), "labels": ids()}


@torch.no_grad()
def logits(model):
    model.eval()
    return model(**inputs()).logits


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
