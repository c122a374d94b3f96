"""The documentation site: its pages are in the menu, and what comes from the code is what the code says."""

import importlib
import re
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck.core import recipe as recipes
from limbeck.core import stage_settings, text_settings
from limbeck.study import spec

DOCS = ROOT / "docs"
DOORS = ("limbeck", "limbeck.mixers", "limbeck.testing")


def parts_of(kind) -> list[type[BaseModel]]:
    """The pydantic models that an annotation is made of, and those that are in them."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind, *(part for field in kind.model_fields.values() for part in parts_of(field.annotation))]
    return [part for inner in get_args(kind) for part in parts_of(inner)]


PARTS = list(dict.fromkeys(parts_of(recipes.Recipe | recipes.TeacherRecipe | spec.Study)))


@pytest.fixture(scope="module")
def generate():
    return load_script(DOCS / "generate.py")


def test_the_reference_is_what_the_code_says(generate):
    outdated = generate.write_pages(check=True)
    assert not outdated, f"not current: {', '.join(outdated)}; run: make reference"


def test_an_outdated_part_is_found_and_written(generate, tmp_path, monkeypatch):
    page = tmp_path / "study.md"
    page.write_text((DOCS / "reference" / "study.md").read_text(encoding="utf-8").replace("Seeds;", "Trees;"), "utf-8")
    monkeypatch.setattr(generate, "PAGES", tmp_path)
    assert generate.write_pages(check=True) == ["study.md"]
    assert "Trees;" in page.read_text(encoding="utf-8")
    assert generate.write_pages() == ["study.md"]
    assert page.read_text(encoding="utf-8") == (DOCS / "reference" / "study.md").read_text(encoding="utf-8")


def test_there_are_parts():
    assert {stage_settings.Logits, stage_settings.Lora, text_settings.Source, spec.Grid, spec.StudentSpec} <= set(PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_key_says_what_it_is(part, generate):
    """In a string below it, as the others do; a comment is seen by nobody but the reader of the code."""
    silent = [key for key, field in part.model_fields.items() if not generate.describe(field)]
    assert not silent, f"{part.__name__}: put a string below {', '.join(silent)}"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "integer > 0"),
        (
            {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "null"}]},
            "number ≥ 0, < 1 or null",
        ),
        ({"enum": ["a", "b"]}, "`a`, `b`"),
        ({"type": "array", "items": {"$ref": "#/$defs/Rule"}}, "list of [student.rules](#studentrules)"),
    ],
)
def test_types_are_named(generate, schema, named):
    assert generate.name_type(schema, {"Rule": "student.rules"}) == named


@pytest.mark.parametrize("door", DOORS)
def test_the_page_on_python_has_every_public_name(door):
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(rf"^::: {re.escape(door)}\.(\w+)$", page, re.M))
    for block in re.findall(rf"^::: {re.escape(door)}\n.*?members: \[(.*?)\]", page, re.S | re.M):
        shown |= set(block.split(", "))
    shown -= {other.removeprefix(f"{door}.") for other in DOORS}
    assert shown == {name for name in importlib.import_module(door).__all__ if not name.startswith("__")}


def test_the_menu_has_every_page_once():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    menu = re.findall(r"[\w/]+\.md", str(site["nav"]))
    hooks = (DOCS / "hooks.py").read_text(encoding="utf-8")
    elsewhere = dict(re.findall(r'^    "(\S+)": "(\S+)",$', hooks, re.M))
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    pages = [page for page in pages if not re.match(r"project/results/\w[\w-]*/", page)]
    assert sorted(menu) == sorted([*pages, *elsewhere.values()])
    assert all((ROOT / page).is_file() for page in elsewhere)
