"""The command line: `limbeck VERB`, one verb a file."""

import logging as standard
import os
import sys
import warnings
from typing import Annotated

import typer

from limbeck.console import console, output
from limbeck.errors import LimbeckError

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
        from limbeck import __version__

        output.print(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
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


def main() -> None:
    """Entry point: a mistake in what was asked for is told without a traceback, with exit code 2."""
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
    try:
        if any(name.endswith("_SIZE") for name in os.environ):  # one of several processes, perhaps
            from limbeck.distributed import one_voice

            one_voice()
        app()
    except LimbeckError as error:
        console.print("error: ", end="", style="bold red")
        console.print(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        resumes = {"distill", "study", "assets"} & set(sys.argv)
        console.print("stopped" + ("; the same command goes on from the last checkpoint" if resumes else ""))
        sys.exit(130)
