"""Recipes, and what the README promises of Python and make."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT
from limbeck import LimbeckError, Recipe
from limbeck.cli.distill import build_recipe
from limbeck.core.config import parse_stages, parse_value, scale_token_budgets
from limbeck.core.objectives import Gram
from limbeck.core.old_keys import OLD_KEYS, from_old_keys, to_old_keys
from limbeck.core.recipe import BUILT_IN, TeacherRecipe
from limbeck.core.stage_settings import STAGES, Lora
from limbeck.study.spec import Study
from limbeck.training.run_directory import check_run
from limbeck.training.setup import run_path

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


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("limbeck_3h", {"name", "stages.0.tokens"}),
        ("hybrid", {"name", "student.options.window", "student.softmax_heads", "student.softmax_window"}),
    ],
)
def test_the_sizes_of_the_main_recipe_differ_in_nothing_else(name, differs):
    recipes = [_flatten(Recipe.load(one).model_dump(mode="json")) for one in ("limbeck", name)]
    assert {key for key in recipes[0] | recipes[1] if recipes[0].get(key) != recipes[1].get(key)} == differs


def _flatten(value, path=()) -> dict:
    """Dotted keys and plain values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {".".join(map(str, path)): value}
    return {key: plain for name, part in parts for key, plain in _flatten(part, (*path, name)).items()}


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
    stages = parse_stages("2,calibrate,2,2", raw)
    assert [s["stage"] for s in stages] == ["hidden", "calibrate", "hidden", "hidden"]
    assert [s.get("lr") for s in stages] == [1.0, None, 2.0, 2.0]
    stages[3]["tokens"] = 100
    assert stages[2]["tokens"] == 7, "stages share their settings"
    scale_token_budgets(stages, 1000)
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
        ({"data": {"seqlen": 3}}, "did you mean 'seq_len'"),
        ({"data": 3}, "data"),
        ({"stages": [{"stage": "hiden", "tokens": 3}]}, "did you mean 'hidden'"),
        ({"stages": [{"stage": "hidden", "tokens": 3, "targett": "block"}]}, "did you mean 'target'"),
        ({"stages": [{"stage": "hidden"}]}, "stages.0.tokens"),
        ({"stages": [{"stage": "logits", "tokens": 3, "ce": 0, "kl": 0}]}, "has to be greater than 0"),
        ({"evaluation": {"tokens": 0}}, "evaluation.tokens"),
        ({"stages": [{"tokens": 3}]}, "stages.0 does not say which stage it is"),
        # infinity is above zero, so a bound alone would let it through
        ({"stages": [{"stage": "hidden", "tokens": 3, "lr": float("inf")}]}, "stages.0.lr is inf"),
        ({"stages": [{"stage": "logits", "tokens": 3, "kl": float("nan")}]}, "stages.0.kl is nan"),
        (
            {"stages": [{"stage": "logits", "tokens": 3, "objectives": {"gram": {"weight": float("inf")}}}]},
            "weight is inf",
        ),
        ({"stages": [{"stage": "logits", "tokens": 3, "betas": [0.9, 1.5]}]}, "stages.0.betas"),
        ({"stages": [{"stage": "hidden", "tokens": 3, "lr": True}]}, "stages.0.lr is True"),
        ({"trackers": "wandb"}, "trackers is 'wandb'"),
        ({"stages": [{"stage": "logits", "tokens": 3, "lora": {"alpha": float("inf")}}]}, "alpha is inf"),
    ],
)
def test_a_wrong_recipe_names_the_place(raw, word):
    with pytest.raises(LimbeckError, match=re.escape(word)):
        Recipe.parse(raw)


def test_one_block_is_a_list_of_one():
    """As YAML reads `blocks: 3`, for the objectives as for layers."""
    gram = {"stage": "logits", "tokens": 3, "objectives": {"gram": {"blocks": 1}}}
    recipe = Recipe.parse({"student": {"softmax_layers": 1}, "stages": [gram]})
    assert recipe.student.softmax_layers == recipe.stages[0].objectives.gram.blocks == "1"


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
        made(settings=["stages.matrix.sampled_queries=64"])
    with pytest.raises(LimbeckError, match=r"2 stages named logits(?s:.*)0 logits, 1 logits"):
        made(stages="3,3", settings=["stages.logits.lr=1e-3"])


