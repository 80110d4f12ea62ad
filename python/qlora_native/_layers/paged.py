"""`PagedWeights`: a model's quantized weights in memory of the host, which are copied to a GPU ahead of their use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C
from .._core.errors import bad, bad_type, check_memory
from .._core.paging import is_pageable, note_written
from .base import QuantizedLayer
from .embedding import Embedding4bit

# The tensors of a layer that have an element for each weight or each block. The others are small, and stay on the GPU.
_PAGED = frozenset({"weight", "absmax", "minimum", "zero_point"})


class PagedWeights:
    """Keep the quantized weights of a model in memory of the host, for a GPU that cannot hold them all.

    Codes and scales of every `Linear4bit`, `Linear8bit` and `Experts4bit` move, in place, to pinned memory of the host,
    as tensors of the GPU, which can read them there. A product with such a weight uses a copy in `device_bytes` of the
    GPU's memory. While one weight is multiplied by, the next is copied on a stream of its own: the first training step
    shows the order, forward, backward and recomputation under gradient checkpointing. What is on the GPU is not copied
    again, and nothing is copied back. Where there is no room, the weights that will be needed last make room. Results
    have the bits of weights on the GPU.

        pages = qn.nn.PagedWeights(model, device_bytes=8 << 30)  # the model may still be on the CPU
        model.to("cuda")  # moves the rest: embeddings, norms, adapters

    A layer that is moved to another device, deep-copied or given another weight has ordinary memory again. The host's
    memory of a weight is freed with its last tensor, and the GPU's when this object is gone too. `load_state_dict` into
    a paged model is noticed; after another write to a weight in place call `refresh`. Products with paged weights
    cannot be captured into CUDA graphs. Other operations, such as `dequantize`, read the weights over the bus. The host
    needs memory for all of them, for pinned memory is never swapped.

    This has run over the emulated driver of the tests alone, on no GPU.

    Attributes:
        device: the GPU.

    Args:
        model: a model with quantized layers on the CPU or on the GPU.
        device_bytes: the most bytes of the GPU's memory that the copies take. The two largest weights must fit.
        device: the GPU; None is torch's current one.

    Raises:
        TypeError, ValueError: an argument is wrong, or `device_bytes` is too few, and the message says what is needed;
            the model is then as it was.
        RuntimeError: this build, or this machine, has no CUDA.
    """

    def __init__(self, model: nn.Module, device_bytes: int, device: torch.device | str | int | None = None) -> None:
        """See the class."""
        if not isinstance(model, nn.Module):
            raise bad_type("model", "an nn.Module", type(model).__name__)
        if type(device_bytes) is not int:
            raise bad_type("device_bytes", "an int", type(device_bytes).__name__)
        if device_bytes < 1:
            raise bad("device_bytes", "at least 1", device_bytes)
        self.device = _chosen(device)
        layers = _tensors_of_layers(model)
        sizes = [[tensor.nbytes for name, tensor in layer.items() if name in _PAGED] for layer in layers]
        self._weights = _C.PagedWeights(sizes, device_bytes, self.device.type == "cuda", self.device.index or 0)
        with torch.no_grad():
            for index, layer in enumerate(layers):
                homes = map(torch.from_dlpack, self._weights.arrays(index))
                for name, tensor in layer.items():
                    tensor.data = _filled(next(homes), tensor) if name in _PAGED else tensor.to(self.device)

    def stats(self) -> dict[str, int]:
        """Count what is paged, and what was copied.

        Returns:
            "bytes_managed", the weights in the host's memory; "bytes_resident", the part of them of which the GPU has a
            copy; "bytes_fetched", what was copied so far; "prefetches", weights that were copied ahead of their
            product; "stalls", the prefetches that a product had to wait for; and "faults", weights that were copied
            only when their product was called, as in the first step.
        """
        return self._weights.stats()

    def refresh(self) -> None:
        """Forget the copies on the GPU, after something has written to weights in place.

        Products in torch's current stream and later ones in other streams see what it wrote.
        """
        cuda = self.device.type == "cuda"
        self._weights.refresh(torch.cuda.current_stream(self.device).cuda_stream if cuda else 0)


def _chosen(device: torch.device | str | int | None) -> torch.device:
    """The GPU, with its index."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if not is_pageable(chosen):
        raise bad("device", "a GPU, whose memory is not the host's", chosen)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def _tensors_of_layers(model: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors of each layer's weight, by name. A tensor that layers share is in the first of them alone."""
    found, seen = [], set()
    for path, module in model.named_modules():
        if not isinstance(module, QuantizedLayer) or isinstance(module, Embedding4bit):
            continue
        layer = {}
        for name, tensor in module.weight_tensors().items():
            argument = f"{path}.{name}" if path else name
            if type(tensor) not in (Tensor, nn.Parameter):
                raise bad_type(argument, "a plain tensor", type(tensor).__name__)
            if tensor.is_meta:
                raise bad(argument, "a tensor with values", "one on the meta device")
            check_memory(argument, tensor)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                layer[name] = tensor
        if any(name in _PAGED for name in layer):
            found.append(layer)
    if not found:
        raise bad("model", "a model with quantized layers", type(model).__name__)
    return found


def _filled(home: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the bytes of `home`."""
    home = home.view(tensor.dtype).view(tensor.shape)
    home.copy_(tensor)
    note_written(home)
    return home
