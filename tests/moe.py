"""Small mixtures of experts from configs, one for each family, because transformers names their parts differently."""

import torch
import transformers
from models import VOCABULARY, ids
from transformers.distributed import tensor_parallel

from qlora_native.nn import Experts4bit

E, HIDDEN, INNER = 4, 64, 32
COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
GROUPED = {"n_routed_experts": E, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
INNERS = {"intermediate_size": 96, "moe_intermediate_size": INNER}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
QWEN3_NEXT = {"shared_expert_intermediate_size": INNER, "layer_types": ["linear_attention", "full_attention"]}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": INNER, "moe_topk": 2, "head_dim": 8}
LONGCAT |= {"n_routed_experts": E, "zero_expert_num": 2, "num_key_value_heads": 4}
LLAMA4 = {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "attention_chunk_size": 16}
FAMILIES = {
    "qwen3-moe": ("Qwen3Moe", {**INNERS, "num_experts": E, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-next": ("Qwen3Next", {**INNERS, **LINEAR, **QWEN3_NEXT, "num_experts": E, "head_dim": 16}),
    "mixtral": ("Mixtral", {"intermediate_size": INNER, "num_local_experts": E}),
    "olmoe": ("Olmoe", {"intermediate_size": INNER, "num_experts": E}),
    "deepseek-v3": ("DeepseekV3", {**INNERS, **GROUPED, **LATENT, "num_key_value_heads": 4}),
    "glm4-moe": ("Glm4Moe", {**INNERS, **GROUPED, "head_dim": 16, "use_qk_norm": True}),
    "gpt-oss": ("GptOss", {"intermediate_size": INNER, "num_local_experts": E, "head_dim": 16, "sliding_window": 8}),
    "longcat-flash": ("LongcatFlash", {**LATENT, **LONGCAT}),
    "llama4": (
        "Llama4",
        {**LLAMA4, "intermediate_size": INNER, "num_local_experts": E, "head_dim": 16, "num_experts_per_tok": 1},
    ),
}
FROM_5_25 = hasattr(tensor_parallel, "UnitColwiseParallel")  # transformers has this style from 5.25 on
if not FROM_5_25:
    del FAMILIES["longcat-flash"]  # its experts are outside the registry there


def make(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    suffix = "Text" if family == "llama4" else ""
    config = getattr(transformers, f"{name}{suffix}Config")(**{**COMMON, **options, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():  # parameters that start at 0 or without values, where one that gets lost is not missed
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "expert" in name or "router" in name or "gate.weight" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def make_qwen3_vl(hidden=HIDDEN, inner=48):
    """A Qwen3-VL-MoE, whose files on the hub have transposed experts; transformers writes the model's own."""
    text = {**COMMON, "hidden_size": hidden, "intermediate_size": 96, "moe_intermediate_size": inner}
    text |= {"num_experts": E, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)
    return model


def routers_of(model):
    """The parameters that choose experts, by name."""
    ends = ("router.weight", "router.classifier.weight", "mlp.gate.weight")
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts4bit)}


def batch(rows=2, length=9, seed=1):
    tokens = ids(rows, length, seed)
    return {"input_ids": tokens, "labels": tokens}
