"""The rows of docs/peft.md, on a small model: every method that PEFT registers, and LoRA's variants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import peft
import torch
import transformers
from lora import dequantized
from peft import PeftConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

import qlora_native as qn

WIDTH, INNER = 64, 96
TARGETS = ["q_proj", "up_proj"]  # [64, 64] and [96, 64]
TASK = "CAUSAL_LM"
OF_TASK = {"task_ids": torch.zeros(2, dtype=torch.long)}


def base_model() -> nn.Module:
    """A Llama of one layer, quantized, whose linear layers have biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return qn.nn.quantize_model(model.eval(), progress=False)


@dataclass
class Row:
    """How an adapter is made."""

    config: Callable[[Path], PeftConfig]  # from a folder that it may use
    types: tuple[str, ...] = ()  # PEFT's names of the methods that the row shows
    inputs: dict[str, Any] = field(default_factory=dict)  # further arguments of the forward pass
    prepare: Callable[[nn.Module], None] = lambda model: None  # of the model before it gets the adapter
    finish: Callable[[nn.Module], None] = lambda model: None  # of the PEFT model
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.SGD(model.parameters(), 0.1)
    make: Callable[[nn.Module, Path], nn.Module] | None = None  # instead of get_peft_model with `config`


def tuner(name: str, type_name: str, **options: Any) -> Row:
    options = {"target_modules": TARGETS, "task_type": TASK, **options}
    return Row(lambda _: getattr(peft, name)(**copy.deepcopy(options)), (type_name,))


def lora(**options: Any) -> Row:
    return tuner("LoraConfig", "LORA", **{"r": 4, "lora_alpha": 8, **options})


def prompt(name: str, type_name: str, **options: Any) -> Row:
    return Row(lambda _: getattr(peft, name)(task_type=TASK, **copy.deepcopy(options)), (type_name,))


def _experts(folder: Path) -> dict[str, str]:
    """{name: folder} of two adapters that differ, with the names under which X-LoRA looks for them."""
    folders = {name: str(folder / name) for name in ("0", "1")}
    for name, path in folders.items():
        if not Path(path).exists():
            with torch.random.fork_rng():
                base = dequantized(base_model())
                torch.manual_seed(10 + int(name))
                peft.get_peft_model(base, lora(init_lora_weights=False).config(folder)).save_pretrained(path)
    return folders


def _arrow(model: nn.Module, folder: Path) -> nn.Module:
    """Arrow mixes adapters from files by the token, and trains nothing."""
    return peft.create_arrow_model(model, list(_experts(folder).values()), peft.ArrowConfig(top_k=1, rng_seed=0))


def _lora_plus(model: nn.Module) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4.0)


def _lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)


def _x_lora(folder: Path) -> PeftConfig:
    sizes = {"hidden_size": WIDTH, "xlora_depth": 1, "xlora_size": 8, "xlora_dropout_p": 0.0}
    return peft.XLoraConfig(task_type=TASK, adapters=_experts(folder), **sizes)


def _no_cache(model: nn.Module) -> None:
    model.config.use_cache = False


def _activations(model: nn.Module) -> None:
    peft.initialize_lora_eva_weights(model, [models.inputs()] * 4, show_progress_bar=False)


