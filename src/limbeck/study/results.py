"""The record of a finished arm: its numbers in one file, whether or not its weights are deleted later.

    record = write_arm_result(arm, study, summary, measurements)          # <arm>/result.json
    read_arm_result(arm)["values"]["agreement.perplexity"]

`values` are flat, under the names of `limbeck.report.values`.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from limbeck.core.old_keys import to_old_keys
from limbeck.core.storage import atomic_write_text
from limbeck.core.version import __version__
from limbeck.evaluation.measure import Measurement, get_measure, parse_settings
from limbeck.models.fingerprint import find_model_folder, fingerprint_checkpoint_with_tokenizer
from limbeck.report.values import flatten_values
from limbeck.study.spec import Arm, Study

RESULT_FILE = "result.json"


def resolve_measure_settings(study: Study) -> dict[str, Any]:
    """Return the study's measures with all of their settings, defaults included."""
    return {
        name: parse_settings(get_measure(name), settings).model_dump(mode="json")
        for name, settings in study.measures.items()
    }


def read_arm_result(arm: Arm, study: Study | None = None) -> dict[str, Any] | None:
    """Read the record of an arm; with a study, None unless it has all of its measures and its evaluation."""
    record = _read_record(arm.path / RESULT_FILE, study)
    return None if record is not None and study is not None and _compare_evaluation(arm, record) else record


def find_stale_evaluation(arm: Arm) -> dict[str, Any] | None:
    """Get the evaluation settings of a finished arm if its recipe has others now and its stages were deleted.

    With its stages still on disk the arm is evaluated again; without them its numbers and those of other arms would
    go into one mean although they are of different texts or sizes.
    """
    record = read_arm_result(arm)
    if record is None or (arm.path / "stages").is_dir():
        return None
    return _compare_evaluation(arm, record)


def _compare_evaluation(arm: Arm, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the evaluation settings of a record if the arm's recipe has others now."""
    evaluation = record.get("evaluation")
    if evaluation is None:  # not in every record; the run's own summary has it then
        try:
            evaluation = json.loads((arm.path / "eval.json").read_text(encoding="utf-8"))["evaluation"]
        except (OSError, ValueError, KeyError):
            return None
    return None if arm.recipe.evaluation.matches(evaluation) else evaluation


def get_arm_state(arm: Arm, study: Study) -> str:
    """Get the state of an arm.

    Returns:
        "finished"; "measure" if its student is there but not all of the study's measures; else "train", which
        resumes the run where it stands: a run that only lacks its evaluation trains nothing.
    """
    if read_arm_result(arm, study) is not None:
        return "finished"
    if (record := read_arm_result(arm)) is not None and _compare_evaluation(arm, record):
        return "train"
    return (
        "measure" if read_arm_result(arm) is not None and (arm.path / "student" / "config.json").exists() else "train"
    )


def write_arm_result(
    arm: Arm, study: Study, summary: dict[str, Any], measurements: list[Measurement]
) -> dict[str, Any]:
    """Write the record of a finished arm and return it."""
    values, errors = flatten_values(summary, measurements, arm.path / "metrics.jsonl")
    record = {
        "format": 1,
        "name": arm.name,
        "axes": arm.axes,
        "limbeck": __version__,
        "mixer": arm.recipe.student.mixer,
        "measures": resolve_measure_settings(study),
        "evaluation": arm.recipe.evaluation.model_dump(mode="json"),
        "values": values,
        "errors": errors,
        "teacher_at_chance": [
            f"{one.measure}.{task}" for one in measurements for task in one.details.get("teacher_at_chance", [])
        ],
        "seconds": sum(stage["seconds"] for stage in summary["stages"]),
        "saved_seconds": sum(stage.get("saved_seconds", 0.0) for stage in summary["stages"]),
        "stages": summary["stages"],
    }
    write_atomically(arm.path / RESULT_FILE, json.dumps(record, indent=1) + "\n")
    return record


def read_teacher_result(arm: Arm, study: Study) -> dict[str, Any] | None:
    """Read the record of an arm's teacher; None unless it has all of the study's measures."""
    record = _read_record(get_teacher_result_path(arm), study)
    folder = find_model_folder(arm.recipe.teacher)
    if record is None or folder is None or "weights" not in record or not study.measures:
        return record
    return record if record["weights"] == fingerprint_checkpoint_with_tokenizer(folder) else None


def write_teacher_result(arm: Arm, study: Study, measurements: list[Measurement]) -> None:
    """Write the measurements of an arm's teacher."""
    values, errors = flatten_values({}, measurements, None)
    record = {
        "format": 1,
        "name": arm.recipe.teacher,
        "measures": resolve_measure_settings(study),
        "values": values,
        "errors": errors,
    }
    if measurements:
        record["weights"] = measurements[0].provenance.weights
    write_atomically(get_teacher_result_path(arm), json.dumps(record, indent=1) + "\n")


def get_teacher_result_path(arm: Arm) -> Path:
    """Get the file for the teacher of an arm, measured on the arm's text, in the study's folder."""
    recipe = arm.recipe
    data = to_old_keys({"data": recipe.data.model_dump(mode="json", exclude={"cache_gb"})})["data"]
    identity = json.dumps([recipe.teacher, recipe.teacher_bits, data])
    # two names that become the same file name stay apart by it
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return arm.path.parent / "teachers" / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', recipe.teacher)}-{digest}.json"


def _read_record(path: Path, study: Study | None) -> dict[str, Any] | None:
    """Read a record; None if it is unreadable or, with a study, lacks some of its measures."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if study is not None and any(
        record["measures"].get(name) != settings for name, settings in resolve_measure_settings(study).items()
    ):
        return None
    return record


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    atomic_write_text(path, text)


def delete_artifacts(arm: Arm, save_artifacts: str) -> None:
    """Delete files of a finished arm: "none" keeps numbers and logs, "students" the student too, "all" everything."""
    if save_artifacts == "all":
        return
    shutil.rmtree(arm.path / "stages", ignore_errors=True)
    if save_artifacts == "none":
        shutil.rmtree(arm.path / "student", ignore_errors=True)
