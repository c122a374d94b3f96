"""limbeck families: which of transformers' models can become students."""

from collections import Counter
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from limbeck.cli.options import Json, Mixer, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import output, progress

STYLES = {"works": "green", "partly": "yellow", "no": "red"}


@verb("limbeck families", "limbeck families qwen3 gemma3_text --student kda", "limbeck families --all --markdown")
def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Model types of transformers, such as qwen3.", show_default="the common ones"
        ),
    ] = None,
    student: Mixer = "gated_deltanet",
    all_: Annotated[
        bool, typer.Option("--all", help="Check all families of the installed transformers (takes minutes).")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as in docs/reference/families.md.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Test which model families can become students.

    A tiny random model of each family of transformers is converted, and the student tested.
    """
    # late, for a fast --help
    from limbeck.testing import survey, tiny_models

    chosen = tiny_models.list_families() if all_ else names or survey.COMMON_FAMILIES
    rows = []
    with progress("families", total=len(chosen), unit="families") as advance:
        for family in chosen:
            rows.append(survey.survey_family(family, student))
            advance(1, note=f"{family} {rows[-1].status}")
    if as_json:
        print_json({"student": student, "families": rows})
        return
    if markdown:
        print(survey.render_markdown(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("family", "status", "its attention", "what fails, or why not"):
        table.add_column(column, overflow="fold")
    for row in rows:
        status = Text(row.status, style=STYLES[row.status])
        table.add_row(row.family, status, ", ".join(row.features), row.problem)
    output.print(table)
    counts = Counter(row.status for row in rows)
    summary = f"{counts['works']} work, {counts['partly']} partly, {counts['no']} do not; mixer {student}"
    output.print(summary, style="dim")
