"""Lay a few options over a recipe: another teacher, student, text or budget, as the command line and Python give them.

    recipe = build_recipe("quickstart", teacher="Qwen/Qwen3-0.6B", data="corpus.jsonl", tokens=1_000_000)
    recipe = build_recipe(None, student="gla", overrides={"stages.hidden.lr": 5e-4})

An option changes more than its own key: a built-in recipe's field names and limits do not hold for another text, and a
mixer's options not for another mixer.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck import mixers
from limbeck.core.config import parse_stages, remove_dotted_key, scale_token_budgets, set_by_dotted_key
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX
from limbeck.core.text_settings import Data
from limbeck.models.export import get_exporter
from limbeck.models.loading import load_config, resolve_teacher


def build_recipe(
    base: str | Path | Recipe | None = None,
    *,
    teacher: str | None = None,
    student: str | None = None,
    layers: str | list[int] | None = None,
    stages: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    data: str | None = None,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    target: str | None = None,
    student_keys: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from another one and the options laid over it.

    Args:
        base: a recipe, the name of a built-in one, or a YAML file. None for the one that suits the options: `limbeck`,
            whose stages fit its own student, or `quickstart`, whose stages fit any, where `student`, `stages` or
            `target` is given.
        teacher: 'embedded', the name of a small teacher, a local folder or a Hub name.
        student: the mixer that replaces softmax attention.
        layers: the layers to convert.
        stages: the stages to run, "0,2,3".
        tokens: training tokens over all stages, divided among them as in the recipe.
        seq_len: tokens in a training sequence, in all stages and in the text.
        data: the text, as `limbeck.data.documents` names it.
        out: the run directory.
        overrides: any other key of the recipe by its dotted name, applied last.
        target: a format of `limbeck export` that the student has to fit.
        student_keys: further keys of the recipe's student.

    Raises:
        LimbeckError: no such recipe, an unknown key, or an invalid value.
    """
    if base is None:
        base = "limbeck" if student is None and stages is None and target is None else "quickstart"
    options: dict[str, Any] = {
        "teacher": teacher,
        "student.mixer": student,
        "student.layers": layers,
        "data.source": data,
        "out": str(out) if out else None,
    }
    changes = {key: value for key, value in options.items() if value is not None}
    if data is not None:
        changes["data.sources"] = None
    original, changed = _load(base, {}), _load(base, changes)
    is_file = not isinstance(base, Recipe) and Path(base).suffix in (".yaml", ".yml")
    is_built_in = not isinstance(base, Recipe) and not is_file
    raw = changed.model_dump(mode="json")
    if out is None and student is not None:
        raw["name"] = f"{original.name}-{mixers.get(student).name}"
    # what a built-in recipe says of its own text and budget does not hold for another one
    if is_built_in:
        if data is not None or tokens is not None:
            raw["data"]["max_tokens"] = None
        if data is not None:
            raw["data"] |= {"text_field": "text", "chat": None}
    if stages is not None:
        raw["stages"] = parse_stages(stages, raw)
    if tokens is not None:
        tokens = parse_count(tokens)
        if not 1 <= tokens < math.inf:
            raise LimbeckError(f"--tokens {tokens}", expected="a positive number")
        scale_token_budgets(raw["stages"], tokens)
    if seq_len is not None:
        for part in (raw["data"], *raw["stages"]):
            part["seq_len"] = seq_len
    if student is not None and student != original.student.mixer:
        raw["student"]["options"] = {}  # those were another mixer's
    if target is not None:
        raw["student"] |= _fit_student(target, changed.teacher, student)
        raw["name"] += f"-{target}"
    raw["student"] |= student_keys or {}
    for key, value in (overrides or {}).items():
        set_by_dotted_key(raw, key, value)
        _drop_other_text(raw, key, overrides or {})
    recipe = Recipe.parse(raw, "recipe" if isinstance(base, Recipe) else str(base))
    if is_file:
        return recipe
    raw = recipe.model_dump(mode="json")  # of which all values are known to be what they should
    _share_text(raw, original.data, {original.data.source, changed.data.source})
    return Recipe.parse(raw)


def _load(base: str | Path | Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a recipe with some keys changed; a file's are changed before it is read as a whole."""
    if not isinstance(base, Recipe):
        return Recipe.load(base, changes)
    raw = base.model_dump(mode="json")
    for key, value in changes.items():
        set_by_dotted_key(raw, key, value)
    return Recipe.parse(raw)


def _drop_other_text(raw: dict[str, Any], key: str, overrides: Mapping[str, Any]) -> None:
    """Take out the `source` that stands beside new `sources`, or the other way round, unless that is set as well."""
    part, _, name = key.rpartition(".")
    if part.rpartition(".")[2] != "data" or name not in ("source", "sources") or overrides[key] is None:
        return
    other = f"{part}.{'sources' if name == 'source' else 'source'}"
    if other not in overrides:
        remove_dotted_key(raw, other)


def _share_text(raw: dict[str, Any], before: Data, names: set[str]) -> None:
    """Let the stages that read a recipe's own text, alone or in a mixture, read what it has become.

    Args:
        raw: the recipe with all that the options changed, every key of it.
        before: the text of the recipe without them.
        names: what that text was called without them, and before the last of them.
    """
    now = raw["data"]
    for stage in raw["stages"]:
        data = stage["data"]
        if data is None:
            continue
        several = data["sources"]
        parts = [new for part in several or [data] for new in _replace_source(part, names, now)]
        if several or parts[0].keys() != data.keys():  # a mixture, or what was one text has become one
            data |= {"sources": parts, "text_field": "text", "chat": None}
            del data["source"]  # their names in one
        else:
            data |= parts[0]
        for key in ("max_tokens", "held_out"):  # one text is divided in one way
            if data[key] == getattr(before, key):
                data[key] = now[key]


def _replace_source(part: dict[str, Any], names: set[str], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a stage reads in the place of a source: where that was the recipe's text, what this has become."""
    source = part["source"]
    prefix = REPEATED_TEXT_PREFIX if source.startswith(REPEATED_TEXT_PREFIX) else ""
    if source.removeprefix(prefix) not in names | {now["source"]}:
        return [part]
    sources = now["sources"]
    if sources is None:
        return [part | {"source": prefix + now["source"], "text_field": now["text_field"], "chat": now["chat"]}]
    share = part.get("weight", 1.0) / sum(one["weight"] for one in sources)
    return [one | {"source": prefix + one["source"], "weight": share * one["weight"]} for one in sources]


def _fit_student(target: str, teacher: str, mixer: str | None) -> dict[str, Any]:
    """Return the keys of `student` with which a student of this teacher can be exported to a format."""
    fit = get_exporter(target).fit(load_config(resolve_teacher(teacher)), mixer)
    settings: dict[str, Any] = {"mixer": fit.mixer, "preset": "default", "options": fit.options, "rules": []}
    return settings if fit.softmax_layers is None else {**settings, "softmax_layers": fit.softmax_layers}
