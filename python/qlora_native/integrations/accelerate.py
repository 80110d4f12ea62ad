"""accelerate's FSDP2 with `cpu_ram_efficient_loading`, over quantized layers.

accelerate moves the model to the meta device, shards it there, and sends the state dict of the first process to the
others. It expects only parameters in the state dict, but scales in fp32 and tables are buffers, which FSDP2 does not
shard. With this module, which is imported when a quantized layer is made after accelerate has been imported, accelerate
sends the parameters, and then each process gets the whole buffers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import fsdp_utils
from torch import nn

from .._layers.base import QuantizedLayer

# An early version of accelerate does not have it.
_fsdp2_load_full_state_dict: Any = getattr(fsdp_utils, "fsdp2_load_full_state_dict", None)


def _load(accelerator: Any, model: nn.Module, full_sd: dict[str, Any], *args: Any, **kwargs: Any) -> nn.Module:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    names = {path: [name for name, b in layer._buffers.items() if b is not None] for path, layer in layers.items()}
    for path, layer in layers.items():  # so that they are not in the state dict
        layer._non_persistent_buffers_set.update(names[path])
    try:
        model = _fsdp2_load_full_state_dict(accelerator, model, full_sd, *args, **kwargs)
    finally:
        for path, layer in layers.items():
            layer._non_persistent_buffers_set.difference_update(names[path])
    for path, layer in layers.items():
        for name in names[path]:
            buffer = layer._buffers[name]
            if accelerator.is_main_process:
                buffer = full_sd[f"{path}.{name}"].to(accelerator.device).contiguous()
            else:
                buffer = torch.empty_like(buffer, device=accelerator.device)
            dist.broadcast(buffer, src=0)
            layer._buffers[name] = buffer
    return model


if _fsdp2_load_full_state_dict is not None:
    fsdp_utils.fsdp2_load_full_state_dict = functools.wraps(_fsdp2_load_full_state_dict)(_load)
