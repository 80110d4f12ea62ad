"""Random models of the architectures that can be exported, and readers of their files from other libraries."""

import gguf
import models
import torch
import transformers

from qlora_native.convert.gguf import ARCHITECTURES


def make(architecture, dtype=torch.float32, **changes):
    """A random model of two layers, with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    options = {
        **{"vocab_size": models.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        # transformers reads GGUF's head_dim for llama alone; 128 is what it takes for Qwen3.
        **({"head_dim": 128} if architecture.startswith("Qwen3") else {}),
        **changes,
    }
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=0.7, std=0.2)
    return model.to(dtype)


def make_all(tmp_path_factory):
    """{architecture: folder in several shards}; of Llama others with biases, and with a tied output layer."""
    made = {}
    for name in (*ARCHITECTURES, "biased", "tied"):
        made[name] = tmp_path_factory.mktemp(name)
        changes = {"biased": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}
        architecture = name if name in ARCHITECTURES else "LlamaForCausalLM"
        make(architecture, **changes.get(name, {})).save_pretrained(made[name], max_shard_size="80KB")
    return made


def read(path):
    """{name: the tensor as fp32} of a GGUF file, by the package's reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def kinds(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def from_gguf(path, **options):
    """The model that transformers makes of a GGUF file."""
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
