"""The command line: `limbeck VERB`, one verb a file."""

import io
import logging as standard
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TerminatedBySignal, TrainingInterrupted, raise_on_signals, restore_handlers
from limbeck.core.storage import explain_write_error

RESUMABLE_COMMANDS = {"distill", "study", "assets", "eval"}  # verbs whose work is kept as it is done

app = typer.Typer(
    name="limbeck",
    help="Distil a pretrained softmax-attention language model into a subquadratic one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from limbeck.core.version import __version__

        output.print(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    mixer: Annotated[
        list[str] | None, typer.Option(help="Load the mixer in this file first, for students that have it.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """What goes before the verb."""
    if mixer:
        from limbeck.mixers import registry

        for file in mixer:
            registry.load_file(file)


def _quiet_transformers() -> None:
    """Its own bars and advice would stand between ours.

    It is not imported for that: `limbeck --help` and a mistyped option need neither it nor torch.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):  # which tell of kernels for other machines
        standard.getLogger(name).setLevel(standard.ERROR)
    if "transformers" not in sys.modules:
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        standard.getLogger(name).setLevel(standard.ERROR)


def _escape_unencodable_output() -> None:
    """A terminal or a pipe that cannot write a character gets its number: `\\u2016` for "‖" ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(error: BaseException) -> NoReturn:
    """Tell how a command ended, and exit with its code. A terminal that is gone hears nothing."""
    stopped = isinstance(error, TrainingInterrupted | TerminatedBySignal | KeyboardInterrupt)
    try:
        if isinstance(error, LimbeckError):
            if not stopped:
                console.print("error: ", end="", style="bold red")
            console.print(str(error), markup=False)
        if stopped:
            console.print("stopped" + ("; the same command resumes" if RESUMABLE_COMMANDS & set(sys.argv) else ""))
    except OSError:
        pass
    sys.exit(getattr(error, "exit_code", 130))


def main() -> None:
    """Entry point: a mistake in what was asked for is told without a traceback, with exit code 2."""
    before = raise_on_signals()
    _in_utf8()
    _escape_unencodable_output()
    try:
        _command()
    except (LimbeckError, TerminatedBySignal, KeyboardInterrupt) as error:
        _end(error)
    except Exception as error:
        told = explain_write_error(error)
        if told is None:
            raise
        _end(told)
    finally:
        restore_handlers(before)


def _in_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding; the terminal keeps its own.

    Names of files would otherwise reach libraries that want UTF-8 in a form that they refuse.
    """
    if sys.getfilesystemencoding().replace("-", "").lower() == "utf8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace")
    os.execv(sys.executable, sys.orig_argv)


def _refuse_bytes(text: str) -> None:
    """Raises LimbeckError for a name that is no UTF-8: no recipe, table or card could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LimbeckError(f"{text!a} holds bytes that are no UTF-8", expected="UTF-8", hint="rename it") from error


def _command() -> None:
    """Run the verb that was asked for."""
    try:
        os.getcwd()
    except OSError as error:
        raise LimbeckError("the current folder has been deleted", expected="one that is there", hint="cd") from error
    for text in (os.getcwd(), *(sys.argv[1:] if "generate" not in sys.argv else ())):  # prompts may hold anything
        _refuse_bytes(text)
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
        recipe,
        report,
        select,
        students,
        study,
    )

    _quiet_transformers()
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    if any(name.endswith("_SIZE") for name in os.environ):  # one of several processes, perhaps
        from limbeck.core.distributed import mute_other_processes

        mute_other_processes()
    app()
