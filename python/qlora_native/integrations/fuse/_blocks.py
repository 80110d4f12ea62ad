"""`fuse_blocks(model)`: gated activations and RMS norms of a model of transformers as one op each.

    fuse_blocks(model)                      # then train as before

Between its products a block of a language model computes f(gate) * up and a norm. From torch's parts autograd keeps a
tensor for every part, those of the norm in fp32; the ops of `qlora_native.functional` keep their operands, and take a
pass over memory each. They are put in where a module computes just that, which is found out by trying, whatever its
family is: an activation returns a `DeferredActivation`, whose product with another tensor is the op, and a norm has
another forward. Nothing else of the model changes; state dicts and checkpoints are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._core.elementwise import ACTIVATIONS
from ..._core.errors import FLOAT_DTYPES
from ...functional import gated_activation, rms_norm
from ._deferred import Deferred, is_plain

# What the ops compute, by the names of `gated_activation`.
_DEFINITIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
_GATES = (("gate_proj", "up_proj"), ("gate_up_proj",))  # children or parameters of a module with a gated linear unit
_ACTIVATIONS_OF_MODULES = ("act_fn", "activation_fn")
_EPS_OF_NORMS = ("variance_epsilon", "eps")


class DeferredActivation(Deferred):
    """f(gate), which is computed together with its product with `up`, if such a product is what follows.

    Attributes:
        module: the activation.
        gate: [..., N], its input.
    """

    def __init__(self, module: nn.Module, gate: Tensor) -> None:
        """Defer the activation of `gate`."""
        super().__init__()
        self.module, self.gate = module, gate

    def compute(self) -> Tensor:
        """What the module gives."""
        return type(self.module).forward(self.module, self.gate)

    def __mul__(self, up: Any) -> Any:
        """f(gate) * up."""
        gate = self.gate
        if is_plain(up) and up.shape == gate.shape and up.dtype == gate.dtype and up.device == gate.device:
            return gated_activation(gate, up, self.module._gated_as)
        return self.tensor() * up

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A product with a tensor on its left; other functions see f(gate)."""
        if func in (Tensor.mul, Tensor.__mul__, torch.mul) and len(args) == 2 and not kwargs:
            first, second = args if isinstance(args[0], cls) else args[::-1]
            return first * second
        return super().__torch_function__(func, types, args, kwargs)

    def __len__(self) -> int:
        """The first dimension, as a tensor's."""
        return self.gate.shape[0]


def replace_blocks(model: nn.Module) -> tuple[int, str | None]:
    """Do what `fuse_blocks` promises: how many modules were changed, and why, if there is none to change."""
    changed, found = 0, 0
    for module in list(model.modules()):
        for each, replace in _candidates(module):
            found += 1
            if _may_be_replaced(each):
                changed += replace(each)
    return changed, None if found else f"{type(model).__name__} has no gated activation and no RMS norm"


def _candidates(module: nn.Module) -> list[tuple[nn.Module, Callable[[nn.Module], bool]]]:
    """(what may be replaced, how) of a module: itself, if it may be a norm, or its activation."""
    result: list[tuple[nn.Module, Callable[[nn.Module], bool]]] = []
    if any(all(hasattr(module, name) for name in names) for names in _GATES):
        activations = (getattr(module, name, None) for name in _ACTIVATIONS_OF_MODULES)
        result += [(each, _fuse_activation) for each in activations if isinstance(each, nn.Module)]
    if _eps_of(module) is not None:
        result.append((module, _fuse_norm))
    return result


def _may_be_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is that of its class, or a kernel of the hub that transformers put there unasked.

    Else it is ours, or another library's.
    """
    own = vars(module)
    return "forward" not in own or (isinstance(own["forward"], MethodType) and "_kernel_repo" in own)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put `forward`, which takes the module first, in the place of a module's own."""
    vars(module).pop("_kernel_repo", None)
    module.forward = _Forward(forward, module)
    _keep_from_kernels(type(module))


class _Forward(partial):
    """What stands in the place of a module's forward, which a copy of the model, or a pickle, has of its own."""

    def __setstate__(self, state: Any) -> None:
        """Be loaded, perhaps by a process that has fused no model yet."""
        super().__setstate__(state)
        _keep_from_kernels(type(self.args[0]))


