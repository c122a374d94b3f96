"""limbeck students: which mixers there are."""

from rich.table import Table

from limbeck.cli import app
from limbeck.console import output


@app.command()
def students() -> None:
    """List the mixers: what each one is, its operator, what it adds to a layer and how large its state is."""
    from limbeck import mixers

    shape = mixers.HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, layers=30)
    table = Table(box=None, pad_edge=False)
    for column in ("student", "operator", "new parameters", "state"):
        table.add_column(column, justify="right" if column in ("new parameters", "state") else "left")
    table.add_column("what it is")
    for name in sorted(mixers.names()):
        mixer = mixers.build(name, shape)
        operator = mixer.operator.__name__.rsplit(".", 1)[1].replace("_", " ") if mixer.operator else "softmax"
        added = sum(p.numel() for p in mixer.parameters())
        table.add_row(name, operator, f"{added:,}", f"{mixer.state_numel():,}", mixer.summary)
    output.print(table)
    output.print("[dim]numbers a layer with 9 heads of 64 on width 576 (SmolLM2-135M)[/]")
