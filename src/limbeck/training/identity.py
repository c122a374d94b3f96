"""Check that a resumed run still has the same teacher, tokenizer and student, by content.

    identity = build_run_identity(recipe, student, teacher, tokenizer, groups)      # stored in manifest.json
    check_run_identity(path, identity)                                     # LimbeckError if the run started otherwise

Names alone do not identify a model: a folder or a Hub revision may change. Fingerprints (`limbeck.models.fingerprint`)
are sha256 of configs and tensors, however these are spread over files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.console import console
from limbeck.core.digests import canonical_json
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe, Student
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX
from limbeck.core.stage_settings import Logits
from limbeck.core.storage import read_manifest
from limbeck.data import documents
from limbeck.mixers.options import LATER_OPTIONS
from limbeck.models.assignment import MixerAssignment, assign_mixers
from limbeck.models.fingerprint import (
    find_model_folder,
    fingerprint_model_files,
    fingerprint_tensors,
    fingerprint_tokenizer,
    identify_mixer_code,
    select_computing_settings,
)
from limbeck.models.layers import format_ranges
from limbeck.training.automatic_heads import find_chosen_heads
from limbeck.training.run_directory import describe_differences, raise_if_changed


def build_run_identity(
    recipe: Recipe,
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[int],
) -> dict[str, Any]:
    """Build the fingerprints of teacher, tokenizer and student, for the manifest.

    Args:
        student: the recipe's, its groups of heads chosen.
        groups: groups of heads in each attention layer of the teacher.
    """
    folder = find_model_folder(recipe.teacher)
    return {
        "teacher": {
            "name": recipe.teacher,
            "architecture": type(teacher).__name__,
            "layers": len(groups),
            "head_groups": list(groups),
            "commit": folder.name if folder and folder.parent.name == "snapshots" else None,  # in the Hub cache
            # the layout of quantized weights in memory depends on library and device
            "tensors": fingerprint_tensors(teacher) if recipe.teacher_bits is None else None,
            "config": json.loads(canonical_json(select_computing_settings(teacher.config.to_dict()))),
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "files": fingerprint_model_files(folder) if folder else None,
        },
        "student": summarize_student_layers(student, groups, recipe.longest),
        **({"further_teachers": further} if (further := _fingerprint_further_teachers(recipe)) else {}),
    }


def _fingerprint_further_teachers(recipe: Recipe) -> dict[str, dict[str, str] | None]:
    """Return the fingerprints of the files of the teachers that an objective of stage 3 names."""
    chosen = [stage.objectives.teachers for stage in recipe.stages if isinstance(stage, Logits)]
    folders = {name: find_model_folder(name) for one in chosen if one is not None for name in one.names}
    return {name: fingerprint_model_files(folder) if folder else None for name, folder in folders.items()}


def assign_student_mixers(student: Student, groups: Sequence[int], length: int) -> dict[int, MixerAssignment]:
    """Return the mixers of the layers that a recipe's student converts, by layer.

    Args:
        groups: groups of heads in each attention layer of the teacher.
        length: longest sequence length in training, in tokens.
    """
    return assign_mixers(groups, **student.collect_placement(), length=length)


def summarize_student_layers(student: Student, groups: Sequence[int], length: int) -> list[dict[str, Any]]:
    """Group the layers of a recipe's student by mixer and options; arguments as in `assign_student_mixers`."""
    assigned = assign_student_mixers(student, groups, length)
    by_mixer: dict[str, tuple[MixerAssignment, list[int]]] = {}
    for layer, one in assigned.items():
        by_mixer.setdefault(canonical_json([one.mixer, one.options]).decode(), (one, []))[1].append(layer)
    return [
        {
            "layers": format_ranges(numbers),
            "mixer": one.mixer,
            "code": identify_mixer_code(one.mixer),
            "options": {k: v for k, v in one.options.items() if k not in LATER_OPTIONS or v != LATER_OPTIONS[k]},
        }
        for one, numbers in by_mixer.values()
    ]


