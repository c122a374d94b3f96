"""Which weights, tokenizer and layers a run works with, by content: names say where something is, not what it is.

    fingerprint_checkpoint(folder)                     # of a folder: settings, every tensor and code of its own
    fingerprint_model(model)                      # of a model in memory
    job.identity = build_run_identity(...)        # what manifest.json keeps, and what a resume is compared with
    check_run_identity(path, job.identity)     # LimbeckError where a run was begun with something else

All are hex sha256. Two folders have the same fingerprint where they hold the same tensors under the same settings,
however these are spread over files; a single byte of a tensor makes another one.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe, Student
from limbeck.core.storage import read_manifest
from limbeck.data import documents
from limbeck.models.convert import assign_mixers
from limbeck.models.fingerprint import (
    _code,
    _files,
    _plain,
    _settings,
    find_model_folder,
    fingerprint_tensors,
    fingerprint_tokenizer,
)
from limbeck.models.layers import format_ranges, select_converted_layers
from limbeck.training.run_directory import describe_differences, raise_if_changed

# ---------------------------------------------------------------------- fingerprints


# ---------------------------------------------------------------------- runs


def build_run_identity(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: int
) -> dict[str, Any]:
    """What a run works with, for its manifest.

    Args:
        layers: attention layers of the teacher.
    """
    folder = find_model_folder(recipe.teacher)
    return {
        "teacher": {
            "name": recipe.teacher,
            "architecture": type(teacher).__name__,
            "layers": layers,
            "commit": folder.name if folder and folder.parent.name == "snapshots" else None,  # in the hub's cache
            # what few-bit weights look like in memory is the business of a library and of a device
            "tensors": fingerprint_tensors(teacher) if recipe.teacher_bits is None else None,
            "config": json.loads(_plain(_settings(teacher.config.to_dict()))),
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "files": _files(folder) if folder else None,
        },
        "student": summarize_student_layers(recipe.student, layers, recipe.longest),
    }


def summarize_student_layers(student: Student, layers: int, length: int) -> list[dict[str, Any]]:
    """Which mixer with which options stands in which layers, of a recipe's student: groups of layers.

    Args:
        layers: attention layers of the teacher.
        length: tokens of the longest sequences that it learns from.
    """
    rules = [rule.model_dump(exclude_none=True) for rule in student.rules]
    chosen = select_converted_layers(student.layers, student.softmax_layers, layers)
    assigned = assign_mixers(chosen, student.mixer, student.options, student.preset, rules, layers, length)
    groups: dict[str, tuple[Any, list[int]]] = {}
    for layer, one in assigned.items():
        groups.setdefault(_plain([one.mixer, one.options]).decode(), (one, []))[1].append(layer)
    return [
        {"layers": format_ranges(numbers), "mixer": one.mixer, "code": _code(one.mixer), "options": one.options}
        for one, numbers in groups.values()
    ]


def check_run_identity(path: Path, now: dict[str, Any]) -> None:
    """Raises LimbeckError where the run at `path` was begun with another teacher, tokenizer or student.

    What a manifest of an earlier version does not say is not compared.
    """
    begun = read_manifest(path)
    before, after = begun.get("teacher", {}), now["teacher"]
    compared = {"architecture": "class", "tokenizer": "tokenizer", "tensors": "weights"}
    if before.get("tensors") is None or after["tensors"] is None:
        compared["files"] = "files"
    name = after["name"]
    changed = [
        f"the teacher '{name}' has not the {what} that it had then"
        for key, what in compared.items()
        if before.get(key) is not None and before[key] != after[key]
    ]
    settings = before.get("config") or {}
    for key in settings:
        if key in after["config"]:  # what one version of transformers alone knows says nothing of a change
            changed += describe_differences(f"the teacher '{name}', {key}", settings[key], after["config"][key])
    if begun.get("student"):
        changed += describe_differences("the student", begun["student"], now["student"])
    raise_if_changed(
        f"the run {path} was begun with something else",
        path,
        changed,
        "the same teacher, tokenizer and mixers, to go on with it",
        "put it back, or ",
    )


def check_same_teacher(runs: dict[Path, Recipe]) -> None:
    """Raises LimbeckError where runs that are to be compared name one teacher and learnt from several.

    Args:
        runs: by their folders; those that have not begun yet would learn from what the name stands for now.
    """
    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for path, recipe in runs.items():
        files = read_manifest(path).get("teacher", {}).get("files")
        if files is None:
            continue
        first, theirs = seen.setdefault(recipe.teacher, (f"in the run {path.name}", files))
        folder = find_model_folder(recipe.teacher)
        now = _files(folder) if folder else files
        for where, ours in ((f"in the run {path.name}", files), ("now", now)):
            if ours != theirs:
                what = "tokenizer" if ours["weights"] == theirs["weights"] else "weights"
                raise LimbeckError(
                    f"the teacher '{recipe.teacher}' had other {what} {first} than {where}",
                    expected="one teacher for all runs that stand in one table",
                    hint="put the teacher back, delete the runs that shall be done again, or --out another folder",
                )


def matches_run_identity(path: Path, recipe: Recipe) -> bool:
    """Whether a finished run would be the same today, from files alone: no model is loaded.

    What is not on this machine any more is not compared, and told. Where this says no, the run has to be opened to
    know more.
    """
    begun = read_manifest(path)
    teacher, student = begun.get("teacher", {}), begun.get("student")
    gone = []
    if teacher.get("files"):
        folder = find_model_folder(recipe.teacher)
        if folder is None:
            gone.append(f"teacher '{recipe.teacher}'")
        elif _files(folder) != teacher["files"]:
            return False
    for name, text in begun.get("texts", {}).items():
        data = json.loads(name)
        for source, content in zip(data["sources"] or [data], text.get("contents", [])):
            try:
                if content is not None and documents.fingerprint_source(source["source"]) != content:
                    return False
            except LimbeckError:
                gone.append(f"text '{source['source']}'")
    try:
        if student and student != json.loads(
            _plain(summarize_student_layers(recipe.student, teacher["layers"], recipe.longest))
        ):
            return False
    except LimbeckError as error:
        gone.append(f"student ({error.found})")
    if gone:
        console.print(f"not compared with what it was begun with: {', '.join(gone)}; not to be read here", markup=False)
    return True


# ---------------------------------------------------------------------- inside