ROWS: dict[str, Row] = {
    "LoRA": lora(),
    'LoRA, `init_lora_weights="gaussian"`': lora(init_lora_weights="gaussian"),
    'LoRA, `"orthogonal"`': lora(init_lora_weights="orthogonal"),
    "EVA": replace(lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)), finish=_activations),
    "MiCA": lora(init_lora_weights="mica"),
    "PiSSA": lora(init_lora_weights="pissa"),
    'PiSSA, `"pissa_niter_4"`': lora(init_lora_weights="pissa_niter_4"),
    "OLoRA": lora(init_lora_weights="olora"),
    "CorDA": lora(init_lora_weights="corda", corda_config=CordaConfig()),
    "LoRA-GA": lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
    "LoftQ": lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "LoRA+": replace(lora(), optimizer=_lora_plus),
    "LoRA-FA": replace(lora(), optimizer=_lora_fa),
    "LoRA, `lora_bias=True`": lora(lora_bias=True),
    "aLoRA": lora(alora_invocation_tokens=[int(models.ids()[0, 4])]),
    "BD-LoRA": lora(use_bdlora=BdLoraConfig(["q_proj"], ["up_proj"], nblocks=2)),
    "VeLoRA": lora(velora_config=VeloraConfig()),
    "MonteCLoRA": lora(monteclora_config=MontecloraConfig()),
    "Arrow": replace(lora(arrow_config=peft.ArrowConfig()), make=_arrow),
    "QALoRA": lora(use_qalora=True),
    "KaSA": lora(kasa_config=KasaConfig()),
    "LoRA, `target_parameters`": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "AdaLoRA": tuner("AdaLoraConfig", "ADALORA", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
    "AdaMSS": tuner("AdamssConfig", "ADAMSS", r=4, num_subspaces=2, subspace_rank=1),
    "BEFT": tuner("BeftConfig", "BEFT"),
    "BOFT": tuner("BOFTConfig", "BOFT", boft_block_size=4),
    "C3A": tuner("C3AConfig", "C3A", block_size=32),
    "DEFT": tuner("DeftConfig", "DEFT", r=4),
    "DeLoRA": tuner("DeloraConfig", "DELORA", r=4),
    "FourierFT": tuner("FourierFTConfig", "FOURIERFT", n_frequency=20),
    "FRoD": tuner("FrodConfig", "FROD"),
    "GLoRA": tuner("GloraConfig", "GLORA", r=4),
    "GraLoRA": tuner("GraloraConfig", "GRALORA", r=4, gralora_k=2),
    "HiRA": tuner("HiraConfig", "HIRA", r=4),
    "HRA": tuner("HRAConfig", "HRA", r=4),
    "IA³": tuner("IA3Config", "IA3", feedforward_modules=["up_proj"]),
    "Lily": tuner("LilyConfig", "LILY", r=4, num_B=2),
    "LoHa": tuner("LoHaConfig", "LOHA", r=4),
    "LoKr": tuner("LoKrConfig", "LOKR", r=4),
    "MiSS": tuner("MissConfig", "MISS", r=4),
    'MiSS, `init_weights="bat"`': tuner("MissConfig", "MISS", r=16, init_weights="bat"),
    'MiSS, `"mini"`': tuner("MissConfig", "MISS", r=4, mini_r=8, init_weights="mini"),
    "OFT": tuner("OFTConfig", "OFT", oft_block_size=8),
    "OSF": tuner("OSFConfig", "OSF", effective_rank=8),
    "PEANuT": tuner("PeanutConfig", "PEANUT", r=4),
    "Poly": replace(tuner("PolyConfig", "POLY", r=4, n_tasks=2, n_skills=2), inputs=OF_TASK),
    "PSOFT": tuner("PsoftConfig", "PSOFT", r=4),
    "PVeRA": tuner("PveraConfig", "PVERA", r=8),
    "RandLoRA": tuner("RandLoraConfig", "RANDLORA", r=4),
    "RoAd": tuner("RoadConfig", "ROAD", group_size=16),
    "SHiRA": tuner("ShiraConfig", "SHIRA", r=4),
    "Supertuning": tuner("SupertuningConfig", "SUPERTUNING", sparsity=0.9),
    "TinyLoRA": tuner("TinyLoraConfig", "TINYLORA"),
    "Uni-LoRA": tuner("UniLoraConfig", "UNILORA", r=4, theta_d_length=64),
    "VB-LoRA": tuner("VBLoRAConfig", "VBLORA", r=2, num_vectors=8, vector_length=32),
    "VeRA": tuner("VeraConfig", "VERA", r=8),
    "WaveFT": tuner("WaveFTConfig", "WAVEFT", n_frequency=20),
    "X-LoRA": Row(_x_lora, ("XLORA",), prepare=_no_cache),
    "LN tuning": tuner("LNTuningConfig", "LN_TUNING", target_modules=["input_layernorm"]),
    "trainable tokens": tuner(
        "TrainableTokensConfig", "TRAINABLE_TOKENS", target_modules=None, token_indices=models.ids()[0, :2].tolist()
    ),
    "prompt tuning": prompt("PromptTuningConfig", "PROMPT_TUNING", num_virtual_tokens=4),
    "multitask prompt tuning": replace(
        prompt("MultitaskPromptTuningConfig", "MULTITASK_PROMPT_TUNING", num_virtual_tokens=4, num_tasks=2),
        inputs=OF_TASK,
    ),
    "P-tuning": prompt("PromptEncoderConfig", "P_TUNING", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": prompt("PrefixTuningConfig", "PREFIX_TUNING", num_virtual_tokens=4),
    "CPT": prompt("CPTConfig", "CPT", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]),
    "Cartridges": prompt("CartridgeConfig", "CARTRIDGE", num_virtual_tokens=4),
    "Llama-Adapter": prompt("AdaptionPromptConfig", "ADAPTION_PROMPT", adapter_len=4, adapter_layers=1),
    "ShadowPEFT": tuner("ShadowConfig", "SHADOW", target_modules=None, r=4, shadow_dropout=0.0),
}
