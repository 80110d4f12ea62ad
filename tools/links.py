"""Find broken links of Markdown pages, to files and to headings as GitHub numbers them."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
ELSEWHERE = re.compile(r"[a-z]+:")


def pages(root: Path) -> list[Path]:
    """The Markdown files below `root` that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode:
        return sorted([*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("bench/results/**/*.md")])
    return sorted(root / line for line in set(listed.stdout.splitlines()) if (root / line).is_file())


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading, which may hold links, code and emphasis."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors of a page. A repeated heading has a number appended."""
    found, seen = set(), Counter[str]()
    for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def targets(page: Path) -> list[str]:
    """The targets of the links and pictures of a page, except those with a scheme such as https."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in LINK.findall(text) if not ELSEWHERE.match(target)]


def broken(page: Path) -> list[str]:
    """Targets of a page that do not exist."""
    found = []
    for target in targets(page):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        good = path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors(path))
        if not good:
            found.append(target)
    return found
