"""limbeck study: run a grid of experiments, write its tables, and test claims."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.completion import complete_choices, complete_studies
from limbeck.cli.options import STUDIES_FOLDER, Json, Plan, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, format_bytes, format_duration, output
from limbeck.core.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.study import Study
    from limbeck.study.plan import StudyPlan
    from limbeck.study.tasks import Executor

MAX_PLAN_ROWS = 40  # runs that are listed one by one


@verb(
    "limbeck study --list",
    "limbeck study paper-experiment-1 --size laptop --plan",
    "limbeck study mine.yaml --executor slurm --partition gpu --gpus 1 --time 4:00:00",
)
def study(
    study: Annotated[
        str | None,
        typer.Argument(help="A built-in study or a YAML file; --list shows them.", autocompletion=complete_studies),
    ] = None,
    size: Annotated[str | None, typer.Option(help="One of the study's sizes.", show_default="its first")] = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder.", show_default="runs/<study>-<size>")] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="Where the runs execute: local, processes, ray or slurm.",
            autocompletion=complete_choices(("local", "processes", "ray", "slurm")),
        ),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs side by side.", show_default="one for each GPU, two on a CPU")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="ray, slurm: CPU cores for each run.")] = None,
    gpus: Annotated[float | None, typer.Option(help="ray, slurm: GPUs for each run.")] = None,
    address: Annotated[
        str | None, typer.Option(help="ray: the address of a cluster; 'auto' for the one this machine belongs to.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: the partition.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm: the time limit of each task, e.g. 4:00:00.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="slurm: any option of sbatch, e.g. --sbatch=--account=x; can be repeated."),
    ] = None,
    task: Annotated[
        int | None, typer.Option(help="Run one Slurm array task of the study in STUDY (internal).", hidden=True)
    ] = None,
    plan: Plan = False,
    list_studies: Annotated[bool, typer.Option("--list", help="List the built-in studies, then exit.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of distillations, and test claims about it.

    With one teacher or several. The same command resumes, and adds runs that are new in the grid.
    """
    if list_studies:
        _list_studies(as_json)
        return
    # late, for a fast --help
    from limbeck.study import Study, list_builtin_studies
    from limbeck.study.executors import create_executor

    if study is None:
        raise LimbeckError("no study given", expected=f"a YAML file, or one of: {', '.join(list_builtin_studies())}")
    if task is not None:
        _run_array_task(Path(study), task)
        return
    chosen = Study.load(study, size)
    options: dict[str, Any] = {"workers": workers, "cpus": cpus, "gpus": gpus, "address": address}
    options |= {"partition": partition, "time": time, "sbatch": sbatch or None}
    executor_or_none = create_executor(executor, **options)
    folder = Path(out or f"runs/{chosen.title}")
    if plan:
        _print_plan_only(chosen, folder, executor_or_none, as_json)
    else:
        _run(chosen, folder, executor_or_none, as_json)


def _print_plan_only(study: "Study", folder: Path, executor: "Executor | None", as_json: bool) -> None:
    """Print what is left of a study and what it would prepare first; nothing is written."""
    # late, for a fast --help
    from limbeck.core.cache import cache_dry_run
    from limbeck.study.plan import plan_study
    from limbeck.study.runner import check_study
    from limbeck.study.tasks import TaskRunner

    workers = max(executor.workers, 1) if executor else 1
    with cache_dry_run() as notes:
        try:
            arms = check_study(study, folder)
        except LimbeckError as error:
            arms = study.arms(folder)
            notes.append(f"without --plan this would be refused: {' '.join(error.found.split())}")
        plan = plan_study(study, arms, TaskRunner(), workers, executor.threads if executor else None)
        if as_json:
            runs = [
                {"name": one.name, "state": one.state, "error": one.error, "tokens": one.tokens, "seconds": one.seconds}
                for one in plan.arms
            ]
            print_json({"plan": plan.to_dict(), "runs": runs, "notes": list(dict.fromkeys(notes))})
        else:
            print_study_plan(plan, output)
    for note in dict.fromkeys(notes):
        console.print(note)


