"""A small real data set that every Python carries: the signatures and docstrings of its standard library.

A prompt is a signature in its class and module, the response the first paragraph of its docstring, and the group its
module. finetune.py holds out whole groups, so that no held-out pair has a near-twin among the training pairs. The
sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

# Tests, demonstrations and bundled packages are poor examples of documented library code.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})
NEAR_TWIN = 0.7  # paragraphs that share this part of their words are near-twins


def pairs(count: int = 5000) -> list[dict[str, str]]:
    """Up to `count` pairs of `prompt`, `response` and `group`.

    A paragraph appears once, and not at all if another module has a near-twin of it. The choice and the order depend
    only on the text of the standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files have broken code on purpose
            continue
        group = re.sub(r"^_(py)?", "", parts[0])  # decimal, _decimal and _pydecimal are one
        for prompt, response in _visit(tree, f"# {'.'.join(parts).removesuffix('.__init__')}\n", ""):
            found.append({"prompt": prompt, "response": response, "group": group})
    # Sorted by hash: the first 5,000 by name would be only the modules from a to t.
    found.sort(key=lambda pair: hashlib.sha256(pair["prompt"].encode()).digest())
    return _without_near_twins(found)[:count]


def _without_near_twins(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """Drop responses with the same words as an earlier one, and near-twins of a response of another group."""
    words_of = [frozenset(re.findall(r"[a-z0-9]+", pair["response"].lower())) for pair in found]
    frequency = Counter(word for words in words_of for word in words)
    kept: list[dict[str, str]] = []
    by_word: dict[str, list[tuple[frozenset[str], str]]] = defaultdict(list)
    for pair, words in zip(found, words_of, strict=True):
        # Sets with a Jaccard index of t share one of the (1 - t) * size + 1 rarest words of each: compare only these.
        rarest = sorted(words, key=lambda word: (frequency[word], word))
        rarest = rarest[: len(words) - math.ceil(NEAR_TWIN * len(words)) + 1]
        if not any(
            other == words or (group != pair["group"] and len(words & other) >= NEAR_TWIN * len(words | other))
            for word in rarest
            for other, group in by_word[word]
        ):
            kept.append(pair)
            for word in rarest:
                by_word[word].append((words, pair["group"]))
    return kept


def _visit(node: ast.AST, header: str, indent: str) -> Iterator[tuple[str, str]]:
    """(prompt, response) of each class and function in `node`, directly or inside a class or an `if`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _visit(child, header, indent)
            continue
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            signature = f"{indent}class {child.name}({bases}):".replace("()", "")
            yield from _visit(child, f"{header}{signature}\n", indent + "    ")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            keyword = "async def" if isinstance(child, ast.AsyncFunctionDef) else "def"
            returns = f" -> {ast.unparse(child.returns)}" if child.returns else ""
            signature = f"{indent}{keyword} {child.name}({ast.unparse(child.args)}){returns}:"
        else:
            continue
        paragraph = (ast.get_docstring(child) or "").strip().split("\n\n")[0].split()
        if len(paragraph) > 2:  # "Deprecated." and the like say nothing about the signature
            yield f"Write a docstring:\n{header}{signature}", " ".join(paragraph)
