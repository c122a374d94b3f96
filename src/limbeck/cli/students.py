"""limbeck students: list the mixers."""

from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.cli.options import MixerSet, Preset, examples
from limbeck.core.console import output


@app.command(epilog=examples("limbeck students", "limbeck students gla,mlstm --preset published --options"))
def students(
    which: MixerSet = "all",
    preset: Preset = "default",
    options: Annotated[bool, typer.Option("--options", help="List the options of each mixer instead.")] = False,
) -> None:
    """List mixers: what each one is, its operator, the parameters it adds to a layer, the size of its state."""
    # late, for a fast --help
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
        num_parameters = sum(p.numel() for p in mixer.parameters())
        state = f"{mixer.state_numel():,}" + (" a token" if mixer.grows else "")
        table.add_row(name, mixer.operator_name, f"{num_parameters:,}", state, mixer.summary)
    output.print(table)
    output.print(f"Numbers per layer with 9 heads of 64 on width 576 (SmolLM2-135M), preset {preset}.", style="dim")
