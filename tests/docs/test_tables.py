"""What the documents say of the students is what the code does."""

import re

import pytest

from helpers.paths import ROOT
from limbeck import mixers

DOCS = ROOT / "docs"
SHAPE = mixers.HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, scale=0.125, layers=30)


def tables(title: str) -> list[list[str]]:
    """The rows of the tables under one heading of the two pages on mixers."""
    pages = [DOCS / "concepts" / "mixers.md", DOCS / "reference" / "mixers.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def sizes(name: str) -> list[str]:
    """A row of the table of sizes: parameters, then state, by preset."""
    made = [mixers.build(name, SHAPE, preset=preset) for preset in mixers.PRESETS]
    parameters = [f"{sum(p.numel() for p in mixer.parameters()):,}" for mixer in made]
    return [f"`{name}`", *parameters, *(f"{m.state_numel():,}" + " a token" * m.grows for m in made)]


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_sizes(name):
    assert sizes(name) in tables("Sizes")


def test_every_mixer_has_its_place_in_the_tables():
    for title in ("Recurrences", "Initialization"):
        named = {name for row in tables(title) for name in re.findall(r"`(\w+)`", row[0])}
        assert named == set(mixers.list_mixers()), title


def test_the_operators_and_sources_are_the_codes():
    for name, _, _, operator, source in tables("Recurrences"):
        cls = mixers.get(name.strip("`"))
        if "arxiv" in source:
            assert re.search(r"\d{4}\.\d{5}", source).group() in cls.source, name
        if cls.operator and name != "`gsa`":
            assert operator == mixers.build(cls.name, SHAPE).operator_name


def test_the_sets_are_the_codes():
    for name, students in tables("Sets"):
        known = mixers.list_mixer_sets()[name.strip("`")]
        assert students.split(", ") == known or known == mixers.list_mixers()


def test_the_switches_are_the_codes():
    import dataclasses

    known = {field.name for field in dataclasses.fields(mixers.Options)}
    named = {row[0].strip("`") for row in tables("Shared options and presets")}
    assert named == known | set(mixers.PRESETS)
