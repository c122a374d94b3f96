"""Plain values for typed settings: from YAML and the command line, and in plain words what is wrong with them.

    raw = read_yaml(path, "recipe", "keys such as teacher, student, data, stages")
    set_by_dotted_key(raw, "stages.hidden.lr", parse_value("1e-3"))
    raw["stages"] = parse_stages("0,2,3", raw)
    try: ... Recipe.model_validate(raw)
    except ValidationError as error: raise format_validation_error(error, "mine.yaml", Recipe, STAGES) from error

Recipes, studies and the settings of measures come this way.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from limbeck.core.errors import LimbeckError, suggest_closest

STAGE_NAMES = {"0": "calibrate", "1": "matrix", "2": "hidden", "3": "logits"}


def parse_stages(text: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Stages from "0,2,3", "0+2+3" or "calibrate,hidden,logits", with the settings that the recipe has for them."""
    given: dict[str, list[dict[str, Any]]] = {}
    for stage in recipe.get("stages", []):
        given.setdefault(stage.get("stage"), []).append(stage)
    result = []
    for part in text.replace("+", ",").split(","):
        name = STAGE_NAMES.get(part.strip(), part.strip())
        if name not in STAGE_NAMES.values():
            raise LimbeckError(
                f"unknown stage '{part.strip()}'{suggest_closest(part.strip(), STAGE_NAMES.values())}",
                expected="0 calibrate, 1 matrix, 2 hidden, 3 logits, joined by commas",
            )
        of_name = given.get(name) or [{"stage": name, "tokens": 16_384}]
        result.append(dict(of_name.pop(0) if len(of_name) > 1 else of_name[0]))
    return result


def format_stage_name(name: str) -> str:
    """What people read: "stage 2 (hidden)", numbered as the paper and `--stages` do, wherever it stands in a recipe."""
    numbers = {stage: number for number, stage in STAGE_NAMES.items()}
    return f"stage {numbers[name]} ({name})" if name in numbers else name


def scale_token_budgets(stages: list[dict[str, Any]], tokens: int) -> None:
    """Scale the stages' token budgets so that they add up to `tokens`."""
    total = sum(stage["tokens"] for stage in stages)
    for stage in stages:
        stage["tokens"] = max(1, round(stage["tokens"] * tokens / total))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def read_yaml(path: Path, what: str, expected: str) -> dict[str, Any]:
    """The mapping that a file holds; LimbeckError, with what was expected, where it holds none."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise LimbeckError(f"{path} holds no {what}", expected=expected)
    return raw


def parse_value(text: str) -> Any:
    """A value of the command line, read as YAML: 3, 1e-3, true, [1, 2], text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def set_by_dotted_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """raw["a"]["b"] = value for the key "a.b"; lists take an index, and stages their name: "stages.hidden.lr"."""
    target: Any = raw
    *path, last = key.split(".")
    try:
        for part in path:
            if isinstance(target, list):
                target = target[_index(target, part, key)]
            else:
                target = target.setdefault(part, {})
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise LimbeckError(
            f"--set {key}: there is no such place in the recipe", expected="for example stages.hidden.tokens=8192"
        ) from error


def _index(items: list[Any], part: str, key: str) -> int:
    """The place in a list that a key names: a number, or the name of a stage that is there once."""
    if part not in STAGE_NAMES.values():
        return int(part)
    places = [at for at, item in enumerate(items) if isinstance(item, dict) and item.get("stage") == part]
    if len(places) == 1:
        return places[0]
    there = ", ".join(f"{at} {item.get('stage')}" for at, item in enumerate(items) if isinstance(item, dict))
    raise LimbeckError(
        f"--set {key}: the recipe has {len(places) or 'no'} stages named {part}",
        expected=f"one of its stages by name, or by its place in the list: {there}",
    )


def format_validation_error(
    error: ValidationError, origin: str, root: type[BaseModel], tagged: Mapping[str, type[BaseModel]] | None = None
) -> LimbeckError:
    """What pydantic says of values for `root`, with a suggestion for a key that it does not know.

    Args:
        origin: what the values are called.
        tagged: the models of the union of stages in it, by their tag.
    """
    tagged = tagged or {}
    # a key that is not known comes before one that is missing: it is the same key, mistyped
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"] if p not in tagged]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        model = _model_at(first["loc"][:-1], root, tagged)
        new = getattr(model, "renamed", {}).get(path[-1])
        if new in model.model_fields:
            return LimbeckError(
                f"{origin}: unknown key '{where}': it is called '{new}' now", expected=".".join([*path[:-1], new])
            )
        known = list(model.model_fields)
        return LimbeckError(
            f"{origin}: unknown key '{where}'{suggest_closest(path[-1], known)}", expected=", ".join(known) or None
        )
    if first["type"] == "union_tag_invalid":
        found = str(first["ctx"]["tag"])
        return LimbeckError(
            f"{origin}: {where}: unknown stage '{found}'{suggest_closest(found, tagged)}", expected=", ".join(tagged)
        )
    return LimbeckError(f"{origin}: {where} is {first['input']!r}: {first['msg']}")


def _model_at(
    location: tuple[Any, ...], model: type[BaseModel], tagged: Mapping[str, type[BaseModel]]
) -> type[BaseModel]:
    """The model whose keys stand at a place."""
    for part in location:
        if part in tagged:
            model = tagged[part]
        elif isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for one in get_args(kind):
        yield from _models_in(one)
