"""Recipes, and what the README promises of Python and make."""

import re
from pathlib import Path

import pytest

from limbeck import LimbeckError, Recipe
from limbeck.cli.distill import build_recipe
from limbeck.prepare import run_path
from limbeck.reading import parse_value, stages_from_text, tokens_over_stages
from limbeck.recipe import BUILT_IN

ROOT = Path(__file__).parent.parent
NOTHING = {"teacher": None, "student": None, "layers": None, "stages": None, "tokens": None, "data": None, "out": None}


def build(**changes) -> Recipe:
    return build_recipe("quickstart", **{**NOTHING, **changes}, settings=changes.pop("settings", []))


@pytest.mark.parametrize("name", [p.stem for p in BUILT_IN.glob("*.yaml")])
def test_every_shipped_recipe_is_complete_and_survives_yaml(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.stages
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


def test_options_go_over_the_recipe():
    base = Recipe.load("quickstart")
    recipe = build(teacher="some/model", student="gla", stages="0,3", tokens=10_000, data="x.jsonl", out=Path("here"))
    assert (recipe.teacher, recipe.student.mixer, recipe.data.source, recipe.out) == (
        "some/model",
        "gla",
        "x.jsonl",
        "here",
    )
    assert [stage.stage for stage in recipe.stages] == ["calibrate", "logits"]
    assert sum(stage.tokens for stage in recipe.stages) == pytest.approx(10_000, abs=2)
    assert recipe.stages[1].lr == base.stages[2].lr, "the recipe's own settings for the stage are kept"
    assert recipe.data.max_tokens is None
    assert run_path(build(student="gla")) == Path("runs/quickstart-gla")
    assert build().out is None
    assert build() == base
    changed = build_recipe(
        "quickstart", **NOTHING, settings=["stages.1.lr=3e-4", "student.options={write: 0.5}", "seed=7"]
    )
    assert changed.stages[1].lr == 3e-4
    assert changed.student.options == {"write": 0.5}
    assert changed.seed == 7


def test_stages_by_number_or_name_repeat_and_take_defaults():
    raw = {"stages": [{"stage": "hidden", "tokens": 5, "lr": 1.0}, {"stage": "hidden", "tokens": 7, "lr": 2.0}]}
    stages = stages_from_text("2,calibrate,2,2", raw)
    assert [s["stage"] for s in stages] == ["hidden", "calibrate", "hidden", "hidden"]
    assert [s.get("lr") for s in stages] == [1.0, None, 2.0, 2.0]
    stages[3]["tokens"] = 100
    assert stages[2]["tokens"] == 7, "stages share their settings"
    tokens_over_stages(stages, 1000)
    assert sum(s["tokens"] for s in stages) == pytest.approx(1000, abs=3)


VALUES = [
    ("3", 3),
    ("1e-3", 1e-3),
    ("-2E5", -2e5),
    ("true", True),
    ("[1, 2]", [1, 2]),
    ("gla", "gla"),
    ("a: [", "a: ["),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"teacherr": "x"}, "did you mean 'teacher'"),
        ({"data": {"lenght": 3}}, "did you mean 'length'"),
        ({"data": 3}, "data"),
        ({"stages": [{"stage": "hiden", "tokens": 3}]}, "did you mean 'hidden'"),
        ({"stages": [{"stage": "hidden", "tokens": 3, "targett": "block"}]}, "did you mean 'target'"),
        ({"stages": [{"stage": "hidden"}]}, "stages.0.tokens"),
        ({"stages": [{"stage": "logits", "tokens": 3, "ce": 0, "kl": 0}]}, "nothing to learn"),
        ({"evaluation": {"tokens": 0}}, "evaluation.tokens"),
    ],
)
def test_a_wrong_recipe_names_the_place(raw, word):
    with pytest.raises(LimbeckError, match=re.escape(word)):
        Recipe.parse(raw)


def test_the_readmes_python_names_what_exists():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert code
    for block in code:
        compile(block, "README.md", "exec")
        import limbeck

        for name in re.findall(r"limbeck\.(\w+)", block):
            assert hasattr(limbeck, name), name


def test_make_has_the_readmes_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_runs_of_old_can_be_read():
    old = {"stage": "logits", "tokens": 100, "kl": 0.7}
    forward = Recipe.parse({"stages": [{**old, "direction": "forward"}]}).stages[0]
    reverse = Recipe.parse({"stages": [{**old, "direction": "reverse"}]}).stages[0]
    assert (forward.kl, forward.reverse_kl) == (0.7, 0)
    assert (reverse.kl, reverse.reverse_kl) == (0, 0.7)


@pytest.mark.parametrize(("name", "number"), [("calibrate", 0), ("hidden", 1), ("logits", 2)])
def test_a_stage_is_named_where_it_is_set(name, number):
    recipe = made(settings=[f"stages.{name}.tokens=4096"])
    assert recipe == made(settings=[f"stages.{number}.tokens=4096"])
    assert recipe.stages[number].tokens == 4096


def test_a_stage_that_is_not_there_or_there_twice_is_refused_with_what_is():
    with pytest.raises(LimbeckError, match=r"no stages named matrix(?s:.*)1 hidden"):
        made(settings=["stages.matrix.rows=64"])
    with pytest.raises(LimbeckError, match=r"2 stages named logits(?s:.*)0 logits, 1 logits"):
        made(stages="3,3", settings=["stages.logits.lr=1e-3"])


@pytest.mark.parametrize("text", ["0+2+3", "0,2,3", "calibrate+hidden+logits", "0, 2 + logits"])
def test_stages_are_joined_by_plus_or_commas(text):
    assert [stage.stage for stage in made(stages=text).stages] == ["calibrate", "hidden", "logits"]


def made(stages=None, settings=()):
    return build_recipe("quickstart", None, None, None, stages, None, None, None, list(settings))
