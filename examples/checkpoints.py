"""Files of a run of finetune.py that a kill at any moment leaves whole: the adapter, and what is needed to go on."""

from __future__ import annotations

import argparse
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import processes
from pairs import Example

FREE = ("output", "save_steps", "resume", "device")  # the options that may change when a run goes on
CHECKPOINT = "checkpoint.pt"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield another name to write a file or a folder under, which then takes the place of `path`."""
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    yield new
    if path.is_dir():  # one folder cannot replace another: the old one stands aside
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def refuse_unfinished(args: argparse.Namespace) -> None:
    """Stop if `args.output` has a run that did not end, and this one would not go on with it."""
    path = args.output / CHECKPOINT
    if path.exists() and not args.resume:
        raise SystemExit(f"--output: {path} is of an unfinished run: add --resume, or remove it")


class Checkpoints:
    """Saves a run: `adapter/` for PEFT, and `checkpoint.pt`, from which it goes on as if it had never stopped."""

    def __init__(self, args: argparse.Namespace, examples: list[Example]) -> None:
        """Find the checkpoint in `args.output`, if there is one: of the same options and data, and with --resume."""
        self.adapter, self.path = args.output / "adapter", args.output / CHECKPOINT
        self.run = {name: str(value) for name, value in sorted(vars(args).items()) if name not in FREE}
        self.run |= {"data": str(zlib.crc32(repr(examples).encode())), "processes": str(processes.count())}
        self.saved: dict[str, Any] = {}
        if not self.path.exists():
            return
        refuse_unfinished(args)
        self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.run.items():
            if (was := self.saved["run"].get(name)) != value:
                raise SystemExit(f"--resume: expected {name} {was}, with which {self.path} was made, got {value}")

    def restore(self, model: PeftModel, optimizer: Optimizer, schedule: LRScheduler) -> list[float]:
        """Put the run into the state of the checkpoint. Returns the losses of the steps that it has made."""
        if not self.saved:
            return []
        model.load_state_dict(self.saved["adapter"], strict=False)
        optimizer.load_state_dict(self.saved["optimizer"])
        schedule.load_state_dict(self.saved["schedule"])
        cpu, device = self.saved["generators"][processes.rank()]
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
        return self.saved["losses"]

    def save(self, model: PeftModel, optimizer: Optimizer, schedule: LRScheduler, losses: list[float]) -> None:
        """Save what the run is after as many steps as it has losses. All processes call this; the first one writes."""
        on_gpu = next(model.parameters()).is_cuda
        generators = processes.gather((torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None))
        if processes.rank() > 0:
            return
        with replaced(self.path) as new:
            adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({"run": self.run, "adapter": adapter, "losses": losses, "generators": generators, **states}, new)
        with replaced(self.adapter) as new:
            model.save_pretrained(str(new), save_embedding_layers=False)
