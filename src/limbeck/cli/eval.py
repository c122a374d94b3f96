"""limbeck eval: measures of students, hybrids and teachers, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import check_writable, find_write_error


@app.command()
def eval(
    models: Annotated[list[str] | None, typer.Argument(help="Runs, models' folders, hub names, 'embedded'.")] = None,
    measure: Annotated[
        str | None, typer.Option(help="Which, joined by commas, or 'all'; --list tells. By default agreement.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks of lm-evaluation-harness by name, or 'paper'; the measure tasks.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher; by default the one of the run.")] = None,
    data: Annotated[str | None, typer.Option(help="Text; by default the held-out part of the run's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens, where a measure counts them.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a sequence; by default the run's.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="A measure's setting, e.g. agreement.tokens=4096.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep all results, a table and figures in this folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    again: Annotated[bool, typer.Option("--again", help="Measure again what has been measured.")] = False,
    stored: Annotated[
        list[Path] | None,
        typer.Option("--from", help="A table of what was measured before, from such folders; no model is loaded."),
    ] = None,
    list_measures: Annotated[bool, typer.Option("--list", help="The measures and their settings, and stop.")] = False,
) -> None:
    """Measure models; a student beside its teacher on text that it was not trained on."""
    from limbeck.evaluation import measure as measures
    from limbeck.report import comparison

    if list_measures:
        output.print(comparison.build_measure_table([measures.get_measure(name) for name in measures.MEASURE_MODULES]))
        return
    if stored:
        if models:
            raise LimbeckError("models and --from together", expected="models to measure, or folders to read")
        _show(comparison.load_measurements(stored), out)
        return
    if not models:
        raise LimbeckError(
            "no model to measure", expected="a run directory, a folder or a name", hint="limbeck eval --list"
        )
    names = (
        list(measures.MEASURE_MODULES)
        if measure == "all"
        else [one.strip() for one in measure.split(",")]
        if measure
        else []
    )
    if tasks is not None and "tasks" not in names:
        names.append("tasks")
    chosen = [measures.get_measure(name) for name in names or ["agreement"]]
    given = _parse_measure_settings(set or [], [one.name for one in chosen])
    if tasks is not None:
        given["tasks"]["names"] = [one.strip() for one in tasks.split(",")]
    for one in chosen:
        for key, value in (("tokens", tokens), ("length", length)):
            if value is not None and key in one.settings.model_fields:
                given[one.name].setdefault(key, value)
        settings = measures.parse_settings(one, given[one.name])
        if one.check_settings is not None:
            one.check_settings(settings)
    if out is not None:
        check_writable(out)
    from limbeck.evaluation.subject import SubjectLoader

    subjects = SubjectLoader(teacher, data, seed, out)
    found = []
    for name in models:
        subject = subjects.load(name)
        found += [measures.run_measure(one, subject, given[one.name], again) for one in chosen]
    _show(found, out)
    kept = dict.fromkeys(
        str(output_dir)
        for output_dir in map(subjects.output_dirs.__getitem__, models)
        if not find_write_error(output_dir)
    )
    if kept and not out:
        console.print(f"kept in {', '.join(kept)}", style="dim")


def _show(found: list[Any], out: Path | None) -> None:
    from limbeck.report import comparison

    output.print(comparison.build_comparison_table(found))
    for path in comparison.write_comparison(found, out) if out else []:
        console.print(f"written: {path}", style="dim")


def _parse_measure_settings(texts: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Settings by measure from "measure.key=value"."""
    from limbeck.core.config import parse_value

    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, setting = key.partition(".")
        if not equals or not dot or name not in given:
            raise LimbeckError(
                f"--set {text}", expected="measure.setting=value of a measure that is taken", hint="limbeck eval --list"
            )
        given[name][setting] = parse_value(value)
    return given
