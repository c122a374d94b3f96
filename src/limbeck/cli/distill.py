"""limbeck distill: train a student from a teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.completion import EXPORT_FORMATS, complete_choices, complete_recipes
from limbeck.cli.options import (
    Json,
    Layers,
    OptionalData,
    OptionalMixer,
    OptionalPreset,
    OptionalTeacher,
    Plan,
    Quiet,
    SoftmaxHeads,
    SoftmaxLayers,
    SoftmaxWindow,
    Stages,
    collect_student,
    count_option,
    split_assignments,
)
from limbeck.cli.results import print_json, to_plain
from limbeck.cli.verbs import verb
from limbeck.core.console import console, format_bytes, format_duration, output

if TYPE_CHECKING:
    from limbeck.core.recipe import Recipe


@verb(
    "limbeck distill",
    "limbeck distill --student gla --tokens 2M --out runs/gla",
    "limbeck distill --data corpus.jsonl --teacher Qwen/Qwen3-0.6B --plan",
    "limbeck distill --for gguf",
)
def distill(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A built-in recipe or a YAML file.",
            show_default="limbeck; with --student, --stages or --for: quickstart",
            autocompletion=complete_recipes,
        ),
    ] = None,
    teacher: OptionalTeacher = None,
    student: OptionalMixer = None,
    preset: OptionalPreset = None,
    layers: Layers = None,
    softmax_layers: SoftmaxLayers = None,
    softmax_heads: SoftmaxHeads = None,
    softmax_window: SoftmaxWindow = None,
    stages: Stages = None,
    tokens: Annotated[
        int | None, count_option("Training tokens over all stages, divided among them as in the recipe.")
    ] = None,
    seq_len: Annotated[
        int | None, count_option("The length of a sequence in tokens.", show_default="the recipe's")
    ] = None,
    data: OptionalData = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Set the mixer and its options so that `limbeck export` can write gguf, qwen3_5 or onnx.",
            autocompletion=complete_choices(EXPORT_FORMATS),
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any key of the recipe, e.g. stages.hidden.lr=1e-3.")
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Sweep the learning rate of each stage, then exit.")
    ] = False,
    plan: Plan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Distill a teacher into a subquadratic student. Without arguments: a real one. The same command resumes."""
    keys = collect_student(
        preset=preset, softmax_layers=softmax_layers, softmax_heads=softmax_heads, softmax_window=softmax_window
    )
    chosen = build_recipe(recipe, teacher, student, layers, stages, tokens, data, out, set or [], target, keys, seq_len)
    if find_lr:
        _find_learning_rates(chosen, as_json)
        return
    if plan:
        _print_run_plan(chosen, as_json)
        return
    # late, for a fast --help
    from rich.markdown import Markdown

    from limbeck.report.run_summary import format_summary
    from limbeck.training import pipeline

    result = pipeline.distill(chosen, confirm=print_plan)
    if as_json:
        print_json(result)
    else:
        output.print(Markdown(format_summary(result)))
    console.print(f"written to {result['run']}/: summary.md, eval.json, metrics.jsonl, student/", style="dim")


def _print_run_plan(recipe: "Recipe", as_json: bool) -> None:
    """Print what a run would cost, and what it would prepare first; nothing is written."""
    # late, for a fast --help
    from limbeck.core.cache import cache_dry_run
    from limbeck.training import pipeline, setup
    from limbeck.training.plan import make_plan

    with cache_dry_run() as notes:
        recipe = setup.assign_run_directory(recipe)
        job = setup.prepare_job(recipe)
        plan = pipeline.measure_plan(job, make_plan(recipe, job.teacher, job.sites))
        if as_json:
            print_json({"plan": plan, "notes": list(dict.fromkeys(notes))})
        else:
            print_plan(plan, output)
    for note in dict.fromkeys(notes):
        console.print(note)


def _find_learning_rates(recipe: "Recipe", as_json: bool) -> None:
    # late, for a fast --help
    from limbeck.training import lr_finder
    from limbeck.training.setup import assign_run_directory, run_path

    recipe = assign_run_directory(recipe)
    sweeps = lr_finder.find_learning_rates(recipe)
    if as_json:
        print_json({"sweeps": [to_plain(sweep) | {"suggested_lr": sweep.suggested_lr} for sweep in sweeps]})
    else:
        output.print(lr_finder.build_lr_table(sweeps))
    folder = Path(f"{run_path(recipe)}-rates")
    files = ", ".join(path.name for path in lr_finder.write_lr_sweeps(sweeps, folder))
    console.print(f"written to {folder}/: {files}", style="dim")
    for sweep in sweeps:
        if sweep.suggested_lr is not None:
            console.print(f"--set stages.{sweep.index}.lr={sweep.suggested_lr:.1e}")


def build_recipe(
    name: str | None,
    teacher: str | None,
    student: str | None,
    layers: str | None,
    stages: str | None,
    tokens: int | None,
    data: str | None,
    out: Path | None,
    settings: list[str],
    target: str | None = None,
    student_keys: dict[str, Any] | None = None,
    seq_len: int | None = None,
) -> "Recipe":
    """Build the recipe of a command line; `limbeck.training.recipe_options` lays the options over the named one.

    Args:
        settings: KEY=VALUE, as --set has them.
        student_keys: keys of `student` that have options of their own.
    """
    # late, for a fast --help
    from limbeck.training import recipe_options

    return recipe_options.build_recipe(
        name,
        teacher=teacher,
        student=student,
        layers=layers,
        stages=stages,
        tokens=tokens,
        seq_len=seq_len,
        data=data,
        out=out,
        overrides=split_assignments(settings, "stages.hidden.lr=1e-3"),
        target=target,
        student_keys=student_keys,
    )


def print_plan(plan: Any, to: Any = console) -> None:
    """Print a `limbeck.training.plan.Plan`: tokens, steps, parameters and time of each stage, memory and disk.

    Args:
        to: a console: standard output if the plan is all that is asked for.
    """
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "tokens", "steps", "trained parameters", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in plan.stages:
        table.add_row(
            row.stage,
            f"{row.tokens:,}",
            f"{row.steps or '-'}",
            f"{row.trained_parameters:,}",
            format_duration(row.seconds),
        )
    to.print(table)
    to.print(
        f"about {format_duration(plan.seconds)} in total, {format_bytes(plan.memory_bytes)} of memory, "
        f"{format_bytes(plan.disk_bytes)} of disk; "
        f"matrix products run at {plan.flops_per_second / 1e9:.0f} GFLOP/s here"
    )
