"""Prompt/response pairs for finetune.py: read them, hold out groups, tokenize them, and make batches."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstrings


@dataclass(frozen=True)
class Example:
    """One pair as tokens: `ids` is the prompt and the response, which starts at `start`."""

    ids: list[int]
    start: int


def read_pairs(path: Path | None) -> list[dict[str, str]]:
    """Read the pairs of a JSON Lines file, or of the standard library if `path` is None."""
    if path is None:
        return docstrings.pairs()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not (line := line.strip()):
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}:{number}: not JSON ({error})") from None
        for key in ("prompt", "response"):
            if not isinstance(pair, dict) or not isinstance(pair.get(key), str) or not pair[key].strip():
                raise SystemExit(f'{path}:{number}: expected an object with a non-empty text "{key}", got {line[:100]}')
        found.append(pair)
    return found


def split(pairs: list[dict[str, str]], seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) pairs. A tenth is held out, in whole groups; without "group", equal prompts are a group."""
    group_of = [str(pair.get("group", pair["prompt"])) for pair in pairs]
    sizes = Counter(group_of)
    if len(sizes) < 2:
        raise SystemExit(f"cannot hold anything out: expected pairs of two groups or more, got {len(sizes)}")
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    held: set[str] = set()
    for group in groups:  # a group that would exceed the tenth stays in training
        if sum(sizes[other] for other in held) + sizes[group] <= len(pairs) / 10:
            held.add(group)
    held = held or {min(groups, key=sizes.__getitem__)}
    training = [pair for pair, group in zip(pairs, group_of, strict=True) if group not in held]
    return training, [pair for pair, group in zip(pairs, group_of, strict=True) if group in held]


def chat(tokenizer: Any, prompt: str, response: str | None = None) -> str:
    """The text of a pair in the model's chat template. Without a response it ends where the response would start."""
    if not tokenizer.chat_template:
        text = f"{tokenizer.bos_token or ''}{prompt}\n"
        return text if response is None else f"{text}{response}{tokenizer.eos_token}"
    turns = [{"role": "user", "content": prompt}]
    if response is None:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)


def encode(tokenizer: Any, pairs: list[dict[str, str]], seq_len: int) -> list[Example]:
    """Tokenize each pair and cut it to `seq_len`. Pairs whose prompt leaves no room for a response are left out."""
    examples = []
    for pair in pairs:
        prompt, whole = chat(tokenizer, pair["prompt"]), chat(tokenizer, pair["prompt"], pair["response"])
        if not whole.startswith(prompt):  # some templates write finished turns differently
            whole = f"{prompt}{pair['response']}{tokenizer.eos_token}"
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False).input_ids
        if len(ids) < seq_len:
            examples.append(Example((ids + answer)[:seq_len], len(ids)))
    if not examples:
        raise SystemExit(f"--seq-len {seq_len}: every prompt is longer than that")
    return examples


def batches(examples: list[Example], steps: int, size: int, seed: int) -> Iterator[list[Example]]:
    """Yield `steps` batches, each of pairs of about equal length. Each epoch has an order of its own."""
    rng = random.Random(seed)
    while steps > 0:
        order = rng.sample(examples, len(examples))
        # Sort within a window: sorting the whole epoch would make the same batches in every epoch.
        window = [sorted(order[i : i + 16 * size], key=lambda e: len(e.ids)) for i in range(0, len(order), 16 * size)]
        epoch = [part[i : i + size] for part in window for i in range(0, len(part), size)]
        rng.shuffle(epoch)
        yield from epoch[:steps]
        steps -= len(epoch)
