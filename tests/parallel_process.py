"""One of several processes of models that transformers shards. test_parallel.py reads what it writes.

torchrun --nproc-per-node 2 parallel_process.py FOLDER
"""

import shutil
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from models import edit_json, ids, load, logits
from models import make as make_model
from moe import FROM_5_25
from sharding import leave
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

import qlora_native as qn
from qlora_native._layers.base import QuantizedLayer
from qlora_native.integrations.transformers import BitsAndBytesConfig, KeepQuantized

SIZES = {"vocab_size": 128, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"intermediate_size": 512, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **LLAMA),
    "moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE, num_key_value_heads=4, intermediate_size=256),
}
MODELS = ("llama", "llama-nf4", "moe", "moe-nf4")  # in 32 bits, quantized by each process; and quantized in their files
TARGETS = {"llama": "all-linear", "moe": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RATE = 1e-2
CUT_EXPERTS = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"}
# What transformers has from 5.25 on.
BY_HEADS = {"model.layers.*.self_attn.q_proj": "unit_colwise"}
ONE_OF_BOTH = {"whole experts": {"ep_size": None}, "whole layers": {"tp_plan": {}}}


def save(folder):
    """Save the models of MODELS."""
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "experts" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / family)
        base(folder, family).save_pretrained(folder / f"{family}-nf4")
    ragged = folder / "ragged"  # rows of 96 elements, whose halves are no whole blocks
    make_model("llama").save_pretrained(ragged)
    shutil.copytree(ragged, folder / "gptq")
    edit_json(folder / "gptq" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def base(folder, name, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return load(folder / name, dtype=torch.float32, quantization_config=config, **options)


def make(folder, name, **options):
    """The model with an adapter."""
    torch.manual_seed(1)
    targets = TARGETS[name.partition("-")[0]]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(base(folder, name, **options), config)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def results(model, adapter):
    """What a model computes and how much of it this process has, before and after a step; its adapter is saved."""
    found = {"bytes": sum(m.quantized_weight.nbytes for m in model.modules() if isinstance(m, QuantizedLayer))}
    found["logits"] = logits(model)
    model.train()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found["loss"], found["gradients"] = loss.detach(), {name: whole(p.grad) for name, p in trained.items()}
    model.save_pretrained(adapter, save_embedding_layers=False)
    options = {"eps": 1.0, "weight_decay": 0.0, "min_8bit_size": 256}  # eps: gradients of 0 make no step of RATE
    optimizer = qn.optim.AdamW8bit(trained.values(), lr=RATE, **options)
    optimizer.step()
    found["after"] = {name: whole(p) for name, p in trained.items()}
    optimizer.zero_grad()
    qn.fuse(model)
    model.gradient_checkpointing_enable()
    fused = model(input_ids=ids(), labels=ids()).loss
    fused.backward()
    found["fused"] = fused.detach()
    return found


def sharded(count, name, **changes):
    """What `from_pretrained` takes: the layers are cut, or the experts divided among the processes."""
    sizes = {"tp_size": count, "ep_size": count if name.startswith("moe") else None}
    return {"distributed_config": DistributedConfig(**{**sizes, **changes})}


def message(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(folder, count):
    """{case: the error}"""
    llama, moe = ((base(folder, name, **sharded(count, name))) for name in ("llama-nf4", "moe-nf4"))
    experts = peft.LoraConfig(target_parameters=["mlp.experts.down_proj"])
    found = {
        "save_pretrained": message(llama.save_pretrained, folder / "no"),
        "dequantize": message(llama.dequantize),
        "merge": message(make(folder, "llama-nf4", **sharded(count, "llama")).merge_adapter),
        "experts": message(base, folder, "moe", **sharded(count, "moe", ep_size=None, tp_plan=CUT_EXPERTS)),
        "adapters of experts": message(peft.get_peft_model, moe, experts),
        "columns": message(base, folder, "ragged", **sharded(count, "llama")),
        "fsdp_size": message(base, folder, "llama", **sharded(count, "llama", tp_size=1, fsdp_size=count)),
        "pp_size": message(base, folder, "llama", **sharded(count, "llama", tp_size=1, pp_size=count)),
        "KeepQuantized": message(load, folder / "gptq", quantization_config=KeepQuantized(), **sharded(count, "llama")),
    }
    if FROM_5_25:
        found["heads"] = message(base, folder, "llama", **sharded(count, "llama", tp_plan=BY_HEADS))
    for config in (
        peft.LoraConfig(use_dora=True, target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
    ):
        model = base(folder, "llama-nf4", **sharded(count, "llama"))
        found[type(config).__name__] = message(peft.get_peft_model, model, config)
    dense = load(folder / "llama", **sharded(count, "llama"))
    found["quantize_model"] = message(qn.nn.quantize_model, dense, progress=False)
    mesh = dist.device_mesh.init_device_mesh("cpu", (count,))
    layer = parallelize_module(qn.nn.Linear4bit(64, 64), mesh, ColwiseParallel())
    found["parallelize_module"] = message(layer, torch.ones(1, 64))
    return found


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    count, written = dist.get_world_size(), {}
    for name in MODELS:
        written[name] = results(make(folder, name, **sharded(count, name)), folder / f"{name}-adapter-{count}")
    if FROM_5_25:
        for case, changes in ONE_OF_BOTH.items():
            model = make(folder, "moe-nf4", **sharded(count, "moe", **changes))
            written[case] = results(model, folder / f"{case}-{count}")
    dist.barrier()  # the first process has saved the adapter
    loaded = peft.PeftModel.from_pretrained(
        base(folder, "llama-nf4", **sharded(count, "llama")), folder / f"llama-nf4-adapter-{count}"
    )
    written["loaded"] = logits(loaded)
    written["refusals"] = refusals(folder, count)
    torch.save(written, folder / f"written-{count}-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
