"""limbeck study: a grid of runs, its tables, and which claims hold."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError

MAX_ROWS = 40  # arms that are shown one by one


@app.command()
def study(
    study: Annotated[str | None, typer.Argument(help="A built-in study or a YAML file; --list names them.")] = None,
    size: Annotated[str | None, typer.Option(help="One of the study's sizes; its first by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Its folder; runs/<study>-<size> by default.")] = None,
    executor: Annotated[str, typer.Option(help="Where it runs: local, processes, ray or slurm.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Arms side by side; one for each GPU by default.")] = None,
    cpus: Annotated[int | None, typer.Option(help="ray, slurm: cores for each.")] = None,
    gpus: Annotated[float | None, typer.Option(help="ray, slurm: GPUs for each.")] = None,
    address: Annotated[str | None, typer.Option(help="ray: a cluster, 'auto' for this machine's.")] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: the partition.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm: the time limit of each task, e.g. 4:00:00.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="slurm: an option of sbatch: --sbatch=--account=x.")] = None,
    task: Annotated[int | None, typer.Option(help="Do this task of the array in the folder STUDY (slurm).")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and stop.")] = False,
    list_studies: Annotated[bool, typer.Option("--list", help="The built-in studies, and stop.")] = False,
) -> None:
    """Run a grid of arms on one teacher or several. The same command resumes, and runs arms that were added."""
    if list_studies:
        output.print(_listing())
        return
    from limbeck.study import Study, list_builtin_studies, run_study

    if study is None:
        raise LimbeckError("no study named", expected=f"a YAML file, or one of: {', '.join(list_builtin_studies())}")
    if task is not None:
        _do_task(Path(study), task)
        return
    chosen = Study.load(study, size)
    from limbeck.study.executors import create_executor

    place = create_executor(
        executor,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        address=address,
        partition=partition,
        time=time,
        sbatch=sbatch or None,
    )
    if plan:
        from limbeck.core.cache import cache_dry_run
        from limbeck.study.plan import plan_study
        from limbeck.study.runner import check_study
        from limbeck.study.tasks import TaskRunner

        folder = Path(out or f"runs/{chosen.title}")
        side_by_side = max(place.workers, 1) if place else 1
        with cache_dry_run() as told:
            try:
                arms = check_study(chosen, folder)
            except LimbeckError as error:
                arms = chosen.arms(folder)
                told.append(f"without --plan this is refused: {' '.join(error.found.split())}")
            print_study_plan(plan_study(chosen, arms, TaskRunner(), side_by_side, place.threads if place else None))
        for sentence in dict.fromkeys(told):
            console.print(sentence)
        return
    results = run_study(chosen, out, confirm=print_study_plan, executor=place)
    from rich.markdown import Markdown

    from limbeck.study.tables import format_claims

    folder = Path(out or f"runs/{chosen.title}")
    output.print(Markdown((folder / "table.md").read_text(encoding="utf-8")))
    if results["claims"]:
        output.print(Markdown(format_claims(results["claims"])))
    sharing = results["sharing"]
    console.print(
        f"trained for {sharing['seconds'] / 60:.1f} min; sharing the teacher's passes "
        f"saved {sharing['saved_seconds'] / 60:.1f} min of {(sharing['seconds'] + sharing['saved_seconds']) / 60:.1f}"
    )
    console.print(f"written to {folder}/: study.json, table.md, values.csv, claims.md", style="dim")
    _report(folder)
    failed = [one["name"] for one in results["arms"] if one["status"] == "failed"]
    if failed:
        raise LimbeckError(
            f"{len(failed)} of {len(results['arms'])} arms failed: {', '.join(failed[:5])}",
            hint=f"see {folder}/failures.json; the same command tries them again",
        )


def _do_task(folder: Path, number: int) -> None:
    """An array task of Slurm: its failures are told, and make the exit code 1."""
    from limbeck.study.executors.slurm import run_array_task

    failures = run_array_task(folder, number)
    for name, text in failures.items():
        console.print(f"arm {name} failed: {text}")
    if failures:
        raise typer.Exit(1)


def _report(folder: Path) -> None:
    """Write the page about the study, where what it takes is installed."""
    from limbeck.report.page import write_report

    try:
        console.print(f"report: {write_report([folder])[0]}", style="dim")
    except LimbeckError as error:
        console.print(f"no report: {error.found}" + (f"; {error.hint}" if error.hint else ""))


def print_study_plan(plan: Any) -> None:
    """Print what the study will cost."""
    left = [arm for arm in plan.arms if arm.state != "finished"]
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False)
    for column in ("arm", "", "tokens", "time", "saved by sharing"):
        table.add_column(column, justify="right" if column in ("tokens", "time", "saved by sharing") else "left")
    for arm in left[:MAX_ROWS]:
        times = (f"{(arm.seconds - arm.saved_seconds) / 60:.1f} min", f"{arm.saved_seconds / 60:.1f} min")
        table.add_row(arm.name, arm.error or arm.state, f"{arm.tokens:,}", *times)
    if len(left) > MAX_ROWS:
        table.add_row(f"and {len(left) - MAX_ROWS} more")
    if left:
        console.print(table)
    console.print(
        f"{len(plan.arms)} arms, {len(plan.arms) - len(left)} of them finished; {plan.tokens:,} tokens, about "
        f"{plan.seconds / 60:.0f} min of training ({plan.saved_seconds / 60:.0f} min saved by sharing), "
        f"{plan.disk_bytes / 1e9:.2f} GB of disk"
        + (f"; {plan.wall_seconds / 60:.0f} min with {plan.workers} workers" if plan.workers > 1 else "")
    )


def _listing() -> Table:
    from limbeck.core.config import read_yaml
    from limbeck.core.recipe import BUILT_IN

    table = Table(box=None, pad_edge=False)
    for column in ("study", "sizes", "what it asks"):
        table.add_column(column, overflow="fold")
    for path in sorted(BUILT_IN.with_name("studies").glob("*.yaml")):
        raw = read_yaml(path, "study", "a mapping")
        table.add_row(path.stem, ", ".join(raw["sizes"]), raw["description"])
    return table
