"""Every link between the files of the repository leads somewhere as they lie there, without building the site."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "bench", "docs", "docs/configuration")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)|^\[(?!\^)[^\]]+\]: (?!https?:)(\S+)", re.M)
FENCED = re.compile(r"^(`{3,}).*?^\1|`[^`\n]*`", re.M | re.S)


def links(page: Path) -> list[str]:
    """Where a page leads, but for other sites."""
    text = FENCED.sub("", page.read_text())
    return [next(filter(None, found)) for found in LINK.findall(text)]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs give to a page's headings."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", text, re.M):
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.resolve())):
            dead.append(link)
    assert dead == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[x](nowhere.md) [y](#a-page) [z](https://a.b)\n\n[w]: other.md\n")
    assert links(page) == ["nowhere.md", "#a-page", "other.md"] and anchors(page) == {"a-page"}
