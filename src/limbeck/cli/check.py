"""limbeck check: test a mixer, yours or any other, against the contract of mixers."""

from itertools import groupby
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from limbeck.cli.completion import complete_mixers
from limbeck.cli.options import Json, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import output, progress


@verb("limbeck check mine.py", "limbeck check mine.py:Mine --family qwen3", "limbeck check gla --quick --json")
def check(
    mixer: Annotated[
        str,
        typer.Argument(
            help="The name of a mixer, or a file: mine.py, mine.py:ClassName.", autocompletion=complete_mixers
        ),
    ],
    family: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAMILY", help="Test students of this model family only; can be repeated.", show_default="all"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Test two families, without the slow checks.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Test a mixer, yours or any other, against the contract.

    State, masks, documents, matrix, gradients, precision, saving: what a mixer has to do, tried one by one.
    """
    # late, for a fast --help
    from limbeck import mixers, testing

    name = mixers.get(mixer).name
    outcomes = []
    with progress(f"check {name}", len(testing.list_cases(family, quick)), "cases") as advance:
        for outcome in testing.run_checks(name, family, quick):
            outcomes.append(outcome)
            advance(1, note=" ".join(filter(None, (outcome.check.name, outcome.family))))
    failed = [outcome for outcome in outcomes if outcome.failure]
    if as_json:
        cases = [
            {
                "check": outcome.check.name,
                "requires": outcome.check.summary,
                "family": outcome.family,
                "passed": outcome.failure is None,
                "failure": str(outcome.failure) if outcome.failure else None,
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        ]
        print_json({"mixer": name, "passed": not failed, "cases": cases})
    else:
        _print_outcomes(name, outcomes)
    if failed:
        raise typer.Exit(1)


def _print_outcomes(name: str, outcomes: list[Any]) -> None:
    """Print a line for each check, and the first failure of each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("check")
    table.add_column("what it requires")
    table.add_column("families", justify="right")
    table.add_column("seconds", justify="right")
    for tested, group in groupby(outcomes, key=lambda outcome: outcome.check):
        cases = list(group)
        passed = sum(outcome.failure is None for outcome in cases)
        if tested.per_family:
            verdict = f"{passed} of {len(cases)}"
        else:
            verdict = "passed" if passed else "failed"
        style = "red" if passed < len(cases) else "green"
        seconds = sum(outcome.seconds for outcome in cases)
        table.add_row(tested.name, tested.summary, Text(verdict, style=style), f"{seconds:.1f}")
    output.print(table)
    failed = [outcome for outcome in outcomes if outcome.failure]
    # one failure of each check is shown: the others mostly have the same cause
    first_failures = {outcome.check.name: outcome for outcome in reversed(failed)}
    for outcome in reversed(first_failures.values()):
        family_note = f" ({outcome.family})" if outcome.family else ""
        output.print(Text.assemble("\n", (outcome.check.name, "bold red"), family_note))
        output.print(str(outcome.failure))
    output.print(f"\n{name}: {len(outcomes) - len(failed)} of {len(outcomes)} cases passed")
