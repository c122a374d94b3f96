"""limbeck export: write a student in the format of another engine, and compare the two."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.cli import app
from limbeck.cli.options import examples
from limbeck.core.console import console, output

if TYPE_CHECKING:
    from limbeck.models.export import Exporter, ExportPlan, Verification


@app.command(
    epilog=examples(
        "limbeck export runs/rwkv7_gguf --to gguf --quantization q8_0",
        "limbeck export runs/qwen3_5 --to qwen3_5 --out exports/student",
        "limbeck export runs/quickstart --to onnx --plan",
    )
)
def export(
    student: Annotated[Path, typer.Argument(help="A run directory, or a student's folder.")],
    to: Annotated[str, typer.Option(help="The format: gguf, qwen3_5 or onnx.")],
    quantization: Annotated[
        str | None, typer.Option(help="The precision of the weights; for gguf f16, q8_0 or f32.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default export/ in the run directory.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be written, then exit.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the engine; by default only where it is installed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a student for llama.cpp, transformers or onnxruntime: exactly the same model, or the reasons why not."""
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
    print_export_plan(exporter, exporter.plan(loaded, tokenizer, quantization), folder)
    if plan:
        return
    exports.write_export(exporter, loaded, tokenizer, folder, quantization, force=force)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    console.print(f"written to {folder}/: {', '.join(str(path.relative_to(folder)) for path in files)}", style="dim")
    if verify is not False:
        _verify(exporter, loaded, tokenizer, folder, required=bool(verify))


def print_export_plan(exporter: "Exporter", plan: "ExportPlan", folder: Path) -> None:
    """Print layout, files and notes of an export."""
    output.print(f"{exporter.name} for {exporter.engine}, layout {plan.layout}")
    for name, size in plan.files.items():
        output.print(f"  {folder / name}" + (f"  {size / 1e6:,.1f} MB" if size else ""), soft_wrap=True)
    for note in plan.notes:
        output.print(f"  {note}", soft_wrap=True)


def _verify(exporter: "Exporter", student: Any, tokenizer: Any, folder: Path, *, required: bool) -> None:
    """Compare with the engine and keep the result; exits with code 1 if the difference is above the bound."""
    # late, for a fast --help
    from limbeck.models.export import EngineMissingError, save_verification

    try:
        result = exporter.verify(student, tokenizer, folder)
    except EngineMissingError as error:
        if required:
            raise
        console.print(f"not verified: {error.found}; {error.hint}")
        return
    path = save_verification(folder, result)
    output.print(format_verification(result))
    console.print(f"kept in {path}", style="dim")
    if not result.passed:
        raise typer.Exit(1)


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
