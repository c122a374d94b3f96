"""Options and arguments that several verbs share: one name, one type, one help text, one way to write a value.

    def students(which: MixerSet = "all", preset: Preset = "default", as_json: Json = False) -> None: ...

A default belongs to the verb. A count may be written 20000, 20_000, 2e4, 20k, 20M or 1.5B. A run directory stands for
its student where a model is asked, and for its teacher where a teacher is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.completion import (
    complete_mixer_sets,
    complete_mixers,
    complete_presets,
    complete_stages,
    complete_teachers,
)
from limbeck.core.console import console
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError

# by path: `limbeck.study.spec`, which has the same, imports torch
STUDIES_FOLDER = Path(__file__).parents[1] / "study" / "studies"


def _find_teacher(name: str | None) -> str | None:
    """Return a teacher's name; for a run directory, the teacher of that run."""
    try:
        recipe = Path(name or "").expanduser() / "recipe.yaml"
        if not name or not recipe.is_file():
            return name
    except (OSError, RuntimeError):  # no path: a name too long, an unknown user behind ~
        return name
    # late, so that --help need not import YAML
    from limbeck.core.config import read_yaml

    teacher = str(read_yaml(recipe, "recipe", "the recipe of a run").get("teacher", "embedded"))
    console.print(f"{name} is a run; its teacher is {teacher}", style="dim")
    return teacher


_TEACHER: dict[str, Any] = {"autocompletion": complete_teachers, "callback": _find_teacher}

TEACHER_HELP = "The teacher: 'embedded', a local folder or a Hub name; a run directory stands for its teacher."
MIXER_HELP = "The mixer that replaces softmax attention; `limbeck students` lists them."
DATA_HELP = "The text: a file, a folder, a dataset name or 'embedded'."

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help="Run directories, model folders, Hub names, or 'embedded'.", show_default=False
    ),
]
Model = Annotated[str, typer.Argument(help="A run directory, a model folder, a Hub name, or 'embedded'.")]
Teacher = Annotated[str, typer.Option(help=TEACHER_HELP, **_TEACHER)]
OptionalTeacher = Annotated[str | None, typer.Option(help=TEACHER_HELP, **_TEACHER)]
RunTeacher = Annotated[str | None, typer.Option(help=TEACHER_HELP, show_default="the run's", **_TEACHER)]
Mixer = Annotated[str, typer.Option(help=MIXER_HELP, autocompletion=complete_mixers)]
OptionalMixer = Annotated[
    str | None, typer.Option(help=f"{MIXER_HELP} Or a file with one.", autocompletion=complete_mixers)
]
MixerSet = Annotated[
    str,
    typer.Argument(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.", autocompletion=complete_mixer_sets),
]
PRESET_HELP = "The mixer's settings: default, published or controlled."
Preset = Annotated[str, typer.Option(help=PRESET_HELP, autocompletion=complete_presets)]
OptionalPreset = Annotated[
    str | None, typer.Option(help=PRESET_HELP, show_default="default", autocompletion=complete_presets)
]
Layers = Annotated[
    str | None, typer.Option(help="The layers to convert: 'all' or numbers such as 0,2,5-9.", show_default="all")
]
SoftmaxLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers among them that keep softmax: 0,9, 'every 4', 'uniform 7', or a file from limbeck select."
    ),
]
SoftmaxHeads = Annotated[
    str | None,
    typer.Option(
        help="Groups of heads in other layers that keep softmax: 18.2,20.0 (layer.group), a file from limbeck select "
        "--heads, or, for a run to choose, their number."
    ),
]
SoftmaxWindow = Annotated[
    int | None,
    typer.Option(
        parser=parse_count, metavar="COUNT", help="Tokens that those groups see, so that their cache does not grow."
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(
        help="Stages to run: 0 calibrate, 1 matrix, 2 hidden, 3 logits; e.g. 0,2,3.", autocompletion=complete_stages
    ),
]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
OptionalData = Annotated[str | None, typer.Option(help=DATA_HELP)]
SeqLen = Annotated[int, typer.Option(parser=parse_count, metavar="COUNT", help="The length of a sequence in tokens.")]
NewTokens = Annotated[int, typer.Option(parser=parse_count, metavar="COUNT", help="The maximum number of new tokens.")]
Temperature = Annotated[float, typer.Option(help="The sampling temperature; 0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Keep weights in float16 on the CPU: faster, and nearly exact.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile decoding for the CPU: faster, after minutes at the first start.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="The random seed.")]
ComparisonFolder = Annotated[
    Path | None, typer.Option(help="Save all results, a table and figures in this folder.", show_default=False)
]
IgnoreCache = Annotated[bool, typer.Option("--again", help="Ignore cached results and re-evaluate.")]
Plan = Annotated[bool, typer.Option("--plan", help="Print the estimated time and memory, then exit.")]
OldOut = Annotated[Path | None, typer.Argument(hidden=True)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON document."),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print results and errors only, no progress or notes."),
]


def count_option(help: str, **settings: Any) -> Any:
    """Return the option of a count of tokens, for `Annotated[int, ...]`."""
    return typer.Option(parser=parse_count, metavar="COUNT", help=help, **settings)


def split_assignments(texts: Iterable[str], example: str) -> dict[str, Any]:
    """Split the values of --set, KEY=VALUE, into keys and the values that YAML makes of the texts.

    Of several values of a key the last counts, which is said: a hint is typed behind the command that it is about.

    Raises:
        LimbeckError: one has no "=".
    """
    # late, so that --help need not import YAML
    from limbeck.core.config import parse_value

    given: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LimbeckError(f"--set {text}", expected=f"--set key=value, for example --set {example}")
        parsed = parse_value(value)
        if given.get(key, parsed) != parsed:
            console.print(f"--set {key} is given {given[key]}, then {parsed}; the last counts", markup=False)
        given[key] = parsed
    return given


def collect_student(**given: Any) -> dict[str, Any]:
    """Return the keys of a recipe's `student` that were given as options of their own."""
    heads = given.get("softmax_heads")
    if heads and heads.isdigit():  # a number of groups, which a run chooses itself
        given["softmax_heads"] = int(heads)
    return {key: value for key, value in given.items() if value is not None}
