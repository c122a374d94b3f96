"""Read settings from YAML and the command line, and explain in plain words what is wrong with them.

    raw = read_yaml(path, "recipe", "keys such as teacher, student, data, stages")
    set_by_dotted_key(raw, "stages.hidden.lr", parse_value("1e-3"))
    raw["stages"] = parse_stages("0,2,3", raw)
    try: ... Recipe.model_validate(raw)
    except ValidationError as error: raise format_validation_error(error, "mine.yaml", Recipe, STAGES) from error

Recipes, studies and the settings of evaluations are read with it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError, suggest_closest


def _as_text(value: Any) -> Any:
    """Accept a single layer's number, as YAML reads `softmax_layers: 3`, as well as "3"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[str | list[int], BeforeValidator(_as_text)]
STAGE_NAMES = {"0": "calibrate", "1": "matrix", "2": "hidden", "3": "logits"}


class Part(BaseModel):
    """A part of a recipe: frozen, without unknown keys.

    The string below a key describes it: in help(), the JSON schema, `limbeck recipe` and docs/reference/recipe.md.
    """

    # infinity is above zero, so a bound alone does not refuse it
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # old names of its keys
    tagged: ClassVar[Mapping[str, type[BaseModel]]] = {}  # the parts of a union in it, by their tag

    def __init__(self, /, **values: Any) -> None:
        """Validate the keys; raises LimbeckError for what is wrong with them."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise format_validation_error(error, type(self).__name__, type(self), self.tagged) from error

    # pydantic then validates a file's values without this method, so that errors name the file
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _refuse_yes_and_no(cls, raw: Any) -> Any:
        """Refuse true and false, YAML's yes and no too, where they would be read as the numbers 1 and 0."""
        for name, field in cls.model_fields.items() if isinstance(raw, dict) else ():
            if isinstance(raw.get(name), bool) and not _accepts_bool(field.annotation):
                problem = PydanticCustomError("yes_or_no", "Input should not be yes or no, true or false")
                where: InitErrorDetails = {"type": problem, "loc": (name,), "input": raw[name]}
                raise ValidationError.from_exception_data(cls.__name__, [where])
        return raw


def _accepts_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_accepts_bool, get_args(annotation)))


def parse_stages(text: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Parse "0,2,3", "0+2+3" or "calibrate,hidden,logits"; each stage gets the settings that `recipe` has for it."""
    settings_by_name: dict[str, list[dict[str, Any]]] = {}
    given = recipe.get("stages") or []
    if not isinstance(given, list) or not all(isinstance(stage, dict) for stage in given):
        raise LimbeckError(f"stages is {given!r}", expected="a list such as [{stage: logits, tokens: 20000}]")
    for stage in given:
        settings_by_name.setdefault(stage.get("stage"), []).append(stage)
    stages = []
    for part in text.replace("+", ",").split(","):
        name = STAGE_NAMES.get(part.strip(), part.strip())
        if name not in STAGE_NAMES.values():
            raise LimbeckError(
                f"unknown stage '{part.strip()}'{suggest_closest(part.strip(), STAGE_NAMES.values())}",
                expected="0 calibrate, 1 matrix, 2 hidden, 3 logits, joined by commas",
            )
        settings = settings_by_name.get(name) or [{"stage": name, "tokens": 16_384}]
        # a stage that the recipe has twice is taken in order, and its last settings serve for any further ones
        stages.append(dict(settings.pop(0) if len(settings) > 1 else settings[0]))
    return stages


def format_stage_name(name: str) -> str:
    """Return "stage 2 (hidden)": numbered as in the paper and in `--stages`, wherever it is in a recipe."""
    numbers = {stage: number for number, stage in STAGE_NAMES.items()}
    return f"stage {numbers[name]} ({name})" if name in numbers else name


def scale_token_budgets(stages: list[dict[str, Any]], tokens: int) -> None:
    """Scale the stages' token budgets so that they add up to `tokens`."""
    before = [parse_count(stage.get("tokens")) for stage in stages]
    if wrong := [count for count in before if not isinstance(count, int | float) or not count > 0]:
        raise LimbeckError(f"a stage has tokens: {wrong[0]}", expected="a positive number in every stage")
    for stage, count in zip(stages, before):
        stage["tokens"] = max(1, round(count * tokens / sum(before)))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C: ten times faster
    """Read 1e-3 as a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def read_yaml(path: Path, what: str, expected: str) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Args:
        what: what the file should be, for the error: "recipe".
        expected: what it should contain.

    Raises:
        LimbeckError: broken YAML, or no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise LimbeckError(f"{path} does not contain a {what}", expected=expected)
    return raw


def parse_value(text: str) -> Any:
    """Parse a value of the command line as YAML: 3, 1e-3, true, [1, 2], text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def set_by_dotted_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set raw["a"]["b"] for the key "a.b"; lists take an index, stages also their name: "stages.hidden.lr".

    A part that is null, such as an objective or the settings of an adapter, is created: its other keys have their
    defaults.

    Raises:
        LimbeckError: there is no such key, or the part has no defaults that go without saying.
    """
    *path, last = key.split(".")
    try:
        target = _find_part(raw, path, key)
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise LimbeckError(
            f"--set {key}: the recipe has no such key", expected="for example stages.hidden.tokens=8192"
        ) from error


def remove_dotted_key(raw: dict[str, Any], key: str) -> None:
    """Remove raw["a"]["b"] for the key "a.b" of a part that `set_by_dotted_key` has found, as far as it is there."""
    *path, last = key.split(".")
    _find_part(raw, path, key).pop(last, None)


def _find_part(raw: dict[str, Any], path: list[str], key: str) -> Any:
    """Return what the names of a path lead to; `key` is the whole key, for errors."""
    target: Any = raw
    for part in path:
        target = target[_index(target, part, key)] if isinstance(target, list) else _enter(target, part, key)
    return target


def _enter(target: dict[str, Any], part: str, key: str) -> Any:
    """Return the value at a part of a key; where it is missing or null, a mapping without keys, put there."""
    if part in target and target[part] is None:
        rest = key.rpartition("data.")[2]
        # null says that the stage reads the recipe's text, and a mapping without a source would be the embedded one
        if part == "data" and "stage" in target and rest.split(".")[0] not in ("source", "sources"):
            raise LimbeckError(
                f"--set {key}: the stage has no text of its own, it reads the recipe's",
                expected=f"a text for the stage first, {key.removesuffix(rest)}source=corpus.jsonl; or data.{rest}",
            )
        target[part] = {}
    return target.setdefault(part, {})


def _index(items: list[Any], part: str, key: str) -> int:
    """Return the list index of a key's part: a number, or the name of a stage that occurs once."""
    if part not in STAGE_NAMES.values():
        return int(part)
    matches = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("stage") == part]
    if len(matches) == 1:
        return matches[0]
    stages = ", ".join(f"{i} {item.get('stage')}" for i, item in enumerate(items) if isinstance(item, dict))
    raise LimbeckError(
        f"--set {key}: the recipe has {len(matches) or 'no'} stages named {part}",
        expected=f"a stage by its name, or by its index: {stages}",
    )


