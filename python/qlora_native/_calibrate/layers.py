"""Run a model one layer after another, over the stored inputs of the layer that is next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .._core.errors import bad


class Stop(Exception):
    """Ends a forward when what was wanted has been seen."""


class Layers:
    """The layers of a model that are called one after another, each with the output of the one before.

    A transformer's layers lie in an `nn.ModuleList`. Layer i is first reached by a call of the whole model in which the
    layers before it pass their input on. The arguments of that call are kept until the next layer's turn, with the
    stored input in its place: so masks and positions are those that the model itself makes for this layer, and memory
    holds the input, the masks and the positions of one layer for all batches.

    Attributes:
        modules: the layers in the order in which they are called. Empty if the model has none that are called once
            each, in order, with the output of the one before; then only whole passes are possible.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[dict[str, Any]],
        wanted: Iterable[nn.Module],
        prepare: Callable[[list[nn.Module]], None] | None = None,
    ) -> None:
        """Find the layers.

        Args:
            model: the model.
            batches: the keyword arguments of its calls.
            wanted: the modules whose inputs will be observed. The list is taken that holds most of their elements, or,
                if its layers are not called one after another, as those of images are not for a text, the next.
            prepare: is called with the layers before any of them is run. No other list is tried then.
        """
        self._model, self._batches = model, batches
        self._next = 0
        # These hold for each batch the input of the next layer, what the layer before returned beside its output (None
        # is for a bare tensor), and the arguments with which the next layer is called.
        self._inputs: list[Tensor] = []
        self._tails: list[tuple[Any, ...] | None] = []
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        # Some models give all layers one mapping, which a layer fills for those after it (keys and values of Gemma 3n).
        self._mappings: dict[str, int] | None = None
        self._filled: dict[tuple[int, str], Any] = {}
        self.modules: list[nn.Module] = self._find({id(module) for module in wanted}, prepare)

    def _find(self, wanted: set[int], prepare: Callable[[list[nn.Module]], None] | None) -> list[nn.Module]:
        def held(layers: nn.ModuleList) -> int:
            modules = (module for module in layers.modules() if id(module) in wanted)
            return sum(parameter.numel() for module in modules for parameter in module.parameters())

        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList) and held(module)]
        lists.sort(key=held, reverse=True)
        inner = {module for layers in lists for module in layers.modules() if module is not layers}
        outermost = [list(layers) for layers in lists if layers not in inner]
        if prepare is not None and outermost:
            prepare(outermost[0])
            del outermost[1:]
        return next((found for found in outermost if self._are_called_in_order(found)), [])

    def _are_called_in_order(self, found: list[nn.Module]) -> bool:
        """Whether a pass of the model calls each of the layers once, with the output of the one before."""
        self._mappings = None
        called: list[nn.Module] = []
        inputs: list[tuple[Any, int]] = []
        outputs: list[Any] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            follows = isinstance(hidden, Tensor) and (not outputs or hidden is outputs[-1])
            called.append(module if follows else self._model)
            inputs.append((hidden, version_of(hidden) if follows else 0))
            mappings = {name: id(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
            same = mappings if self._mappings is None else self._mappings
            self._mappings = dict(mappings.items() & same.items())

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) and output else output)
            hidden, version = inputs[-1]
            if not isinstance(outputs[-1], Tensor) or not isinstance(hidden, Tensor) or version_of(hidden) != version:
                called.append(self._model)  # a layer that changes its input cannot be run again over it

        with ExitStack() as stack:
            for layer in found:
                stack.enter_context(layer.register_forward_pre_hook(begin, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(end))
            self._model(**self._batches[0])
        return called == found

    @property
    def inputs(self) -> list[Tensor] | None:
        """The inputs of the next layer, for each batch; None if layers hand on more than their output."""
        return None if self._mappings or any(tail is not None for tail in self._tails) else self._inputs

    def resume(self, index: int, inputs: list[Tensor]) -> None:
        """Go on with layer `index` and its inputs, as they were when the layers before it had been run."""
        if len(inputs) != len(self._batches):
            raise bad("inputs", f"those of {len(self._batches)} batches", len(inputs))
        self._next, self._inputs, self._tails = index, inputs, [None] * len(inputs)

    def run(self, index: int | None, *, advance: bool, batches: int | None = None) -> Iterator[int]:
        """Run layer `index` over the batches, and yield the number of each before it is run.

        Args:
            index: of the layer. Layers are run in order, each as often as wanted. A module in it may raise `Stop`. None
                is the whole model.
            advance: store the outputs of a layer, as the inputs of the next one.
            batches: how many are run, all unless given.
        """
        if index is None:
            for number, batch in enumerate(self._batches):
                yield number
                self._model(**batch)
            return
        assert index == self._next
        for number in range(len(self._batches) if batches is None else batches):
            yield number
            if number not in self._calls:
                self._calls[number] = self._call_of(number)
            args, kwargs = self._calls[number]
            try:
                output = self.modules[index](*args, **kwargs)
            except Stop:
                assert not advance
                continue
            if advance:
                del self._calls[number]
                self._store(number, output)
        self._next += advance

    def _store(self, number: int, output: Any) -> None:
        """Keep the output of a layer as the input of the next one."""
        tail = tuple(output[1:]) if isinstance(output, tuple) else None
        hidden = output[0] if isinstance(output, tuple) else output
        if self._next == 0:
            self._inputs.append(hidden)
            self._tails.append(tail)
        else:
            self._inputs[number], self._tails[number] = hidden, tail

    def _call_of(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the model calls the next layer in a batch, over its stored input."""
        index = self._next
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def skip(*args: Any, **kwargs: Any) -> Any:
            tail = self._tails[number]
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if tail is None else (hidden, *tail)

        def note(*args: Any, **kwargs: Any) -> Any:
            if index > 0:
                if args:
                    args = (self._inputs[number], *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": self._inputs[number]}
            # A cache of transformers would get the keys of each run of the layer.
            kwargs = {name: None if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}
            for name in self._mappings or ():
                kwargs[name] = self._filled.setdefault((number, name), kwargs[name])
            found.append((args, kwargs))
            raise Stop

        forwards = [skip] * index + [note]
        with ExitStack() as stack:
            for layer, forward in zip(self.modules, forwards, strict=False):
                stack.enter_context(patched_forward(layer, forward))
            try:
                self._model(**self._batches[number])
            except Stop:
                return found[0]
        raise RuntimeError(f"layer {index} was not called in batch {number}, as it was in the first one")


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another function as its forward."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def is_same(seen: tuple[Tensor, int], tensor: Tensor) -> bool:
    """Whether a tensor is the one that was seen, with its version, and has not been changed since."""
    return seen[0] is tensor and seen[1] == version_of(tensor)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
