"""Define a study: a typed grid of recipes, from YAML; an unknown key is an error that suggests the closest one.

    study = Study.load("paper-experiment-1", size="gpu")       # or a file: Study.load("mine.yaml")
    for arm in study.arms(Path("runs/mine")):
        arm.name, arm.axes, arm.recipe                           # "gla_2+3_seed0", {"student": "gla", ...}, Recipe

An arm is an ordinary recipe with an ordinary run directory. Its name is made of its values on the axes and stays the
same when an axis gets another value, so that a study can grow.
"""

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limbeck import mixers
from limbeck.core import recipe as recipes
from limbeck.core.config import (
    STAGE_NAMES,
    format_validation_error,
    parse_stages,
    read_yaml,
    scale_token_budgets,
    set_by_dotted_key,
)
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.old_keys import OLD_KEYS, study_from_old_keys
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import STAGES
from limbeck.evaluation import measure
from limbeck.study.claims import CLAIMS

STUDIES_FOLDER = Path(__file__).parent / "studies"
RESERVED_AXES = ("student", "stages", "copy_projections", "layers", "softmax_layers", "teacher", "tokens", "seed")


class _StrictModel(BaseModel):
    """A part of a study. The string below a key describes it in help(), the JSON schema and docs/reference/study.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # old and new names of its keys


class StudentSpec(_StrictModel):
    """A student with a name: its mixer, and its options, preset or rules."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")]
    """Its name in the study's tables and in the names of runs."""
    mixer: str
    """Its mixer: a name that `limbeck students` lists, or a Python file."""
    preset: Literal["default", "published", "controlled"] | None = None
    """Defaults of the mixer's options; null: that of `base`."""
    options: dict[str, Any] = {}
    """Options of the mixer, by name."""
    rules: list[recipes.Rule] = []
    """Other mixers for some of the layers."""


class Grid(_StrictModel):
    """The axes of a study; an arm has one value of each."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["grid"]
    students: str | Annotated[list[str | StudentSpec], Field(min_length=1)]
    """Mixers, sets of mixers (`paper-v2`, `paper-v3`, `all`), or students with options."""
    stages: Annotated[list[str], Field(min_length=1)]
    """Combinations of stages that `base` has: "3", "2+3", "hidden+logits"."""
    copy_projections: Annotated[list[bool], Field(min_length=1)] = [True]
    """Values of `student.copy_projections`."""
    layers: Annotated[list[str | list[int]], Field(min_length=1)] = ["all"]
    """Values of `student.layers`."""
    softmax_layers: Annotated[list[str | list[int]], Field(min_length=1)] = ["none"]
    """Values of `student.softmax_layers`."""
    teachers: Annotated[list[str], Field(min_length=1)] | None = None
    """Teachers; null: that of `base`."""
    tokens: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] | None = None
    """Budgets in tokens over all stages, divided as in `base`; null: those of `base`."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """Seeds; the replicates of the study's statistics."""
    recipes: list[str] = []
    """Further arms: recipes, built-in or YAML files, with their own students, texts and stages, and the tokens of the
    other arms.
    """
    settings: dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]] = {}
    """Further axes: name of the axis, name of a value, keys of the recipe as in `--set`; a stage is named, not numbered
    (stages.hidden.lr).
    """


