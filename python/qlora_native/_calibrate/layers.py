"""Run a model one layer after another, over the stored inputs of the layer that is next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .._core.errors import bad, bad_type


class Stop(Exception):
    """Ends a forward when what was wanted has been seen."""


class Layers:
    """The layers of a model that are called one after another, each with the output of the one before.

    A transformer's layers lie in an `nn.ModuleList`. Layer i is first reached by a call of the whole model in which the
    layers before it pass their input on. The arguments of that call are kept until the next layer's turn, with the
    stored input in its place: so masks and positions are those that the model itself makes for this layer, and memory
    holds the input of one layer.

    Attributes:
        modules: the layers in the order in which they are called. Empty if the model has none that are called once
            each, in order; then only whole passes are possible.
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
            wanted: the modules whose inputs will be observed; the list that holds most of them is taken.
            prepare: is called with the layers before any of them is run.
        """
        self._model, self._batches = model, batches
        self._inputs: list[Tensor] = []  # of the next layer, for each batch
        self._tails: list[tuple[Any, ...] | None] = []  # what a layer returned beside its output; None: a bare tensor
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # of the next layer, by batch
        self._next = 0
        self.modules: list[nn.Module] = self._find({id(module) for module in wanted}, prepare)

    def _find(self, wanted: set[int], prepare: Callable[[list[nn.Module]], None] | None) -> list[nn.Module]:
        def held(layers: nn.ModuleList) -> int:
            return sum(id(module) in wanted for module in layers.modules())

        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=held, default=()))  # of nested lists, the outermost
        if not found or not held(nn.ModuleList(found)):
            return []
        if prepare is not None:
            prepare(found)
        called: list[nn.Module] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            called.append(module if isinstance(tensor, Tensor) else self._model)

        hooks = [layer.register_forward_hook(note) for layer in found]
        try:
            self.whole_pass(self._batches[:1])
        finally:
            for hook in hooks:
                hook.remove()
        return found if called == found else []

    def whole_pass(self, batches: list[dict[str, Any]] | None = None) -> None:
        """Call the model with each batch."""
        for batch in self._batches if batches is None else batches:
            self._model(**batch)

    @property
    def inputs(self) -> list[Tensor] | None:
        """The inputs of the next layer, for each batch; None if layers hand on more than their output."""
        return self._inputs if all(tail is None for tail in self._tails) else None

    def resume(self, index: int, inputs: list[Tensor]) -> None:
        """Go on with layer `index` and its inputs, as they were when the layers before it had been run."""
        if len(inputs) != len(self._batches):
            raise bad("inputs", f"those of {len(self._batches)} batches", len(inputs))
        self._next, self._inputs, self._tails = index, inputs, [None] * len(inputs)

    def run(self, index: int, *, advance: bool, batches: int | None = None) -> Iterator[int]:
        """Run layer `index` over the batches, and yield the number of each before it is run.

        Args:
            index: of the layer. Layers are run in order, each as often as wanted. A module in it may raise `Stop`.
            advance: store the outputs, as the inputs of the next layer.
            batches: how many are run, all unless given.
        """
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


def checked_batches(model: nn.Module, batches: Any) -> list[dict[str, Any]]:
    """The keyword arguments of the model's calls, with a check of token ids.

    Args:
        model: the model.
        batches: tensors of token ids [B, T], or mappings with the arguments of the model's `forward`.

    Raises:
        TypeError: a batch is neither.
        ValueError: there is none, or ids lie outside the model's vocabulary.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise bad_type("batches", "an iterable of tensors or mappings", type(batches).__name__)
    takes = inspect.signature(model.forward).parameters
    vocabulary = _vocabulary(model)
    made = []
    for number, batch in enumerate(batches):
        name = f"batches[{number}]"
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        elif not isinstance(batch, Mapping):
            raise bad_type(name, "a tensor or a mapping", type(batch).__name__)
        arguments = dict(batch)
        arguments.pop("labels", None)
        ids = arguments.get("input_ids")
        if isinstance(ids, Tensor) and ids.numel():
            if ids.is_floating_point() or ids.dim() != 2:
                raise bad(f"{name}: input_ids", "integers [B, T]", f"{ids.dtype} {list(ids.shape)}")
            low, high = (end.item() for end in ids.aminmax())
            if vocabulary is not None and not 0 <= low <= high < vocabulary:
                got = f"{low if low < 0 else high}: the tokenizer is another model's"
                raise bad(f"{name}: input_ids", f"ids of the model's vocabulary, 0 ... {vocabulary - 1}", got)
        if "use_cache" in takes:
            arguments["use_cache"] = False
        made.append(arguments)
    if not made:
        raise bad("batches", "at least one batch of the model's own text", "none")
    return made


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model has, or None if it has no embedding of tokens."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
