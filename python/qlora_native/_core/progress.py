"""Show the progress of a long loop: a bar on a terminal, or a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

SECONDS = 30.0  # between two lines of a log file


class Progress:
    """Counts what has been done and shows it on stderr.

    On a terminal, and in a notebook, it shows a bar of tqdm, if tqdm is installed. Elsewhere it prints a line every
    SECONDS and one at the end, so that a log file does not fill with bars. The time left assumes that an item takes as
    long as those before it.

    Args:
        total: the number of items.
        wanted: whether anything is shown.
        action: the verb for an item, such as "quantize".
        unit: the noun for an item, such as "layer".
    """

    def __init__(self, total: int, wanted: bool, action: str, unit: str) -> None:
        self._wanted, self._action, self._unit = wanted, action, unit
        self._total, self._done = total, 0
        self._started = self._shown = time.monotonic()
        self._bar = None
        if wanted:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=action, unit=unit, disable=None)  # None disables it without a terminal

    def over(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield `items`, and count each one when the next is requested. Several calls add up."""
        for item in items:
            yield item
            self._done += 1
            self._show()

    def _show(self) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.update()
            if self._done == self._total:
                self._bar.close()
            return
        now = time.monotonic()
        if self._wanted and (self._done == self._total or now - self._shown >= SECONDS):
            self._shown = now
            seconds, left = now - self._started, self._total - self._done
            more = f", about {seconds / self._done * left:.0f} s left" if left else ""
            sys.stderr.write(f"{self._action}: {self._done} of {self._total} {self._unit}s, {seconds:.0f} s{more}\n")
