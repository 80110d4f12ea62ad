"""Tables of Markdown, and parts of pages that a program writes."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown, which ends with a line break."""
    header = list(header)
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (header, ["---"] * len(header), *rows))


def with_part(page: str, mark: str, text: str) -> str:
    """A page with the text between the comments `MARK begins` and `MARK ends`."""
    begin, end = f"<!-- {mark} begins -->\n", f"<!-- {mark} ends -->\n"
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]