def check_run_identity(path: Path, now: dict[str, Any]) -> None:
    """Raise LimbeckError if the run at `path` started with another teacher, tokenizer or student.

    Fields that the manifest of an earlier version does not have are not compared.
    """
    manifest = read_manifest(path)
    before, after = manifest.get("teacher", {}), now["teacher"]
    compared = {"architecture": "class", "tokenizer": "tokenizer", "tensors": "weights"}
    if before.get("tensors") is None or after["tensors"] is None:
        compared["files"] = "files"
    name = after["name"]
    changed = [
        f"the teacher '{name}' has changed: its {what} {'differ' if what in ('weights', 'files') else 'differs'}"
        for key, what in compared.items()
        if before.get(key) is not None and before[key] != after[key]
    ]
    settings = before.get("config") or {}
    for key in settings:
        if key in after["config"]:  # versions of transformers have different keys
            changed += describe_differences(f"the teacher '{name}', {key}", settings[key], after["config"][key])
    if manifest.get("student"):
        changed += describe_differences("the student", manifest["student"], now["student"])
    further = now.get("further_teachers", {})
    for name, before_files in manifest.get("further_teachers", {}).items():
        if before_files is not None and further.get(name) not in (None, before_files):
            changed.append(f"the teacher '{name}' has changed: its files differ")
    raise_if_changed(
        f"the run {path} started with another teacher or student",
        path,
        changed,
        "the same teacher, tokenizer and mixers, to resume the run",
        "restore them, or ",
    )


def check_same_teacher(runs: dict[Path, Recipe]) -> None:
    """Raise LimbeckError if runs name the same teacher but used different weights or tokenizers.

    Args:
        runs: recipes by run directory; a run that has not started would use the teacher as it is now.
    """
    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for path, recipe in runs.items():
        files = read_manifest(path).get("teacher", {}).get("files")
        if files is None:
            continue
        first, theirs = seen.setdefault(recipe.teacher, (f"in the run {path.name}", files))
        folder = find_model_folder(recipe.teacher)
        now = fingerprint_model_files(folder) if folder else files
        for where, ours in ((f"in the run {path.name}", files), ("now", now)):
            if ours != theirs:
                what = "tokenizer" if ours["weights"] == theirs["weights"] else "weights"
                raise LimbeckError(
                    f"the teacher '{recipe.teacher}' had different {what} {first} and {where}",
                    expected="the same teacher for all runs that are compared",
                    hint="restore the teacher, delete the runs that should be repeated, or --out another folder",
                )


def matches_run_identity(path: Path, recipe: Recipe) -> bool:
    """Whether a finished run would be the same today, by comparing files only, without loading a model.

    Teacher or text that is no longer on this machine is not compared, and a message says so.
    """
    manifest = read_manifest(path)
    teacher, student = manifest.get("teacher", {}), manifest.get("student")
    unavailable = []
    if teacher.get("files"):
        folder = find_model_folder(recipe.teacher)
        if folder is None:
            unavailable.append(f"teacher '{recipe.teacher}'")
        elif fingerprint_model_files(folder) != teacher["files"]:
            return False
    for name, text in manifest.get("texts", {}).items():
        data = json.loads(name)
        for source, content in zip(data["sources"] or [data], text.get("contents", [])):
            try:
                if (
                    content is not None
                    and documents.fingerprint_source(source["source"].removeprefix(REPEATED_TEXT_PREFIX)) != content
                ):
                    return False
            except LimbeckError:
                unavailable.append(f"text '{source['source']}'")
    # runs of earlier versions do not have the groups, and none of those kept softmax by group
    groups = teacher.get("head_groups") or [0] * teacher.get("layers", 0)
    try:
        if student and student != json.loads(
            canonical_json(summarize_student_layers(find_chosen_heads(recipe.student, path), groups, recipe.longest))
        ):
            return False
    except LimbeckError as error:
        unavailable.append(f"student ({error.found})")
    if unavailable:
        console.print(f"Not available here, so not checked for changes: {', '.join(unavailable)}", markup=False)
    return True