# what pydantic puts into the place of an error, where a key takes values of several types
_UNION_MEMBER = re.compile(r"str|int|float|bool|none|(list|dict|tuple|literal|function-\w+|constrained-\w+)\b.*")


def format_validation_error(
    error: ValidationError, origin: str, root: type[BaseModel], tagged: Mapping[str, type[BaseModel]] | None = None
) -> LimbeckError:
    """Convert pydantic's error about values of `root`, with a suggestion for an unknown key.

    Args:
        origin: the name of the file or object that the values came from.
        tagged: the models of the union of stages in `root`, by their tag.
    """
    tagged = tagged or {}
    # An unknown key is reported before a missing one: usually it is that same key, mistyped.
    first = min(error.errors(), key=lambda issue: issue["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"] if p not in tagged and not _UNION_MEMBER.fullmatch(str(p))]
    if first["type"] == "extra_forbidden" and path[-1:] != [str(first["loc"][-1])]:
        path.append(str(first["loc"][-1]))  # a user's key, even if it is called `int` or as a stage
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        model = _model_at(first["loc"][:-1], root, tagged)
        new = getattr(model, "renamed", {}).get(path[-1])
        if new in model.model_fields:
            return LimbeckError(
                f"{origin}: unknown key '{where}': it has been renamed to '{new}'",
                expected=".".join([*path[:-1], new]),
            )
        fields = list(model.model_fields)
        return LimbeckError(
            f"{origin}: unknown key '{where}'{suggest_closest(path[-1], fields)}", expected=", ".join(fields) or None
        )
    if first["type"] == "union_tag_not_found":
        return LimbeckError(f"{origin}: {where} does not say which stage it is", expected=f"stage: {', '.join(tagged)}")
    if first["type"] == "union_tag_invalid":
        tag = str(first["ctx"]["tag"])
        return LimbeckError(
            f"{origin}: {where}: unknown stage '{tag}'{suggest_closest(tag, tagged)}", expected=", ".join(tagged)
        )
    # a whole part of the recipe would hide what is wrong with it
    value = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
    place = f"{where}{value}: " if where else ""
    return LimbeckError(f"{origin}: {place}{first['msg'].removeprefix('Value error, ')}")


class _OtherDefault:
    """Stands in a signature for a default that would fill lines."""

    def __repr__(self) -> str:
        return "..."


def build_short_signature(model: type[BaseModel]) -> inspect.Signature:
    """Build the signature that `help` shows: the keys and plain defaults; the types of all parts would fill a page."""
    plain = (str, int, float, bool, type(None))
    parameters = []
    for name, field in model.model_fields.items():
        default: Any = field.default if isinstance(field.default, plain) else _OtherDefault()
        default = inspect.Parameter.empty if field.is_required() else default
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)


def _model_at(
    location: tuple[Any, ...], model: type[BaseModel], tagged: Mapping[str, type[BaseModel]]
) -> type[BaseModel]:
    """Return the model that validates the values at a location."""
    for part in location:
        if part in tagged:
            model = tagged[part]
        elif isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Iterate over the models in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
