"""limbeck check: the contract of mixers, on one of your own or on any other."""

from itertools import groupby
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from limbeck.cli import app
from limbeck.core.console import output, progress


@app.command()
def check(
    mixer: Annotated[str, typer.Argument(help="A mixer's name, or a file: mine.py, mine.py:ClassName.")],
    family: Annotated[
        list[str] | None, typer.Option(help="Only in students of this family; may be repeated.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two families, without the slow checks.")] = False,
) -> None:
    """Check a mixer against the contract: state, masks, documents, matrix, gradients, precision, saving."""
    from limbeck import mixers, testing

    name = mixers.get(mixer).name
    outcomes = []
    with progress(f"check {name}", len(testing.list_cases(family, quick)), "cases") as advance:
        for outcome in testing.run_checks(name, family, quick):
            outcomes.append(outcome)
            advance(1, note=" ".join(filter(None, (outcome.check.name, outcome.family))))
    table = Table(box=None, pad_edge=False)
    for column in ("check", "what it asks for"):
        table.add_column(column)
    table.add_column("families", justify="right")
    table.add_column("seconds", justify="right")
    failed = [outcome for outcome in outcomes if outcome.failure]
    for clause, group in groupby(outcomes, key=lambda outcome: outcome.check):
        of = list(group)
        passed = sum(outcome.failure is None for outcome in of)
        if clause.per_family:
            verdict = f"{passed} of {len(of)}"
        else:
            verdict = "passed" if passed else "failed"
        colour = "red" if passed < len(of) else "green"
        seconds = sum(outcome.seconds for outcome in of)
        table.add_row(clause.name, clause.summary, Text(verdict, style=colour), f"{seconds:.1f}")
    output.print(table)
    shown = set()
    for outcome in failed:
        if outcome.check.name not in shown:  # the first of each check tells enough
            shown.add(outcome.check.name)
            where = f" ({outcome.family})" if outcome.family else ""
            output.print(Text.assemble("\n", (outcome.check.name, "bold red"), where))
            output.print(str(outcome.failure))
    output.print(f"\n{name}: {len(outcomes) - len(failed)} of {len(outcomes)} cases passed")
    if failed:
        raise typer.Exit(1)
