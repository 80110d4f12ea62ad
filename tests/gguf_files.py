"""Random models of the architectures that can be exported, and readers of their files from other libraries; and random
files of the architectures that transformers reads.
"""

import gguf
import models
import numpy as np
import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

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


# ---- files for reading -----------------------------------------------------------------------------------------------

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": models.VOCABULARY, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
T5 = {"n_positions": 128, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
T5["feed_forward_proj"] = "gated-gelu"  # transformers takes every T5 for gated
# Value heads that are twice as many as key heads, so that their order differs.
QWEN35_SIZES = {"head_dim": 64, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN35_SIZES |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
SHARED = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
# {architecture in a file: (that of transformers, sizes beside SIZES)}, from both of transformers' mappings.
READ = {
    "llama": ("LlamaForCausalLM", {"head_dim": 64}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "moe_intermediate_size": 1408}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "moe_intermediate_size": 768, "head_dim": 64}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 64}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 64}),
    "phi3": ("Phi3ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 256, "n_head": 4, "max_position_embeddings": 1024}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {"intermediate_size": 512, "state_size": 16, "time_step_rank": 256}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "t5": ("T5ForConditionalGeneration", T5),
    "qwen35": ("Qwen3_5ForCausalLM", QWEN35_SIZES),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", {**QWEN35_SIZES, **EXPERTS, **SHARED}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}),
}
# Parts of names of the tensors that llama.cpp leaves in fp32 beside vectors: routers, convolutions, tables.
IN_FP32 = ("ffn_gate_inp", "conv", "ssm_a", "attn_rel_b", "position_embd", "time_mix")


def write_random(path, architecture, types, blocks, changes=(), extra=(), keys=()):
    """Write a file of random tensors for an architecture of READ.

    Args:
        path: the new file.
        architecture: a key of READ.
        types: the types of its matrices in turn.
        blocks: makes the bytes [rows, bytes of a row] from (type, rows, K, seed).
        changes: {name: type} of matrices that have another type.
        extra: {name: array} of further tensors.
        keys: {name: value} of further keys, strings and ints and floats.

    Returns:
        {name: type} of its matrices.
    """
    model = skeleton(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, architecture, model.config)
    for name, value in dict(keys).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    written, state = {}, model.state_dict()
    names = _names(model, architecture)
    tied = model.all_tied_weights_keys
    for seed, (name, own) in enumerate(names.items()):
        if own in tied or own not in state:
            continue
        shape = list(state[own].shape)
        if architecture == "gpt2" and len(shape) == 2 and name.startswith("blk"):
            shape.reverse()  # Conv1D
        if name.endswith(("_gate_exps", "_up_exps")):
            shape[1] //= 2
        shape = [size for size in shape if size > 1]
        name += "" if name.endswith((".weight", ".bias", "ssm_a", "ssm_d")) else ".weight"
        if len(shape) == 1 or any(part in name for part in IN_FP32):
            values = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
            writer.add_tensor(name, -values if "ssm_a" in name else values)
            continue
        kind = types[len(written) % len(types)]
        if shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]:
            kind = "Q5_0"  # as llama-quantize chooses for rows of K-quants that are no multiple of 256
        if name.endswith("_up_exps.weight"):
            kind = written[name.replace("_up_", "_gate_")]
        written[name] = kind = dict(changes).get(name, kind)
        if kind == "F32":
            writer.add_tensor(name, 0.1 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
            continue
        *leading, K = shape
        data = blocks(kind, int(np.prod(leading)), K, seed).reshape(*leading, -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, array in dict(extra).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _names(model, architecture):
    """{name in a file: name in transformers}. Those of experts' gates and of what they gate are of one parameter."""
    if not architecture.startswith("qwen35"):
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(model.config.to_dict())
        return get_gguf_hf_weights_map(model, processor)
    names = {}
    for own in model.state_dict():
        name = own
        for part, new in QWEN35.items():
            name = name.replace(part, new)
        names[name] = own
        if name.endswith("_gate_exps"):
            names[name.replace("_gate_", "_up_")] = own
    return names


def skeleton(architecture):
    """The model of transformers on the meta device."""
    name, changes = READ[architecture]
    model_class = getattr(transformers, name)
    sizes = changes if architecture == "t5" else {**SIZES, **changes}
    with torch.device("meta"):
        return model_class(model_class.config_class(**{**sizes, "vocab_size": models.VOCABULARY}))


def _add_config(writer, architecture, config):
    """Write the keys that transformers reads the config from."""
    mapping = GGUF_CONFIG_MAPPING.get(architecture, GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text")))
    if architecture.startswith("qwen35"):
        mapping = QWEN35_KEYS
        writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
        writer.add_uint32(f"{architecture}.full_attention_interval", 2)
        writer.add_array(f"{architecture}.rope.dimension_sections", [4, 2, 2, 0])
        writer.add_uint32(f"{architecture}.rope.dimension_count", config.head_dim // 4)
        inner = config.linear_num_value_heads * config.linear_value_head_dim
        writer.add_uint32(f"{architecture}.ssm.inner_size", inner)
    for key, name in mapping.items():
        value = getattr(config, name, None) if isinstance(name, str) else None
        value = 10000.0 if name == "rope_theta" else value
        if architecture == "lfm2" and name == "num_key_value_heads":
            value = [value if kind == "full_attention" else 0 for kind in config.layer_types]
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}.get(type(value))
        if add is not None:
            add(f"{architecture}.{key}", value)
    if architecture == "lfm2":
        writer.add_float32("lfm2.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(config.vocab_size)])


# {part of a name in transformers: in a file}, of Qwen3.5, whose names are not in the package gguf.
QWEN35 = {
    "model.embed_tokens.": "token_embd.", "lm_head.": "output.", "model.norm.": "output_norm.", "model.layers.": "blk.",
    "linear_attn.in_proj_qkv.": "attn_qkv.", "linear_attn.in_proj_z.": "attn_gate.",
    "linear_attn.in_proj_a.": "ssm_alpha.", "linear_attn.in_proj_b.": "ssm_beta.", "linear_attn.norm.": "ssm_norm.",
    "linear_attn.conv1d.": "ssm_conv1d.",
    "linear_attn.out_proj.": "ssm_out.", "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias",
    "self_attn.q_proj.": "attn_q.", "self_attn.k_proj.": "attn_k.", "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.", "self_attn.q_norm.": "attn_q_norm.", "self_attn.k_norm.": "attn_k_norm.",
    "input_layernorm.": "attn_norm.", "post_attention_layernorm.": "post_attention_norm.",
    "mlp.gate.": "ffn_gate_inp.", "mlp.shared_expert_gate.": "ffn_gate_inp_shexp.",
    "mlp.shared_expert.gate_proj.": "ffn_gate_shexp.", "mlp.shared_expert.up_proj.": "ffn_up_shexp.",
    "mlp.shared_expert.down_proj.": "ffn_down_shexp.", "mlp.experts.gate_up_proj": "ffn_gate_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.gate_proj.": "ffn_gate.", "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}  # fmt: skip
QWEN35_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim", "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads", "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_count": "num_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
