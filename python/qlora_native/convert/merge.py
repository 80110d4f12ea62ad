"""Convert checkpoints for deployment, shard by shard: merge an adapter into its base, or quantize.

    python -m qlora_native merge --base DIR --adapter DIR --out DIR [--to bf16|nf4|int4|...]
    python -m qlora_native quantize --model DIR --out DIR [--to nf4]

Both take `--calibrate FILE [--bits 4.5]` with a quantized format. Memory holds one shard of the result and two weights
in fp32, so any model that fits on the disk can be merged; a calibration needs what docs/quality.md says. The base may
be in 16 bits or in 4 (bitsandbytes' format). The merged weight is computed in fp32 and rounded once. The result is an
ordinary checkpoint that transformers loads: NF4 and FP4 in bitsandbytes' format, "int4" and "int8" in the format of
compressed-tensors.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .._core.versions import require

require("transformers")

import torch
from torch import Tensor, nn

from .. import _C
from .._calibrate.budget import Budget
from .._calibrate.feedback import Options
from .._core.blocks import check_blocksize
from .._core.errors import bad, dtype_name
from .._core.progress import Progress
from ..integrations.transformers._new_layers import names_to_skip
from ..integrations.transformers._quantizer import BitsAndBytesConfig
from . import _compressed_tensors as compressed_tensors
from ._adapters import Adapter
from ._calibration import CalibratedWeights, digest, read_texts
from ._checkpoints import Checkpoint, other_files, other_folders, rounded, write_shards
from ._report import Report
from ._skeleton import Skeleton, assembled
from ._staging import new_folder

__all__ = ["TARGETS", "Report", "convert"]

# The values of --to: {name: dtype, or a format of quantize()}.
TARGETS: dict[str, torch.dtype | str] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "nf4": "nf4",
    "fp4": "fp4",
    "int4": "int4",
    "int8": "int8",
}


def convert(
    base: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    to: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool = True,
    calibrate: str | Path | None = None,
    bits: float | None = None,
) -> Report:
    """Convert the model of `base`, with `adapter` merged into it, and write it to the new folder `out`.

    Args:
        base: folder of a checkpoint in safetensors files, in 16 or 32 bits or in bitsandbytes' 4; or the id of a
            model of the hub that is in the Hugging Face cache.
        out: a folder that does not exist or is empty. It appears when it is complete.
        adapter: folder of an adapter that PEFT saved, or None: LoRA and what comes with it (DoRA, experts' parameters,
            trained tokens, modules_to_save, another vocabulary), LoHa or IA³.
        to: a key of TARGETS. A format quantizes the layers that transformers would give to bitsandbytes. None keeps
            the dtype of each tensor of the base; a weight in 4 bits gets the one that it had before, as its quant_state
            says.
        blocksize, double_quant: as in `qlora_native.quantize`, for a format. "int4" and "int8" are written in the
            format of compressed-tensors, which has no double quantization and needs rows of whole blocks.
        progress: show the progress on stderr: on a terminal a bar, if tqdm is installed; in a log file a line now and
            then.
        calibrate: a file of text of the kind that the model will see, or JSON Lines with a "prompt" and a "response" in
            each line. Quantized weights are chosen by it, as by `qlora_native.calibrate`: the model is run layer by
            layer, and the folder `.<out>.calibration` beside `out` holds what is done, with which an interrupted run
            goes on. Experts that are stacked in one tensor stay in 16 bits.
        bits: a budget, as in `qlora_native.calibrate`: the mean bits of an element of the layers that are quantized,
            such as 4.5. Those whose rounding moves the model most stay in 16 bits, and the config names them in
            `llm_int8_skip_modules`; the format has no 8 bits beside 4.

    Returns:
        What was done, and the error of rounding.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `out` exists and is not empty.
        TypeError, ValueError: a file is damaged, a tensor of the model is missing, or the adapter cannot be merged or
            does not fit the base. Nothing is written but the folder of a calibration that has begun.
    """
    if to is not None and to not in TARGETS:
        raise bad("to", "one of " + ", ".join(TARGETS), repr(to))
    target = None if to is None else TARGETS[to]
    if calibrate is not None and not isinstance(target, str):
        formats = ", ".join(name for name, made in TARGETS.items() if isinstance(made, str))
        raise bad("calibrate", f"a file with one of the formats {formats}", f"one with {to or 'none'}")
    if bits is not None and calibrate is None:
        raise bad("bits", "None without a file to calibrate by", bits)
    checkpoint = Checkpoint(base)
    check_blocksize(blocksize)
    model = Skeleton(checkpoint)
    there = model.check_files(checkpoint)
    loaded = None
    if adapter is not None:
        model = model.as_loaded(checkpoint)
        loaded = Adapter(adapter, model)
    conversion = _Conversion(checkpoint, model, loaded, target, blocksize, double_quant)
    conversion.check(there)

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        bar = Progress(sum(map(len, checkpoint.shards.values())), progress, "convert", "tensor")
        for file, names in checkpoint.shards.items():
            yield file, {key: tensor for name in bar.over(names) for key, tensor in conversion.tensors(name).items()}

    with new_folder(out) as folder:
        if calibrate is not None:
            conversion.calibrate(calibrate, folder.with_name(f".{Path(out).name}.calibration"), progress, bits)
        conversion.report.bytes = write_shards(folder, shards())
        for path in conversion.others:
            shutil.copy2(path, folder / path.name)
        for path in loaded.tokenizer if loaded is not None else ():
            shutil.copy2(path, folder / path.name)
        config = (model if loaded is None else loaded.model).json
        config.pop("quantization_config", None)
        if conversion.format is not None:
            config["quantization_config"] = conversion.quantization_config()
        elif conversion.dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(conversion.dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    conversion.note_dtypes()
    if conversion.calibrated is not None:
        conversion.calibrated.remove()
    elif loaded is not None and to in ("nf4", "fp4", "int4") and (lost := conversion.report.error_of_delta) is not None:
        conversion.report.notes.append(
            f"rounding to 4 bits moved the weights {lost:.1f} times as far as the adapter did: --calibrate FILE keeps "
            "more of what it had learned, and --to bf16 all of it (docs/quality.md)"
        )
    return conversion.report


@dataclass
class _Conversion:
    """The conversion of one checkpoint: it decides what each tensor becomes."""

    checkpoint: Checkpoint
    model: Skeleton
    adapter: Adapter | None
    target: torch.dtype | str | None
    blocksize: int
    double_quant: bool
    calibrated: CalibratedWeights | None = None
    report: Report = field(default_factory=Report)
    others: list[Path] = field(default_factory=list)  # files to copy: tokenizer, generation config, ...
    # {name: names that it is tied to in the base, which the files do not have}: those that get tensors of their own ...
    untied: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)  # ... and those that stay tied, and that are adapted
    stored: Counter[torch.dtype] = field(default_factory=Counter)  # how many tensors are written in a dtype,
    decoded: Counter[torch.dtype] = field(default_factory=Counter)  # and how many of them were in 4 bits

    @property
    def format(self) -> str | None:
        """The format that weights are quantized to, or None."""
        return self.target if isinstance(self.target, str) else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of all tensors that are not quantized, or None: each has that of the base."""
        return self.target if isinstance(self.target, torch.dtype) else None

    @property
    def packed(self) -> bool:
        """Whether the format is written as in compressed-tensors, and not as in bitsandbytes."""
        return self.format in compressed_tensors.MAX_CODES

    @property
    def kept(self) -> set[str]:
        """The layers that a budget leaves unquantized."""
        return set() if self.calibrated is None else self.calibrated.kept

    @property
    def options(self) -> Options:
        """How weights are quantized."""
        if not self.packed:
            return Options(self.format, self.blocksize, self.double_quant, None)
        rounded_scales = partial(compressed_tensors.with_rounded_scales, dtype=self.model.dtype)
        return Options(self.format, self.blocksize, False, None, rounded_scales)

    def calibrate(self, path: str | Path, folder: Path, progress: bool, bits: float | None) -> None:
        """Choose the weights of the layers that are quantized by the text of a file, with a folder for what is done."""
        skeleton = self.model if self.adapter is None else self.adapter.model
        sources = self.model.sources(self.checkpoint)
        model = skeleton.without_values()
        for name, buffer in model.named_buffers():
            if name in sources:
                buffer.copy_(self._value(sources, name))
        widest = max((skeleton.shape(f"{name}.weight")[1] for name in skeleton.linears), default=0)
        texts = read_texts(path, self.checkpoint.folder, widest)
        run = {
            "files": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in self._files()],
            "format": [self.format, self.blocksize, self.options.double_quant],
            "texts": digest(texts),
            "version": _C.version(),
        }
        budget = None
        if bits is not None:
            run["measured"] = True  # the calibration is the same for each budget
            budget = Budget(bits, eight=False, dtype=self.model.dtype)
        self.calibrated = CalibratedWeights(folder)
        value = partial(self._value, sources)
        self.calibrated.make(skeleton, model, value, texts, self.options, run, progress, budget)
        self.report.notes.append(str(self.calibrated.report))

    def _value(self, sources: dict[str, list[str]], own: str) -> Tensor:
        """The value that the model's tensor `own` has before it is quantized, in the dtype that transformers loads.

        Args:
            sources: what the files have, as `Skeleton.sources` says.
            own: the name of the tensor.
        """
        names = next((sources[name] for name in (own, *sorted(self.model.tied(own))) if name in sources), [])
        parts = [part for name in names if (part := self.model.part_of(name)) is not None]
        if not names or self.model.is_transposed(own) or (parts and own.removesuffix(".weight") in self.model.linears):
            raise bad("calibrate", f"files with {own} as the model has it (or qn.calibrate, in memory)", "others")
        adapted = self.adapter is not None and own in self.adapter.names
        dtype = self.model.dtype_of(own)
        if not parts:
            base = self.checkpoint.dense(names[0])
            return (self.adapter.merged(own, base)[0] if adapted else base).to(dtype, copy=True)
        stored = [self.checkpoint[name] for name in names]
        merged = map(self.adapter.merged_part, parts, stored) if adapted else stored
        return assembled([(part, tensor.to(dtype)) for part, tensor in zip(parts, merged, strict=True)])

    def _files(self) -> list[Path]:
        """The files that are converted."""
        files = [self.checkpoint.folder / name for name in ("config.json", *self.checkpoint.shards)]
        adapters = ("adapter_config.json", "adapter_model.safetensors") if self.adapter is not None else ()
        return files + [self.adapter.folder / name for name in adapters]

    def quantization_config(self) -> dict[str, Any]:
        """The quantization_config of config.json."""
        if self.packed:
            return compressed_tensors.quantization_config(self.format, self.blocksize, self.model.other_linears())
        model = self.model if self.adapter is None else self.adapter.model
        dense = [*model.other_linears(), *sorted(self.kept)]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=self.model.dtype,
            bnb_4bit_quant_type=self.format,
            bnb_4bit_use_double_quant=self.double_quant,
            blocksize=self.blocksize,
            llm_int8_skip_modules=names_to_skip(dense, model.linears - self.kept) if self.kept or model.dense else None,
        ).to_dict()

    def check(self, there: set[str]) -> None:
        """Raise ValueError unless the adapter can be merged into the files, and the layers can have the format.

        Args:
            there: the names of the model's tensors that the files make.
        """
        if self.adapter is not None:
            self._check_adapter(self.adapter, there)
        if self.format is not None:
            direct = {self.model.name_of(name) for names in self.checkpoint.shards.values() for name in names}
            weights = {f"{path}.weight" for path in self.model.linears}
            if joined := sorted((weights & there) - direct):
                raise bad(
                    "to",
                    f"bf16, fp16 or fp32 for a {self.model.architecture}, whose files have {joined[0]} within another "
                    "tensor (transformers loads these in 4 bits by its quantization_config)",
                    self.target,
                )
        for path in sorted(self.model.linears) if self.packed else ():
            if type(self.model.module(path)) is not nn.Linear:  # the format names its layers by this class
                raise bad("to", f"bf16, fp16, fp32, nf4 or fp4 for a {self.model.architecture}", self.target)
            compressed_tensors.check_layer(path, self.model.shape(f"{path}.weight")[1], self.blocksize)
        stacks = self.model.stacks()
        if self.packed and stacks:
            raise bad(
                "to", f"nf4, fp4 or 16 bits for a {self.model.architecture}, whose experts are stacked", self.target
            )
        if self.format is not None and stacks:
            self.report.notes.append(
                f"{len(stacks)} tensors of experts, {sum(stacks.values()):,} elements, stay in 16 bits: they are "
                "quantized where transformers loads the checkpoint in 16 bits"
            )
        self.report.notes += self.model.note_of_unread("copied as they are")
        self.others = other_files(self.checkpoint.folder)
        if folders := other_folders(self.checkpoint.folder):
            self.report.notes.append(f"folders of the base are not copied: {', '.join(folders)}")

    def _check_adapter(self, adapter: Adapter, there: set[str]) -> None:
        """Find where each tensor that the adapter changes is written.

        Raises:
            ValueError: the files have no tensor that it could be merged into.
        """
        files = [name for names in self.checkpoint.shards.values() for name in names]
        parts = [(name, part) for name in files if (part := self.model.part_of(name)) is not None]
        adapter.check_parts(parts)
        direct = {self.model.name_of(name) for name in files}
        if joined := sorted((there & set(adapter.names)) - direct - {part.own for _, part in parts}):
            expected = "changes to tensors that the files have as such (PEFT's merge_and_unload merges these)"
            raise bad("adapter", expected, f"{joined[0]}, which they have within another")
        needed = adapter.model.needed(there)
        for name in sorted({*adapter.names, *needed} - there):
            source = next((other for other in sorted(self.model.tied(name)) if other in direct), None)
            if source is None:
                raise bad("adapter", "changes to tensors that the base has", f"{name}, which it has not")
            (self.untied if name in needed else self.shared).setdefault(source, []).append(name)
        self.report.merged = sum(not name.endswith(".bias") for name in adapter.names)
        self.report.notes += adapter.notes

    def note_dtypes(self) -> None:
        """Say in the report which dtypes were written, if the caller has not chosen."""
        if self.target is None:
            self.report.notes.append(f"dtypes of the base were kept: {_counts(self.stored)} (--to chooses another)")
            if self.decoded.total():
                self.report.notes.append(
                    f"weights in 4 bits were written in the dtype that they had before: {_counts(self.decoded)}"
                )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Make the entries that replace the tensor `name` of the file."""
        if name in self.model.unread:
            return {name: self.checkpoint[name]}
        own = self.model.name_of(name)
        part = None if self.adapter is None else self.model.part_of(name)
        if part is not None and part.own in self.adapter.names:
            stored = self.checkpoint[name]
            merged = self.adapter.merged_part(part, stored)
            return {name: self._rounded(name, part.own, merged, stored, merged)}
        entries = self._entries(name, own, name)
        for other in self.untied.get(own, ()):
            entries.update(self._entries(name, other, other))
        return entries

    def _entries(self, name: str, own: str, key: str) -> dict[str, Tensor]:
        """Make the entries of the model's tensor `own` of what the files call `name`, to be written as `key`."""
        path, _, kind = own.rpartition(".")
        adapted = self.adapter is not None and own in self.adapter.names
        quantized = self.checkpoint.quantized(name)
        quantize = self.format is not None and kind == "weight" and path in self.model.linears - self.kept
        if quantize and quantized and not adapted and self.calibrated is None:
            q = self.checkpoint.quantized_weight(name)
            if (q.format, q.blocksize, q.nested_absmax is not None) == (self.format, self.blocksize, self.double_quant):
                return q.to_bitsandbytes(key.removesuffix("weight"))  # unchanged bytes
        stored = self.checkpoint.dense(name)
        # Conv1D has a weight [in, out]; in 4 bits it is stored as [out, in], as in nn.Linear.
        transposed = self.model.is_transposed(own)
        base = stored.t() if transposed and quantized else stored
        weight, trained = self.adapter.merged(own, base) if adapted else (base, base)
        if not quantize:
            return {key: self._rounded(name, own, weight, base, trained)}
        weight = weight.t() if transposed else weight
        try:
            q = self.options.round_to_nearest(weight) if self.calibrated is None else self.calibrated[path]
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.describe(name)}: {str(error).removeprefix('weight: ')}") from None
        decoded = q.dequantize(torch.float32)
        self.report.add_rounding(path, decoded, weight)
        self._measure(own, decoded.t() if transposed else decoded, base, trained)
        if self.packed:
            return compressed_tensors.entries(q, key.removesuffix("weight"))
        return replace(q, dtype=self.checkpoint.dtype(name)).to_bitsandbytes(key.removesuffix("weight"))

    def _rounded(self, name: str, own: str, tensor: Tensor, base: Tensor, trained: Tensor) -> Tensor:
        """Round a tensor that is not quantized, once, to the dtype in which it is written. Integers are kept.

        Args:
            name, own: its names in the files and in the model.
            tensor: its value.
            base: its value in the base.
            trained: its value in the model that was trained.
        """
        if not tensor.is_floating_point():
            return tensor.contiguous()
        kept = own.removesuffix(".weight") in self.kept
        dtype = self.dtype or (self.model.dtype if kept else self.checkpoint.dtype(name))
        self.stored[dtype] += 1
        self.decoded[dtype] += self.checkpoint.quantized(name)
        written = rounded(self.checkpoint.describe(name), tensor, dtype)
        self._measure(own, written, base, trained)
        return written

    def _measure(self, name: str, written: Tensor, base: Tensor, trained: Tensor) -> None:
        """Count how far a written tensor is from what the trained model has, and how far that is from the base."""
        if self.adapter is not None and not (written is base and trained is base):
            self.report.add_written(written, base, trained)
            for other in self.shared.get(name, ()):
                self.report.add_written(written, base, self.adapter.merged(other, base)[1])


def _counts(dtypes: Counter[torch.dtype]) -> str:
    """ "bfloat16 (290 tensors), float32 (2)"."""
    return ", ".join(f"{dtype_name(dtype)} ({count:,})" for dtype, count in dtypes.most_common() if count)