def test_a_key_of_a_part_that_is_null_creates_the_part_with_its_defaults():
    stage = made(settings=["stages.logits.objectives.gram.weight=0.5", "stages.logits.lora.rank=4"]).stages[-1]
    assert stage.objectives.gram == Gram(weight=0.5)
    assert (stage.lora, stage.train) == (Lora(rank=4), "lora")
    with pytest.raises(LimbeckError, match="did you mean 'gram'"):
        made(settings=["stages.logits.objectives.gramm.weight=0.5"])
    with pytest.raises(LimbeckError, match="seed"):
        made(settings=["seed.gram=0.5"])


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "a\nb"])
def test_a_name_is_that_of_a_folder_in_runs(name):
    with pytest.raises(LimbeckError, match=r"name is .*without slashes"):
        Recipe(name=name)


@pytest.mark.parametrize("key", ["int", "logits", "list[str]"])
def test_an_unknown_key_is_named_whatever_it_is_called(key):
    with pytest.raises(LimbeckError, match=rf"unknown key '{re.escape(key)}'"):
        Recipe.parse({key: 1})
    with pytest.raises(LimbeckError, match=rf"unknown key 'student\.{re.escape(key)}'"):
        Recipe.parse({"student": {key: 1}})


def test_a_stage_without_a_text_does_not_get_one_by_the_way():
    """The default of a text is the embedded one, and not what the stage has read so far."""
    with pytest.raises(LimbeckError, match=r"no text of its own(?s:.*)data\.max_tokens"):
        made(settings=["stages.logits.data.max_tokens=2000"])
    keys = ["stages.logits.data.source=here.jsonl", "stages.logits.data.max_tokens=2000"]
    data = made(settings=keys).stages[-1].data
    assert (data.source, data.max_tokens) == ("here.jsonl", 2000)


@pytest.mark.parametrize("text", ["0+2+3", "0,2,3", "calibrate+hidden+logits", "0, 2 + logits"])
def test_stages_are_joined_by_plus_or_commas(text):
    assert [stage.stage for stage in made(stages=text).stages] == ["calibrate", "hidden", "logits"]


# One value for each key that had another name once, by part, in a recipe of version 0.1 as its run directory has it.
OLD_STAGE = {
    "length": 64, "batch": 6, "micro_batch": 3, "warmup": 0.2, "floor": 0.5, "decay": "wsd", "cooldown": 0.3,
    "clip": 0.7, "ema": 0.9, "evaluate_every": 3, "evaluate_sequences": 5,
}  # fmt: skip
OLD = {
    "student": {"mixer": "gla", "keep": [1]},
    "data": {"source": "here.jsonl", "length": 128},
    "stages": [
        {"stage": "matrix", "tokens": 64, "rows": 8, "converged": {"patience": 7, "tolerance": 0.1}},
        {"stage": "logits", "tokens": 64, "lr_rest": 1e-4, "top": 20, "chunk": 9, "data": {"length": 32}, **OLD_STAGE}
        | {"lora": {"targets": "all-linear"}},
    ],
    "keep_checkpoints": 5,
}
OLD_STUDY = {
    "name": "mine",
    "about": "what is asked",
    "keep": "students",
    "base": {"data": {"length": 128}, "stages": [{"stage": "matrix", "tokens": 64, "batch": 2}]},
    "grid": {
        "students": ["gla"],
        "stages": ["1"],
        "keep": ["none", "0"],
        "settings": {
            "few": {"rows": {"stages.matrix.rows": 8, "stages.0.data.length": 32}, "kept": {"student.keep": "1"}}
        },
    },
}


