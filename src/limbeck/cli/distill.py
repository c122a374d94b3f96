"""limbeck distill: teacher in, student out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.core.console import console, format_duration, output
from limbeck.core.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.core.recipe import Recipe


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")] = "quickstart",
    teacher: Annotated[str | None, typer.Option(help="'embedded', a local folder or a hub name.")] = None,
    student: Annotated[str | None, typer.Option(help="The mixer; `limbeck students` lists them.")] = None,
    layers: Annotated[str | None, typer.Option(help="'all' or layer numbers such as 0,2,5-9.")] = None,
    stages: Annotated[str | None, typer.Option(help="0 calibrate, 1 matrix, 2 hidden, 3 logits; e.g. 0,2,3.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens over all stages, shared out as in the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="Text: a file, a folder, a dataset name or 'embedded'.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="Any key of the recipe, e.g. stages.hidden.lr=1e-3.")] = None,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Sweep each stage's learning rate and stop.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and stop.")] = False,
) -> None:
    """Distil a teacher into a subquadratic student. Without arguments: the quickstart. The same command resumes."""
    chosen = build_recipe(recipe, teacher, student, layers, stages, tokens, data, out, set or [])
    if find_lr:
        _find_rates(chosen)
        return
    from limbeck.training import pipeline, setup

    if plan:
        from limbeck.core.cache import cache_dry_run
        from limbeck.training.plan import make_plan

        with cache_dry_run() as told:
            chosen = setup.assign_run_directory(chosen)
            ready = setup.prepare_job(chosen)
            print_plan(pipeline.measure_plan(ready, make_plan(chosen, ready.teacher, ready.sites)))
        for sentence in dict.fromkeys(told):
            console.print(sentence)
        return
    result = pipeline.distill(chosen, confirm=print_plan)
    from rich.markdown import Markdown

    from limbeck.report.run_summary import format_summary

    output.print(Markdown(format_summary(result)))
    console.print(f"written to {result['run']}/: summary.md, eval.json, metrics.jsonl, student/", style="dim")


def _find_rates(recipe: "Recipe") -> None:
    from limbeck.training import lr_finder
    from limbeck.training.lr_finder import find_learning_rates
    from limbeck.training.setup import assign_run_directory, run_path

    recipe = assign_run_directory(recipe)
    sweeps = find_learning_rates(recipe)
    output.print(lr_finder.build_lr_table(sweeps))
    folder = Path(f"{run_path(recipe)}-rates")
    console.print(
        f"written to {folder}/: {', '.join(path.name for path in lr_finder.write_lr_sweeps(sweeps, folder))}",
        style="dim",
    )
    for sweep in sweeps:
        if sweep.suggested_lr is not None:
            console.print(f"--set stages.{sweep.index}.lr={sweep.suggested_lr:.1e}")


def build_recipe(
    name: str,
    teacher: str | None,
    student: str | None,
    layers: str | None,
    stages: str | None,
    tokens: int | None,
    data: str | None,
    out: Path | None,
    settings: list[str],
) -> "Recipe":
    """The recipe that a command line asks for: the named one with the given options over it."""
    import yaml

    from limbeck.core.config import parse_stages, parse_value, scale_token_budgets, set_by_dotted_key
    from limbeck.core.recipe import Recipe

    given = {
        "teacher": teacher,
        "student.mixer": student,
        "student.layers": layers,
        "data.source": data,
        "out": str(out) if out else None,
    }
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if data is not None:
        overrides["data.sources"] = None
    base = Recipe.load(name, overrides)
    raw = yaml.safe_load(base.to_yaml())
    if out is None and student is not None:
        from limbeck import mixers

        raw["name"] = f"{base.name}-{mixers.get(student).name}"
    if Path(name).suffix not in (".yaml", ".yml"):  # what a named recipe says of its own text and budget
        if data is not None or tokens is not None:
            raw["data"]["max_tokens"] = None
        if data is not None:
            raw["data"] |= {"text_field": "text", "chat": None}
    if stages is not None:
        raw["stages"] = parse_stages(stages, raw)
    if tokens is not None:
        if tokens < 1:
            raise LimbeckError(f"--tokens {tokens}", expected="a positive number")
        scale_token_budgets(raw["stages"], tokens)
    if student is not None and student != Recipe.load(name).student.mixer:
        raw["student"]["options"] = {}  # they were another mixer's
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise LimbeckError(f"--set {text}", expected="--set key=value, for example --set stages.hidden.lr=1e-3")
        set_by_dotted_key(raw, key, parse_value(value))
    return Recipe.parse(raw, name)


def print_plan(plan: Any) -> None:
    """Print what the run will cost."""
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
    console.print(table)
    console.print(
        f"about {format_duration(plan.seconds)} in all, {plan.memory_bytes / 1e9:.1f} GB of memory, "
        f"{plan.disk_bytes / 1e9:.1f} GB of disk; matrix products run at {plan.flops_per_second / 1e9:.0f} GFLOP/s here"
    )
