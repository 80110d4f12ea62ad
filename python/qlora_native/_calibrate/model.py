"""`calibrate`: quantize a model with a few batches of its own text."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.errors import bad
from .._core.progress import Progress
from .._core.weight import QuantizedWeight
from .._layers import callbacks
from .._layers.experts import Experts4bit
from .._layers.hooks import take_over_hooks
from .._layers.linear import linear_class
from .._layers.quantize_model import check_model, find
from .batches import check_tokens, checked_batches
from .budget import Budget, BudgetAllocator, Probe
from .experts import ObservedExperts
from .feedback import Options, factored
from .layers import Layers
from .memory import available_memory
from .observe import Inputs
from .pieces import Replay, order_of_calls
from .quantizer import Quantizer
from .report import CalibrationReport


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    skip: Iterable[str] = ("lm_head",),
    format: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
    codebook: Tensor | Sequence[float] | None = None,
    sequential: bool = True,
    progress: bool = True,
    bits: float | None = None,
) -> CalibrationReport:
    """Quantize a model in place as `quantize_model` does, so that its layers' outputs change least on given text.

    The format and the bytes are those of `quantize_model`, and whatever reads its weights reads these. The codes and
    the scales are others: scales that weigh the errors by the layer's inputs, and codes that make up for the errors of
    those before them (Frantar et al., "GPTQ", 2023).

    Layers are quantized one after another, so memory holds the inputs of one, and a matrix [K, K] of fp32 for the input
    that is observed. Weights outside of the layers follow in one pass. The result does not depend on the number of
    threads.

    Args:
        model: a model in 16 or 32 bits, in eval or training mode; it is run in eval mode, without gradients.
        batches: some of the text that it will see: token ids [B, T], or the keyword arguments of the model's `forward`.
            Rows that an `attention_mask` [B, T] excludes do not count, but for routed experts, which get them in
            another order. 16 tokens for each column of the widest weight are enough; see docs/quality.md.
        skip, format, blocksize, double_quant, codebook: as in `quantize_model`.
        sequential: a weight in one of the layers sees the inputs that the quantized ones before it give, in its own
            layer too. Otherwise it sees those of the 16-bit model.
        progress: show the progress on stderr.
        bits: a budget: the bits that an element of the weights may have on average, with scales and tables, such as
            4.5. Weights whose rounding moves the output of their transformer layer most get 8 bits ("int8"), or stay as
            they are. Experts, and weights that are not in one of the layers that are run one after another, count and
            stay in `format`. There are no files of a model with "int8" in it: `python -m qlora_native quantize --bits`
            writes 4 and 16 bits beside each other. None: all weights have `format`.

    Returns:
        What was done, with the error of each layer's output before and after. A weight that no batch reached, or whose
        inputs are all 0, is rounded to the nearest levels, and so is an expert that less than a quarter as many tokens
        reached as it has columns. The report names them, and a warning the first.

    Raises:
        TypeError: `model` is not a module, `skip` is a string, a batch is neither a tensor nor a mapping, or `bits` is
            not a number.
        ValueError: `model` is a linear layer, which cannot be replaced in place; there are no batches, or fewer tokens
            than the widest weight has columns; the ids are not of the model's vocabulary; an input has a NaN or Inf;
            memory does not suffice; or `bits` is less than `format` needs, more than 16, or for a format other than
            "nf4" and "fp4". The model is then as it was.
        NotImplementedError: the model is not on the CPU.
        RuntimeError: a layer calls its modules in another way than for the first batch. The model is then as it was.
    """
    check_model(model, skip)
    started = time.monotonic()
    options = Options(format, blocksize, double_quant, codebook)
    budget = None if bits is None else Budget(bits)
    calibration = Calibration(model, batches, tuple(skip), options, sequential, budget=budget)
    stages = calibration.stages()
    try:
        for stage in Progress(len(stages), progress, "calibrate", "layer").over(stages):
            calibration.run(stage)
        calibration.allocate()
    except BaseException:
        calibration.undo()
        raise
    calibration.finish()
    report = calibration.report
    report.seconds = time.monotonic() - started
    if report.fallbacks:
        first, *others = report.fallbacks
        more = f", and {len(others)} more weights (print the report)" if others else ""
        warnings.warn(f"calibrate: {first.name} was rounded plainly: {first.fallback}{more}", stacklevel=2)
    return report


@dataclass(frozen=True)
class Stage:
    """Weights that are quantized together.

    Attributes:
        index: of the layer that holds them, or None: they lie in no layer, and are observed in whole passes.
        names: the paths of their modules in the model. A shared module has several.
        experts: modules with experts.
    """

    index: int | None
    names: list[str] = field(default_factory=list)
    experts: list[callbacks.Experts] = field(default_factory=list)


class Calibration:
    """A calibration, stage by stage. Stages are run in order."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        skip: tuple[str, ...],
        options: Options,
        sequential: bool,
        prepare: Callable[[list[nn.Module]], None] | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Find the weights and the layers, and check the arguments. `prepare` is called before a layer is run."""
        callbacks.load_integrations()
        self._model, self._sequential = model, sequential
        found = find(model, skip, strict=False, embeddings=False)
        if not found.names and not found.experts:
            raise bad("model", "nn.Linear layers to quantize", "a model without any")
        for each in found.unknown:
            if each.is_stack:
                warnings.warn(f"calibrate: {each}", stacklevel=3)
        self._names = found.names
        self._experts = list({id(each.module): each for each in found.experts}.values())
        others = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
        if prepare is None and others:
            raise NotImplementedError(f"calibrate: expected a model on the CPU, got one on {min(others)}")
        linears = {name: model.get_submodule(name) for name in self._names}
        parameters = [getattr(each.module, name) for each in self._experts for name in each.names]
        self.allocator = None if budget is None else BudgetAllocator(budget, options, linears, parameters)
        self._quantizer = Quantizer(options, {} if self.allocator is None else self.allocator.sensitivity)
        self.report = self._quantizer.report
        self._dense: dict[str, nn.Module] = {}  # the layer that was at a path before
        self._layer_of: dict[int, nn.Module] = {}  # the quantized layer, by the id of the one that it replaces
        self._undo: list[Callable[[], object]] = []
        self._modes = {module: module.training for module in model.modules()}
        self._weights: dict[int, QuantizedWeight] = {}  # by the id of the weight
        model.eval()
        try:
            with torch.no_grad():
                self._batches = checked_batches(model, batches)
                wanted = [*map(model.get_submodule, self._names), *(each.module for each in self._experts)]
                self.layers = Layers(model, self._batches, wanted, prepare)
                if budget is not None and not self.layers.modules:
                    raise bad("bits", "None for a model without layers that are run one after another", budget.bits)
                check_tokens(self._batches, max(map(self._width, self._names), default=0))
                self._check_memory()
        except BaseException:
            self._restore_modes()
            raise

    def stages(self) -> list[Stage]:
        """The layers in order, and then what lies in none, or in several because it is shared."""
        layer_of: dict[int, int | None] = {}  # by the id of the module
        for index, layer in enumerate(self.layers.modules):
            for module in layer.modules():
                layer_of[id(module)] = None if id(module) in layer_of else index
        of_weight: dict[int, set[int | None]] = {}
        for name in self._names:
            module = self._model.get_submodule(name)
            of_weight.setdefault(id(module.weight), set()).add(layer_of.get(id(module)))
        stages: dict[int | None, Stage] = {index: Stage(index) for index in range(len(self.layers.modules))}
        for name in self._names:
            indices = of_weight[id(self._model.get_submodule(name).weight)]
            index = indices.copy().pop() if len(indices) == 1 else None
            stages.setdefault(index, Stage(index)).names.append(name)
        for each in self._experts:
            index = layer_of.get(id(each.module))
            stages.setdefault(index, Stage(index)).experts.append(each)
        return list(stages.values())

    @torch.no_grad()
    def run(self, stage: Stage) -> None:
        """Observe the inputs of a stage, and put quantized layers into the model."""
        if self.allocator is not None and stage.index is not None:
            dense = {name: self._model.get_submodule(name) for name in stage.names}
            self.allocator.measure(Probe(self.layers, stage.index, self._batches), dense)
        modules: dict[str, nn.Module] = {}
        for name in stage.names:
            module = self._model.get_submodule(name)
            if module not in modules.values():
                modules[name] = module
        experts = {f"{each.path}.{name}": each for each in stage.experts for name in each.names}
        modules |= {path: self._observe(each, path.rpartition(".")[2]) for path, each in experts.items()}
        if self._sequential and stage.index is not None:
            self._run_by_pieces(stage, modules)
        else:
            self._run_at_once(stage, modules, advance=True)

    def _run_at_once(self, stage: Stage, modules: Mapping[str, nn.Module], advance: bool) -> None:
        """Observe all weights of a stage in one pass, and quantize them."""
        inputs = Inputs(modules)
        with inputs.observed():
            for number in self.layers.run(stage.index, advance=advance):
                inputs.begin(self._batches[number])
        self._quantize(stage, inputs, modules)

    def _run_by_pieces(self, stage: Stage, modules: Mapping[str, nn.Module]) -> None:
        """Observe each piece of a layer when those before it have been quantized."""
        order = order_of_calls(self.layers, stage.index, modules)
        if order.pieces is None:
            self._run_at_once(stage, modules, advance=False)
        with Replay(self._has_room) as replay:
            for number, piece in enumerate(order.pieces or ()):
                replay.add(module for module, pieces in order.others if pieces <= number)
                inputs = Inputs({path: modules[path] for path in piece})
                with inputs.observed(stop=True):
                    for batch in self.layers.run(stage.index, advance=False):
                        inputs.begin(self._batches[batch])
                        replay.begin(batch)
                self._quantize(stage, inputs, {path: modules[path] for path in piece})
                replay.add(map(self._model.get_submodule, piece))
                del inputs  # and its matrices
            for batch in self.layers.run(stage.index, advance=True):
                replay.begin(batch, last=True)

    def _quantize(self, stage: Stage, inputs: Inputs, modules: Mapping[str, nn.Module]) -> None:
        """Quantize observed weights, and put the quantized layers into the model."""
        linears = {name: module for name, module in modules.items() if not isinstance(module, ObservedExperts)}
        names_of: dict[int, list[str]] = {}
        for name, module in linears.items():
            names_of.setdefault(id(module.weight), []).append(name)
        # Weights with the same input follow one another, and share the factored matrix.
        place = {name: number for number, name in enumerate(linears)}
        found, last = None, None
        for names in sorted(names_of.values(), key=lambda names: [place[inputs.key(name)] for name in names]):
            keys = sorted(set(map(inputs.key, names)))
            weight = linears[names[0]].weight
            gram = inputs.gram(keys, names[0])
            if keys != last:
                found, last = None if gram is None else factored(gram), keys
            tokens = sum(inputs.tokens[key] for key in keys)
            self._weights[id(weight)] = self._quantizer.linear(names[0], weight, gram, found, tokens)
        for name in stage.names:
            if self._model.get_submodule(name) in linears.values():
                self._replace(name)
        for each in stage.experts:
            for name in each.names:
                path = f"{each.path}.{name}"
                if path in modules:
                    q = self._quantizer.experts(path, modules[path])
                    layer = Experts4bit.from_quantized(q, each.transposed).train(self._modes[each.module])
                    setattr(each.module, name, layer)
        self._weights.clear()

    def _observe(self, experts: callbacks.Experts, name: str) -> ObservedExperts:
        """Put experts that observe their inputs in the place of a parameter."""
        module = experts.module
        before = dict(module._parameters)
        parameter = module._parameters.pop(name)
        observed = ObservedExperts(parameter, experts.transposed).train(module.training)
        config = getattr(module, "config", None)  # Llama 4's experts have none
        implementation = getattr(config, "_experts_implementation", None)

        def undo() -> None:
            delattr(module, name)
            module._parameters.clear()
            module._parameters.update(before)  # in their order
            if config is not None:
                config._experts_implementation = implementation

        self._undo.append(undo)
        setattr(module, name, observed)
        experts.run_quantized()
        return observed

    def _replace(self, name: str) -> None:
        """Put a quantized layer at `name`."""
        path, _, child = name.rpartition(".")
        parent = self._model.get_submodule(path)
        dense = self._dense.setdefault(name, parent.get_submodule(child))
        if id(dense) not in self._layer_of:
            q = self._weights[id(dense.weight)]
            layer = linear_class(q).from_quantized(q, dense.bias).train(self._modes[dense])
            take_over_hooks(layer, dense)
            self._layer_of[id(dense)] = layer
            self._weights[id(dense.weight)] = layer.quantized_weight  # a layer tied to this one shares its parameters
        self._undo.append(partial(setattr, parent, child, dense))
        setattr(parent, child, self._layer_of[id(dense)])

    def allocate(self) -> None:
        """Give weights more bits, as far as the budget reaches, and put their layers into the model."""
        if self.allocator is None:
            return
        for path, format in self.allocator.choose(self.report).items():
            weight = self._dense[path].weight
            dense = {other: layer for other, layer in self._dense.items() if layer.weight is weight}
            if format == "int8":
                self._weights[id(weight)] = self.allocator.quantized(weight, format)
                for layer in dense.values():
                    self._layer_of.pop(id(layer), None)
            else:
                self._layer_of |= {id(layer): layer for layer in dense.values()}
            for other in dense:
                self._replace(other)

    def undo(self) -> None:
        """Put every module back."""
        for undo in reversed(self._undo):
            undo()
        self._restore_modes()

    def finish(self) -> None:
        """Restore the training mode, and let integrations know that the model is quantized."""
        self._restore_modes()
        for adopt in callbacks.adopt_model:
            adopt(self._model)

    def _restore_modes(self) -> None:
        for module, training in self._modes.items():
            module.training = training

    def _check_memory(self) -> None:
        """Raise ValueError if the matrices of a layer cannot fit in the memory that is available."""
        needed = 0
        for stage in self.stages():
            # Layers of one width in one module usually have one input.
            widths = {(name.rpartition(".")[0], self._width(name)) for name in stage.names}
            squares = [width**2 for _, width in widths]
            for each in stage.experts:
                for E, *sizes in (getattr(each.module, name).shape for name in each.names):
                    squares.append(E * sizes[0 if each.transposed else 1] ** 2)
            # fp32 for each, and for the largest two of float64 while it is factored, besides its factor.
            largest = max((width**2 for _, width in widths), default=0)
            needed = max(needed, 4 * sum(squares) + 20 * largest)
        self._needed = needed
        available = available_memory()
        if available is not None and needed > available:
            raise bad("model", f"matrices of inputs that fit in memory ({available:,} bytes)", f"{needed:,} bytes")

    def _has_room(self) -> bool:
        """Whether the memory that is available suffices for the matrices of a layer."""
        available = available_memory()
        return available is None or available > self._needed

    def _width(self, name: str) -> int:
        return self._model.get_submodule(name).weight.shape[1]