class Study(_StrictModel):
    """A study: its grid, the recipe that its arms share, its measures and its claims."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["study"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Name of the study; its folder is `runs/NAME-SIZE`."""
    description: str = ""
    """The question that it answers, in a sentence."""
    size: str | None = None
    """The size that was chosen with `--size`; set by Limbeck."""
    base: dict[str, Any]
    """What all arms share: keys of a recipe. Its list `stages` has the settings of every stage that the grid uses."""
    grid: Grid
    """The axes."""
    measures: dict[str, dict[str, Any]] = {"agreement": {}}
    """Measures of `limbeck eval` by name, each with the settings that differ from its defaults."""
    claims: list[str] = []
    """Claims that are tested, by name."""
    save_artifacts: Literal["none", "students", "all"] = "none"
    """What stays of a finished arm: numbers and logs; its student too; everything."""

    @classmethod
    def load(cls, source: str | Path, size: str | None = None) -> "Study":
        """Load a built-in study by name or a YAML file, in one of its sizes (the first by default).

        Raises:
            LimbeckError: no such study or size, broken YAML, unknown key, measure or claim, impossible value.
        """
        path = Path(source) if Path(source).suffix in (".yaml", ".yml") else STUDIES_FOLDER / f"{source}.yaml"
        if not path.is_file():
            raise LimbeckError(
                f"there is no study '{source}'{suggest_closest(str(source), list_builtin_studies())}",
                expected=f"a YAML file, or one of: {', '.join(list_builtin_studies())}",
            )
        raw = read_yaml(path, "study", "keys such as name, base, grid, measures")
        if recipes.is_stored(path):
            raw = study_from_old_keys(raw)
        sizes = raw.pop("sizes", None) or {}
        if not isinstance(sizes, dict) or not all(isinstance(settings, dict) for settings in sizes.values()):
            raise LimbeckError(f"{source}: sizes", expected="by name, each with the keys that differ in it")
        if size is None and sizes:
            size = next(iter(sizes))
        if size is not None and size not in sizes:
            raise LimbeckError(
                f"{source} has no size '{size}'{suggest_closest(size, sizes)}", expected=", ".join(sizes) or "no --size"
            )
        if size is not None:
            raw = {**_merge(raw, sizes[size]), "size": size}
            if isinstance(raw.get("measures"), dict):  # a size leaves a measure out with null
                raw["measures"] = {name: settings for name, settings in raw["measures"].items() if settings is not None}
        return cls.parse(raw, str(source))

    @classmethod
    def parse(cls, raw: dict[str, Any], origin: str = "study") -> "Study":
        """Create a study from plain values; raises LimbeckError instead of pydantic's error."""
        if isinstance(raw.get("measures"), list):
            raw = {**raw, "measures": {name: {} for name in raw["measures"]}}
        try:
            study = cls.model_validate(raw)
        except ValidationError as error:
            raise format_validation_error(error, origin, cls) from error
        for name, settings in study.measures.items():
            measure.parse_settings(measure.get_measure(name), settings)
        for name in study.claims:
            if name not in CLAIMS:
                raise LimbeckError(
                    f"{origin}: unknown claim '{name}'{suggest_closest(name, CLAIMS)}", expected=", ".join(CLAIMS)
                )
        return study

    @property
    def title(self) -> str:
        """Name and size, as the folder is called."""
        return self.name if self.size is None else f"{self.name}-{self.size}"

    def arms(self, folder: Path) -> list["Arm"]:
        """List the arms of the grid, with run directories under `folder`; of arms with equal recipes the first.

        Raises:
            LimbeckError: a value of the grid does not give a valid recipe.
        """
        grid = self.grid
        by_name: dict[str, Arm] = {}
        applied: set[str] = set()  # keys of `grid.settings` that some arm's recipe has
        for axis in grid.settings:
            if axis in RESERVED_AXES:
                raise LimbeckError(f"{self.name}: grid.settings.{axis} is already an axis", expected="another name")
        unset: list[Any] = [None]
        values: list[list[Any]] = [
            grid.teachers or unset,
            expand_students(grid.students),
            grid.stages,
            grid.copy_projections,
            grid.layers,
            grid.softmax_layers,
            grid.tokens or unset,
            *(list(axis.items()) for axis in grid.settings.values()),
            grid.seeds,
        ]
        for teacher, student, stages, copied, layers, softmax, tokens, *chosen, seed in itertools.product(*values):
            raw = self._build_raw_recipe(student, stages, teacher, tokens)
            raw["student"] |= {"copy_projections": copied, "layers": layers, "softmax_layers": softmax}
            axes = {"student": student.name, "stages": _format_stage_numbers(raw["stages"]), "copy_projections": copied}
            axes |= {"layers": layers, "softmax_layers": softmax, "teacher": raw["teacher"], "tokens": tokens}
            for axis, (label, settings) in zip(grid.settings, chosen):
                axes[axis] = label
                applied |= {key for key, value in settings.items() if _apply_setting(raw, key, value)}
            axes["seed"] = seed
            name = _format_arm_name(
                axes, {axis: bool(settings) for axis, (_, settings) in zip(grid.settings, chosen)}, teacher
            )
            raw |= {"seed": seed, "name": name, "out": str(folder / name), "trackers": raw.get("trackers", [])}
            recipe = Recipe.parse(raw, f"study {self.name}, arm {name}")
            mixers.resolve_options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
            if by_name.setdefault(name, Arm(name, axes, recipe)).recipe != recipe:
                raise LimbeckError(
                    f"{self.name}: two arms are named {name}", expected="a name for each value of an axis"
                )
        for name, teacher, tokens, seed in itertools.product(
            grid.recipes, grid.teachers or unset, grid.tokens or unset, grid.seeds
        ):
            arm = self._build_recipe_arm(name, teacher, tokens, seed, folder)
            if by_name.setdefault(arm.name, arm) is not arm:
                raise LimbeckError(f"{self.name}: two arms are named {arm.name}", expected="other names of students")
        unapplied = {key for axis in grid.settings.values() for settings in axis.values() for key in settings} - applied
        if unapplied:
            raise LimbeckError(
                f"{self.name}: grid.settings: no arm's recipe has {', '.join(sorted(unapplied))}",
                expected="keys of the recipe, stages by name: stages.hidden.target",
            )
        return _drop_duplicates(list(by_name.values()))

    def _build_recipe_arm(self, name: str, teacher: str | None, tokens: int | None, seed: int, folder: Path) -> "Arm":
        """Build the arm of a recipe: teacher, evaluation and the sum of tokens are those of the other arms."""
        raw = Recipe.load(name).model_dump(mode="json")
        others = self._build_raw_recipe(expand_students(self.grid.students)[0], self.grid.stages[0], teacher, tokens)
        scale_token_budgets(raw["stages"], sum(stage["tokens"] for stage in others["stages"]))
        raw |= {key: others[key] for key in ("teacher", "evaluation", "trackers") if key in others}
        student = raw["student"]
        axes: dict[str, Any] = {"student": Path(name).stem, "stages": _format_stage_numbers(raw["stages"])}
        axes |= {key: student[key] for key in ("copy_projections", "layers", "softmax_layers")}
        axes |= {"teacher": raw["teacher"], "tokens": tokens, "seed": seed}
        arm_name = _format_arm_name(axes, {}, teacher)
        raw |= {"seed": seed, "name": arm_name, "out": str(folder / arm_name)}
        return Arm(arm_name, axes, Recipe.parse(raw, f"study {self.name}, arm {arm_name}"))

    def _build_raw_recipe(
        self, student: StudentSpec, stages: str, teacher: str | None, tokens: int | None
    ) -> dict[str, Any]:
        """Build the recipe of a student and its stages, as plain values."""
        raw = copy.deepcopy(self.base)
        raw["teacher"] = teacher or raw.get("teacher", Recipe.model_fields["teacher"].default)
        settings: dict[str, Any] = {"mixer": student.mixer, "options": student.options, "preset": student.preset}
        settings |= {"rules": [rule.model_dump(exclude_none=True) for rule in student.rules]}
        if not isinstance(raw.get("student") or {}, dict):
            raise LimbeckError(
                f"{self.name}: base.student is {raw['student']!r}", expected="keys of a recipe's student"
            )
        raw["student"] = {**(raw.get("student") or {}), **{key: value for key, value in settings.items() if value}}
        raw["stages"] = parse_stages(stages.replace("+", ","), raw)
        if tokens is not None:
            scale_token_budgets(raw["stages"], tokens)
        return raw


