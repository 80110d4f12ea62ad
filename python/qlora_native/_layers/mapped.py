"""`MappedWeights`: the weights of a model stay in their files, and are read before their layers need them."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from .._core import mapped
from .._core.errors import bad, bad_type
from .._core.mapped import MappedFile, Region, mappings, read_bytes, region_of
from .._core.progress import SECONDS
from .base import QuantizedLayer

AHEAD_BYTES = 1 << 30  # two layers of a Llama of 65 billion parameters, a second of a disk of 1 GB/s
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # the attribute of a module by which DDP leaves tensors alone


class MappedWeights:
    """Reads the quantized weights of a model, which are views of mapped files, before its layers need them.

    The files may be larger than the memory: the kernel keeps what fits in its page cache, and drops pages, which nobody
    has written to, when memory is short. Processes that map the same files share these pages.

    While a layer computes, a thread reads the layers that come next, up to `ahead_bytes`: upward in forward and
    downward in backward, also where gradient checkpointing computes a layer again. The order is that of the model's
    modules, corrected by the first forward.

    Before each use of a layer its files are checked: one that was truncated, written to or replaced is a ValueError,
    and a page that cannot be read is an OSError. A file that is truncated after the check, while a product reads its
    pages, still ends the process with SIGBUS.

    It ends with the model. A layer that gets another weight (a merge, `.to()` of a GPU, FSDP2) is not read from the
    files any more. In a graph of `torch.compile` nothing is read ahead and nothing is checked.

    Attributes:
        nbytes: the bytes of all weights in the files.
        waited_s: the seconds in which the program has waited for weights.
    """

    def __init__(self, model: nn.Module, ahead_bytes: int = AHEAD_BYTES, progress: bool = True) -> None:
        """Find the files of a model's weights, and read ahead from now on.

        Args:
            model: a module with quantized layers, all of which have weights that are views of mapped files: a 4-bit
                folder (nf4, fp4) that transformers has loaded on the CPU, or layers over tensors of
                `safetensors.safe_open` or `torch.load(mmap=True)`.
            ahead_bytes: how much is read before it is needed; 0 reads a layer when it is used.
            progress: write a line on stderr after a step that has read from the disk, and every 30 seconds at most:
                bytes, their rate, and the share of it in the rate that the disk had while it was read from. The bytes
                are `read_bytes` of /proc/self/io, those of the whole process.

        Raises:
            TypeError: `model` is not a module.
            ValueError: it has no quantized layer, the codes of one are no view of a mapped file, or a file is on a
                network file system.
            OSError: a file cannot be opened.
        """
        if not isinstance(model, nn.Module):
            raise bad_type("model", "an nn.Module", type(model).__name__)
        if not isinstance(ahead_bytes, int) or ahead_bytes < 0:
            raise bad("ahead_bytes", "a number of bytes", ahead_bytes)
        weights: dict[int, tuple[str, list[Tensor]]] = {}  # by the address of the codes, which layers may share
        names = []
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                tensors = module.weight_tensors()
                names += [_joined(name, own) for own in tensors]
                weights.setdefault(tensors["weight"].data_ptr(), (name, list(tensors.values())))
        if not weights:
            raise bad("model", "a module with quantized layers", type(model).__name__)
        maps, files = mappings(), dict[str, MappedFile]()
        regions = [region_of(name, tensors, maps, files) for name, tensors in weights.values()]
        self.nbytes = sum(region.nbytes for region in regions)
        self.waited_s = 0.0
        self._order, self._known = regions, 0  # the first `_known` have been used in this order
        for i, region in enumerate(regions):
            region.position = i
        self._ahead_bytes, self._progress = ahead_bytes, progress
        self._clock = 0  # bytes of regions that have been read
        self._backward = False
        self._steps = 0
        self._disk_bytes, self._disk_s = 0, 0.0  # of the reads that took bytes from the disk
        self._shown = self._figures()  # at the last report
        self._renew()
        self._uses = {region.tensors[0].data_ptr(): partial(self._use, region) for region in regions}
        mapped.uses.update(self._uses)
        _all.add(self)
        # DDP would copy the weights of the first process over those of all, in place, and so into memory.
        setattr(model, _DDP_IGNORES, [*getattr(model, _DDP_IGNORES, ()), *names, *map(_under_peft, names)])
        self._finalizer = weakref.finalize(model, self.close)

    def close(self) -> None:
        """Stop reading ahead and checking. The model's weights stay mapped."""
        for address, use in self._uses.items():
            if mapped.uses.get(address) is use:
                del mapped.uses[address]
        self._uses = {}
        self._queue.put(None)
        self._finalizer.detach()

    def report(self) -> str:
        """What has been read since the last report or line of progress, and how fast."""
        before, self._shown = self._shown, self._figures()
        seconds, steps, read, waited = (now - then for now, then in zip(self._shown, before, strict=True))
        text = f"mapped weights: {steps} step{'s' * (steps != 1)} in {seconds:.1f} s read {read / 1e9:.2f} GB"
        if self._disk_s > 0 and seconds > 0:
            rate, of_disk = read / seconds, self._disk_bytes / self._disk_s
            text += f" ({rate / 1e9:.2f} GB/s, {rate / of_disk:.0%} of the {of_disk / 1e9:.2f} GB/s of the disk)"
        return f"{text}, waited {waited:.1f} s for {self.nbytes / 1e9:.2f} GB of weights"

    def _figures(self) -> tuple[float, int, int, float]:
        """What a report tells the growth of: time, steps, bytes from the disk, and seconds of waiting."""
        return time.monotonic(), self._steps, read_bytes(), self.waited_s

    def _renew(self) -> None:
        """Make the locks and the queue, and no thread yet: at first, and in a forked process, which has no thread."""
        self._lock, self._queue = threading.Lock(), queue.SimpleQueue[Region | None]()
        self._thread: threading.Thread | None = None
        for region in self._order:
            region.lock, region.queued = threading.Lock(), False

    def _use(self, region: Region) -> None:
        """Have a region in memory, and let the reader go on to those that come next."""
        for file in region.files:
            file.check()
        backward = torch._C._current_graph_task_id() != -1  # also where a checkpoint computes a layer again
        with self._lock:
            if not self._known:
                self._shown = self._figures()  # the first step begins
            if self._backward and not backward:
                self._end_step()
            self._backward = backward
            self._learn(region)
            for other in self._next(region, backward):
                other.queued = True
                self._queue.put(other)
            if self._thread is None and self._ahead_bytes:
                self._thread = threading.Thread(target=self._read_ahead, args=(self._queue,), daemon=True)
                self._thread.start()
        started = time.monotonic()
        self._read(region)
        self.waited_s += time.monotonic() - started

    def _learn(self, region: Region) -> None:
        """Note the first use of a region: the order is that of first uses, and then that of modules."""
        if region.position < self._known:
            return
        self._order.remove(region)
        self._order.insert(self._known, region)
        self._known += 1
        for i, each in enumerate(self._order[self._known - 1 :], self._known - 1):
            each.position = i

    def _next(self, region: Region, backward: bool) -> list[Region]:
        """The regions after this one that are to be read, and have not been requested or read lately."""
        if self._known == len(self._order) and self.nbytes <= 2 * self._ahead_bytes:
            return []  # each has been read once, and always counts as read lately
        found, left = [], self._ahead_bytes
        count, step = len(self._order), -1 if backward else 1
        for i in range(1, count):
            position = region.position + i * step
            if not 0 <= position < count:
                # Forward is followed by backward, which begins with what was used last, but for an evaluation.
                if torch.is_grad_enabled():
                    break
                position %= count
            other = self._order[position]
            left -= other.nbytes
            if left < 0 and i > 1:
                break
            if not other.queued and not self._is_recent(other):
                found.append(other)
        return found if self._ahead_bytes else []

    def _is_recent(self, region: Region) -> bool:
        """Whether a region is in memory, as so little has been read since it was that the kernel has not dropped it."""
        return region.touched is not None and self._clock - region.touched <= 2 * self._ahead_bytes

    def _read(self, region: Region) -> None:
        with region.lock:
            if not self._is_recent(region):
                started, before = time.monotonic(), read_bytes()
                region.read()
                if (read := read_bytes() - before) > 0:
                    self._disk_bytes += read
                    self._disk_s += time.monotonic() - started
                self._clock += region.nbytes
            region.touched = self._clock

    def _read_ahead(self, regions: queue.SimpleQueue[Region | None]) -> None:
        while (region := regions.get()) is not None:
            with contextlib.suppress(OSError):  # the use of the region tries again, and raises the error
                self._read(region)
            region.queued = False

    def _end_step(self) -> None:
        self._steps += 1
        since, steps, before, _ = self._shown
        if self._progress and (steps == 0 or time.monotonic() - since >= SECONDS) and read_bytes() > before:
            sys.stderr.write(f"{self.report()}\n")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _under_peft(name: str) -> str:
    """The name of a layer's tensor when PEFT has put an adapter around the layer."""
    path, _, own = name.rpartition(".")
    return f"base_model.model.{path}.base_layer.{own}"


_all: weakref.WeakSet[MappedWeights] = weakref.WeakSet()


def _after_fork() -> None:
    for weights in _all:
        weights._renew()


os.register_at_fork(after_in_child=_after_fork)
