"""limbeck push: a student with its card to the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError


@app.command()
def push(
    student: Annotated[Path, typer.Argument(help="A run directory, or a student's folder.")],
    repo: Annotated[str, typer.Argument(help="The repository: owner/name, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that only its owner sees.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show everything that would be sent, and stop.")] = False,
    license: Annotated[
        str | None, typer.Option(help="The licence, as the hub writes it, where the teacher's is not found.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher's hub name, where the run has a local folder or there is no run.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="The address of a hub that is not huggingface.co.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before sending.")] = False,
) -> None:
    """Publish a student: writes a model card from the run, checks that all is there, and uploads in one commit."""
    from limbeck.report import upload, upload_plan

    upload_plan.check_repo_id(repo)
    folder = upload_plan.find_student_folder(student)
    if dry_run:
        name = repo if "/" in repo else f"YOUR-NAME/{repo}"
    else:
        if not yes and not sys.stdin.isatty():
            raise LimbeckError("there is nobody to ask before sending", expected="--yes, or --dry-run to look first")
        upload.check_hub_access()
        name = upload.get_full_repo_name(repo, endpoint)
    ready = upload_plan.plan_upload(folder, name, private=private, license=license, teacher=teacher)
    print_package(ready)
    if dry_run:
        print_card(ready.model_card)
        console.print("nothing was sent; without --dry-run it is")
        return
    if not yes and not typer.confirm("send it?"):
        console.print("nothing was sent; --dry-run shows the card too")
        return
    console.print(f"sent: {upload.push_to_hub(ready, endpoint)}")


def print_package(ready: Any) -> None:
    """Print what an upload plan holds."""
    output.print(f"repository: {ready.repo_id} ({'private' if ready.private else 'public'})")
    output.print(f"commit message: {ready.commit_message}")
    width = max(len(f"{item.size:,}") for item in ready.files)
    output.print(f"\n{'bytes':>{width}}  kept in  {'sha256':64}  file", soft_wrap=True)
    for item in ready.files:
        line = f"{item.size:>{width},}  {'LFS' if item.is_lfs else 'git':7}  {item.sha256}  {item.path_in_repo}"
        output.print(line, soft_wrap=True)
    output.print(f"{len(ready.files)} files, {ready.size:,} bytes")
    if ready.skipped_files:
        output.print(f"not sent: {', '.join(ready.skipped_files)}")


def print_card(card: str) -> None:
    """Print a card: rendered on a terminal, as it is anywhere else."""
    output.print("\nREADME.md:\n")
    if not output.is_terminal:
        output.print(card, soft_wrap=True)
        return
    from rich.markdown import Markdown

    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    output.print(head + "\n", style="dim")
    output.print(Markdown(body))