class Arm:
    """One run of a study: its value on each axis, and its recipe."""

    def __init__(self, name: str, axes: dict[str, Any], recipe: Recipe):
        self.name, self.axes, self.recipe = name, axes, recipe

    @property
    def path(self) -> Path:
        """Its run directory."""
        assert self.recipe.out is not None
        return Path(self.recipe.out)


def list_builtin_studies() -> list[str]:
    """List the names of the studies that come with Limbeck."""
    return sorted(path.stem for path in STUDIES_FOLDER.glob("*.yaml"))


def expand_students(students: str | list[str | StudentSpec]) -> list[StudentSpec]:
    """Expand names and sets of mixers to students; LimbeckError for an unknown mixer or a name that comes twice."""
    by_name: dict[str, StudentSpec] = {}
    for entry in [students] if isinstance(students, str) else students:
        if isinstance(entry, StudentSpec):
            mixers.get(entry.mixer)
            expanded = [entry]
        else:
            expanded = [StudentSpec(name=mixers.get(mixer).name, mixer=mixer) for mixer in mixers.select_mixers(entry)]
        for student in expanded:
            if by_name.setdefault(student.name, student) != student:
                raise LimbeckError(f"two students are named '{student.name}'", expected="a name for each")
    return list(by_name.values())


def _drop_duplicates(arms: list[Arm]) -> list[Arm]:
    """Keep the first of arms whose recipes differ by the name alone."""
    by_recipe: dict[str, Arm] = {}
    for arm in arms:
        content = arm.recipe.model_dump_json(exclude={"name", "out"})
        by_recipe.setdefault(content, arm)
    return list(by_recipe.values())


