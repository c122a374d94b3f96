"""The command line: `limbeck VERB`, one verb a file."""

import io
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from limbeck.console import console
from limbeck.data.cache import refusal
from limbeck.errors import LimbeckError
from limbeck.stages.interrupt import Ended, Stopped, end_on_signals

RESUMES = {"distill", "study", "assets", "eval"}  # verbs whose work is kept as it is done

app = typer.Typer(
    name="limbeck",
    help="Distil a pretrained softmax-attention language model into a subquadratic one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def everywhere(
    mixer: Annotated[
        list[str] | None, typer.Option(help="Load the mixer in this file first, for students that have it.")
    ] = None,
) -> None:
    """What goes before the verb."""
    if mixer:
        from limbeck.mixers import registry

        for file in mixer:
            registry.load_file(file)


def _quiet_transformers() -> None:
    """Its own bars and advice would stand between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _any_encoding() -> None:
    """A terminal or a pipe that cannot write a character gets its number: `\\u2016` for "‖" ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(error: BaseException) -> NoReturn:
    """Tell how a command ended, and exit with its code. A terminal that is gone hears nothing."""
    stopped = isinstance(error, Stopped | Ended | KeyboardInterrupt)
    try:
        if isinstance(error, LimbeckError):
            if not stopped:
                console.print("[bold red]error:[/] ", end="")
            console.print(str(error), markup=False)
        if stopped:
            console.print("stopped" + ("; the same command resumes" if RESUMES & set(sys.argv[1:2]) else ""))
    except OSError:
        pass
    sys.exit(getattr(error, "exit_code", 130))


def main() -> None:
    """Entry point: a mistake in what was asked for is told without a traceback, with exit code 2."""
    end_on_signals()
    _any_encoding()
    try:
        _command()
    except (LimbeckError, Ended, KeyboardInterrupt) as error:
        _end(error)
    except Exception as error:
        told = refusal(error) or _unspeakable(error)
        if told is None:
            raise
        _end(told)


def _unspeakable(error: BaseException) -> LimbeckError | None:
    """What to do about a name that the locale cannot write, which the system's calls raise as an UnicodeEncodeError."""
    if not isinstance(error, UnicodeEncodeError):
        return None
    if error.encoding.replace("-", "").lower() == "utf8":
        return LimbeckError(
            f"{error.object[:200]!a} holds bytes that are no UTF-8", expected="names in UTF-8", hint="rename it"
        )
    return LimbeckError(
        f"{error.object[:200]!a} cannot be written in this locale's encoding, {error.encoding}",
        expected="a locale with UTF-8",
        hint="export PYTHONUTF8=1   (or LC_ALL=C.UTF-8)",
    )


def _command() -> None:
    """Run the verb that was asked for."""
    try:
        os.getcwd()
    except OSError as error:
        raise LimbeckError("the current folder has been deleted", expected="one that is there", hint="cd") from error
    from limbeck.cli import (  # noqa: F401
        assets,
        bench,
        check,
        convert,
        distill,
        doctor,
        eval,
        families,
        generate,
        matrices,
        push,
        report,
        select,
        students,
        study,
    )

    _quiet_transformers()
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    if any(name.endswith("_SIZE") for name in os.environ):  # one of several processes, perhaps
        from limbeck.distributed import one_voice

        one_voice()
    app()
