"""limbeck export: write a student in the format of another engine, and compare the two."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.completion import EXPORT_FORMATS, complete_choices
from limbeck.cli.options import DATA_HELP, Json, Plan, Quiet, count_option
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output

if TYPE_CHECKING:
    from limbeck.evaluation.exported import ExportText
    from limbeck.models.export import Exporter, ExportPlan, Verification
    from limbeck.models.export.record import ExportRecord


@verb(
    "limbeck export runs/rwkv7_gguf --to gguf --quantization f16,q8_0,q4_0",
    "limbeck export runs/qwen3_5 --to qwen3_5 --out exports/student",
    "limbeck export runs/quickstart --to onnx --plan",
)
def export(
    student: Annotated[Path, typer.Argument(help="A run directory, or a student's folder.")],
    to: Annotated[
        str, typer.Option(help="The format: gguf, qwen3_5 or onnx.", autocompletion=complete_choices(EXPORT_FORMATS))
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            help="The precision of the weights, or several joined by commas; for gguf f16, q8_0, q5_1, q5_0, q4_1, "
            "q4_0 or f32."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write, or the parent of several; by default export/ in the run directory."),
    ] = None,
    plan: Plan = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the engine and measure it; by default only where it is installed.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        count_option("Tokens of held-out text for the perplexity in the engine; 0 for none.", show_default="2048"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=DATA_HELP, show_default="for the perplexity, embedded:held-out-wikipedia")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a student for llama.cpp, transformers or onnxruntime.

    What is written is exactly the same model; otherwise it is refused, with the reasons.
    """
    # late, for a fast --help
    from limbeck.core.extras import require
    from limbeck.models import export as exports
    from limbeck.models.export.record import EXPORT_FOLDER, check_free, write_export
    from limbeck.models.loading import load_model_and_tokenizer
    from limbeck.report.upload_plan import find_student_folder

    exporter = exports.get_exporter(to)
    source = find_student_folder(student)
    names = list(dict.fromkeys(name.strip() for name in quantization.split(","))) if quantization else [None]
    parent = out or student / EXPORT_FOLDER
    folders = [out if out and len(names) == 1 else parent / (f"{to}-{name}" if name else to) for name in names]
    if not plan:
        for package in exporter.packages:
            require(package, f"limbeck export --to {to}", "export")
        for folder in folders:
            check_free(folder, force=force)
    loaded, tokenizer = load_model_and_tokenizer(str(source), require_student=True)
    chosen = [exports.check_exportable(exporter, loaded, tokenizer, name) for name in names]
    plans = [exporter.plan(loaded, tokenizer, name) for name in chosen]
    for planned, folder in zip(plans, folders):
        print_export_plan(exporter, planned, folder)
    described = {"format": exporter.name, "engine": exporter.engine}
    if plan:
        if as_json:
            planned_files = [{"folder": folder, **dataclasses.asdict(one)} for folder, one in zip(folders, plans)]
            print_json({**described, "exports": planned_files})
        return
    sample = None if verify is False or tokens == 0 else _load_text(tokenizer, tokens, data)
    records: dict[Path, ExportRecord] = {}
    for name, folder in zip(chosen, folders):
        records[folder] = write_export(exporter, loaded, tokenizer, folder, name, source=source, force=force)
        files = ", ".join(records[folder].files)
        console.print(f"written to {folder}/: {files}", style="dim")
    if verify is not False:
        records |= _measure(exporter, loaded, tokenizer, records, sample, required=bool(verify))
    if as_json:
        written = [{"folder": folder, **dataclasses.asdict(record)} for folder, record in records.items()]
        print_json({**described, "exports": written})
    if any(record.verification is not None and not record.verification.passed for record in records.values()):
        raise typer.Exit(1)


def print_export_plan(exporter: "Exporter", plan: "ExportPlan", folder: Path) -> None:
    """Print layout, files and notes of an export."""
    output.print(f"{exporter.name} for {exporter.engine}, layout {plan.layout}")
    for name, size in plan.files.items():
        output.print(f"  {folder / name}" + (f"  {size / 1e6:,.1f} MB" if size else ""), soft_wrap=True)
    for note in plan.notes:
        output.print(f"  {note}", soft_wrap=True)


