"""bitsandbytes: replace its layers by ours, or run its layers on our kernels."""

from ._replace import disable, enable, enabled, quantized_weight, replace

__all__ = ["disable", "enable", "enabled", "quantized_weight", "replace"]
