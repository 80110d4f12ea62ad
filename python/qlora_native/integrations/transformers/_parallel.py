"""Tensor and expert parallelism of transformers (`distributed_config`) over quantized layers.

transformers shards a parameter by reading a slice of the tensor that a file has under its name. But a quantized weight
has several tensors, and the second level of its scales is that of the whole. So each process reads or quantizes whole
weights, one after the other, and keeps its part of each, which decodes to the bits of the whole. transformers' own
hooks around the layers exchange activations and gradients.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel, TensorParallelLayer

from ..._core.errors import bad
from ..._core.part import check_parts, part_of
from ..._core.weight import QuantizedWeight
from ..._layers.base import QuantizedLayer
from ...nn import Experts4bit, Linear4bit

_WHOLE = "replicate"  # transformers' style of a parameter that each process has whole
_SIZES = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size")


def parallelism(model: nn.Module) -> Any:
    """The `DistributedConfig` by which transformers shards `model`, or None."""
    config = getattr(model.config, "distributed_config", None)
    return config if config is not None and any(getattr(config, size) > 1 for size in _SIZES) else None


class Parts:
    """What each process has of the quantized weights of a model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        """Plan the parts of the layers of `model`, which have no values yet.

        Args:
            model: the model, before transformers shards it.
            config: a `DistributedConfig`.

        Raises:
            ValueError: transformers would shard a quantized layer in a way that it cannot be sharded in.
        """
        for size in _SIZES[2:]:
            if getattr(config, size) > 1:
                remedy = "" if size == "pp_size" else ": load the whole model, and give it to fully_shard or accelerate"
                raise bad(f"distributed_config, {size}", f"1 for a quantized model{remedy}", getattr(config, size))
        self._cuts: dict[str, tuple[str, int]] = {}  # {path of a layer: (dimension of the mesh, of the weight)}
        tp_plan, ep_plan = _changed(model.tp_plan, config.tp_plan), _changed(model.ep_plan, config.ep_plan)
        if config.tp_plan == {}:  # no rules
            tp_plan = {}
        if config.ep_size > 1:
            self._plan(model, "ep", ep_plan, config.ep_size)
            owners = tuple(f"{path}." for path in ep_plan)  # rules of tp_plan for experts do not hold then
            tp_plan = {path: style for path, style in tp_plan.items() if not f"{path}.".startswith(owners)}
        if config.tp_size > 1:
            self._plan(model, "tp", tp_plan, config.tp_size)

    def _plan(self, model: nn.Module, mesh: str, plan: dict[str, str], count: int) -> None:
        for path, layer in model.named_modules():
            style = plan.get(replace_layer_number_by_wildcard(path))
            if not isinstance(layer, QuantizedLayer) or style is None:
                continue
            dim = _dimension(path, layer, mesh, style)
            if dim is None:
                continue
            check_parts(path, layer._shape, layer.blocksize, dim, count)
            self._cuts[path] = mesh, dim
            if isinstance(layer, Experts4bit):
                owner = model.get_submodule(path.rpartition(".")[0])
                owner._is_expert_parallel, owner.num_experts = True, layer.num_experts // count
            else:  # the hooks give it tensors, not DTensors
                layer._hf_quantized_needs_local_tp = True

    def leave_whole(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Add rules to the `tp_plan` or `ep_plan` of `model`, in place, by which transformers shards no weight itself.

        A rule for a layer holds for its parameters too, unless there are rules for these.
        """
        of_plan = "ep" if plan is model.ep_plan else "tp"
        for path, (mesh, _) in self._cuts.items():
            if mesh == of_plan:
                layer, generic = model.get_submodule(path), replace_layer_number_by_wildcard(path)
                names = layer.weight_tensors().keys() & layer._parameters.keys()
                plan.update({f"{generic}.{name}": _WHOLE for name in names})

    def put_weight(self, path: str, layer: QuantizedLayer, q: QuantizedWeight, meshes: Any) -> None:
        """Give a layer its part of the weight `q`. `meshes` are those of transformers.

        Raises:
            ValueError: the weight cannot be cut; the message names the layer.
        """
        if path not in self._cuts:
            layer.replace_weight(q)
            return
        name, dim = self._cuts[path]
        mesh = meshes.get_mesh(name)
        try:
            part = part_of(q, dim, mesh.get_local_rank(), mesh.size())
        except ValueError as error:
            raise ValueError(f"{path}.{error}") from None
        if isinstance(layer, Linear4bit):
            layer.replace_by_part(part)
        else:
            layer.replace_weight(part)

    def unsaved(self) -> ValueError:
        """The error of saving or dequantizing the model."""
        return bad(
            "save_pretrained, dequantize",
            "a model that this process has all of",
            "one in tensor or expert parallelism: save the adapter (save_pretrained of the PeftModel), and use it over "
            "the files that the model was loaded from",
        )


def _changed(plan: dict[str, str], changes: Any) -> dict[str, str]:
    """A plan of a model with the changes of a `DistributedConfig`, which may be None or "auto"."""
    return {**plan, **changes} if isinstance(changes, dict) else plan


def _dimension(path: str, layer: QuantizedLayer, mesh: str, style: str) -> int | None:
    """The dimension along which a style of transformers shards a layer; None if each process has the whole."""
    if isinstance(layer, Experts4bit) and mesh == "ep":
        return 0
    shard = type(ALL_PARALLEL_STYLES[style]).shard_param  # a style with another is another, though it is a subclass
    if isinstance(layer, Linear4bit) and shard is ColwiseParallel.shard_param:
        return 0
    if isinstance(layer, Linear4bit) and shard is RowwiseParallel.shard_param:
        return -1
    if shard is TensorParallelLayer.shard_param:
        return None
    remedy = "use ep_size" if isinstance(layer, Experts4bit) else "name it in llm_int8_skip_modules"
    raise bad(f"{path}: {mesh}_plan", f"a style that shards {type(layer).__name__} ({remedy})", style)
