"""JSON out of files, whose authors may be strangers."""

from __future__ import annotations

import json
from typing import Any

from ._errors import bad


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object that `text` is. `name` says in errors where the text is from.

    Raises:
        ValueError: it is no JSON object, is nested too deeply, or has a key twice, for then readers would disagree
            about which of the two values counts.
    """
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
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values
