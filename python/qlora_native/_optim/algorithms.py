"""The algorithms of the optimizers of optim.py: what tells one from another, and the shapes of their state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._core.blocks import ceil_div

BLOCKSIZE = 256  # elements of a moment that share a scale, as in bitsandbytes
# {argument that only bitsandbytes' optimizers have: the values with which they do what ours do}.
BITSANDBYTES_ARGUMENTS = {
    "amsgrad": (False,),
    "optim_bits": (32, 8),  # bitsandbytes' 8-bit classes take 32 and mean 8
    "args": (None,),
    "block_wise": (True,),
    "percentile_clipping": (100,),
}


@dataclass(frozen=True)
class Algorithm:
    """How one optimizer of optim.py differs from the others. The C++ core has its arithmetic (optimizer.h).

    Attributes:
        name: its name for the op.
        moments: the number of moments in state1, and in state2 if it has one.
        numbers: the options of a parameter group that are finite numbers of at least 0.
        steps: the options that are a count of steps, or None.
        betas: the number of betas.
        bitsandbytes_arguments: the keys of BITSANDBYTES_ARGUMENTS that bitsandbytes' class takes, or once took.
    """

    name: str
    moments: tuple[int, ...]
    numbers: tuple[str, ...] = ("lr", "eps", "weight_decay")
    steps: tuple[str, ...] = ()
    betas: int = 2
    bitsandbytes_arguments: tuple[str, ...] = tuple(BITSANDBYTES_ARGUMENTS)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states that hold moments."""
        return ("state1", "state2")[: len(self.moments)]

    @property
    def scales(self) -> tuple[str, ...]:
        """The names of the scales of these states."""
        return ("absmax1", "absmax2")[: len(self.moments)]


ADAMW = Algorithm("adamw", (1, 1))
LION = Algorithm("lion", (1,), bitsandbytes_arguments=("args", "block_wise", "percentile_clipping"))
ADEMAMIX = Algorithm(
    "ademamix",
    (2, 1),
    numbers=("lr", "eps", "weight_decay", "alpha"),
    steps=("t_alpha", "t_beta3"),
    betas=3,
    bitsandbytes_arguments=(),
)


def shapes_of(algorithm: Algorithm, param: Tensor, in_8_bits: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the moments of a parameter, and of their scales if the moments are in 8 bits."""
    several = [(count,) if count > 1 else () for count in algorithm.moments]
    dtype, blocks = torch.uint8 if in_8_bits else torch.float32, ceil_div(param.numel(), BLOCKSIZE)
    shapes = {name: (dtype, (*first, *param.shape)) for name, first in zip(algorithm.states, several, strict=True)}
    if in_8_bits:
        shapes |= {
            name: (torch.float32, (*first, blocks)) for name, first in zip(algorithm.scales, several, strict=True)
        }
    return shapes
