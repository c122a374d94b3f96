"""Write the results of a study: study.json for programs, tables and claims for people.

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
from limbeck.report.values import format_mean_std, get_window_name, get_window_tokens, mark_at_chance, values_to_csv
from limbeck.study import results as record
from limbeck.study.spec import Arm, Study
from limbeck.training.run_directory import collect_environment

ARM_KEYS = ("values", "errors", "teacher_at_chance", "seconds", "saved_seconds", "stages")  # of an arm in study.json


def write_study_results(
    study: Study, folder: Path, arms: list[Arm], failures: dict[str, str], claims: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write study.json, table.md, values.csv and claims.md; returns what study.json holds."""
    entries: list[dict[str, Any]] = []
    for arm in arms:
        result = record.read_arm_result(arm, study)
        status = "finished" if result else "failed" if arm.name in failures else "open"
        entries.append(
            {
                "name": arm.name,
                "axes": arm.axes,
                "status": status,
                "run": arm.path.name,
                "failure": failures.get(arm.name) if not result else None,
                **{key: (result or {}).get(key) for key in ARM_KEYS},
            }
        )
    teachers, versions = _collect_teacher_results(study, arms), _count_versions(arms, study)
    results = {
        "format": STUDY_FORMAT,
        "study": study.model_dump(mode="json", exclude_none=True),
        "environment": collect_environment(),
        "arms": entries,
        "teachers": {
            name: teacher and {key: teacher[key] for key in ("values", "errors")} for name, teacher in teachers.items()
        },
        "sharing": {
            "seconds": sum(entry["seconds"] or 0.0 for entry in entries),
            "saved_seconds": sum(entry["saved_seconds"] or 0.0 for entry in entries),
        },
        "claims": claims,
        "versions": versions,
    }
    finished = [entry for entry in entries if entry["status"] == "finished"]
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
    """Format a table for each measure: rows for arms, as mean ± standard deviation over seeds, windows and teacher."""
    varied = [
        axis
        for axis in _list_axes(finished)
        if axis != "seed" and len({_format_axis_value(arm, axis) for arm in finished}) > 1
    ]
    varied = varied or ["student"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for arm in finished:
        groups.setdefault(tuple(_format_axis_value(arm, axis) for axis in varied), []).append(arm)
    lines = [f"# {study.title}", ""]
    if versions and len(versions) > 1:
        counts = ", ".join(f"{name} ({count} arms)" for name, count in versions.items())
        lines += [f"Measured with several versions of Limbeck: {counts}.", ""]
    for measure in dict.fromkeys(["held_out", "exam", *study.measures]):
        names = [
            name
            for name in dict.fromkeys(name for arm in finished for name in arm["values"])
            if name.startswith(f"{measure}.") and not name.startswith(f"{measure}.window_")
        ]
        if measure == "held_out":
            names = [name for name in names if name.split(".")[1] in ("student_perplexity", "kl", "top1_agreement")]
        if measure == "exam" and measure not in study.measures:
            names = [name for name in names if name.startswith("exam.student_")]
        if not names:
            continue
        at_chance = {task for arm in finished for task in arm.get("teacher_at_chance") or ()}
        columns = [mark_at_chance(name.partition(".")[2].replace("_", " "), name, at_chance) for name in names]
        headings = [*varied, "seeds", *columns]
        rows = []
        for labels, members in groups.items():
            numbers = [[arm["values"][name] for arm in members if name in arm["values"]] for name in names]
            rows.append([*labels, str(len(members)), *map(format_mean_std, names, numbers)])
        by_name = [_collect_window_values(name, finished) for name in names]
        for tokens in sorted({tokens for windows in by_name for tokens in windows}):
            cells = [format_mean_std(name, windows.get(tokens, [])) for name, windows in zip(names, by_name)]
            rows.append([f"untrained window, {tokens:,} tokens", *[""] * len(varied), *cells])
        for teacher, teacher_result in (teachers or {}).items():
            if teacher_result and any(name in teacher_result["values"] for name in names):
                numbers = [
                    [teacher_result["values"][name]] if name in teacher_result["values"] else [] for name in names
                ]
                rows.append([f"teacher {teacher}", *[""] * len(varied), *map(format_mean_std, names, numbers)])
        table = format_markdown_table(headings, rows, num_text_columns=len(varied))
        lines += [f"## {measure.replace('_', ' ')}", "", table]
    return "\n".join(lines)


def _collect_window_values(name: str, finished: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Collect the untrained windows' numbers beside a value, by tokens of the window, each different number once."""
    found: dict[int, dict[float, None]] = {}
    for arm in finished:
        tokens = get_window_tokens(name, arm["values"])
        if tokens is not None:
            found.setdefault(tokens, {})[arm["values"][get_window_name(name)]] = None
    return {tokens: list(numbers) for tokens, numbers in found.items()}


def format_values_csv(finished: list[dict[str, Any]]) -> str:
    """Format a CSV line for each value: the arm, its axes, the value's name, the value, its standard error."""
    axes = _list_axes(finished)
    return values_to_csv(
        [
            (arm["name"], {axis: _format_axis_value(arm, axis) for axis in axes}, arm["values"], arm["errors"])
            for arm in finished
        ]
    )


def format_claims(claims: list[dict[str, Any]]) -> str:
    """Format each claim with its verdict, and its findings with effect, interval, p and seeds."""
    lines = ["# Claims", ""]
    for claim in claims:
        lines += [f"**{claim['verdict']}**: {claim['statement']} ({claim['source']}; `{claim['name']}`)", ""]
        for finding in claim["findings"]:
            lines.append(f"- {finding['says']}: {_format_finding(finding, claim['unit'])}")
        lines.append("")
    return "\n".join(lines)


def _format_finding(finding: dict[str, Any], unit: str) -> str:
    if finding["effect"] is None:
        return f"{finding['verdict']}, {finding['reason']}{_format_left_out(finding)}"
    numbers = f"{finding['effect']:+.4g} {unit}"
    if finding["low"] is not None:
        numbers += f", 95 % interval {finding['low']:+.4g} to {finding['high']:+.4g}, p = {finding['p']:.2g}"
    agreement = f"{100 * finding['consistent']:.0f} % of {finding['comparisons']} comparisons agree"
    numbers += f", {len(finding['by_seed'])} seeds, {agreement}"
    bound = "at least" if finding["kind"] == "more" else "less than"
    numbers += f"; {bound} {finding['margin']:g} was asked for"
    return (
        f"{finding['verdict']}, {numbers}"
        + (f" ({finding['reason']})" if finding["reason"] else "")
        + _format_left_out(finding)
    )


def _format_left_out(finding: dict[str, Any]) -> str:
    """Format the arms that count in no seed because some seed lacks them."""
    names = finding.get("left_out") or []
    if not names:
        return ""
    return f"; left out, as not every seed has it: {', '.join(names[:4])}" + (", ..." if len(names) > 4 else "")


def _collect_teacher_results(study: Study, arms: list[Arm]) -> dict[str, dict[str, Any] | None]:
    """Read the teachers' records by name; if arms read several texts, by name and text."""
    by_path = {record.get_teacher_result_path(arm): arm for arm in arms}
    names = {path: Path(arm.recipe.teacher).name for path, arm in by_path.items()}
    results: dict[str, dict[str, Any] | None] = {}
    for path, arm in by_path.items():
        name = names[path]
        if list(names.values()).count(name) > 1:
            others = [
                other_arm
                for other_path, other_arm in by_path.items()
                if names[other_path] == name and other_path != path
            ]
            # the axes by which this teacher or its text differs from the others of that name
            differing = [
                f"{axis} {value}"
                for axis, value in arm.axes.items()
                if all(other.axes.get(axis) != value for other in others)
            ]
            name = f"{name} ({', '.join(differing) or get_basename(arm.recipe.data.source)})"
        results[name if name not in results else f"{name} {path.stem[-10:]}"] = record.read_teacher_result(arm, study)
    return results


def _count_versions(arms: list[Arm], study: Study) -> dict[str, int]:
    """Count the finished arms that were measured with each version of Limbeck."""
    counts: dict[str, int] = {}
    for arm in arms:
        if result := record.read_arm_result(arm, study):
            name = result.get("limbeck", "an unknown version")
            counts[name] = counts.get(name, 0) + 1
    return counts


def _list_axes(arms: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(axis for arm in arms for axis in arm["axes"]))


def _format_axis_value(arm: dict[str, Any], axis: str) -> str:
    value = arm["axes"].get(axis)
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