def _load_text(tokenizer: Any, tokens: int | None, source: str | None) -> "ExportText | None":
    """Load the text of the perplexity; one that was not asked for may be missing, which is said."""
    # late, for a fast --help
    from limbeck.core.errors import LimbeckError
    from limbeck.evaluation.exported import HELD_OUT_TEXT, TOKENS, load_text

    try:
        return load_text(tokenizer, TOKENS if tokens is None else tokens, source or HELD_OUT_TEXT)
    except LimbeckError as error:
        if tokens is not None or source is not None:
            raise
        console.print(f"no perplexity: {error.found}")
        return None


def _measure(
    exporter: "Exporter",
    student: Any,
    tokenizer: Any,
    records: dict[Path, "ExportRecord"],
    text: "ExportText | None",
    *,
    required: bool,
) -> dict[Path, "ExportRecord"]:
    """Compare the written files with the student, and keep the results; none where the engine is missing."""
    # late, for a fast --help
    from limbeck.evaluation.exported import PROMPT, ExportMeasurer
    from limbeck.models.export import EngineMissingError

    measurer = ExportMeasurer(exporter, student, tokenizer, text)
    measured: dict[Path, ExportRecord] = {}
    for folder, record in records.items():
        try:
            result = measurer.measure(folder, record)
        except EngineMissingError as error:
            if required:
                raise
            console.print(f"not verified: {error.found}; {error.hint}")
            return measured
        measured[folder] = result
        assert result.verification is not None
        output.print(format_verification(result.verification))
        if result.rates is not None:
            rates, threads = result.rates, result.rates.threads
            speed = f"{rates.engine:.1f} tokens/s (transformers: {rates.student:.1f})"
            output.print(f"{exporter.engine} at {speed}, {threads} thread{'s' * (threads != 1)}:")
            output.print(f"  {PROMPT}{measurer.continuation}", soft_wrap=True)
        console.print(f"kept in {folder}/export.json", style="dim")
    if text is not None:
        output.print(build_score_table(list(measured.values()), text))
    return measured


def build_score_table(records: list["ExportRecord"], text: "ExportText") -> Table:
    """Set the written files' perplexity beside the student's own."""
    title = f"perplexity of {text.targets:,} tokens of {text.source}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("weights", "in", "MB", "perplexity", "of the student's"):
        table.add_column(column, justify="left" if column in ("weights", "in") else "right")
    scores = [record.score for record in records if record.score is not None]
    if scores:
        table.add_row("the student", "Limbeck", "", f"{scores[0].student_perplexity:.2f}", "")
    for record in records:
        if record.score is not None:
            ratio = record.score.perplexity / record.score.student_perplexity - 1
            cells = (f"{record.size / 1e6:,.1f}", f"{record.score.perplexity:.2f}", f"{ratio:+.2%}")
            table.add_row(record.quantization, record.engine, *cells)
    return table


def format_verification(result: "Verification") -> str:
    """Word how far the engine is from the student."""
    verdict = "verified" if result.passed else "NOT the same model"
    allowed = f"; allowed: {result.limit:.2g}"
    prompt, steps = f"{result.prompt_difference:.2g} as a prompt", f"{result.step_difference:.2g} step by step"
    lines = [
        f"{verdict}: {result.engine} ({result.version}) on {result.tokens} tokens",
        f"  largest difference of a logit: {prompt}, {steps}" + ("" if result.rounded else allowed),
        f"  typical difference: {result.typical_difference:.2g}" + (allowed if result.rounded else ""),
        f"  (the logits' standard deviation is {result.logit_deviation:.2g}); same most likely token: "
        f"{result.same_token:.0%}",
    ]
    if not result.same_text_tokens:
        lines.append("  the engine's tokenizer splits a sample text otherwise")
    return "\n".join(lines)
