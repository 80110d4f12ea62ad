"""What each layer of PEFT adds to, or makes of, the weight that it stands over: the change of one tensor.

A change takes the tensor as the model has it, so a `Conv1D` of GPT-2 has its weight [in, out] and an embedding its
rows. It is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .._core.errors import bad


class Change(Protocol):
    """What an adapter makes of one tensor."""

    kind: ClassVar[str]

    def apply(self, tensor: Tensor) -> Tensor:
        """The changed tensor, in fp32."""


class Added:
    """A change that adds the same to any tensor, and so can be added to the parts that the files have of it."""

    kind: ClassVar[str]

    def delta(self, expert: int | None = None) -> Tensor:
        """What is added, in fp32: to the whole tensor, or to one expert of a stack."""
        raise NotImplementedError

    def apply(self, tensor: Tensor) -> Tensor:
        """The sum, in fp32."""
        return tensor.float() + self.delta()


@dataclass(frozen=True)
class LowRank(Added):
    """LoRA: W + scaling * lora_b lora_a.

    Attributes:
        lora_b, lora_a: [rows of W, rank] and [rank, columns of W]: B and A of a linear layer, A^T and B^T if W is
            transposed.
        scaling: a number.
    """

    kind = "LoRA"
    lora_b: Tensor
    lora_a: Tensor
    scaling: float

    def delta(self, expert: int | None = None) -> Tensor:
        """The product, scaled."""
        return self.scaling * (self.lora_b.float() @ self.lora_a.float())

    def apply(self, tensor: Tensor) -> Tensor:
        """The sum; the product is not kept beside it."""
        return torch.addmm(tensor.float(), self.lora_b.float(), self.lora_a.float(), alpha=self.scaling)


@dataclass(frozen=True)
class Dora:
    """DoRA (Liu et al. 2024): the sum of LoRA, with vectors of the given length.

    Attributes:
        lora: the change of LoRA.
        magnitude: the lengths [rows] of W's rows, or [columns] of its columns.
        of_rows: which of the two they are.
    """

    kind = "DoRA"
    lora: LowRank
    magnitude: Tensor
    of_rows: bool

    def apply(self, tensor: Tensor) -> Tensor:
        """The sum, scaled by row or by column."""
        merged = self.lora.apply(tensor)
        factor = self.magnitude.float().flatten() / torch.linalg.norm(merged, dim=1 if self.of_rows else 0)
        return merged.mul_(factor[:, None] if self.of_rows else factor)


@dataclass(frozen=True)
class Experts(Added):
    """LoRA of each expert of a stack [E, rows, columns].

    Attributes:
        lora_b, lora_a: [E, rows, rank] and [E, rank, columns].
        scaling: a number.
    """

    kind = "LoRA of experts"
    lora_b: Tensor
    lora_a: Tensor
    scaling: float

    def delta(self, expert: int | None = None) -> Tensor:
        """The products of all experts, or the one of `expert`."""
        if expert is None:
            return self.scaling * (self.lora_b.float() @ self.lora_a.float())
        return LowRank(self.lora_b[expert], self.lora_a[expert], self.scaling).delta()

    def apply(self, tensor: Tensor) -> Tensor:
        """The sums; one product at a time is kept beside them."""
        merged = tensor.to(torch.float32, copy=True)
        for e, weight in enumerate(merged):
            weight.addmm_(self.lora_b[e].float(), self.lora_a[e].float(), alpha=self.scaling)
        return merged


@dataclass(frozen=True)
class Hadamard(Added):
    """LoHa (Hyeon-Woo et al. 2022): W + scaling * (a1 b1) * (a2 b2), the products multiplied element by element."""

    kind = "LoHa"
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scaling: float

    def delta(self, expert: int | None = None) -> Tensor:
        """The product of the products, scaled."""
        (a1, b1), (a2, b2) = self.first, self.second
        return (a1.float() @ b1.float()).mul_(a2.float() @ b2.float()).mul_(self.scaling)


@dataclass(frozen=True)
class Vector(Added):
    """`lora_bias`: a bias plus scaling times another."""

    kind = "lora_bias"
    bias: Tensor
    scaling: float

    def delta(self, expert: int | None = None) -> Tensor:
        """The other bias, scaled."""
        return self.scaling * self.bias.float()


@dataclass(frozen=True)
class Scaled:
    """IA³ (Liu et al. 2022): a tensor times a factor for each row, or for each column."""

    kind = "IA³"
    factor: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """The product."""
        return tensor.float() * self.factor.float()


@dataclass(frozen=True)
class Rows:
    """Trained tokens: some rows of an embedding have new values."""

    kind = "trained tokens"
    index: Tensor
    rows: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """The embedding with the new rows."""
        return tensor.float().index_copy(0, self.index, self.rows.float())


def changes_of(path: str, layer: BaseTunerLayer, read: Callable[[Tensor], Tensor]) -> dict[str, Change]:
    """The changes that a layer of PEFT makes to the module below it, at `path`.

    `read` gives the value of a tensor of the layer, which is on the meta device.

    Returns:
        {name of a parameter of the module: its change}.
    """
    (name,) = layer.active_adapters
    if isinstance(layer, TrainableTokensLayer):
        source = layer.tied_adapter or layer
        index, rows = torch.tensor(source.token_indices[name]), len(layer.weight)
        if index.dtype != torch.int64 or not ((0 <= index) & (index < rows)).all() or len(index.unique()) < len(index):
            raise bad("adapter_config.json: trained tokens", f"different rows of the {rows} of {path}", index.tolist())
        return {"weight": Rows(index, read(source.trainable_tokens_delta[name]))}
    if isinstance(layer, IA3Layer) and type(layer) is IA3Linear:
        vector = read(layer.ia3_l[name])
        changes: dict[str, Change] = {"weight": Scaled(vector.t() if layer.fan_in_fan_out else vector)}
        if not layer.is_feedforward and layer.get_base_layer().bias is not None:
            changes["bias"] = Scaled(vector.flatten())
        return changes
    if type(layer) is LoHaLinear:
        first, second = ((f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        factors = [tuple(read(getattr(layer, part)[name]) for part in pair) for pair in (first, second)]
        return {"weight": Hadamard(*factors, _scaling(path, layer, name))}
    if type(layer) is LoraEmbedding:
        lora_b, lora_a = (read(part[name]).t() for part in (layer.lora_embedding_A, layer.lora_embedding_B))
        return {"weight": _lora(layer, name, LowRank(lora_b, lora_a, _scaling(path, layer, name)), read, False)}
    if type(layer) not in (LoraLinear, ParamWrapper):
        raise bad(f"adapter, {path}", "a layer that can be merged here", f"PEFT's {type(layer).__module__} of it")
    lora_b, lora_a = read(layer.lora_B[name].weight), read(layer.lora_A[name].weight)
    scaling = _scaling(path, layer, name)
    if type(layer) is ParamWrapper:
        if layer.get_param().dim() == 2:
            return {layer.parameter_name: LowRank(lora_b, lora_a, scaling)}
        E = layer.num_experts
        b, a = lora_b.reshape(len(lora_b), -1, E).permute(2, 0, 1), lora_a.reshape(E, -1, lora_a.shape[1])
        if not layer._did_swap_in_out_features:  # the parameter is [E, in, out]
            b, a = a.transpose(1, 2), b.transpose(1, 2)
        return {layer.parameter_name: Experts(b, a, scaling)}
    if layer.fan_in_fan_out:
        lora_b, lora_a = lora_a.t(), lora_b.t()
    changes = {"weight": _lora(layer, name, LowRank(lora_b, lora_a, scaling), read, not layer.fan_in_fan_out)}
    if layer.lora_bias[name]:
        if layer.get_base_layer().bias is None:
            raise bad(f"adapter, {path}: lora_bias", "a layer with a bias to add it to", "one without")
        changes["bias"] = Vector(read(layer.lora_B[name].bias), scaling)
    return changes


def _lora(layer: BaseTunerLayer, name: str, change: LowRank, read: Callable[[Tensor], Tensor], of_rows: bool) -> Change:
    if name not in layer.lora_magnitude_vector:
        return change
    return Dora(change, read(layer.lora_magnitude_vector[name].weight), of_rows)


def _scaling(path: str, layer: BaseTunerLayer, name: str) -> float:
    """The scaling that PEFT computes from alpha and rank."""
    scaling = float(layer.scaling[name])
    if not abs(scaling) <= torch.finfo(torch.float32).max:
        raise bad(f"adapter_config.json: alpha, for {path}", "a scaling that fp32 can hold", scaling)
    return scaling
