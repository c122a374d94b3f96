"""Bad recipes and bad command lines: never a traceback, never half a run directory."""

import contextlib
import copy
import io
import math
import os
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck import LimbeckError
from limbeck.cli import main
from limbeck.cli.distill import build_recipe
from limbeck.core.recipe import Recipe, Student
from limbeck.core.stage_settings import STAGES, Trained
from limbeck.training import recipe_options, setup

pytestmark = pytest.mark.usefixtures("own_cache")
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "derandomize": True}

BASE = {
    "name": "tiny",
    "teacher": "teacher",
    "student": {"mixer": "gla", "options": {"conv": 4}, "rules": [{"layers": "0", "mixer": "mlstm"}]},
    "data": {"source": "corpus.jsonl", "seq_len": 32, "held_out": 0.2},
    "stages": [{"stage": name, "tokens": 512} for name in STAGES],
    "evaluation": {"tokens": 256},
    "seed": 0,
    "device": "cpu",
}
NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 3, 31, 1e-30, 1e300, math.inf, -math.inf, math.nan]),
    st.floats(allow_subnormal=False),  # a teacher on a CPU flushes them to zero
    st.text(max_size=12),
    st.sampled_from(
        ["all", "none", "0-99", "every 0", "uniform 3", "kl", "gla", "softmax", "../x", "a/b.json", "ä😀\0"]
    ),
    st.lists(st.one_of(st.integers(-3, 40), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
)
KEYS = sorted(
    {*Recipe.model_fields, *Student.model_fields, *Trained.model_fields}
    | {name for stage in STAGES.values() for name in stage.model_fields}
)


def places(raw, path=()):
    """Every place in a recipe, leaves and branches."""
    inside = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def broken(draw) -> dict:
    """The base recipe with one to three of its places changed, removed or added to."""
    raw = copy.deepcopy(BASE)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(raw)) or [("name",)]))
        holder = raw
        for key in path[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["change", "remove", "add"]))
        if what == "remove":
            del holder[path[-1]]
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)))] = draw(NASTY)
        else:
            holder[path[-1]] = draw(NASTY)
    return raw


@pytest.mark.slow
def test_bad_recipes_are_read_or_refused():
    outcomes, told = {"read": 0, "refused": 0}, []

    @settings(max_examples=1400, **QUIET)
    @given(broken())
    def each(raw):
        try:
            recipe = Recipe.parse(raw)
        except LimbeckError as error:
            outcomes["refused"] += 1
            told.append(str(error))
        else:
            outcomes["read"] += 1
            again = Recipe.parse(yaml.safe_load(recipe.to_yaml()))
            assert again.to_yaml() == recipe.to_yaml()

    each()
    assert min(outcomes.values()) > 100, outcomes
    assert all(told)


OPTIONS = [
    "--teacher",
    "--student",
    "--layers",
    "--stages",
    "--tokens",
    "--data",
    "--out",
    "--set",
    "--plan",
    "--nothing",
]
WORDS = st.one_of(
    st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
    st.sampled_from(["0", "-1", "0,2,3", "9,9", "1e9", "gla", "student.mixer=x", "stages.9.lr=1", "a.b.c=[", "="]),
)


@pytest.mark.slow
def test_bad_settings_make_a_recipe_or_are_refused():
    @settings(max_examples=600, **QUIET)
    @given(
        st.lists(WORDS, max_size=2),
        st.one_of(st.none(), WORDS),
        st.one_of(st.none(), WORDS),
        st.one_of(st.none(), st.integers(-5, 10**30)),
    )
    def each(texts, stages, layers, tokens):
        with contextlib.suppress(LimbeckError):
            build_recipe("quickstart_smoke", None, None, layers, stages, tokens, None, None, texts)

    each()


@pytest.mark.slow
def test_bad_values_of_a_built_in_recipes_keys_are_read_or_refused():
    """Options and settings meet before the recipe is read as a whole; so does the text that stages share."""
    outcomes = {"read": 0, "refused": 0}
    keys = [".".join(map(str, path)) for path in places(Recipe.load("limbeck").model_dump(mode="json"))]
    texts = st.sampled_from(["data.sources", "data.source", "stages.0.data.sources", "stages.logits.data.source"])

    @settings(max_examples=600, **QUIET)
    @given(
        st.dictionaries(st.one_of(st.sampled_from(keys), texts), NASTY, min_size=1, max_size=2),
        st.sampled_from([None, "mine.jsonl"]),
        st.sampled_from([None, 4096]),
    )
    def each(overrides, data, tokens):
        try:
            recipe_options.build_recipe("limbeck", overrides=overrides, data=data, tokens=tokens)
        except LimbeckError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1

    each()
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.slow
def test_bad_command_lines_end_with_a_word_and_leave_nothing(teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = ["--teacher", str(teacher_folder), "--data", str(corpus), "--set", "data.seq_len=32", "--plan"]

    @settings(max_examples=150, **QUIET)
    @given(st.lists(st.one_of(st.sampled_from(OPTIONS), WORDS), max_size=5), st.booleans())
    def each(words, good_first):
        out, err = io.StringIO(), io.StringIO()
        arguments = ["distill", *(["quickstart_smoke", *good, *words] if good_first else [*words, *good])]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["limbeck", *arguments])
            code = 0
            try:
                main()
            except SystemExit as exit:
                code = exit.code
        assert code in (0, 2), (arguments, code, err.getvalue())
        assert "Traceback" not in err.getvalue() + out.getvalue()
        assert os.listdir(tmp_path) in ([], [".hypothesis"]), (arguments, os.listdir(tmp_path))

    each()


@pytest.mark.slow
def test_recipes_that_are_read_plan_or_are_refused_and_leave_nothing(teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned, told = [], []

    @settings(max_examples=150, **QUIET)
    @given(broken())
    def each(raw):
        for key, part, value in (("teacher", raw, str(teacher_folder)), ("source", raw.get("data"), str(corpus))):
            if isinstance(part, dict) and part.get(key) in ("teacher", "corpus.jsonl"):
                part[key] = value
        try:
            recipe = Recipe.parse(raw)
            if "embedded" in (recipe.teacher, recipe.data.source):
                return  # the defaults: they would be brought
            setup.prepare_job(recipe)
            planned.append(recipe)
        except LimbeckError as error:
            told.append(str(error))
        assert not (Path(tmp_path) / "runs").exists()

    each()
    assert len(planned) > 2
    assert all(told)