def test_a_run_directory_with_old_keys_opens_as_the_same_run(tmp_path):
    import yaml

    assert OLD_KEYS["stage"].keys() == OLD_STAGE.keys() | {"rows", "converged", "lr_rest", "top", "chunk"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**OLD, "name": "old"}), encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yaml", stored=True)
    first, second = recipe.stages
    assert (recipe.student.softmax_layers, recipe.data.seq_len, recipe.save_total_limit) == ([1], 128, 5)
    assert (first.sampled_queries, first.layer_early_stopping.patience) == (8, 7)
    assert {key: getattr(second, OLD_KEYS["stage"][key]) for key in OLD_STAGE} == OLD_STAGE
    assert (second.lr_other, second.top_k, second.chunk_size, second.data.seq_len) == (1e-4, 20, 9, 32)
    assert second.lora.target_modules == "all-linear"
    check_run(tmp_path, recipe)
    with pytest.raises(LimbeckError, match=r"data\.seq_len: was 128, now 64"):
        check_run(tmp_path, recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": 64})}))
    with pytest.raises(LimbeckError, match="it has been renamed"):
        Recipe.load(tmp_path / "recipe.yaml")
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")  # of a run directory, so the hints of a run work
    assert build_recipe(str(tmp_path / "recipe.yaml"), **NOTHING, settings=[]) == recipe


OLD_PLACES = [
    ("student", {"student": {"keep": 3}}, "student.softmax_layers"),
    ("data", {"data": {"length": 64}}, "data.seq_len"),
    ("stage's data", {"stages": [{"stage": "hidden", "tokens": 9, "data": {"length": 64}}]}, "stages.0.data.seq_len"),
    ("lora", {"stages": [{"stage": "logits", "tokens": 9, "lora": {"targets": "x"}}]}, "stages.0.lora.target_modules"),
    ("recipe", {"keep_checkpoints": 3}, "save_total_limit"),
    *(
        (f"{stage} {old}", {"stages": [{"stage": stage, "tokens": 9, old: 3}]}, f"stages.0.{new}")
        for stage, kind in STAGES.items()
        for old, new in OLD_KEYS["stage"].items()
        if new in kind.model_fields
    ),
]


@pytest.mark.parametrize(("raw", "new"), [one[1:] for one in OLD_PLACES], ids=[one[0] for one in OLD_PLACES])
def test_an_old_key_of_a_user_is_refused_with_its_name_of_today(raw, new):
    with pytest.raises(LimbeckError) as refused:
        Recipe.parse(raw)
    assert f"it has been renamed to '{new.split('.')[-1]}'" in refused.value.found
    assert refused.value.expected == new


def test_an_old_key_is_refused_on_the_command_line_and_in_a_teachers_recipe():
    with pytest.raises(LimbeckError, match=r"unknown key 'stages\.1\.batch': it has been renamed to 'batch_size'"):
        made(settings=["stages.hidden.batch=2"])
    plain = {"name": "x", "model": {}, "vocab_size": 400, "data": {}, "stages": [{"stage": "next_token", "tokens": 9}]}
    for raw, new in (({"start": "random"}, "init"), ({"vocabulary": 400}, "vocab_size")):
        with pytest.raises(LimbeckError, match=f"it has been renamed to '{new}'"):
            TeacherRecipe.parse({**plain, **raw})


def test_the_keys_of_a_study_are_read_where_it_is_stored_and_refused_elsewhere(tmp_path):
    import yaml

    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(OLD_STUDY), encoding="utf-8")
    for raw, new in (({"about": "x"}, "description"), ({"keep": "all"}, "save_artifacts")):
        with pytest.raises(LimbeckError, match=f"it has been renamed to '{new}'"):
            Study.parse({"name": "mine", "base": {}, "grid": {"students": ["gla"], "stages": ["1"]}, **raw})
    with pytest.raises(LimbeckError, match=r"unknown key 'grid\.keep': it has been renamed to 'softmax_layers'"):
        Study.parse({"name": "x", "base": {}, "grid": {**OLD_STUDY["grid"], "settings": {}}})
    with pytest.raises(LimbeckError, match="it has been renamed"):
        Study.load(path)
    (tmp_path / "study.json").write_text("{}", encoding="utf-8")
    study = Study.load(path)
    assert (study.description, study.save_artifacts) == ("what is asked", "students")
    arms = {arm.name: arm.recipe for arm in study.arms(tmp_path)}
    assert {"gla_1_rows_seed0", "gla_1_keep-0_rows_seed0"} < set(arms), "folders that are there keep their names"
    assert arms["gla_1_keep-0_rows_seed0"].student.softmax_layers == "0"
    assert arms["gla_1_kept_seed0"].student.softmax_layers == "1"
    stage = arms["gla_1_rows_seed0"].stages[0]
    assert (stage.batch_size, stage.sampled_queries, stage.data.seq_len) == (2, 8, 32)


def test_old_keys_never_hide_one_of_today_and_translate_both_ways():
    parts = {"student": Recipe().student, "data": Recipe().data, "recipe": Recipe()}
    for part, settings in parts.items():
        assert not OLD_KEYS[part].keys() & type(settings).model_fields.keys()
    for kind in STAGES.values():
        assert not OLD_KEYS["stage"].keys() & kind.model_fields.keys()
    now = from_old_keys(OLD)
    assert to_old_keys(now) == OLD
    assert list(to_old_keys(now)) == list(OLD), "the order stays, which some fingerprints go by"
    assert from_old_keys(now) == now


def made(stages=None, settings=()):
    return build_recipe("quickstart", None, None, None, stages, None, None, None, list(settings))
