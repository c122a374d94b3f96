"""What made the numbers of a report: commands, versions, hardware, texts, and the recipe of every run.

    provenance = build_provenance(collection)
    provenance.shared_settings              # YAML: what the recipes of all runs have in common
    provenance.recipes[0].own_settings      # YAML: what is the run's own

Shared and own settings together are a run's recipe, a stage's settings under `stages.<stage>.`.
"""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from limbeck.report.collection import Run, RunCollection
from limbeck.report.privacy import strip_local_paths

ENVIRONMENT_LABELS = {
    "limbeck": "limbeck",
    "python": "python",
    "torch": "torch",
    "transformers": "transformers",
    "platform": "platform",
    "gpu": "accelerator",
    "threads": "threads",
    "processes": "processes",
}
HIDDEN_KEYS = ("name", "out")  # of a recipe


@dataclass(frozen=True)
class RunProvenance:
    """A run's part: facts are pairs of label and text."""

    run: str
    status: str
    facts: list[tuple[str, str]]
    own_settings: str


@dataclass(frozen=True)
class ReportProvenance:
    """environment, texts: pairs of label and text. study: its YAML, or ""."""

    commands: list[str]
    environment: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    study: str
    shared_settings: str
    recipes: list[RunProvenance]


def build_provenance(collection: RunCollection) -> ReportProvenance:
    """Gather the provenance of all runs; versions or machines that differ are listed with the run that has them."""
    flat_recipes = {run.name: _flatten(run.recipe) for run in collection.runs if run.recipe}
    settings: dict[str, list[Any]] = {}
    for recipe in flat_recipes.values():
        for key, value in recipe.items():
            settings.setdefault(key, []).append(value)
    shared = {key: values[0] for key, values in settings.items() if all(value == values[0] for value in values)}
    environment = [
        (label, str(collection.environment[key]))
        for key, label in ENVIRONMENT_LABELS.items()
        if collection.environment.get(key)
    ]
    recipes = [
        RunProvenance(
            run.name,
            run.status,
            _list_facts(run, collection),
            _to_yaml({key: value for key, value in flat_recipes.get(run.name, {}).items() if key not in shared}),
        )
        for run in collection.runs
        if run.recipe or run.measurements
    ]
    study = yaml.safe_dump(collection.study, sort_keys=False, allow_unicode=True) if collection.study else ""
    return ReportProvenance(collection.commands, environment, _list_texts(collection), study, _to_yaml(shared), recipes)


def _flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """Flatten a recipe to dotted keys; a stage's are under its name, and `stages` lists the stages."""
    flat: dict[str, Any] = {"stages": [stage["stage"] for stage in recipe["stages"]]}
    for stage in recipe["stages"]:
        flat |= {f"stages.{stage['stage']}.{key}": value for key, value in stage.items() if key != "stage"}
    for key, value in recipe.items():
        if key in HIDDEN_KEYS or key == "stages":
            continue
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            flat[key] = value
    return flat


def _list_facts(run: Run, collection: RunCollection) -> list[tuple[str, str]]:
    facts = []
    if run.seconds:
        facts.append(("trained for", f"{run.seconds / 60:.1f} min"))
    if run.manifest.get("opened"):
        facts.append(("started", str(run.manifest["opened"])))
    weights = dict.fromkeys(one.provenance.weights for one in run.measurements.values())
    if weights:
        facts.append(("measured weights", ", ".join(weights)))
    environment = {key: run.manifest[key] for key in ENVIRONMENT_LABELS if key in run.manifest}
    different = [
        f"{ENVIRONMENT_LABELS[key]} {value}"
        for key, value in environment.items()
        if collection.environment.get(key, value) != value
    ]
    if different:
        facts.append(("made with", ", ".join(different)))
    return facts


def _list_texts(collection: RunCollection) -> list[tuple[str, str]]:
    """List the texts that were trained on and measured on, each with the key of its tokens and their number."""
    texts: dict[tuple[str, str], None] = {}
    for run in collection.runs:
        if "tokens_key" in run.manifest:
            manifest = run.manifest
            count = "any number of" if manifest["train_tokens"] is None else f"{manifest['train_tokens']:,}"
            text = f"key {manifest['tokens_key']}, {count} tokens to train on, {manifest['held_out_tokens']:,} held out"
            texts.setdefault((f"text {run.recipe.get('data', {}).get('source', '')}".strip(), text))
        for one in run.measurements.values():
            data = _join({key: value for key, value in one.data.items() if isinstance(value, str | int)})
            settings = _join(one.settings)
            texts.setdefault((f"measure {one.measure}", f"{data} ({settings})" if settings else data))
    return list(texts)


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in strip_local_paths(values).items() if value is not None)


def _to_yaml(settings: dict[str, Any]) -> str:
    """Write flat settings as YAML, a line a key; JSON values are valid YAML."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
