"""limbeck students: which mixers there are."""

from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.core.console import output


@app.command()
def students(
    which: Annotated[str, typer.Argument(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.")] = "all",
    preset: Annotated[str, typer.Option(help="default, published or controlled.")] = "default",
    options: Annotated[bool, typer.Option("--options", help="List every option with its value instead.")] = False,
) -> None:
    """List mixers: what each one is, its operator, what it adds to a layer and how large its state is."""
    from limbeck import mixers

    shape = mixers.HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, scale=0.125, layers=30)
    table = Table(box=None, pad_edge=False)
    columns = ("student", "options") if options else ("student", "operator", "new parameters", "state", "what it is")
    for column in columns:
        table.add_column(column, justify="right" if column in ("new parameters", "state") else "left")
    for name in mixers.select_mixers(which):
        mixer = mixers.build(name, shape, preset=preset)
        if options:
            table.add_row(name, mixer.extra_repr())
            continue
        added = sum(p.numel() for p in mixer.parameters())
        size = f"{mixer.state_numel():,}" + (" a token" if mixer.has_growing_state else "")
        table.add_row(name, mixer.operator_name, f"{added:,}", size, mixer.summary)
    output.print(table)
    output.print(f"numbers a layer with 9 heads of 64 on width 576 (SmolLM2-135M), preset {preset}", style="dim")
