"""Optimizers with moments in 8 bits: AdamW, Adam, Lion and AdEMAMix. Each has a paged form, whose moments can leave
the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._optim.algorithms import ADAMW, ADEMAMIX, LION
from ._optim.base import Optimizer8bit
from ._optim.paged import Paged

__all__ = [
    "AdEMAMix8bit",
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "Optimizer8bit",
    "PagedAdEMAMix8bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
]


class AdamW8bit(Optimizer8bit):
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits (Dettmers et al., 2022).

    It stores 2.03 bytes a parameter, where torch's AdamW stores 8. `Optimizer8bit` describes its state, of which state1
    is the first moment and state2 the second, and when it skips a step.

    `load_state_dict` also takes a state dict of bitsandbytes' AdamW8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep fp32 moments. Applies when a parameter is first stepped.
        bitsandbytes_arguments: further arguments of bitsandbytes' optimizers (amsgrad, optim_bits, args, is_paged, and
            in older versions block_wise and percentile_clipping). Only values with which it does what this one does are
            accepted.

    Raises:
        TypeError, ValueError: an option is out of its range, or a parameter that is to be trained is not fp32, bf16 or
            fp16. `step` raises for a gradient that is sparse or of another dtype, and for an option that has left its
            range; it has then changed no parameter and no moment.
    """

    algorithm = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        **bitsandbytes_arguments: Any,
    ) -> None:
        """See the class."""
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, options, bitsandbytes_arguments)


class Adam8bit(AdamW8bit):
    """Adam (Kingma and Ba, 2015) with both moments in 8 bits: AdamW8bit without weight decay.

    A weight_decay that is not 0 is decoupled, as in AdamW and in bitsandbytes' Adam8bit, while torch's Adam adds it to
    the gradient. State, state dicts and errors are those of AdamW8bit; bitsandbytes' class is Adam8bit.

    Args:
        params, lr, betas, eps, weight_decay, min_8bit_size, bitsandbytes_arguments: as in AdamW8bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        **bitsandbytes_arguments: Any,
    ) -> None:
        """See the class."""
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size, **bitsandbytes_arguments)


class Lion8bit(Optimizer8bit):
    """Lion (Chen et al., 2023) with its moment in 8 bits: 1.02 bytes a parameter.

        p <- (1 - lr * weight_decay) p - lr * sign(beta1 m + (1 - beta1) g)        m <- beta2 m + (1 - beta2) g

    Every element moves by lr, or stays if the sign is that of 0. The authors use an lr of a third to a tenth of
    AdamW's, and a weight_decay that is three to ten times as large. `Optimizer8bit` describes the state, which has only
    state1 and absmax1, and when a step is skipped. A parameter group has an eps, as in bitsandbytes, but nothing reads
    it.

    `load_state_dict` also takes a state dict of bitsandbytes' Lion8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: the decay rates in the direction of the step and in the moment, each in [0, 1).
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep an fp32 moment. Applies when a parameter is first stepped.
        bitsandbytes_arguments: further arguments of bitsandbytes' Lion8bit (args, is_paged, and in older versions
            block_wise and percentile_clipping). Only values with which it does what this one does are accepted.

    Raises:
        TypeError, ValueError: as in AdamW8bit.
    """

    algorithm = LION

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        **bitsandbytes_arguments: Any,
    ) -> None:
        """See the class."""
        options = {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, options, bitsandbytes_arguments)


class AdEMAMix8bit(Optimizer8bit):
    """AdEMAMix (Pagliardini et al., 2024) with its three moments in 8 bits: 3.05 bytes a parameter.

    It is AdamW with a second, slow first moment s, in which gradients of thousands of steps ago still count:

        s <- beta3 s + (1 - beta3) g
        p <- (1 - lr * weight_decay) p - lr (m / (1 - beta1^t) + alpha s) / (sqrt(v / (1 - beta2^t)) + eps)

    With alpha = 0 the parameters are those of AdamW8bit, bit for bit. `Optimizer8bit` describes the state, but here
    state1 is [2, *p.shape] and absmax1 [2, blocks]: m, then s, as in bitsandbytes.

    `load_state_dict` also takes a state dict of bitsandbytes' AdEMAMix8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: decay rates of m, v and s, each in [0, 1).
        alpha: the factor of s in the step; the factor of m is 1.
        t_alpha: the steps over which alpha rises linearly to its value; with None or 0 it has its value at once.
        t_beta3: the steps over which beta3 rises from beta1 to its value, so that 1 / ln beta rises linearly; with None
            or 0 it has its value at once.
        eps: added to the root of the second moment.
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep fp32 moments. Applies when a parameter is first stepped.
        bitsandbytes_arguments: a further argument of bitsandbytes' AdEMAMix8bit (is_paged), with a value
            with which it does what this one does.

    Raises:
        TypeError, ValueError: as in AdamW8bit; also if t_beta3 is given and the first or the third beta is 0.
    """

    algorithm = ADEMAMIX

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: float | None = None,
        t_beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        **bitsandbytes_arguments: Any,
    ) -> None:
        """See the class."""
        options = {
            "lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3, "eps": eps,
            "weight_decay": weight_decay, "min_8bit_size": min_8bit_size,
        }  # fmt: skip
        super().__init__(params, options, bitsandbytes_arguments)


class PagedAdamW8bit(Paged, AdamW8bit):
    """AdamW8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Without a GPU it keeps them in ordinary memory, and warns once. Arguments, state, state dict and results are those
    of AdamW8bit, bit for bit; `stats` also counts what was paged.
    """


class PagedAdam8bit(Paged, Adam8bit):
    """Adam8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Without a GPU it keeps them in ordinary memory, and warns once. Arguments, state, state dict and results are those
    of Adam8bit, bit for bit; `stats` also counts what was paged.
    """


class PagedLion8bit(Paged, Lion8bit):
    """Lion8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Without a GPU it keeps them in ordinary memory, and warns once. Arguments, state, state dict and results are those
    of Lion8bit, bit for bit; `stats` also counts what was paged.
    """


class PagedAdEMAMix8bit(Paged, AdEMAMix8bit):
    """AdEMAMix8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Without a GPU it keeps them in ordinary memory, and warns once. Arguments, state, state dict and results are those
    of AdEMAMix8bit, bit for bit; `stats` also counts what was paged.
    """
