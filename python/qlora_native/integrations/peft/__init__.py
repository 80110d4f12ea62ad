"""PEFT's LoRA on `Linear4bit`: adapter and quantized weight run as one fused product, also for DoRA.

    model = get_peft_model(quantized_model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(quantized_model, folder)

Importing this module makes PEFT put `LoraLinear4bit` around each `Linear4bit`, for every config, and lets PEFT's other
methods stand over it (docs/peft.md). It is imported when a `Linear4bit` is made after PEFT has been imported.

**The adapter's dtype.** PEFT makes adapters in the base layer's `compute_dtype` and then, by default
(`autocast_adapter_dtype=True`), casts them to fp32. Keep this for training: AdamW's steps are about `lr` in size, and
bf16, with its 8 bits of precision, rounds away every step smaller than 1/512 of the weight that it is added to. The
fused op reads fp32 adapters beside bf16 activations, so it does not cast activations to fp32 and back, as PEFT does.
"""

from ._lora import LoraLinear4bit, register

__all__ = ["LoraLinear4bit", "register"]
