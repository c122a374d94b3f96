"""limbeck push: upload a student with its model card to the Hugging Face Hub."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.options import Quiet
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError


@verb(
    "limbeck push runs/quickstart your-name/student --plan", "limbeck push runs/quickstart your-name/student --private"
)
def push(
    student: Annotated[Path, typer.Argument(help="A run directory, or a student's folder.")],
    repo: Annotated[str, typer.Argument(help="The repository: owner/name; without an owner, one of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print everything that would be uploaded, then exit.")] = False,
    license: Annotated[
        str | None, typer.Option(help="The license as a Hub identifier, if the teacher's is not found.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher's Hub name, if the run has a local folder or there is no run.")
    ] = None,
    exports: Annotated[
        bool,
        typer.Option(
            "--exports/--no-exports", help="Send along what `limbeck export` wrote of this student.", show_default=True
        ),
    ] = True,
    endpoint: Annotated[str | None, typer.Option(help="The URL of a Hub other than huggingface.co.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking for confirmation.")] = False,
    quiet: Quiet = False,
) -> None:
    """Upload a student, with a card made from its run, to the Hub.

    All files go in one commit, after a check that they are complete and name no path of this machine.
    """
    # late, for a fast --help
    from limbeck.report import upload, upload_plan

    upload_plan.check_repo_id(repo)
    folder = upload_plan.find_student_folder(student)
    if plan:
        name = repo if "/" in repo else f"YOUR-NAME/{repo}"
    else:
        if not yes and not sys.stdin.isatty():
            raise LimbeckError(
                "cannot ask for confirmation: standard input is not a terminal",
                expected="--yes to upload, or --plan to look first",
            )
        upload.check_hub_access()
        name = upload.get_full_repo_name(repo, endpoint)
    planned = upload_plan.plan_upload(folder, name, private=private, license=license, teacher=teacher, exports=exports)
    print_upload_plan(planned)
    if plan:
        print_card(planned.model_card)
        console.print("Nothing was uploaded; run without --plan to upload.")
        return
    if not yes and not typer.confirm("Upload?"):
        console.print("Nothing was uploaded; --plan also shows the card.")
        return
    console.print(f"uploaded: {upload.push_to_hub(planned, endpoint)}")


def print_upload_plan(plan: Any) -> None:
    """Print repository, commit message and files of a `limbeck.report.upload_plan.UploadPlan`."""
    output.print(f"repository: {plan.repo_id} ({'private' if plan.private else 'public'})")
    output.print(f"commit message: {plan.commit_message}")
    width = max(len(f"{item.size:,}") for item in plan.files)
    output.print(f"\n{'bytes':>{width}}  kept in  {'sha256':64}  file", soft_wrap=True)
    for item in plan.files:
        line = f"{item.size:>{width},}  {'LFS' if item.is_lfs else 'git':7}  {item.sha256}  {item.path_in_repo}"
        output.print(line, soft_wrap=True)
    output.print(f"{len(plan.files)} files, {plan.size:,} bytes")
    if plan.exports_size:
        output.print(f"of which {plan.exports_size:,} bytes are exports; --no-exports leaves them out", soft_wrap=True)
    if plan.skipped_files:
        output.print(f"not uploaded: {', '.join(plan.skipped_files)}")
    for name, problem in plan.skipped_exports.items():
        output.print(f"not uploaded: {name} {problem}", soft_wrap=True)


def print_card(card: str) -> None:
    """Print a card: rendered on a terminal, as plain text anywhere else."""
    output.print("\nREADME.md:\n")
    if not output.is_terminal:
        output.print(card, soft_wrap=True)
        return
    # late: only terminals need it
    from rich.markdown import Markdown

    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    output.print(head + "\n", style="dim")
    output.print(Markdown(body))
