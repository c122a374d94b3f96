"""What made the numbers of a report: commands, versions, hardware, texts, and the recipe of every run.

    made = build_provenance(collection)
    made.shared_settings                   # YAML: what the recipes of all runs have in common
    made.recipes[0].own_settings       # YAML: what is the run's own

Common part and own part together are a run's recipe, a stage's settings under `stages.<stage>.`.
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
    """A run: facts are label and text."""

    run: str
    status: str
    facts: list[tuple[str, str]]
    own_settings: str


@dataclass(frozen=True)
class ReportProvenance:
    """environment, texts: label and text. study: its YAML, or ""."""

    commands: list[str]
    environment: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    study: str
    shared_settings: str
    recipes: list[RunProvenance]


def build_provenance(collection: RunCollection) -> ReportProvenance:
    """Of all runs; what differs between runs that should be alike (versions, machines) is told with each run."""
    flat = {run.name: _flat(run.recipe) for run in collection.runs if run.recipe}
    holders: dict[str, list[Any]] = {}
    for one in flat.values():
        for key, value in one.items():
            holders.setdefault(key, []).append(value)
    common = {key: values[0] for key, values in holders.items() if all(value == values[0] for value in values)}
    environment = [
        (word, str(collection.environment[key]))
        for key, word in ENVIRONMENT_LABELS.items()
        if collection.environment.get(key)
    ]
    recipes = [
        RunProvenance(
            run.name,
            run.status,
            _facts(run, collection),
            _told({key: value for key, value in flat.get(run.name, {}).items() if key not in common}),
        )
        for run in collection.runs
        if run.recipe or run.measurements
    ]
    study = yaml.safe_dump(collection.study, sort_keys=False, allow_unicode=True) if collection.study else ""
    return ReportProvenance(collection.commands, environment, _texts(collection), study, _told(common), recipes)


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keys with dots; a stage's under its name, and which stages there are under `stages`."""
    found: dict[str, Any] = {"stages": [stage["stage"] for stage in recipe["stages"]]}
    for stage in recipe["stages"]:
        found |= {f"stages.{stage['stage']}.{key}": value for key, value in stage.items() if key != "stage"}
    for key, value in recipe.items():
        if key in HIDDEN_KEYS or key == "stages":
            continue
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            found[key] = value
    return found


def _facts(run: Run, collection: RunCollection) -> list[tuple[str, str]]:
    facts = []
    if run.seconds:
        facts.append(("trained for", f"{run.seconds / 60:.1f} min"))
    if run.manifest.get("opened"):
        facts.append(("begun", str(run.manifest["opened"])))
    weights = dict.fromkeys(one.provenance.weights for one in run.measurements.values())
    if weights:
        facts.append(("weights measured", ", ".join(weights)))
    other = {key: run.manifest[key] for key in ENVIRONMENT_LABELS if key in run.manifest}
    usual = collection.environment
    differs = [f"{ENVIRONMENT_LABELS[key]} {value}" for key, value in other.items() if usual.get(key, value) != value]
    if differs:
        facts.append(("made with", ", ".join(differs)))
    return facts


def _texts(collection: RunCollection) -> list[tuple[str, str]]:
    """Name, and the key of its tokens with their counts."""
    found: dict[tuple[str, str], None] = {}
    for run in collection.runs:
        if "tokens_key" in run.manifest:
            m = run.manifest
            count = "any number of" if m["train_tokens"] is None else f"{m['train_tokens']:,}"
            told = f"key {m['tokens_key']}, {count} tokens to train on, {m['held_out_tokens']:,} held out"
            found.setdefault((f"text {run.recipe.get('data', {}).get('source', '')}".strip(), told))
        for one in run.measurements.values():
            told = _list({key: value for key, value in one.data.items() if isinstance(value, str | int)})
            settings = _list(one.settings)
            found.setdefault((f"measure {one.measure}", f"{told} ({settings})" if settings else told))
    return list(found)


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in strip_local_paths(values).items() if value is not None)


def _told(recipe: dict[str, Any]) -> str:
    """A flat recipe, a line a key; what JSON writes is YAML too."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in recipe.items())
