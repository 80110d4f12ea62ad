"""Where memory can be paged between host and GPU, and what the core must know of writes to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C


def is_pageable(device: torch.device) -> bool:
    """Whether tensors on `device` can be paged: on a GPU, and on the emulated one of the tests."""
    return device.type == "cuda" or (device.type == "cpu" and _C.cpu_tensors_backend() == "cuda_emulated")


def note_written(tensor: Tensor) -> None:
    """Tell the core that torch's current stream has written `tensor`, of which a GPU may have a copy (PagedWeights)."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or not is_pageable(tensor.device):
        return
    cuda = tensor.device.type == "cuda"
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if cuda else 0
    _C.paged_weight_written(tensor.data_ptr(), cuda, tensor.device.index or 0, stream)