def _keep_from_kernels(kind: Any) -> None:
    """Let the `kernels` library leave the forwards of fused modules of a class.

    In `train()` and `eval()` transformers asks that library for forwards of modules whose class names a kernel, and
    sets back those for which there is none. The condition of the class can say no for a module.
    """
    condition = getattr(kind, "kernel_condition", None)
    if hasattr(kind, "kernel_layer_name") and not isinstance(condition, _KernelCondition):
        kind.kernel_condition = staticmethod(_KernelCondition(condition))


class _KernelCondition:
    """The `kernel_condition` of a class, which keeps the forward of a fused module."""

    def __init__(self, condition: Callable[[nn.Module], bool] | None) -> None:
        """Keep the condition that the class had, if any, for its other modules."""
        self.condition = condition

    def __call__(self, module: nn.Module) -> bool:
        """Whether a kernel may replace the module's forward."""
        if hasattr(module, "_gated_as") or hasattr(module, "_norm_eps"):
            return False
        return self.condition is None or self.condition(module)


# ---- activations ----


def _fuse_activation(module: nn.Module) -> bool:
    if [*module.parameters(), *module.buffers()]:  # what it computes may change with these
        return False
    probe = torch.linspace(-6.0, 6.0, 49)
    result = _tried(module, probe)
    name = next((name for name in ACTIVATIONS if _agrees(result, _DEFINITIONS[name](probe.double()))), None)
    if name is None:
        return False
    module._gated_as = name
    _replace_forward(module, _activation_forward)
    return True


def _activation_forward(module: nn.Module, x: Tensor) -> Any:
    """What stands in the place of an activation's forward."""
    if is_plain(x) and x.dtype in FLOAT_DTYPES and x.dim() > 0 and x.shape[-1] > 0:
        return DeferredActivation(module, x)
    return type(module).forward(module, x)


# ---- norms ----


def _eps_of(module: nn.Module) -> float | None:
    """The epsilon of a module that may be an RMS norm."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or len(list(module.children())):
        return None
    eps = next((eps for name in _EPS_OF_NORMS if isinstance(eps := getattr(module, name, None), float)), None)
    return eps if is_plain(weight) and weight.dtype in FLOAT_DTYPES and not weight.is_meta else None


def _fuse_norm(module: nn.Module) -> bool:
    eps = _eps_of(module)
    try:
        trial = copy.deepcopy(module).float()  # in the dtype of few roundings
    except (TypeError, RuntimeError):  # it holds what cannot be copied
        return False
    weight = trial.weight.detach()
    columns = torch.arange(weight.numel(), dtype=torch.float32, device=weight.device)
    # Whatever the weight is now, 0 or 1 at the beginning, training may make others of it.
    weight.copy_(1.5 * torch.sin(3.0 * columns + 1.0))
    # Rows of several sizes, one near epsilon's, with a mean that is not 0.
    sizes = torch.tensor([[1.0], [30.0], [0.5 * eps**0.5]], device=weight.device)
    x = (torch.sin(columns) + 0.3) * sizes
    result = _tried(trial, x)
    wide = x.double()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    for shift in (0.0, 1.0):
        if _agrees(result, normal * (shift + weight.double())):
            module._norm_shift, module._norm_eps = shift, eps
            _replace_forward(module, _norm_forward)
            return True
    return False


def _norm_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What stands in the place of a norm's forward."""
    weight = module.weight
    fits = is_plain(x, weight) and x.dtype == weight.dtype and x.device == weight.device
    if fits and not args and not kwargs and x.shape[-1:] == weight.shape:
        return rms_norm(x, weight, module._norm_eps, shift=module._norm_shift)
    return type(module).forward(module, x, *args, **kwargs)


def _tried(module: nn.Module, x: Tensor) -> Any:
    """What a module makes of `x`, or None if it takes something else. Hooks do not see it."""
    try:
        with torch.no_grad():
            return type(module).forward(module, x)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None


def _agrees(result: Any, expected: Tensor) -> bool:
    """Whether a result is the expected one but for the roundings of a few operations in its dtype."""
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype not in FLOAT_DTYPES:
        return False
    allowed = 8 * torch.finfo(result.dtype).eps * expected.abs().amax()
    return bool(((result.double() - expected).abs() <= allowed).all())
