"""The rotation of positions in transformers' models as one op, which `fuse_attention` puts before attention.

A model's code calls a function of its module by the name `apply_rotary_pos_emb`, and transformers has no registry for
it. So the function of a module is replaced, once for all models of it, by one that checks whether a fused model
makes the call: the module that makes cos and sin marks them in such a model (by a hook). All other calls reach the
function that was there. Where the package `kernels` is installed, transformers makes an `nn.Module` of the function,
which models copy and unpickle by its name and type; it stays, and its `forward` is replaced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..._core.errors import FLOAT_DTYPES
from ...functional import rotary_embedding
from ._deferred import is_plain

FUNCTION, EMBEDDING = "apply_rotary_pos_emb", "rotary_emb"
_MARK = "_of_fused_model"


def fuse_rotary(model: nn.Module) -> bool:
    """Let a model rotate queries and keys by `qlora_native.functional.rotary_embedding`, on the CPU in eager mode.

    Returns:
        Whether its code has the function, which computes the same.
    """
    functions = [
        (module, function)
        for name in {type(each).__module__ for each in model.modules()}
        if (module := sys.modules.get(name)) is not None and callable(function := getattr(module, FUNCTION, None))
    ]
    embeddings = [each for path, each in model.named_modules() if path.rpartition(".")[2] == EMBEDDING]
    fused = False
    for module, function in functions:
        owner, name = (function, "forward") if isinstance(function, nn.Module) else (module, FUNCTION)
        present = getattr(owner, name)
        if not hasattr(present, "replaces"):
            if not _agrees(present):
                continue
            setattr(owner, name, _in_place_of(present))
        fused = True
    if fused:
        for embedding in embeddings:
            if _mark not in embedding._forward_hooks.values():
                embedding.register_forward_hook(_mark)
    return fused and bool(embeddings)


def _mark(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that marks cos and sin, a pair of tensors."""
    if torch.compiler.is_compiling():
        return
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(each, Tensor) for each in output):
        for each in output:
            setattr(each, _MARK, True)


def _in_place_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of a module's function."""

    @functools.wraps(function)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        ours = not torch.compiler.is_compiling() and getattr(cos, _MARK, False) and not args and not kwargs
        if ours and _fit(q, k, cos, sin):
            return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
        return function(q, k, cos, sin, *args, **kwargs)

    rotate.replaces = function  # type: ignore[attr-defined]
    return rotate


def _fit(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Whether `rotary_embedding` takes these operands."""
    if torch.jit.is_tracing() or not (is_plain(q, k, cos, sin) and q.is_cpu and k.is_cpu and cos.is_cpu and sin.is_cpu):
        return False
    if q.dtype not in FLOAT_DTYPES or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return False
    if not q.dim() == k.dim() == 4 or cos.requires_grad or sin.requires_grad or q.shape[-1] % 2:
        return False
    (B, _, T, D), of_keys = q.shape, k.shape
    return cos.shape in ((B, T, D), (1, T, D)) and sin.shape == cos.shape and of_keys[::2] + of_keys[3:] == (B, T, D)


def _agrees(function: Callable[..., Any]) -> bool:
    """Whether a function computes what the op does, but for the roundings of a few operations."""
    numbers = torch.linspace(-2.0, 2.0, 2 * 3 * 5 * 8).reshape(2, 3, 5, 8)
    q, k = torch.sin(3.0 * numbers), torch.cos(5.0 * numbers[:, :2])
    angles = torch.cat([numbers[:1, 0, :, :4]] * 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    try:
        results = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it takes something else
    if not isinstance(results, tuple) or len(results) != 2:
        return False
    return all(
        isinstance(result, Tensor)
        and result.shape == x.shape
        and torch.allclose(result, rotary_embedding(x, cos, sin), rtol=0.0, atol=8 * torch.finfo(torch.float32).eps)
        for result, x in zip(results, (q, k), strict=True)
    )
