"""Experts in 16 bits that observe their inputs, each its own."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.calibrate import add_gram
from .._layers.experts import Experts4bit


class ObservedExperts(Experts4bit):
    """Stands in for an `Experts4bit` until the experts of a layer are quantized: it multiplies by the 16-bit weights.

    Attributes:
        tokens: the rows of each expert that were observed.
        grams: XᵀX [K, K] in fp32 of each expert; None if no row has reached it.
    """

    def __init__(self, parameter: nn.Parameter, transposed: bool) -> None:
        """Make the experts of a parameter [E, N, K], or [E, K, N] if `transposed`."""
        nn.Module.__init__(self)
        self.register_parameter("weight", parameter)
        self.transposed = transposed
        self._shape = tuple(self.dense().shape)
        self.num_experts, self.out_features, self.in_features = self._shape
        self.dtype = parameter.dtype
        self.tokens = [0] * self.num_experts
        self.grams: list[Tensor | None] = [None] * self.num_experts

    def dense(self) -> Tensor:
        """The weights [E, N, K]."""
        weight = self._parameters["weight"]
        return weight.transpose(1, 2) if self.transposed else weight

    def observe(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> None:
        """Add the rows of each expert to its Gram matrix."""
        for e, (first, end) in enumerate(pairwise(offsets.tolist())):
            if first == end:
                continue
            if self.grams[e] is None:
                self.grams[e] = torch.zeros(self.in_features, self.in_features, device=x.device)
            add_gram(self.grams[e], x[first:end])
            self.tokens[e] += end - first

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply each row of x by the weight of its expert, as `Experts4bit.forward` does."""
        y = x.new_empty(len(x), self.out_features)
        for e, (first, end) in enumerate(pairwise(offsets.tolist())):
            if first < end:
                y[first:end] = F.linear(x[first:end], self.dense()[e], None if bias is None else bias[e])
        return y