def _run(study: "Study", folder: Path, executor: "Executor | None", as_json: bool) -> None:
    """Run what is left of a study, and print its table, its claims and where everything was written."""
    # late, for a fast --help
    from rich.markdown import Markdown

    from limbeck.study import run_study
    from limbeck.study.tables import format_claims

    results = run_study(study, folder, confirm=print_study_plan, executor=executor)
    if as_json:
        print_json(results)
    else:
        output.print(Markdown((folder / "table.md").read_text(encoding="utf-8")))
    if results["claims"] and not as_json:
        output.print(Markdown(format_claims(results["claims"])))
    seconds, saved_seconds = results["sharing"]["seconds"], results["sharing"]["saved_seconds"]
    console.print(
        f"Training took {seconds / 60:.1f} min; sharing teacher passes saved {saved_seconds / 60:.1f} of "
        f"{(seconds + saved_seconds) / 60:.1f} min."
    )
    console.print(f"written to {folder}/: study.json, table.md, values.csv, claims.md", style="dim")
    _write_report(folder)
    failed = [arm["name"] for arm in results["arms"] if arm["status"] == "failed"]
    if failed:
        raise LimbeckError(
            f"{len(failed)} of {len(results['arms'])} runs failed: {', '.join(failed[:5])}",
            hint=f"see {folder}/failures.json; the same command tries them again",
        )


def _run_array_task(folder: Path, number: int) -> None:
    """Run one array task of Slurm; its failures are printed and make the exit code 1."""
    # late, for a fast --help
    from limbeck.study.executors.slurm import run_array_task

    failures = run_array_task(folder, number)
    for name, text in failures.items():
        console.print(f"run {name} failed: {text}")
    if failures:
        raise typer.Exit(1)


def _write_report(folder: Path) -> None:
    """Write the page about the study if the libraries of the extra `report` are installed."""
    # late, for a fast --help
    from limbeck.report.page import write_report

    try:
        console.print(f"report: {write_report([folder])[0]}", style="dim")
    except LimbeckError as error:
        console.print(f"no report written: {error.found}" + (f"; {error.hint}" if error.hint else ""))


def print_study_plan(plan: "StudyPlan", to: Any = console) -> None:
    """Print what is left of a study: tokens, time, what sharing saves, disk.

    Args:
        to: a console: standard output if the plan is all that is asked for.
    """
    left = [arm for arm in plan.arms if arm.state != "finished"]
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False)
    for column in ("run", "", "tokens", "time", "saved by sharing"):
        table.add_column(column, justify="right" if column in ("tokens", "time", "saved by sharing") else "left")
    for arm in left[:MAX_PLAN_ROWS]:
        times = format_duration(arm.seconds - arm.saved_seconds), format_duration(arm.saved_seconds)
        table.add_row(arm.name, arm.error or arm.state, f"{arm.tokens:,}", *times)
    if len(left) > MAX_PLAN_ROWS:
        table.add_row(f"and {len(left) - MAX_PLAN_ROWS} more")
    if left:
        to.print(table)
    to.print(
        f"{len(plan.arms)} runs, {len(plan.arms) - len(left)} of them finished; {plan.tokens:,} tokens, about "
        f"{format_duration(plan.seconds)} of training ({format_duration(plan.saved_seconds)} saved by sharing), "
        f"{format_bytes(plan.disk_bytes)} of disk"
        + (f"; {format_duration(plan.wall_seconds)} with {plan.workers} workers" if plan.workers > 1 else "")
    )


def _list_studies(as_json: bool) -> None:
    """Print the built-in studies from their files, without importing torch."""
    # late, for a fast --help
    from limbeck.core.config import read_yaml

    studies = {path.stem: read_yaml(path, "study", "a mapping") for path in sorted(STUDIES_FOLDER.glob("*.yaml"))}
    if as_json:
        print_json(
            {
                "studies": {
                    name: {"sizes": list(raw["sizes"]), "description": raw["description"]}
                    for name, raw in studies.items()
                }
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("study", "sizes", "question"):
        table.add_column(column, overflow="fold")
    for name, raw in studies.items():
        table.add_row(name, ", ".join(raw["sizes"]), raw["description"])
    output.print(table)
