"""limbeck export: write a student in the format of another engine, and compare the two."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.cli.completion import EXPORT_FORMATS, complete_choices
from limbeck.cli.options import Json, Plan, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output

if TYPE_CHECKING:
    from limbeck.models.export import Exporter, ExportPlan, Verification


@verb(
    "limbeck export runs/rwkv7_gguf --to gguf --quantization q8_0",
    "limbeck export runs/qwen3_5 --to qwen3_5 --out exports/student",
    "limbeck export runs/quickstart --to onnx --plan",
)
def export(
    student: Annotated[Path, typer.Argument(help="A run directory, or a student's folder.")],
    to: Annotated[
        str, typer.Option(help="The format: gguf, qwen3_5 or onnx.", autocompletion=complete_choices(EXPORT_FORMATS))
    ],
    quantization: Annotated[
        str | None, typer.Option(help="The precision of the weights; for gguf f16, q8_0 or f32.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default export/ in the run directory.")
    ] = None,
    plan: Plan = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the engine; by default only where it is installed.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a student for llama.cpp, transformers or onnxruntime.

    What is written is exactly the same model; otherwise it is refused, with the reasons.
    """
    # late, for a fast --help
    from limbeck.models import export as exports
    from limbeck.models.loading import load_model_and_tokenizer
    from limbeck.report.upload_plan import find_student_folder

    exporter = exports.get_exporter(to)
    source = find_student_folder(student)
    folder = out or student / "export" / (f"{to}-{quantization}" if quantization else to)
    if not plan:
        exports.check_free(folder, force=force)
    loaded, tokenizer = load_model_and_tokenizer(str(source), require_student=True)
    quantization = exports.check_exportable(exporter, loaded, tokenizer, quantization)
    planned = exporter.plan(loaded, tokenizer, quantization)
    document = {"format": exporter.name, "engine": exporter.engine, "folder": folder, **dataclasses.asdict(planned)}
    if not as_json:
        print_export_plan(exporter, planned, folder)
    if plan:
        if as_json:
            print_json(document)
        return
    exports.write_export(exporter, loaded, tokenizer, folder, quantization, force=force)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    console.print(f"written to {folder}/: {', '.join(str(path.relative_to(folder)) for path in files)}", style="dim")
    result = None
    if verify is not False:
        result = _verify(exporter, loaded, tokenizer, folder, required=bool(verify))
    if as_json:
        written = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        print_json({**document, "files": written, "verification": result})
    elif result is not None:
        output.print(format_verification(result))
    if result is not None and not result.passed:
        raise typer.Exit(1)


def print_export_plan(exporter: "Exporter", plan: "ExportPlan", folder: Path) -> None:
    """Print layout, files and notes of an export."""
    output.print(f"{exporter.name} for {exporter.engine}, layout {plan.layout}")
    for name, size in plan.files.items():
        output.print(f"  {folder / name}" + (f"  {size / 1e6:,.1f} MB" if size else ""), soft_wrap=True)
    for note in plan.notes:
        output.print(f"  {note}", soft_wrap=True)


def _verify(
    exporter: "Exporter", student: Any, tokenizer: Any, folder: Path, *, required: bool
) -> "Verification | None":
    """Compare with the engine and keep the result; None, and a note, where the engine is not installed."""
    # late, for a fast --help
    from limbeck.models.export import EngineMissingError, save_verification

    try:
        result = exporter.verify(student, tokenizer, folder)
    except EngineMissingError as error:
        if required:
            raise
        console.print(f"not verified: {error.found}; {error.hint}")
        return None
    console.print(f"kept in {save_verification(folder, result)}", style="dim")
    return result


def format_verification(result: "Verification") -> str:
    """Word how far the engine is from the student."""
    verdict = "verified" if result.passed else "NOT the same model"
    limit = f"{result.limit:.2g} (the logits' standard deviation is {result.logit_deviation:.2g})"
    prompt, steps = f"{result.prompt_difference:.2g} as a prompt", f"{result.step_difference:.2g} step by step"
    lines = [
        f"{verdict}: {result.engine} ({result.version}) on {result.tokens} tokens",
        f"  largest difference of a logit: {prompt}, {steps}; allowed: {limit}",
        f"  same most likely token: {result.same_token:.0%}",
    ]
    if not result.same_text_tokens:
        lines.append("  the engine's tokenizer splits a sample text otherwise")
    return "\n".join(lines)
