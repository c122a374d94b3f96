"""Options and arguments that several commands share, and the examples at the end of a command's help.

    @app.command(epilog=examples("limbeck students", "limbeck students paper-v3 --options"))
    def students(which: MixerSet = "all", preset: Preset = "default") -> None: ...

A default belongs to the command; the type, the help text and the way to write a value are the same everywhere.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.core.errors import LimbeckError

# by path: `limbeck.study.spec`, which has the same, imports torch
STUDIES_FOLDER = Path(__file__).parents[1] / "study" / "studies"

TEACHER_HELP = "The teacher: 'embedded', a local folder or a Hub name."
MIXER_HELP = "The mixer that replaces softmax attention; `limbeck students` lists them."
DATA_HELP = "The text: a file, a folder, a dataset name or 'embedded'."

Models = Annotated[
    list[str] | None,
    typer.Argument(help="Run directories, model folders, Hub names, or 'embedded'.", show_default=False),
]
Teacher = Annotated[str, typer.Option(help=TEACHER_HELP)]
OptionalTeacher = Annotated[str | None, typer.Option(help=TEACHER_HELP)]
Mixer = Annotated[str, typer.Option(help=MIXER_HELP)]
OptionalMixer = Annotated[str | None, typer.Option(help=MIXER_HELP)]
MixerSet = Annotated[str, typer.Argument(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.")]
Preset = Annotated[str, typer.Option(help="The mixer's settings: default, published or controlled.")]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
OptionalData = Annotated[str | None, typer.Option(help=DATA_HELP)]
SeqLen = Annotated[int, typer.Option(help="The length of a sequence in tokens.")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="The random seed.")]
ComparisonFolder = Annotated[
    Path | None, typer.Option(help="Save all results, a table and figures in this folder.", show_default=False)
]
IgnoreCache = Annotated[bool, typer.Option("--again", help="Ignore cached results and re-evaluate.")]
Plan = Annotated[bool, typer.Option("--plan", help="Print the estimated time and memory, then exit.")]


def examples(*commands: str) -> str:
    """Format the epilog of a command's help; "\\b" keeps its lines from being joined."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def split_assignment(text: str, example: str) -> tuple[str, Any]:
    """Split a value of --set, KEY=VALUE, into the key and the value that YAML makes of the text.

    Raises:
        LimbeckError: there is no "=".
    """
    # late, so that --help need not import YAML
    from limbeck.core.config import parse_value

    key, equals, value = text.partition("=")
    if not equals:
        raise LimbeckError(f"--set {text}", expected=f"--set key=value, for example --set {example}")
    return key, parse_value(value)
