"""Use adapters: load a model in 4 bits, generate with one adapter after another, and merge one of them. Copy it.

    python examples/generate.py --adapter out/finetune/adapter --prompt "Write a docstring for len."
        The adapter that finetune.py has made, over SmolLM2-135M-Instruct.
    python examples/generate.py --model PATH_OR_HUB_ID --adapter FIRST SECOND --prompt "..." --merge out/merged
        Your model and adapters. All adapters share the same 4-bit weights, and switching takes no time. --merge merges
        the first adapter into these weights and saves the result, in 4 bits, as a model of its own. It is refused over
        the bytes of a file that was quantized before, as those of SmolLM2 are without --format nf4.

The weights must be in the format that the adapter was trained over: repeat finetune.py's --format, --no-double-quant,
--dtype and --device. python -m qlora_native merge merges into 16 bits, which rounds less; see also docs/serving.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

import finetune


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; `base` are finetune.py's arguments, by which it loads the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, nargs="+", required=True, help="folders of adapters of PEFT")
    parser.add_argument("--prompt", nargs="+", required=True, help="what the model is asked")
    parser.add_argument("--merge", type=Path, help="a new folder for the model with the first adapter merged into it")
    args, rest = parser.parse_known_args(argv)
    args.base = finetune.arguments(rest)  # --model, --format, --device, ...
    for folder in args.adapter:
        if not (folder / "adapter_config.json").is_file():
            parser.error(f"--adapter: no adapter_config.json in {folder}")
    if args.merge is not None and args.merge.exists():
        parser.error(f"--merge: expected a new folder, {args.merge} exists")
    return args


def show(title: str, model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """Generate an answer to each prompt, and print it."""
    print(f"\n{title}")
    for prompt, answer in zip(prompts, finetune.answers(model, tokenizer, prompts), strict=True):
        print(f"  {prompt}\n    {answer}")


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, generate with each adapter, and merge the first if asked to."""
    args = arguments(argv)
    tokenizer, base, _, _ = finetune.load_quantized(args.base)
    if args.merge is not None and args.base.format == finetune.KEPT:
        raise SystemExit("--merge: expected weights that are rounded to 4 bits here, got the bytes of a quantized file")
    names = [f"adapter-{number}" for number, _ in enumerate(args.adapter, 1)]
    model = PeftModel.from_pretrained(base, args.adapter[0], adapter_name=names[0])
    for name, folder in zip(names[1:], args.adapter[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)

    with model.disable_adapter():
        show("without an adapter", model, tokenizer, args.prompt)
    for name, folder in zip(names, args.adapter, strict=True):
        model.set_adapter(name)
        show(f"{name}: {folder}", model, tokenizer, args.prompt)

    if args.merge is not None:
        model.set_adapter(names[0])
        merged = model.merge_and_unload(adapter_names=names[:1])  # rounds the sum to 4 bits, once
        show(f"merged: {args.merge}", merged, tokenizer, args.prompt)
        merged.save_pretrained(args.merge)
        tokenizer.save_pretrained(args.merge)


if __name__ == "__main__":
    main()
