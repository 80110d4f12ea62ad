"""bitsandbytes: replace its layers by ours, or run its layers on our kernels.

    replace(model)      # every bitsandbytes.nn.Linear4bit becomes a Linear4bit over the same codes
    enable()            # bitsandbytes keeps its layers and calls our kernels

`replace` gains more: adapters run inside the product, and the weight is decoded in parts. A model in training keeps its
optimizer. `enable` changes no module, so code that expects bitsandbytes' own modules keeps working.
"""

from ._backend import disable, enable, enabled
from ._replace import quantized_weight, replace

__all__ = ["disable", "enable", "enabled", "quantized_weight", "replace"]
