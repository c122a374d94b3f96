"""limbeck bench: speed and memory of students beside their teacher, measured in turns in one process."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.completion import complete_choices
from limbeck.cli.options import ComparisonFolder, IgnoreCache, Json, Models, Plan, Quiet, RunTeacher, count_option
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, format_bytes, format_duration, output
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import find_missing
from limbeck.core.storage import check_writable

INT8_MODES = ("dynamic", "none")


@verb(
    "limbeck bench runs/gla runs/mlstm",
    "limbeck bench runs/gla --lengths 1k,16k --batch-sizes 1,8 --plan",
    "limbeck bench runs/gla --teacher none --json",
)
def bench(
    models: Models = None,
    teacher: RunTeacher = None,
    lengths: Annotated[
        str, typer.Option(metavar="COUNTS", help="Context lengths in tokens, joined by commas.")
    ] = "1024,4096",
    batch_sizes: Annotated[str, typer.Option(metavar="COUNTS", help="Batch sizes, joined by commas.")] = "1",
    new_tokens: Annotated[int, count_option("Generated tokens to time at each length.")] = 16,
    rounds: Annotated[int, typer.Option(help="Prompts to time at each length.")] = 3,
    prefill: Annotated[int, count_option("The longest prompt to time; 0 for none.")] = 8192,
    teacher_int8: Annotated[
        str,
        typer.Option(
            help="Also time the teacher in int8 on a CPU: dynamic (activations too) or none.",
            autocompletion=complete_choices(INT8_MODES),
        ),
    ] = "dynamic",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's")] = None,
    out: ComparisonFolder = None,
    plan: Plan = False,
    again: IgnoreCache = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory over context lengths and batch sizes.

    Prompts, the next token, caches and memory of each model, in turns in one process; --teacher none leaves out the
    softmax model that students are compared with.
    """
    if not models:
        raise LimbeckError("no model to benchmark", expected="a run directory, a folder or a name")
    if teacher_int8 not in INT8_MODES:
        raise LimbeckError(f"--teacher-int8 {teacher_int8}", expected=", ".join(INT8_MODES))
    if out is None and (extra := find_missing("matplotlib")):
        console.print(f"left out: the figure, which needs matplotlib; {extra.command}")
    # late, for a fast --help
    from limbeck.evaluation.measure import get_measure, parse_settings

    values: dict[str, Any] = {
        "lengths": _parse_numbers("lengths", lengths),
        "batches": _parse_numbers("batch-sizes", batch_sizes),
    }
    values |= {"steps": new_tokens, "rounds": rounds, "prefill": prefill}
    settings: Any = parse_settings(get_measure("speed"), values)
    if threads is not None and threads < 1:
        raise LimbeckError(f"--threads {threads}", expected="a positive number")
    # late, after the options are checked
    import torch

    from limbeck.core.system import describe_cpu_contention
    from limbeck.evaluation.speed import SpeedBenchmark
    from limbeck.report import comparison
    from limbeck.report.figures import speed
    from limbeck.report.figures.style import save_figure, use_style

    if threads is not None:
        torch.set_num_threads(threads)
    busy = describe_cpu_contention(torch.get_num_threads())
    candidates = _load_candidates(models, teacher, teacher_int8, out)
    for candidate in candidates:
        check_writable(candidate.output_dir)
    benchmark = SpeedBenchmark(candidates, settings, ignore_cache=again, notes=[busy] if busy else [])
    estimates = benchmark.estimate()
    to = output if plan else console
    if plan and as_json:
        print_json({"plan": estimates, "num_cached": len(benchmark.points)})
    else:
        _print_plan(to, estimates, len(benchmark.points))
    benchmark.check_memory(estimates)
    if plan:
        return
    if busy:
        console.print(f"{busy} Ratios are more reliable than times.")
    measurements = benchmark.run()
    if as_json:
        print_json({"measurements": measurements, "notes": benchmark.notes})
    else:
        output.print(speed.build_speed_table(measurements))
        for sentence in speed.format_break_even(measurements):
            output.print(sentence)
    for note in benchmark.notes:
        console.print(f"while measuring: {note}")
    if out:
        paths = comparison.write_comparison(measurements, out)
    elif find_missing("matplotlib"):
        paths = []
    else:
        paths = [candidates[0].output_dir / f"speed.{ending}" for ending in ("svg", "png")]
        with use_style(one.model for one in measurements):
            figure = speed.draw_speed(measurements)
            for path in paths:
                save_figure(figure, path)
    console.print(f"saved: {', '.join(str(one.output_dir / 'speed.json') for one in candidates)}", style="dim")
    if paths:
        console.print(f"written: {', '.join(map(str, paths))}", style="dim")


def _load_candidates(models: list[str], teacher: str | None, int8: str, out: Path | None) -> list[Any]:
    """Load the models, after them their teachers, and after each teacher the same in int8."""
    # late, for a fast --help
    from limbeck.evaluation.candidate import Candidate
    from limbeck.evaluation.subject import SubjectLoader

    subjects = SubjectLoader(None if teacher == "none" else teacher, out=out)
    loaded = [subjects.load(name) for name in dict.fromkeys(models)]
    teachers = [teacher] if teacher else [s.teacher_or_none.name for s in loaded if s.teacher_or_none is not None]
    loaded += [subjects.load(name) for name in dict.fromkeys(teachers) if name not in models and name != "none"]
    candidates = []
    for subject in loaded:
        candidates.append(Candidate.from_subject(subject))
        if int8 != "none" and not subject.is_student and subject.device.type == "cpu":
            candidates.append(candidates[-1].to_int8())
    return candidates


def _print_plan(to: Any, estimates: list[Any], num_cached: int) -> None:
    """Print the estimates on a console: standard output if the plan is all that is asked for."""
    for estimate in estimates:
        to.print(
            f"plan: {estimate.length:,} tokens, batch {estimate.batch}: about {estimate.seconds:.0f} s, "
            f"{format_bytes(estimate.bytes)} on top of the models"
        )
    cached = f"; {num_cached} cached" if num_cached else ""
    to.print(f"plan: about {format_duration(sum(estimate.seconds for estimate in estimates))} in total{cached}")


def _parse_numbers(option: str, text: str) -> list[int]:
    try:
        return [parse_count(part) for part in text.split(",")]
    except LimbeckError as error:
        raise LimbeckError(f"--{option} {text}", expected="numbers joined by commas, for example 1024,4k") from error
