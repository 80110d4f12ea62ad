"""Guards the documentation: its links lead somewhere, and the site with the API reference is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import links  # noqa: E402

PAGES = links.pages(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    assert links.broken(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One heading\n\n## Where `N` is\n\n## Where `N` is\n")
    (tmp_path / "page.md").write_text(
        "[a](other.md#one-heading) [b](other.md#where-n-is-1) [c](other.md#two) [d](none.md) [e](https://x.y/z)\n"
        "`[f](none.md)`\n```\n[g](none.md)\n```\n# Here\n[h](#here) [i](#there)\n"
    )
    assert links.broken(tmp_path / "page.md") == ["other.md#two", "none.md", "#there"]


def test_index_lists_every_page_of_docs():
    index = (ROOT / "docs/README.md").read_text()
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    shown = subprocess.run(
        [sys.executable, ROOT / "tools/docs.py", tmp_path / "site"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    site = tmp_path / "site"
    for name in ("index.html", "docs/index.html", "docs/numbers.html", "api/qlora_native/functional.html"):
        assert (site / name).is_file(), name
    assert 'id="linear_grouped"' in (site / "api/qlora_native/functional.html").read_text()
