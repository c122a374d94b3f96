"""What a study found, on disk: study.json for programs, tables and claims for people.

    results = write_study_results(study, folder, arms, failures, claims)
    print(format_claims(results["claims"]))

The tables hold no times, so that a study that was killed and resumed leaves the same ones.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.report.collection import STUDY_FORMAT
from limbeck.report.privacy import get_basename
from limbeck.report.text_tables import format_markdown_table
from limbeck.report.values import format_mean_std, values_to_csv
from limbeck.study import results as record
from limbeck.study.spec import Arm, Study
from limbeck.training.run_directory import collect_environment


def write_study_results(
    study: Study, folder: Path, arms: list[Arm], failures: dict[str, str], claims: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write study.json, table.md, values.csv and claims.md; returns what study.json holds."""
    facts: list[dict[str, Any]] = []
    for arm in arms:
        known = record.read_arm_result(arm, study)
        status = "finished" if known else "failed" if arm.name in failures else "open"
        facts.append(
            {
                "name": arm.name,
                "axes": arm.axes,
                "status": status,
                "run": arm.path.name,
                "failure": failures.get(arm.name) if not known else None,
                **{key: (known or {}).get(key) for key in ("values", "errors", "seconds", "saved_seconds", "stages")},
            }
        )
    teachers, versions = _teachers(study, arms), _versions(arms, study)
    results = {
        "format": STUDY_FORMAT,
        "study": study.model_dump(mode="json", exclude_none=True),
        "environment": collect_environment(),
        "arms": facts,
        "teachers": {name: one and {key: one[key] for key in ("values", "errors")} for name, one in teachers.items()},
        "sharing": {
            "seconds": sum(one["seconds"] or 0.0 for one in facts),
            "saved_seconds": sum(one["saved_seconds"] or 0.0 for one in facts),
        },
        "claims": claims,
        "versions": versions,
    }
    finished = [one for one in facts if one["status"] == "finished"]
    record.write_atomically(folder / "study.json", json.dumps(results, indent=1) + "\n")
    record.write_atomically(folder / "table.md", format_results_table(study, finished, teachers, versions))
    record.write_atomically(folder / "values.csv", format_values_csv(finished))
    if claims:
        record.write_atomically(folder / "claims.md", format_claims(claims))
    return results


def format_results_table(
    study: Study,
    finished: list[dict[str, Any]],
    teachers: dict[str, dict[str, Any] | None] | None = None,
    versions: dict[str, int] | None = None,
) -> str:
    """A row for each arm, seeds together as mean ± standard deviation, and the teachers; a table for each measure."""
    varied = [axis for axis in _axes(finished) if axis != "seed" and len({_shown(one, axis) for one in finished}) > 1]
    varied = varied or ["student"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in finished:
        groups.setdefault(tuple(_shown(one, axis) for axis in varied), []).append(one)
    lines = [f"# {study.title}", ""]
    if versions and len(versions) > 1:
        told = ", ".join(f"{name} ({count} arms)" for name, count in versions.items())
        lines += [f"Measured with several versions of Limbeck: {told}.", ""]
    for measure in ["held_out", *study.measures]:
        names = list(dict.fromkeys(n for one in finished for n in one["values"] if n.partition(".")[0] == measure))
        if measure == "held_out":
            names = [name for name in names if name.split(".")[1] in ("student_perplexity", "kl", "top1_agreement")]
        if not names:
            continue
        heads = [*varied, "seeds", *(name.partition(".")[2].replace("_", " ") for name in names)]
        rows = []
        for places, members in groups.items():
            numbers = [[one["values"][name] for one in members if name in one["values"]] for name in names]
            rows.append([*places, str(len(members)), *map(format_mean_std, names, numbers)])
        for teacher, known in (teachers or {}).items():
            if known and any(name in known["values"] for name in names):
                numbers = [[known["values"][name]] if name in known["values"] else [] for name in names]
                rows.append([f"teacher {teacher}", *[""] * len(varied), *map(format_mean_std, names, numbers)])
        table = format_markdown_table(heads, rows, num_text_columns=len(varied))
        lines += [f"## {measure.replace('_', ' ')}", "", table]
    return "\n".join(lines)


def format_values_csv(finished: list[dict[str, Any]]) -> str:
    """One line a number: the arm, its axes, the value's name, the value, its standard error."""
    axes = _axes(finished)
    return values_to_csv(
        [(one["name"], {axis: _shown(one, axis) for axis in axes}, one["values"], one["errors"]) for one in finished]
    )


def format_claims(claims: list[dict[str, Any]]) -> str:
    """Each claim with its verdict, and its parts with effect, interval, p and seeds."""
    lines = ["# Claims", ""]
    for one in claims:
        lines += [f"**{one['verdict']}**: {one['statement']} ({one['source']}; `{one['name']}`)", ""]
        for part in one["findings"]:
            lines.append(f"- {part['says']}: {_finding(part, one['unit'])}")
        lines.append("")
    return "\n".join(lines)


def _finding(part: dict[str, Any], unit: str) -> str:
    if part["effect"] is None:
        return f"{part['verdict']}, {part['reason']}{_left_out(part)}"
    numbers = f"{part['effect']:+.4g} {unit}"
    if part["low"] is not None:
        numbers += f", 95 % interval {part['low']:+.4g} to {part['high']:+.4g}, p = {part['p']:.2g}"
    numbers += (
        f", {len(part['by_seed'])} seeds, {100 * part['consistent']:.0f} % of {part['comparisons']} comparisons agree"
    )
    bound = "at least" if part["kind"] == "more" else "less than"
    numbers += f"; {bound} {part['margin']:g} was asked for"
    return f"{part['verdict']}, {numbers}" + (f" ({part['reason']})" if part["reason"] else "") + _left_out(part)


def _left_out(part: dict[str, Any]) -> str:
    """Name what counts in no seed because some seed lacks it."""
    names = part.get("left_out") or []
    if not names:
        return ""
    return f"; left out, as not every seed has it: {', '.join(names[:4])}" + (", ..." if len(names) > 4 else "")


def _teachers(study: Study, arms: list[Arm]) -> dict[str, dict[str, Any] | None]:
    """The teachers' records by name; where arms read several texts, by name and text."""
    by_path = {record.get_teacher_result_path(arm): arm for arm in arms}
    names = {path: Path(arm.recipe.teacher).name for path, arm in by_path.items()}
    found: dict[str, dict[str, Any] | None] = {}
    for path, arm in by_path.items():
        name = names[path]
        if list(names.values()).count(name) > 1:
            others = [one for other, one in by_path.items() if names[other] == name and other != path]
            # the axes of the grid that tell this text or folder from the others'
            told = [f"{a} {v}" for a, v in arm.axes.items() if all(one.axes.get(a) != v for one in others)]
            name = f"{name} ({', '.join(told) or get_basename(arm.recipe.data.source)})"
        found[name if name not in found else f"{name} {path.stem[-10:]}"] = record.read_teacher_result(arm, study)
    return found


def _versions(arms: list[Arm], study: Study) -> dict[str, int]:
    """How many finished arms were measured with which version of Limbeck."""
    found: dict[str, int] = {}
    for arm in arms:
        if known := record.read_arm_result(arm, study):
            name = known.get("limbeck", "an unknown version")
            found[name] = found.get(name, 0) + 1
    return found


def _axes(arms: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(axis for one in arms for axis in one["axes"]))


def _shown(arm: dict[str, Any], axis: str) -> str:
    value = arm["axes"].get(axis)
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
