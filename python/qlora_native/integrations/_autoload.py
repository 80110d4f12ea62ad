"""The entry point that bitsandbytes calls while it is imported itself, so this module does not import bitsandbytes."""

from __future__ import annotations

import os

from .._core.errors import bad


def autoload() -> None:
    """Call `enable` if QLORA_NATIVE_BNB=1. bitsandbytes calls this on import (entry point `bitsandbytes.backends`).

    Raises:
        ValueError: QLORA_NATIVE_BNB is neither 0 nor 1. bitsandbytes then fails to be imported, with this message.
    """
    value = os.environ.get("QLORA_NATIVE_BNB") or "0"
    if value not in ("0", "1"):
        raise bad("QLORA_NATIVE_BNB", "0 or 1", repr(value))
    if value == "1":
        from .bitsandbytes import enable

        enable()
