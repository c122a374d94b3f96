"""limbeck students: list the mixers."""

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.catalog import SHAPE, describe_mixer, has_other_mixers, read_catalog
from limbeck.cli.options import Json, MixerSet, Preset, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import output

CHOICE = """Which one? For use take a recipe: `limbeck distill` (windows, a few of them long), `limbeck distill hybrid`.
To compare recurrences begin with gated_deltanet, kda, mlstm and gla, beside sliding_window, the bar to clear."""


@verb("limbeck students", "limbeck students gla,mlstm --preset published --options", "limbeck students --json")
def students(
    which: MixerSet = "all",
    preset: Preset = "default",
    options: Annotated[bool, typer.Option("--options", help="List the options of each mixer instead.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the mixers that a student can have.

    What each one is, its operator, the parameters that it adds to a layer, and the size of its state.
    """
    mixers = _describe_mixers(which, preset)
    if as_json:
        print_json({"preset": preset, "shape": SHAPE, "mixers": mixers})
        return
    table = Table(box=None, pad_edge=False)
    columns = ("student", "options") if options else ("student", "operator", "new parameters", "state", "what it is")
    for column in columns:
        table.add_column(column, justify="right" if column in ("new parameters", "state") else "left")
    for name, mixer in mixers.items():
        if options:
            table.add_row(name, ", ".join(f"{key}={value}" for key, value in mixer["options"].items()))
            continue
        state = f"{mixer['state']:,}" + (" a token" if mixer["state_grows"] else "")
        table.add_row(name, mixer["operator"], f"{mixer['new_parameters']:,}", state, mixer["summary"])
    output.print(table)
    output.print(f"Numbers per layer with 9 heads of 64 on width 576 (SmolLM2-135M), preset {preset}.", style="dim")
    if not quiet:
        output.print(CHOICE, style="dim")


def _describe_mixers(which: str, preset: str) -> dict[str, dict[str, Any]]:
    """Describe mixers by name: from the catalog, or if there may be others than Limbeck's own, from the registry."""
    catalog = read_catalog()
    own, parts = catalog["mixers"], [part.strip() for part in which.split(",")]
    names = catalog["mixer_sets"].get(which) or list(dict.fromkeys(parts))
    # `all` may have mixers of files, whose registry is imported by then, and of packages
    others = which == "all" and ("limbeck.mixers.registry" in sys.modules or has_other_mixers())
    if preset in catalog["presets"] and set(names) <= own.keys() and not others:
        return {name: own[name][preset] for name in names}
    # late: it imports torch
    from limbeck import mixers

    return {name: describe_mixer(name, preset) for name in mixers.select_mixers(which)}
