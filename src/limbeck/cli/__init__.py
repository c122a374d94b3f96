"""The command line: `limbeck VERB`, one verb a file."""

import os
import sys
import warnings
from typing import Annotated

import typer

from limbeck.console import console
from limbeck.errors import LimbeckError

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
    """Its own bars and advice would stand between ours; so would what torchao says of other machines' kernels."""
    import logging as standard

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        standard.getLogger(name).setLevel(standard.ERROR)


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
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        resumes = {"distill", "study", "assets"} & set(sys.argv)
        console.print("stopped" + ("; the same command goes on from the last checkpoint" if resumes else ""))
        sys.exit(130)
