"""The command `qlora-native`, or `python -m qlora_native`: prints what a bug report needs, checks the kernels of this
machine, and converts models."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _C, __version__
from ._core.microscaling import MICROSCALED

PACKED = ("int4", "int8")  # formats that are written to compressed-tensors' files


def report() -> dict[str, str]:
    """What this installation is and what it runs on: {name: value}, in the order in which it is printed."""
    try:
        used = _C.current_isa()
    except RuntimeError as error:  # QLN_FORCE_ISA names one that cannot run here, and the report says why
        used = f"none: {error}"
    forced = os.environ.get("QLN_FORCE_ISA")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "qlora_native": __version__,
        "instruction sets found": ", ".join(_C.available_isas()),
        "instruction set used": used + (f" (QLN_FORCE_ISA={forced})" if forced else ""),
        "threads": f"{_C.num_threads()} of {os.cpu_count()} processors",
        "CUDA backend": _C.cuda_unavailable_reason() or "built",
        "CUDA devices": ", ".join(devices) or "none that torch sees",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built'}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        **{name: _version_of(name) for name in ("bitsandbytes", "gguf", "peft", "transformers")},
        "Python": sys.version.split()[0],
        "platform": f"{platform.platform()}, {_processor()}",
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def cmake_dir() -> Path:
    """The folder of the C++ package inside this Python package, which CMake takes as qlora_native_DIR."""
    return Path(_C.__file__).parent / "lib/cmake/qlora_native"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; end the program if it is wrong."""
    parser = argparse.ArgumentParser(prog="qlora-native", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--cmake-dir", action="store_true", help="print the value for CMake's -Dqlora_native_DIR=")
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser("check", help="compare the results of this CPU and of each GPU with their definitions")
    check.add_argument("--only", choices=["cpu", "gpu"], help="default: both")
    merge = commands.add_parser("merge", help="merge an adapter into a checkpoint, shard by shard")
    quantize = commands.add_parser("quantize", help="put a checkpoint into 4 bits, shard by shard")
    merge.add_argument(
        "--base", required=True, help="folder of the model, in 16 or in 4 bits, or its id in the hub's cache"
    )
    merge.add_argument("--adapter", type=Path, required=True, help="folder of the adapter, as PEFT saved it")
    quantize.add_argument(
        "--model", required=True, dest="base", help="folder of the model, or its id in the hub's cache"
    )
    merge.add_argument(
        "--to",
        type=_stored_format,
        choices=["bf16", "fp16", "fp32", "nf4", "fp4", *PACKED],
        help="int4 and int8: a folder of compressed-tensors (default: the dtype that each tensor has in the base; a "
        "weight in 4 bits gets the one that it had before)",
    )
    quantize.add_argument("--to", type=_stored_format, choices=["nf4", "fp4"], default="nf4")
    for command in (merge, quantize):
        command.add_argument("--out", type=Path, required=True, help="a new folder; it appears when it is complete")
        command.add_argument("--blocksize", type=int, default=64, help="weights that share a scale, in 4 bits")
        _add_calibrate(command)
        command.add_argument(
            "--bits",
            type=float,
            metavar="MEAN",
            help="with --calibrate: the bits that an element may have on average, such as 4.5; the layers that matter "
            "most stay in 16 bits",
        )
        command.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32, in 4 bits")
    _add_export(commands)
    args = parser.parse_args(argv)
    if args.command == "export":
        given = [name for name in ("model", "base", "adapter") if getattr(args, name) is not None]
        if given not in (["model"], ["base", "adapter"]):
            parser.error("export: expected --model, or --base and --adapter")
        if args.calibrate is not None and (args.model is None or args.to not in PACKED):
            expected = f"expected --model and --to {' or '.join(PACKED)}"
            parser.error(f"export: --calibrate: {expected}: the codes of a GGUF file are made by the package gguf")
    return args


def _add_calibrate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="choose the quantized weights by text of the kind that the model will see: a file of it, or .jsonl with a "
        '"prompt" and a "response" in each line',
    )


def _stored_format(name: str) -> str:
    if name in MICROSCALED:
        raise argparse.ArgumentTypeError(
            f"expected a format that can be written, got {name}: the 4-bit files written here are bitsandbytes', which "
            f"has nf4 and fp4; a model is put into {name} while it is loaded (BitsAndBytesConfig, quantize_model)"
        )
    return name


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model or an adapter for servers: GGUF, compressed-tensors")
    export.add_argument("--model", help="folder of a model, in 16 or in 4 bits, or its id in the hub's cache")
    export.add_argument("--base", help="what --adapter was trained over: a model, as --model, or a GGUF file")
    export.add_argument(
        "--adapter", type=Path, help="folder of a LoRA adapter, as PEFT saved it, to become a GGUF file"
    )
    export.add_argument("--out", type=Path, required=True, help="a new file, or folder; it appears when it is complete")
    export.add_argument(
        "--to",
        help="a GGUF file: f32, f16, bf16, and of a model q8_0, q5_1, q5_0, q4_1, q4_0 (default: the model's dtype, of "
        "an adapter f32). A folder of compressed-tensors, of a model: int4, int8",
    )
    export.add_argument("--blocksize", type=int, default=64, help="weights that share a scale, for int4 and int8")
    _add_calibrate(export)


def convert(args: argparse.Namespace) -> Any:
    """Run `merge`, `quantize` or `export`, and return a report that can be printed."""
    if args.command != "export" or (args.model is not None and args.to in PACKED):
        from .convert import merge

        source = args.model if args.command == "export" else args.base
        double_quant = not getattr(args, "no_double_quant", True)
        return merge.convert(
            source,
            args.out,
            getattr(args, "adapter", None),
            args.to,
            args.blocksize,
            double_quant,
            calibrate=args.calibrate,
            bits=getattr(args, "bits", None),
        )
    from .convert import gguf

    if args.model is not None:
        return gguf.export_model(args.model, args.out, args.to)
    return gguf.export_adapter(args.base, args.adapter, args.out, args.to or "f32")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command of the command line; without a command, print the report."""
    args = arguments(argv)
    if args.cmake_dir:
        print(cmake_dir())
        return
    if args.command == "check":
        return check(args.only)
    if args.command is not None:
        try:
            print(convert(args))
        except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
            raise SystemExit(f"{args.command}: {error}") from None
        return
    print_report()


def print_report() -> None:
    """Print `report()`, a line for each value."""
    values = report()
    width = max(len(name) for name in values) + 2
    for name, value in values.items():
        print(f"{name:{width}}{value}")


def check(only: str | None) -> None:
    """Print `report()` and what a check of this machine finds; end the program with 1 if something is wrong."""
    from ._check import run

    begin = time.monotonic()
    print_report()
    all_right = True
    for text, is_right in run.check(only):
        print(f"\n{text}", flush=True)
        all_right &= is_right
    print(f"\n{'All is right' if all_right else 'SOMETHING IS WRONG'}, in {time.monotonic() - begin:.0f} s.")
    if not all_right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
