"""Read JSON objects from files that nobody has checked."""

from __future__ import annotations

import json
from typing import Any

from .errors import bad


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse `text`; errors call it `name`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(name, "a JSON object", f"something else ({error})") from None
    if not isinstance(value, dict):
        raise bad(name, "a JSON object", type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return values
