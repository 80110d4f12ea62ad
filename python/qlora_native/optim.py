"""Optimizers with moments in 8 bits: AdamW, Adam, Lion and AdEMAMix, and each paged: its moments can leave the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._optim_base import Optimizer8bit
from ._optim_state import ADAMW, ADEMAMIX, LION
from ._paged import Paged

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
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits a parameter (Dettmers et al., 2022).

    2.03 bytes a parameter instead of AdamW's 8. State, skipped steps and promises are those of `Optimizer8bit`: state1
    is the first moment, state2 the second.

    `load_state_dict` also takes a state dict of bitsandbytes' AdamW8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep fp32 moments. Applies when a parameter is first stepped.
        bitsandbytes_arguments: what bitsandbytes' optimizers take on top (amsgrad, optim_bits, args, is_paged, and of
            older versions block_wise and percentile_clipping), with the values that mean what this one does.

    Raises:
        TypeError, ValueError: an option out of its range; a parameter that is to be trained and is not fp32, bf16 or
            fp16. In `step`: a sparse gradient, or one of another dtype, or an option that is out of its range by now;
            no parameter and no moment has changed then.
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

    A weight_decay that is not 0 is decoupled, as in bitsandbytes' Adam8bit: it is AdamW's then. (torch's Adam adds it
    to the gradient.) Arguments, state, state dicts and errors are AdamW8bit's; bitsandbytes' class is Adam8bit.
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

    Every element moves by lr, or not at all where the sign is that of 0. Its authors take a third to a tenth of AdamW's
    lr, and a weight_decay as many times as large. State, skipped steps and promises are those of `Optimizer8bit`, with
    state1 and absmax1 alone. A parameter group has an eps that nothing reads, because bitsandbytes' has it.

    `load_state_dict` also takes a state dict of bitsandbytes' Lion8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: of the direction and of the moment, each in [0, 1).
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep an fp32 moment. Applies when a parameter is first stepped.
        bitsandbytes_arguments: what bitsandbytes' Lion8bit takes on top (args, is_paged, and of older versions
            block_wise and percentile_clipping), with the values that mean what this one does.

    Raises:
        TypeError, ValueError: as AdamW8bit.
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

    AdamW whose first moment m is joined by a slow one, s, in which gradients of thousands of steps ago still count:

        s <- beta3 s + (1 - beta3) g
        p <- (1 - lr * weight_decay) p - lr (m / (1 - beta1^t) + alpha s) / (sqrt(v / (1 - beta2^t)) + eps)

    With alpha = 0 the parameters are AdamW8bit's, bit for bit. State, skipped steps and promises are those of
    `Optimizer8bit`, but state1 is [2, *p.shape] and absmax1 [2, blocks]: m, then s, as bitsandbytes has them.

    `load_state_dict` also takes a state dict of bitsandbytes' AdEMAMix8bit, and `to_bitsandbytes` returns one for it.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor, which is read at each step.
        betas: decay rates of m, v and s, each in [0, 1).
        alpha: the factor of s in the step, where that of m is 1.
        t_alpha: steps over which alpha rises to its value, linearly; None or 0: it has it from the first step on.
        t_beta3: steps over which beta3 rises from beta1 to its value, so that 1 / ln beta rises linearly; None or 0: it
            has it from the first step on.
        eps: added to the root of the second moment.
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep fp32 moments. Applies when a parameter is first stepped.
        bitsandbytes_arguments: what bitsandbytes' AdEMAMix8bit takes on top (is_paged), with the value that means what
            this one does.

    Raises:
        TypeError, ValueError: as AdamW8bit; and the first or the third beta is 0 and t_beta3 is given.
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

    Where there is no GPU it is AdamW8bit, with ordinary memory, and says so once. Arguments, state and state dict are
    AdamW8bit's, and so are the results, bit for bit; `stats` also tells of the paging.
    """


class PagedAdam8bit(Paged, Adam8bit):
    """Adam8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Where there is no GPU it is Adam8bit, with ordinary memory, and says so once. Arguments, state and state dict are
    Adam8bit's, and so are the results, bit for bit; `stats` also tells of the paging.
    """


class PagedLion8bit(Paged, Lion8bit):
    """Lion8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Where there is no GPU it is Lion8bit, with ordinary memory, and says so once. Arguments, state and state dict are
    Lion8bit's, and so are the results, bit for bit; `stats` also tells of the paging.
    """


class PagedAdEMAMix8bit(Paged, AdEMAMix8bit):
    """AdEMAMix8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    Where there is no GPU it is AdEMAMix8bit, with ordinary memory, and says so once. Arguments, state and state dict
    are AdEMAMix8bit's, and so are the results, bit for bit; `stats` also tells of the paging.
    """
