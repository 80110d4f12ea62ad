"""Calibrate the weights of a checkpoint: its model is run layer by layer, and memory holds one layer at a time.

What is done stays in a folder beside the result until the result is complete: the quantized weights of each layer, and
the inputs of the next one. A run that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from .._calibrate.batches import ENOUGH
from .._calibrate.budget import Budget
from .._calibrate.feedback import Options
from .._calibrate.model import Calibration
from .._calibrate.report import Calibrated, CalibrationReport
from .._core.errors import bad
from .._core.progress import Progress
from .._core.weight import QuantizedWeight
from ._skeleton import Skeleton

SEQUENCE, BATCH = 512, 4  # tokens of a sequence, and sequences that are run together
CHARACTERS = 16  # of a text for each token that is needed, at first: prose and code have 3 to 5 in a token
_TENSORS = ("codes", "absmax", "nested_absmax", "nested_code", "offset", "code")


class CalibratedWeights:
    """The quantized weights of a checkpoint's linear layers, in files of a folder of their own.

    Attributes:
        report: what was done, also before an interruption.
        kept: the paths of the layers that a budget leaves unquantized.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, which need not exist yet."""
        self.folder = folder
        self.report = CalibrationReport()
        self.kept: set[str] = set()
        self._file_of: dict[str, Path] = {}

    def make(
        self,
        skeleton: Skeleton,
        model: nn.Module,
        value: Callable[[str], Tensor],
        texts: list[Tensor],
        options: Options,
        run: dict[str, Any],
        progress: bool,
        budget: Budget | None = None,
    ) -> None:
        """Calibrate, or go on with it.

        Args:
            skeleton: says which linear layers are quantized. Stacked experts are not.
            model: the model. Its parameters are on the meta device, and its buffers have their values.
            value: returns the value of a parameter by its name in the model.
            texts: token ids [B, T].
            options: the format.
            run: what a run that goes on must have in common with the one that was interrupted.
            progress: show it on stderr.
            budget: what the weights may take, without 8 bits.
        """
        loader, skip = _Loader(model, value), (*skeleton.other_linears(), *skeleton.stacks())
        calibration = Calibration(model, texts, skip, options, True, loader.attach, budget)
        stages = calibration.stages()
        found = {name for stage in stages if stage.index is not None for name in stage.names}
        if left := sorted(skeleton.linears - found):
            raise bad(f"calibrate: {left[0]}", "a linear layer in one of the model's layers", "another (qn.calibrate)")
        text = json.dumps(run, sort_keys=True)
        start = self._begin(text, calibration)
        for stage in Progress(len(stages) - start, progress, "calibrate", "layer").over(stages[start:]):
            done, started = len(calibration.report.weights), time.monotonic()
            calibration.run(stage)
            weights = {name: model.get_submodule(name).quantized_weight for name in stage.names}
            report = CalibrationReport(calibration.report.weights[done:], time.monotonic() - started)
            self._save(stage.index, weights, report, calibration.layers.inputs)
            for name in stage.names:
                model.get_submodule(name).to("meta")
        if calibration.allocator is not None:
            self.kept = set(calibration.allocator.choose(self.report))

    def __getitem__(self, path: str) -> QuantizedWeight:
        """The weight of the layer at `path`."""
        with safe_open(self._file_of[path], framework="pt") as file:
            described = json.loads(file.metadata()["weights"])[path]
            there = set(file.keys())
            tensors = {
                name: file.get_tensor(f"{path}.{name}") if f"{path}.{name}" in there else None for name in _TENSORS
            }
        described |= {"shape": tuple(described["shape"]), "dtype": getattr(torch, described["dtype"])}
        if tensors["offset"] is not None:
            tensors["offset"] = tensors["offset"].reshape(())
        return QuantizedWeight(**tensors, **described)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, run: str, calibration: Calibration) -> int:
        """Make the folder, or go on with the run of one. Returns the layers that are done."""
        description = self.folder / "run.json"
        if not description.is_file() or description.read_text(encoding="utf-8") != run:
            self.remove()
            self.folder.mkdir(parents=True)
            with _replaced(description) as path:
                path.write_text(run, encoding="utf-8")
        done = 0
        while self._weights_file(done).is_file():
            done += 1
        while done > 0 and not self._inputs_file(done - 1).is_file():
            done -= 1
        for index in range(done):
            self._note(self._weights_file(index))
        if done > 0:
            with safe_open(self._inputs_file(done - 1), framework="pt") as file:
                calibration.layers.resume(done, [file.get_tensor(str(i)) for i in range(len(file.keys()))])
        return done

    def _save(
        self, index: int, weights: dict[str, QuantizedWeight], report: CalibrationReport, inputs: list[Tensor] | None
    ) -> None:
        """Write the weights of a layer and the inputs of the next one, each whole or not at all."""
        tensors, described = {}, {}
        for path, q in weights.items():
            others = {field.name: getattr(q, field.name) for field in fields(q) if field.name not in _TENSORS}
            described[path] = others | {"dtype": str(q.dtype).removeprefix("torch.")}
            values = {name: getattr(q, name) for name in _TENSORS}
            tensors |= {
                f"{path}.{name}": value.detach().reshape(-1) if name == "offset" else value.detach()
                for name, value in values.items()
                if value is not None
            }
        file = self._weights_file(index)
        with _replaced(file) as path:
            metadata = {"weights": described, "report": asdict(report)}
            save_file(tensors, path, metadata={name: json.dumps(value) for name, value in metadata.items()})
        if inputs is not None:
            with _replaced(self._inputs_file(index)) as path:
                save_file({str(i): each.contiguous() for i, each in enumerate(inputs)}, path)
        if index > 0:
            self._inputs_file(index - 1).unlink(missing_ok=True)
        self._note(file)

    def _note(self, file: Path) -> None:
        """Take a finished layer into the report."""
        with safe_open(file, framework="pt") as opened:
            weights, report = (json.loads(opened.metadata()[name]) for name in ("weights", "report"))
        self._file_of |= dict.fromkeys(weights, file)
        self.report.weights += [Calibrated(**each) for each in report["weights"]]
        self.report.seconds += report["seconds"]

    def _weights_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def _inputs_file(self, index: int) -> Path:
        return self.folder / f"inputs-{index:05}.safetensors"


class _Loader:
    """Gives the layer that is called its values, and takes them from the one that was called before."""

    def __init__(self, model: nn.Module, value: Callable[[str], Tensor]) -> None:
        self._model, self._value = model, value
        self._names = {id(module): name for name, module in model.named_modules()}
        self._loaded: nn.Module | None = None
        self._parameters: list[tuple[nn.Module, str]] = []

    def attach(self, layers: list[nn.Module]) -> None:
        """Load all parameters that are in no layer, and let each layer be loaded when it is called."""
        inside = {id(module) for layer in layers for module in layer.modules()}
        for name, module in self._model.named_modules():
            for own, parameter in module._parameters.items() if id(module) not in inside else ():
                if parameter is not None:
                    full = f"{name}.{own}" if name else own
                    module._parameters[own] = nn.Parameter(self._value(full), requires_grad=False)
        for layer in layers:
            layer.forward = self._loading(layer, layer.forward)

    def _loading(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_run(*args: Any, **kwargs: Any) -> Any:
            if layer is not self._loaded:
                self._free()
                self._load(layer)
            return forward(*args, **kwargs)

        return load_and_run

    def _load(self, layer: nn.Module) -> None:
        path = self._names[id(layer)]
        for name, module in layer.named_modules():
            for own, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    full = ".".join(part for part in (path, name, own) if part)
                    module._parameters[own] = nn.Parameter(self._value(full), requires_grad=False)
                    self._parameters.append((module, own))
        self._loaded = layer

    def _free(self) -> None:
        """Take the values away, also from the layers that have been replaced, and what has replaced them."""
        if self._loaded is not None:
            for module, own in self._parameters:
                module._parameters[own] = nn.Parameter(module._parameters[own].to("meta"), requires_grad=False)
            for module in self._loaded.modules():
                for own, parameter in module._parameters.items():
                    if parameter is not None and not parameter.is_meta:
                        module._parameters[own] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        self._parameters, self._loaded = [], None


def read_texts(path: str | Path, folder: Path, widest: int) -> list[Tensor]:
    """Token ids [B, SEQUENCE] of a file, as many as are enough.

    Args:
        path: text, or JSON Lines (`.jsonl`) with a "prompt" and a "response" in each line, as examples/finetune.py
            takes them; these are written in the tokenizer's chat template.
        folder: of the tokenizer.
        widest: the columns of the widest weight.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has something else, the text's whole sequences have fewer tokens than `widest`, or the folder
            has no tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"calibrate: expected a file of text, found none at {path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise bad(f"calibrate: {folder}", "the model's tokenizer", f"none ({' '.join(str(error).split())})") from None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"calibrate: {path}", "text in UTF-8", str(error)) from None
    parts = _pairs(path, text, tokenizer) if path.suffix == ".jsonl" else [text]
    least = -(-widest // SEQUENCE) * SEQUENCE  # whole sequences with as many tokens as the widest weight has columns
    enough = max(least, ENOUGH * widest)
    ids: list[int] = []
    for part in parts:
        ids += _first_ids(tokenizer, part, enough)
        if len(ids) >= enough:
            break
    ids = ids[:enough]
    if len(ids) < least:
        raise bad(f"calibrate: {path}", f"at least {least} tokens ({enough} are enough)", len(ids))
    whole = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
    return list(whole.split(BATCH))


def _first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` token ids of a text or more, or all if it has fewer.

    A cut changes tokens near it, so the text is cut where twice as many come before it.
    """
    length = CHARACTERS * count
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False).input_ids
        if length >= len(text) or len(ids) >= 2 * count:
            return ids
        length *= 2


def _pairs(path: Path, text: str, tokenizer: Any) -> Iterator[str]:
    """The texts of prompts and responses."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            prompt, response = pair["prompt"], pair["response"]
            if not isinstance(prompt, str) or not isinstance(response, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            expected = 'an object with texts "prompt" and "response"'
            raise bad(f"calibrate: {path}:{number}", expected, line[:100]) from None
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            yield tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            yield f"{tokenizer.bos_token or ''}{prompt}\n{response}{tokenizer.eos_token or ''}"


def digest(texts: list[Tensor]) -> str:
    """A number that other texts do not have."""
    made = hashlib.sha256()
    for each in texts:
        made.update(each.numpy().tobytes())
    return made.hexdigest()


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield another name to write a file under, which then takes the place of `path`."""
    new = path.with_name(f".{path.name}.new")
    yield new
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
