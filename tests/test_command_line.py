"""The command line itself: what it imports before it has something to do, and names that it prints as they are."""

import subprocess
import sys

import pytest
from rich.table import Table

from limbeck import console as consoles

LIGHT = """
import sys
from limbeck.cli import main
sys.argv = ["limbeck", *{arguments!r}]
try:
    main()
except SystemExit as end:
    print("ended with", end.code)
print("imported:", sorted(name for name in ("torch", "transformers", "limbeck.model") if name in sys.modules))
"""


def python(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "distill"),
        (["-h"], 0, "--version"),
        (["--version"], 0, "limbeck 0."),
        (["study", "-h"], 0, "--executor"),
        (["study", "--list"], 0, "paper-experiment-1"),
        (["distil"], 2, "Did you mean 'distill'?"),
        (["distill", "--techer", "x"], 2, "--teacher"),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(arguments, code, says):
    said = python(LIGHT.format(arguments=arguments))
    assert says in said
    assert f"ended with {code}" in said
    assert "imported: []" in said


@pytest.mark.parametrize(
    "first",
    [
        "import limbeck; from transformers import AutoConfig, AutoModelForCausalLM",
        "import transformers, limbeck; from transformers import AutoConfig",
        "from transformers import AutoConfig, AutoModelForCausalLM; import limbeck",
        "import limbeck; from transformers import GenerationMixin, AutoConfig",
        "from limbeck import convert; from transformers import AutoConfig",
    ],
)
def test_students_are_known_to_transformers_once_limbeck_is_imported(first):
    said = python(f"{first}\nprint(type(AutoConfig.for_model('limbeck')).__module__)")
    assert "limbeck.model_type" in said


def test_the_public_names_and_the_modules_are_there():
    said = python(
        "import limbeck\n"
        "print(limbeck.Recipe.__name__, limbeck.LimbeckError.__name__, limbeck.mixers.names()[0])\n"
        "print(callable(limbeck.convert), callable(limbeck.distill), set(limbeck.__all__) <= set(dir(limbeck)))\n"
        "from limbeck import *\n"
        "print(Recipe is limbeck.Recipe, hasattr(limbeck, 'nonsense'), hasattr(limbeck, '__wrapped__'))\n"
    )
    assert said.split() == "Recipe LimbeckError based True True True True False False".split()


NAMES = ["[red]x", "[/tmp]", "r/exp[/old]", "run[v2]", "[link=x]", ":smile:", "a[bold]b[/bold]"]


@pytest.mark.parametrize("console", ["console", "output"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is(console, name):
    printer = getattr(consoles, console)
    table = Table(box=None)
    table.add_column(f"head {name}")
    table.add_row(f"cell {name}")
    with printer.capture() as seen:
        printer.print(f"written to {name}/")
        printer.print(f"kept in {name}", style="dim")
        printer.print(table)
    for words in (f"written to {name}/", f"kept in {name}", f"head {name}", f"cell {name}"):
        assert words in seen.get()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_bar_shows_a_name_as_it_is(name, terminal, monkeypatch):
    monkeypatch.setattr(consoles.console, "_force_terminal", terminal)
    with consoles.console.capture() as seen, consoles.progress(f"tokens of {name}", 2, "steps") as advance:
        advance(1, note=f"at {name}")
        advance(1, note=f"at {name}")
    assert f"tokens of {name}" in seen.get()
    assert f"at {name}" in seen.get()
