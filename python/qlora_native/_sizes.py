"""What a model's bytes are: quantized, or left alone and why. Nothing stays in 16 bits without a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ._layer import QuantizedLayer

__all__ = ["Left", "Row", "SizeReport", "has_note", "left_alone", "linears_of_routers", "note_left", "size_report"]

_NOTE = "_why_not_quantized"  # an attribute of a module that was left alone on purpose
_SHOWN = 3  # names of a row


@dataclass(frozen=True)
class Left:
    """A parameter that stays as it is.

    Attributes:
        name, tensor: the parameter.
        reason: why it stays.
        unknown: it is a weight, and it is not known how its module multiplies by it.
    """

    name: str
    tensor: Tensor
    reason: str
    unknown: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it may be the weights of several experts: three dimensions, none of them 1."""
        return self.tensor.dim() == 3 and min(self.tensor.shape) > 1

    def __str__(self) -> str:
        """Name, size and reason."""
        return f"{self.name}, {self.tensor.nbytes:,} bytes, is left as it is: {self.reason}"


@dataclass
class Row:
    """Tensors that share a reason.

    Attributes:
        quantized: whether they are a quantized weight.
        what: their format, or why they were left alone.
        names: of the tensors, or of the quantized weights.
        bytes: of all of them.
    """

    quantized: bool
    what: str
    names: list[str] = field(default_factory=list)
    bytes: int = 0


@dataclass
class SizeReport:
    """A model's bytes: quantized, left alone and why. `print` shows a table.

    Attributes:
        rows: those of quantized weights first, each part by falling size.
    """

    rows: list[Row]

    @property
    def quantized(self) -> int:
        """Bytes of quantized weights, scales and tables included."""
        return sum(row.bytes for row in self.rows if row.quantized)

    @property
    def left_alone(self) -> int:
        """Bytes of everything else."""
        return sum(row.bytes for row in self.rows if not row.quantized)

    def __str__(self) -> str:
        """A table."""
        total = max(self.quantized + self.left_alone, 1)
        lines = [f"{'bytes':>16}  {'share':>7}  {'tensors':>7}"]
        for row in self.rows:
            kind = "quantized" if row.quantized else "left alone"
            names = ", ".join(row.names[:_SHOWN]) + (
                f", and {len(row.names) - _SHOWN} more" * (len(row.names) > _SHOWN)
            )
            share = f"{row.bytes / total:.1%}"
            lines.append(f"{row.bytes:>16,}  {share:>7}  {len(row.names):>7}  {kind}, {row.what}: {names}")
        return "\n".join(lines)


def size_report(model: nn.Module) -> SizeReport:
    """What the parameters and buffers of `model` are, each counted once."""
    rows: dict[tuple[bool, str], Row] = {}

    def add(quantized: bool, what: str, name: str, size: int) -> None:
        row = rows.setdefault((quantized, what), Row(quantized, what))
        row.names.append(name)
        row.bytes += size

    seen: set[int] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            tensors = [tensor for tensor in layer.weight_tensors().values() if id(tensor) not in seen]
            seen.update(map(id, tensors))
            if tensors:
                scales = "8 bits" if layer.double_quant else "fp32"
                what = f"{layer.format} in blocks of {layer.blocksize}, scales in {scales}"
                add(True, what, path, sum(tensor.nbytes for tensor in tensors))
    for left in left_alone(model, seen):
        add(False, left.reason, left.name, left.tensor.nbytes)
    for name, buffer in model.named_buffers():
        if id(buffer) not in seen:
            add(False, "a buffer", name, buffer.nbytes)
    return SizeReport(sorted(rows.values(), key=lambda row: (not row.quantized, -row.bytes)))


def note_left(module: nn.Module, reason: str) -> None:
    """Remember why the weights of `module` were not quantized, for the report."""
    setattr(module, _NOTE, reason)


def has_note(module: nn.Module) -> bool:
    """Whether it is known why the weights of `module` were not quantized."""
    return _NOTE in vars(module)


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts: it stays in its own precision, as a small change sends a row elsewhere."""
    return any(word in type(module).__name__.lower() for word in ("router", "gating"))


def linears_of_routers(model: nn.Module) -> list[str]:
    """Paths of the linear layers in routers, which are noted there as such."""
    found = []
    for path, router in model.named_modules():
        for name, child in router.named_children() if is_router(router) else ():
            if type(child) is nn.Linear:
                note_left(child, "a router")
                found.append(f"{path}.{name}" if path else name)
    return found


def left_alone(model: nn.Module, quantized: set[int]) -> Iterator[Left]:
    """The parameters of `model` but those whose id is in `quantized`, with the reason why each stays."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in quantized and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Left(name, parameter, *_reason(name, parameter, module))


def _reason(name: str, parameter: Tensor, module: nn.Module) -> tuple[str, bool]:
    """Why a parameter stays, and whether that is because nothing is known of its use."""
    kind = type(module).__name__
    if ".lora_" in name:
        return "an adapter", False
    if parameter.dim() < 2 or name.endswith("bias"):
        return "a vector", False
    if not parameter.is_floating_point():
        return f"{parameter.dtype} already", False
    if isinstance(module, nn.Embedding):
        return "an embedding", False
    if has_note(module):
        return vars(module)[_NOTE], False
    if is_router(module):
        return "a router", False
    if isinstance(module, _ConvNd):
        return "a convolution", False
    if type(module) is nn.Linear:
        return "a linear layer", True
    if isinstance(module, nn.Linear):
        return f"a subclass of nn.Linear, {kind}", True
    return f"a parameter of {kind}, whose use is not known", parameter.dim() == 2 or min(parameter.shape) > 1
