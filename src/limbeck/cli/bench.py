"""limbeck bench: speed and memory of students beside their teacher, all in turns in one run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import check_writable

INT8_MODES = ("weights", "dynamic", "none")


@app.command()
def bench(
    models: Annotated[list[str] | None, typer.Argument(help="Runs, models' folders, hub names, 'embedded'.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The softmax model to race against; by default the runs' own; 'none' for none.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of context, joined by commas.")] = "1024,4096",
    batch: Annotated[str, typer.Option(help="Sequences at once, joined by commas.")] = "1",
    steps: Annotated[int, typer.Option(help="Tokens that are timed at each length.")] = 16,
    rounds: Annotated[int, typer.Option(help="Prompts that are timed at each length.")] = 3,
    prefill: Annotated[int, typer.Option(help="The longest prompt that is timed; 0 for none.")] = 8192,
    int8: Annotated[
        str, typer.Option(help="The teacher in int8 too, on a CPU: weights, dynamic (activations too) or none.")
    ] = "dynamic",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default torch's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep all results, a table and figures in this folder.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="What it takes in time and memory, and stop.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what has been measured.")] = False,
) -> None:
    """Race models: prompts, the next token, caches and memory, over lengths and batch sizes."""
    if not models:
        raise LimbeckError("no model to race", expected="a run directory, a folder or a name")
    if int8 not in INT8_MODES:
        raise LimbeckError(f"--int8 {int8}", expected=", ".join(INT8_MODES))
    from limbeck.evaluation.measure import get_measure, parse_settings

    given: dict[str, Any] = {"lengths": _numbers("lengths", lengths), "batches": _numbers("batch", batch)}
    settings: Any = parse_settings(get_measure("speed"), given | {"steps": steps, "rounds": rounds, "prefill": prefill})
    if threads is not None and threads < 1:
        raise LimbeckError(f"--threads {threads}", expected="a positive number")
    import torch

    from limbeck.core.system import describe_cpu_contention
    from limbeck.evaluation.speed import SpeedBenchmark
    from limbeck.report import comparison
    from limbeck.report.figures import speed
    from limbeck.report.figures.style import save_figure, use_style

    if threads is not None:
        torch.set_num_threads(threads)
    busy = describe_cpu_contention(torch.get_num_threads())
    entries = _entries(models, teacher, int8, out)
    for entry in entries:
        check_writable(entry.output_dir)
    benchmark = SpeedBenchmark(entries, settings, ignore_cache=again, notes=[busy] if busy else [])
    estimates = benchmark.estimate()
    _show_plan(estimates, len(benchmark.points))
    benchmark.check_memory(estimates)
    if plan:
        return
    if busy:
        console.print(f"{busy} Trust ratios more than times.")
    found = benchmark.run()
    output.print(speed.build_speed_table(found))
    for sentence in speed.format_break_even(found):
        output.print(sentence)
    for note in benchmark.notes:
        console.print(f"the machine was busy: {note}")
    if out:
        paths = comparison.write_comparison(found, out)
    else:
        paths = [entries[0].output_dir / f"speed.{ending}" for ending in ("svg", "png")]
        with use_style(one.model for one in found):
            figure = speed.draw_speed(found)
            for path in paths:
                save_figure(figure, path)
    console.print(f"kept in {', '.join(str(entry.output_dir / 'speed.json') for entry in entries)}", style="dim")
    console.print(f"written: {', '.join(map(str, paths))}", style="dim")


def _entries(models: list[str], teacher: str | None, int8: str, out: Path | None) -> list[Any]:
    """The models, behind them their teachers, behind each teacher its int8 twin."""
    from limbeck.evaluation.candidate import Candidate
    from limbeck.evaluation.subject import SubjectLoader

    subjects = SubjectLoader(None if teacher == "none" else teacher, out=out)
    opened = [subjects.load(name) for name in dict.fromkeys(models)]
    bases = [teacher] if teacher else [s.teacher_or_none.name for s in opened if s.teacher_or_none is not None]
    extra = [name for name in dict.fromkeys(bases) if name not in models and name != "none"]
    opened += [subjects.load(name) for name in extra]
    entries = []
    for subject in opened:
        entries.append(Candidate.from_subject(subject))
        if int8 != "none" and not subject.is_student and subject.device.type == "cpu":
            entries.append(entries[-1].to_int8(activations=int8 == "dynamic"))
    return entries


def _show_plan(estimates: list[Any], done: int) -> None:
    from limbeck.core.console import format_bytes

    seconds = sum(estimate.seconds for estimate in estimates)
    for estimate in estimates:
        console.print(
            f"plan: {estimate.length:,} tokens, batch {estimate.batch}: about {estimate.seconds:.0f} s, "
            f"{format_bytes(estimate.bytes)} on top of the models"
        )
    already = f"; {done} measured already" if done else ""
    console.print(f"plan: about {seconds / 60:.1f} min in all{already}")


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError as error:
        raise LimbeckError(f"--{name} {text}", expected="numbers joined by commas, for example 1024,4096") from error
