"""limbeck distill: teacher in, student out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.console import as_time, console, output
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.recipe import Recipe


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
    from limbeck import job

    if plan:
        from limbeck.data.cache import looking
        from limbeck.plan import make_plan

        with looking() as told:
            chosen = job.placed(chosen)
            ready = job.prepare_job(chosen)
            show_plan(job.measured_plan(ready, make_plan(chosen, ready.teacher, ready.sites)))
        for sentence in dict.fromkeys(told):
            console.print(sentence)
        return
    result = job.distill(chosen, confirm=show_plan)
    from rich.markdown import Markdown

    from limbeck.summary import write_summary

    output.print(Markdown(write_summary(result)))
    console.print(f"written to {result['run']}/: summary.md, eval.json, metrics.jsonl, student/", style="dim")


def _find_rates(recipe: "Recipe") -> None:
    from limbeck.find_rate import find_rates
    from limbeck.prepare import placed, run_path
    from limbeck.report import rates

    recipe = placed(recipe)
    sweeps = find_rates(recipe)
    output.print(rates.table(sweeps))
    folder = Path(f"{run_path(recipe)}-rates")
    console.print(f"written to {folder}/: {', '.join(path.name for path in rates.write(sweeps, folder))}", style="dim")
    for sweep in sweeps:
        if sweep.suggested is not None:
            console.print(f"--set stages.{sweep.index}.lr={sweep.suggested:.1e}")


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

    from limbeck.reading import assign, parse_value, stages_from_text, tokens_over_stages
    from limbeck.recipe import Recipe

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
        raw["stages"] = stages_from_text(stages, raw)
    if tokens is not None:
        if tokens < 1:
            raise LimbeckError(f"--tokens {tokens}", expected="a positive number")
        tokens_over_stages(raw["stages"], tokens)
    if student is not None and student != Recipe.load(name).student.mixer:
        raw["student"]["options"] = {}  # they were another mixer's
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise LimbeckError(f"--set {text}", expected="--set key=value, for example --set stages.hidden.lr=1e-3")
        assign(raw, key, parse_value(value))
    return Recipe.parse(raw, name)


def show_plan(plan: Any) -> None:
    """Print what the run will cost."""
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "tokens", "steps", "trained parameters", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in plan.rows:
        table.add_row(row.stage, f"{row.tokens:,}", f"{row.steps or '-'}", f"{row.trained:,}", as_time(row.seconds))
    console.print(table)
    console.print(
        f"about {as_time(plan.seconds)} in all, {plan.memory_bytes / 1e9:.1f} GB of memory, "
        f"{plan.disk_bytes / 1e9:.1f} GB of disk; matrix products run at {plan.speed / 1e9:.0f} GFLOP/s here"
    )
