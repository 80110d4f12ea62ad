"""For large.py: a model whose 4-bit weights stay in files, what limits its step, and the memory that it takes."""

from __future__ import annotations

import copy
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import qlora_native as qn
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from qlora_native.convert._checkpoints import write_shards
from qlora_native.convert._staging import new_folder
from qlora_native.integrations.transformers import BitsAndBytesConfig
from qlora_native.integrations.transformers._weight_files import written_weight
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

DISK_BYTES = 4 << 30  # that are read to measure the rate of the disk,
BLOCK, READERS = 8 << 20, 4  # in blocks, by as many threads
SAMPLE_S = 0.05  # between two looks at the memory
LAYERS = 2  # whose products are timed, so that no cache of the processor holds their weights
ROUNDS = 3
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def write(folder: Path, config: PreTrainedConfig, layers: nn.ModuleList, rest: nn.Module, make: Callable) -> None:
    """Write a folder as `python -m qlora_native quantize` does, a layer in each file. Nothing is written twice.

    Args:
        folder: where; it appears when it is complete.
        config: of the model.
        layers: the layers of the model, on the meta device. Each is freed when it has been written.
        rest: the model.
        make: gives values to a module, whose linear layers are to be in 4 bits then if it is one of `layers`.
    """
    count = len(layers) + 1

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for i in range(count):
            part, prefix = (layers[i], f"model.layers.{i}.") if i < len(layers) else (rest, "")
            make(part)
            yield f"model-{i + 1:05}-of-{count:05}.safetensors", _entries(part, prefix)
            if part is not rest:
                layers[i] = nn.Identity()

    described = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with new_folder(folder) as staged:
        write_shards(staged, shards())
        written = copy.deepcopy(config)
        written.quantization_config = described.to_dict()
        written.save_pretrained(staged)


def _entries(part: nn.Module, prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in part.named_modules():
        path = f"{prefix}{name}"
        if isinstance(module, qn.nn.Linear4bit):
            tensors |= written_weight(f"{path}.weight", module)
        else:
            tensors |= {f"{path}.{own}": tensor.data for own, tensor in module.named_parameters(recurse=False)}
    return tensors


def files_of(folder: Path) -> list[Path]:
    """The files of weights in a folder."""
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path, config: PreTrainedConfig) -> tuple[nn.Module, qn.nn.MappedWeights]:
    """The model of a folder, and what reads its weights ahead.

    Raises:
        ValueError: the folder has a model of another size.
    """
    found = AutoConfig.from_pretrained(folder)
    if other := [name for name in _SIZES if getattr(found, name) != getattr(config, name)]:
        raise ValueError(f"{folder}: expected {other[0]} {getattr(config, other[0])}, got {getattr(found, other[0])}")
    of_file = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=of_file)
    return model, qn.nn.MappedWeights(model)  # as with mapped=True, but here its figures are read


def forget(files: Sequence[Path]) -> None:
    """Let the page cache drop the files, which nothing has mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(files: Sequence[Path]) -> float:
    """The bytes a second that the disk gives: READERS threads read blocks, past the page cache (O_DIRECT)."""
    local = threading.local()

    def read(block: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, BLOCK)  # O_DIRECT wants pages
        path, offset = block
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system in memory
            descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.preadv(descriptor, [local.buffer], offset)
        finally:
            os.close(descriptor)

    blocks = [(path, offset) for path in files for offset in range(0, path.stat().st_size, BLOCK)]
    with ThreadPoolExecutor(READERS) as readers:
        started = time.perf_counter()
        read_bytes = sum(readers.map(read, blocks[: DISK_BYTES // BLOCK]))
        return read_bytes / (time.perf_counter() - started)


class Memory:
    """The largest memory of this process within a block, by kind, as /proc/self/status has it.

    Attributes:
        peaks: bytes: "RssAnon" is the process's own; "RssFile" are pages of mapped files, which the system takes back
            when it needs them; "VmRSS" is the sum at one moment.
    """

    def __init__(self) -> None:
        """Look at nothing yet."""
        self.peaks = dict.fromkeys(("RssAnon", "RssFile", "VmRSS"), 0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            with open("/proc/self/status", encoding="utf-8") as lines:
                now = {name: 1024 * int(value.split()[0]) for name, _, value in (each.partition(":") for each in lines)
                       if name in self.peaks}  # fmt: skip
            self.peaks = {name: max(peak, now[name]) for name, peak in self.peaks.items()}

    def __enter__(self) -> Memory:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End."""
        self._end.set()
        self._thread.join()


def products_s(model: Any, tokens: int) -> float:
    """The seconds that the products of one step take alone, with weights that are in memory.

    Those of LAYERS layers are timed one after the other, with their adapters: each twice forward, as gradient
    checkpointing computes them, and once backward. They count for all layers; the output layer's count once.
    """
    layers = model.base_model.model.model.layers
    chosen = [m for layer in layers[:LAYERS] for m in layer.modules() if isinstance(m, BaseTunerLayer)]
    operands = [_operands(module, module.in_features, module.out_features, tokens) for module in chosen]
    head = model.base_model.model.lm_head
    of_head = _operands(head, head.in_features, head.out_features, tokens)
    rounds = []
    for _ in range(ROUNDS + 1):
        seconds = sum(_forward_twice_and_backward(*each) for each in operands) * len(layers) / min(LAYERS, len(layers))
        rounds.append(seconds + _forward_twice_and_backward(*of_head, forwards=1))
    for parameter in model.parameters():
        parameter.grad = None
    return statistics.median(rounds[1:])  # the first has read the weights from the files


def _operands(module: nn.Module, K: int, N: int, tokens: int) -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(1, tokens, K, dtype=torch.bfloat16).requires_grad_()
    return module, x, torch.randn(1, tokens, N, dtype=torch.bfloat16)


def _forward_twice_and_backward(module: nn.Module, x: Tensor, dy: Tensor, forwards: int = 2) -> float:
    started = time.perf_counter()
    for _ in range(forwards):
        y = module(x)
    y.backward(dy)
    return time.perf_counter() - started
