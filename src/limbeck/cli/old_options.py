"""Options of the command line that had another name in earlier versions.

    rename_old_options("eval", ["runs/gla", "--length", "512"])       # ["runs/gla", "--seq-len", "512"], and a note

One name means one thing in all verbs: --seq-len is the length of a sequence, --new-tokens what is generated, --student
a mixer, --out where results go, --plan what would be done. Old names keep working, with a note on standard error.
"""

from pathlib import Path

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

# By verb, "" for options in front of the verb: old name -> new name. No option of today may be on the left of its verb.
OLD_OPTIONS: dict[str, dict[str, str]] = {
    "": {"--mixer": "--mixer-file"},
    "bench": {"--batch": "--batch-sizes", "--steps": "--new-tokens", "--int8": "--teacher-int8"},
    "chat": {"--tokens": "--new-tokens"},
    "eval": {"--length": "--seq-len"},
    "families": {"--mixer": "--student"},
    "generate": {"--tokens": "--new-tokens"},
    "push": {"--dry-run": "--plan"},
    "select": {"--judged": "--eval-tokens"},
}


def rename_old_options(verb: str, arguments: list[str]) -> list[str]:
    """Return a verb's arguments with the new names of its options; what is behind "--" stays as it is."""
    names, renamed = OLD_OPTIONS.get(verb, {}), list[str]()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        if name in names:
            console.print(f"note: {name} is now {names[name]}", style="dim")
            argument = f"{names[name]}{equals}{value}"
        renamed.append(argument)
    return renamed + arguments[end:]


def take_old_out(old: Path | None, out: Path | None) -> Path | None:
    """Return where a verb writes, given as --out or, as in earlier versions, as its last argument.

    Raises:
        LimbeckError: both are given.
    """
    if old is None:
        return out
    if out is not None:
        raise LimbeckError(f"{old} and --out {out}", expected="one place to write to: --out")
    console.print(f"note: where to write is now an option: --out {old}", style="dim")
    return old
