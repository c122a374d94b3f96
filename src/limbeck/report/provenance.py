"""What made the numbers of a report: commands, versions, hardware, texts, and the recipe of every arm.

    made = provenance_of(collection)
    made.common                   # YAML: what the recipes of all arms have in common
    made.recipes[0].differs       # YAML: what is the arm's own

Common part and own part together are an arm's recipe, a stage's settings under `stages.<stage>.`.
"""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from limbeck.publish.privacy import without_paths
from limbeck.report.arms import Arm, Collection

SHOWN = {
    "limbeck": "limbeck",
    "python": "python",
    "torch": "torch",
    "transformers": "transformers",
    "platform": "platform",
    "gpu": "accelerator",
    "threads": "threads",
    "processes": "processes",
}
NOT_SHOWN = ("name", "out")  # of a recipe


@dataclass(frozen=True)
class Recipe:
    """An arm: facts are label and text."""

    arm: str
    status: str
    facts: list[tuple[str, str]]
    differs: str


@dataclass(frozen=True)
class Provenance:
    """environment, texts: label and text. study: its YAML, or ""."""

    commands: list[str]
    environment: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    study: str
    common: str
    recipes: list[Recipe]


def provenance_of(collection: Collection) -> Provenance:
    """Of all arms; what differs between arms that should be alike (versions, machines) is told with each arm."""
    flat = {arm.name: _flat(arm.recipe) for arm in collection.arms if arm.recipe}
    holders: dict[str, list[Any]] = {}
    for one in flat.values():
        for key, value in one.items():
            holders.setdefault(key, []).append(value)
    common = {key: values[0] for key, values in holders.items() if all(value == values[0] for value in values)}
    environment = [
        (word, str(collection.environment[key])) for key, word in SHOWN.items() if collection.environment.get(key)
    ]
    recipes = [
        Recipe(
            arm.name,
            arm.status,
            _facts(arm, collection),
            _told({key: value for key, value in flat.get(arm.name, {}).items() if key not in common}),
        )
        for arm in collection.arms
        if arm.recipe or arm.measurements
    ]
    study = yaml.safe_dump(collection.study, sort_keys=False, allow_unicode=True) if collection.study else ""
    return Provenance(collection.commands, environment, _texts(collection), study, _told(common), recipes)


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keys with dots; a stage's under its name, and which stages there are under `stages`."""
    found: dict[str, Any] = {"stages": [stage["stage"] for stage in recipe["stages"]]}
    for stage in recipe["stages"]:
        found |= {f"stages.{stage['stage']}.{key}": value for key, value in stage.items() if key != "stage"}
    for key, value in recipe.items():
        if key in NOT_SHOWN or key == "stages":
            continue
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            found[key] = value
    return found


def _facts(arm: Arm, collection: Collection) -> list[tuple[str, str]]:
    facts = []
    if arm.seconds:
        facts.append(("trained for", f"{arm.seconds / 60:.1f} min"))
    if arm.manifest.get("opened"):
        facts.append(("begun", str(arm.manifest["opened"])))
    weights = dict.fromkeys(one.provenance.weights for one in arm.measurements.values())
    if weights:
        facts.append(("weights measured", ", ".join(weights)))
    other = {key: arm.manifest[key] for key in SHOWN if key in arm.manifest}
    usual = collection.environment
    differs = [f"{SHOWN[key]} {value}" for key, value in other.items() if usual.get(key, value) != value]
    if differs:
        facts.append(("made with", ", ".join(differs)))
    return facts


def _texts(collection: Collection) -> list[tuple[str, str]]:
    """Name, and the key of its tokens with their counts."""
    found: dict[tuple[str, str], None] = {}
    for arm in collection.arms:
        if "tokens_key" in arm.manifest:
            m = arm.manifest
            count = "any number of" if m["train_tokens"] is None else f"{m['train_tokens']:,}"
            told = f"key {m['tokens_key']}, {count} tokens to train on, {m['held_out_tokens']:,} held out"
            found.setdefault((f"text {arm.recipe.get('data', {}).get('source', '')}".strip(), told))
        for one in arm.measurements.values():
            told = _list({key: value for key, value in one.data.items() if isinstance(value, str | int)})
            settings = _list(one.settings)
            found.setdefault((f"measure {one.measure}", f"{told} ({settings})" if settings else told))
    return list(found)


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in without_paths(values).items() if value is not None)


def _told(recipe: dict[str, Any]) -> str:
    """A flat recipe, a line a key; what JSON writes is YAML too."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in recipe.items())
