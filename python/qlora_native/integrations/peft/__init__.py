"""PEFT's LoRA on `Linear4bit`: adapter and quantized weight run as one fused product, also for DoRA."""

from ._lora import LoraLinear4bit, register

__all__ = ["LoraLinear4bit", "register"]
