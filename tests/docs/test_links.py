"""Links between the documents lead somewhere: to a file of the repository, and to a heading of it."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *(ROOT / "benchmarks").rglob("*.md")})
PAGES += sorted({*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")})


def prose(page: Path) -> str:
    """Return a page's text without its code blocks and inline code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    seen: dict[str, int] = {}
    result = set()
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        # letters, digits, spaces, hyphens and underscores stay; spaces become hyphens
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


LINKS = [
    (page.relative_to(ROOT).as_posix(), target)
    for page in PAGES
    for target in dict.fromkeys(re.findall(r"\]\(([^)\s]+)\)", prose(page)))
    if not re.match(r"[a-z]+:", target)
]


def test_links_exist():
    assert len(LINKS) > 80


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_link_leads_to_a_file_and_a_heading(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page}: no file {path}"
    if anchor:
        assert anchor in anchors(file), f"{page}: no heading #{anchor} in {path or page}"
