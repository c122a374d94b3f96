"""limbeck eval: evaluate students, hybrids and teachers side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.catalog import read_catalog
from limbeck.cli.completion import complete_measures
from limbeck.cli.options import (
    DATA_HELP,
    ComparisonFolder,
    IgnoreCache,
    Json,
    Models,
    Quiet,
    RunTeacher,
    Seed,
    count_option,
    split_assignments,
)
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import find_missing
from limbeck.core.storage import check_writable, find_write_error


@verb(
    "limbeck eval runs/gla runs/mlstm --measure agreement,recall --out comparison",
    "limbeck eval runs/gla --tasks arc_easy,piqa --set tasks.limit=200",
    "limbeck eval --from runs --from comparison --json",
)
def eval(
    models: Models = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Measures, joined by commas, or 'all'; --list shows them.",
            show_default="agreement",
            autocompletion=complete_measures,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks of lm-evaluation-harness by name, or 'paper'; adds the measure tasks."),
    ] = None,
    teacher: RunTeacher = None,
    data: Annotated[
        str | None, typer.Option(help=DATA_HELP, show_default="the held-out part of the run's text")
    ] = None,
    tokens: Annotated[int | None, count_option("Tokens to evaluate on, for measures that count them.")] = None,
    seq_len: Annotated[
        int | None, count_option("The length of a sequence in tokens.", show_default="the run's")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of a measure, e.g. agreement.tokens=4096."),
    ] = None,
    out: ComparisonFolder = None,
    control: Annotated[
        bool,
        typer.Option("--control", help="Measure the control arm too: the teacher through the mixer softmax."),
    ] = False,
    no_window: Annotated[
        bool,
        typer.Option("--no-window", help="Leave out the untrained sliding windows of the students' memory."),
    ] = False,
    seed: Seed = 0,
    again: IgnoreCache = False,
    stored: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Build the table from existing result folders without loading models; can be repeated.",
        ),
    ] = None,
    list_measures: Annotated[
        bool, typer.Option("--list", help="List available evaluations and their settings, then exit.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure students beside their teachers: text, recall, tasks.

    A student is compared with its teacher on text that it was not trained on.
    """
    if list_measures:
        _list_measures(as_json)
        return
    models = models or []
    if stored and models:
        raise LimbeckError("models and --from together", expected="models to evaluate, or folders to read")
    if not stored and not models:
        raise LimbeckError(
            "no model to evaluate", expected="a run directory, a folder or a name", hint="limbeck eval --list"
        )
    # late, for a fast --help
    from limbeck.evaluation import measure as measures
    from limbeck.report import comparison

    if stored:
        _show(comparison.load_measurements(stored), out, as_json)
        return
    names = [name.strip() for name in measure.split(",")] if measure else []
    if measure == "all":
        names = _list_possible_measures()
    if tasks is not None and "tasks" not in names:
        names.append("tasks")
    chosen = [measures.get_measure(name) for name in names or ["agreement"]]
    settings = _parse_measure_settings(set or [], [one.name for one in chosen])
    if tasks is not None:
        settings["tasks"]["names"] = [name.strip() for name in tasks.split(",")]
    measures.complete_settings(chosen, settings, tokens, seq_len)
    if out is not None:
        check_writable(out)
    # late, after the options are checked: it loads the evaluations of every measure
    from limbeck.core.screen import watch
    from limbeck.evaluation import baselines
    from limbeck.evaluation.subject import SubjectLoader

    subjects = SubjectLoader(teacher, data, seed, out)
    with watch(measures.make_view(chosen, models)):
        measurements = baselines.run_measures(
            map(subjects.load, models), chosen, settings, ignore_cache=again, window=not no_window, control=control
        )
    _show(measurements, out, as_json)
    folders = dict.fromkeys(subjects.output_dirs[name] for name in models)
    saved = [str(folder) for folder in folders if not find_write_error(folder)]
    if saved and not out:
        console.print(f"saved in {', '.join(saved)}", style="dim")


def _list_measures(as_json: bool) -> None:
    """Print what can be measured, with every setting and its default."""
    measures = read_catalog()["measures"]
    if as_json:
        print_json({"measures": measures})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("measure", "what", "settings"):
        table.add_column(column, overflow="fold")
    for name, one in measures.items():
        settings = ", ".join(f"{key}={value}" for key, value in one["settings"].items())
        table.add_row(name, one["description"], settings)
    output.print(table)


def _list_possible_measures() -> list[str]:
    """List the measures but those whose extra is not installed; these are named."""
    # late, for a fast --help
    from limbeck.evaluation.measure import MEASURE_MODULES

    missing = {"tasks": find_missing("lm_eval")}
    for name, extra in missing.items():
        if extra:
            console.print(f"left out: {name}, which needs the extra {extra.name}: {extra.command}")
    return [name for name in MEASURE_MODULES if not missing.get(name)]


def _show(measurements: list[Any], out: Path | None, as_json: bool) -> None:
    """Print measurements side by side, and write them to a folder if there is one."""
    # late, for a fast --help
    from limbeck.report import comparison

    if as_json:
        print_json({"measurements": measurements})
    else:
        output.print(comparison.build_comparison_table(measurements))
    for path in comparison.write_comparison(measurements, out) if out else []:
        console.print(f"written: {path}", style="dim")


def _parse_measure_settings(texts: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Parse "measure.key=value" into settings by measure."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in split_assignments(texts, "agreement.tokens=4096").items():
        name, dot, setting = key.partition(".")
        if not dot or name not in settings:
            raise LimbeckError(
                f"--set {key}", expected="measure.setting=value of a selected measure", hint="limbeck eval --list"
            )
        settings[name][setting] = parse_count(value) if setting in ("tokens", "length") else value
    return settings
