"""The command line: `limbeck COMMAND`, one module for each command.

    limbeck --help
    limbeck distill --student gla

Modules of commands import only what their help needs; everything that brings torch is imported inside the command, so
that `--help` and mistyped options answer at once.
"""

import io
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from limbeck.cli.verbs import VERBS, app
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TerminatedBySignal, TrainingInterrupted, raise_on_signals, restore_handlers
from limbeck.core.storage import explain_write_error

RESUMABLE_COMMANDS = {"distill", "study", "assets", "eval"}  # they save their work as they go
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")  # they report kernels for other machines


def _print_version(requested: bool) -> None:
    if requested:
        from limbeck.core.version import __version__

        output.print(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    mixer_file: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py", help="Load the mixer in this file first, for students that use it."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, then exit.")
    ] = False,
) -> None:
    """Options that apply to every command."""
    if mixer_file:
        # late: most commands load no file
        from limbeck.mixers import registry

        for file in mixer_file:
            registry.load_file(file)


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and exits with code 2."""
    previous_handlers = raise_on_signals()
    _restart_in_utf8()
    _escape_unencodable_output()
    try:
        _run_command()
    except (LimbeckError, TerminatedBySignal, KeyboardInterrupt) as error:
        _exit(error)
    except Exception as error:
        write_error = explain_write_error(error)
        if write_error is None:
            raise
        _exit(write_error)
    finally:
        restore_handlers(previous_handlers)


def _run_command() -> None:
    """Import the commands and run the requested one."""
    try:
        os.getcwd()
    except OSError as error:
        raise LimbeckError("the current folder has been deleted", expected="a folder that exists", hint="cd") from error
    for text in (os.getcwd(), *(sys.argv[1:] if "generate" not in sys.argv else ())):  # prompts may hold anything
        _check_utf8(text)
    # late, after names that cannot be are refused
    for name in VERBS:
        import_module(f"limbeck.cli.{name}")
    _quiet_libraries()
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    if any(name.endswith("_SIZE") for name in os.environ):  # perhaps one of several processes
        # late: it imports torch
        from limbeck.core.distributed import mute_other_processes

        mute_other_processes()
    app()


def _escape_unencodable_output() -> None:
    """Print characters that a terminal or a pipe cannot encode by number, `\\u2016` for "‖", instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _restart_in_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding; the terminal keeps its own.

    Otherwise file names would reach libraries that require UTF-8 in a form that they refuse.
    """
    if sys.getfilesystemencoding().replace("-", "").lower() == "utf8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace")
    os.execv(sys.executable, sys.orig_argv)


def _check_utf8(text: str) -> None:
    """Raise LimbeckError for a name that is not UTF-8: no recipe, table or card could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LimbeckError(f"{text!a} contains bytes that are not UTF-8", expected="UTF-8", hint="rename it") from error


def _quiet_libraries() -> None:
    """Silence progress bars and advice of transformers and torch, which would mix with our output.

    Nothing is imported for that: environment variables do where transformers is not loaded yet.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        # late: only if it is loaded already
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit(error: BaseException) -> NoReturn:
    """Print how a command ended, and exit with its code."""
    interrupted = isinstance(error, TrainingInterrupted | TerminatedBySignal | KeyboardInterrupt)
    try:
        if isinstance(error, LimbeckError):
            if not interrupted:
                console.print("error: ", end="", style="bold red")
            console.print(str(error))
        if interrupted:
            console.print("stopped" + ("; the same command resumes" if RESUMABLE_COMMANDS & set(sys.argv) else ""))
    except OSError:  # the terminal may be gone
        pass
    sys.exit(getattr(error, "exit_code", 130))