def _format_arm_name(axes: dict[str, Any], shown_settings: dict[str, bool], teacher: str | None) -> str:
    """Name an arm by its student, stages and seed and by what is not at its default, so that a new axis renames none.

    Args:
        shown_settings: the axes of `grid.settings`, and whether this arm's value of each changes anything.
    """
    parts = [axes["student"], axes["stages"]]
    if teacher is not None:
        parts.insert(0, Path(teacher).name)
    if not axes["copy_projections"]:
        parts.append("fresh")
    # these are names of folders on disk: "keep" is the prefix of existing studies for the layers with softmax
    for axis, prefix, default in (
        ("layers", "layers", "all"),
        ("softmax_layers", "keep", "none"),
        ("tokens", "tokens", None),
    ):
        value = axes[axis]
        if value != default:
            parts.append(f"{prefix}-{'.'.join(map(str, value)) if isinstance(value, list) else value}")
    parts += [str(axes[axis]) for axis, shown in shown_settings.items() if shown]
    text = "_".join([*parts, f"seed{axes['seed']}"])
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)


def _format_stage_numbers(stages: list[dict[str, Any]]) -> str:
    """Format stages by their numbers: "2+3" for hidden and logits."""
    numbers = {name: number for number, name in STAGE_NAMES.items()}
    return "+".join(numbers[stage["stage"]] for stage in stages)


def _apply_setting(raw: dict[str, Any], key: str, value: Any) -> bool:
    """Set a key of a raw recipe, that of a stage by the stage's name; False if the arm has no such stage."""
    first, _, rest = key.partition(".")
    stage, _, setting = rest.partition(".")
    if first != "stages" or stage.isdigit():
        set_by_dotted_key(raw, key, value)
        return True
    if stage not in STAGES:
        raise LimbeckError(
            f"grid.settings: {key}{suggest_closest(stage, STAGES)}",
            expected=f"stages.{'|'.join(STAGES)}.key",
        )
    matching = [stage_settings for stage_settings in raw["stages"] if stage_settings["stage"] == stage]
    for stage_settings in matching:
        set_by_dotted_key(stage_settings, setting, value)
    return bool(matching)


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge `override` into `base`, mapping by mapping; lists are replaced."""
    nested = {key: _merge(base[key], value) for key, value in override.items() if _are_mappings(base.get(key), value)}
    return {**base, **override, **nested}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def study_to_yaml(study: Study) -> str:
    """Format the study as YAML, with its size merged into it."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
