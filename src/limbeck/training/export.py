"""End a run: export the student as a Hugging Face folder and evaluate it beside its teacher.

result = export_and_evaluate(job, run, student)          # writes student/, summary.md and eval.json
"""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, read_manifest
from limbeck.core.system import get_peak_memory
from limbeck.evaluation.timing import measure_cache_sizes
from limbeck.models import group_layers_by_mixer
from limbeck.models.conversion import count_student_parameters
from limbeck.models.export import get_exporter
from limbeck.models.generation import generate_continuation
from limbeck.models.head_groups import describe_softmax_heads
from limbeck.models.saved_check import check_export
from limbeck.report.figures.curves import draw_loss_curves
from limbeck.report.run_summary import format_summary
from limbeck.report.teacher_info import get_teacher_name
from limbeck.report.text_plot import plot_run
from limbeck.training.job import Job
from limbeck.training.run_directory import RunDirectory
from limbeck.training.run_exam import build_run_window, describe_run_window, evaluate_exam, evaluate_held_out


def export_and_evaluate(
    job: Job, run: RunDirectory, student: PreTrainedModel, plot_curves: bool = True
) -> dict[str, Any]:
    """Export and evaluate a student; returns the content of eval.json."""
    recipe = job.recipe
    student.eval()
    _export(job, run, student)
    stages = [{**s.model_dump(mode="json"), **run.load_stage_metrics(i)} for i, s in enumerate(recipe.stages)]
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    result = evaluate_run(job, student, stages, plan, recipe.evaluation.tokens, recipe.evaluation.new_tokens)
    if plot_curves:
        _draw_pictures(job, run, result)
    run.write_file("summary.md", format_summary(result))
    run.write_file("eval.json", json.dumps(result, indent=1) + "\n")
    return result


def _draw_pictures(job: Job, run: RunDirectory, result: dict[str, Any]) -> None:
    """Draw the training losses into the run directory, and a picture of the run on the terminal if there is one."""
    recipe = job.recipe
    if run.metrics_path.exists():
        if importlib.util.find_spec("matplotlib"):
            title = f"{run.path.name}: {recipe.student.mixer} student of {get_teacher_name(recipe.teacher)}"
            draw_loss_curves(run.metrics_path, run.path / "curves.png", title)
        else:
            console.print("no curves.png: figures need matplotlib; pip install 'limbeck[report]'")
    if console.is_interactive and not console.options.ascii_only:
        plot = plot_run(result, console.width)
        if plot is not None:
            console.print(plot)


def _export(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Save the student as a Hugging Face folder, and load it again before it replaces an earlier export."""
    final = job.path / "student"
    with atomic_folder(final) as folder:
        student.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        check_export(folder, student, job.tokenizer)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": compute_sha256(file)} for file in folder.iterdir()}
        manifest = read_manifest(job.path)
        _rename_if_edited(final, [manifest.get("exported"), manifest.get("exported_before")])
        # Written before the folder is replaced: a run that is killed in between knows both the old and the new export.
        run.update_manifest(exported=files, exported_before=manifest.get("exported"))
    student.name_or_path = str(final)  # not the temporary folder, which no longer exists


def _rename_if_edited(folder: Path, exports: list[dict[str, Any] | None]) -> None:
    """Keep an earlier export under another name if somebody edited it or added files to it.

    Args:
        exports: size and sha256 of each file, of the exports that this run wrote to the folder.
    """
    recorded = [files for files in exports if files]
    if not recorded or not (folder / "config.json").is_file():
        return
    names = {file.name for file in folder.iterdir()}
    if not any(names <= set(files) and check_exported_files(folder, files) is None for files in recorded):
        target = folder.resolve()
        backup = next(p for n in range(1, 1000) if not (p := target.with_name(f"{target.name}-before-{n}")).exists())
        target.rename(backup)
        console.print(f"{folder} was edited after its export; it has been kept as {backup}", markup=False)


def check_exported_files(folder: Path, exported: dict[str, Any] | None) -> str | None:
    """Return what is wrong with an exported student, or None if its files are unchanged.

    Args:
        exported: size and sha256 of each file, from the manifest; None in runs of versions that did not record them.
    """
    if not (folder / "config.json").is_file():
        return "it does not exist"
    for name, entry in (exported or {}).items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or compute_sha256(file) != entry["sha256"]:
            return f"{name} has been changed"
    return None


def evaluate_run(
    job: Job,
    student: PreTrainedModel,
    stages: list[dict[str, Any]],
    plan: dict[str, Any],
    tokens: int,
    new_tokens: int,
    rehearsal: bool = False,
) -> dict[str, Any]:
    """Evaluate a student beside its teacher and the untrained window of its memory; returns the content of eval.json.

    Args:
        stages: settings and results of each stage.
        plan: the content of plan.json.
        tokens: number of held-out tokens to evaluate on.
        new_tokens: length of the sampled continuations.
        rehearsal: run only the beginning of the exam.
    """
    recipe, evaluation = job.recipe, job.recipe.evaluation
    samples = {}
    if evaluation.prompt and new_tokens:
        for name, model in (("teacher", job.teacher), ("student", student)):
            samples[name] = generate_continuation(model, job.tokenizer, evaluation.prompt, new_tokens)
    parameters = count_student_parameters(student, recipe.student.copy_projections)
    memory = measure_cache_sizes(job.teacher, student)
    window = build_run_window(job, memory)
    return {
        "run": str(job.path),
        "teacher": recipe.teacher,
        "mixer": recipe.student.mixer,
        "mixers": group_layers_by_mixer(student.config.limbeck, job.num_layers),
        "softmax_heads": describe_softmax_heads(student.config.limbeck),
        "layers": f"{len(job.sites)} of {job.num_layers}",
        "text": recipe.data.source,
        "held_out": evaluate_held_out(job, student, window, tokens),
        "exam": evaluate_exam(job, student, window, rehearsal),
        "window": describe_run_window(job, window, memory),
        "parameters": vars(parameters),
        "stages": stages,
        "memory": memory,
        "chats": bool(getattr(job.tokenizer, "chat_template", None)),
        "exports": _list_export_formats(job, student),
        "held_out_tokens": job.text.held_out_tokens,
        "prompt": evaluation.prompt,
        "samples": samples,
        "evaluation": evaluation.model_dump(mode="json"),
        "compile_refused": job.compile_failures.reasons,
        "seed": recipe.seed,
        "peak_memory_bytes": get_peak_memory(),
        "plan": plan,
    }


def _list_export_formats(job: Job, student: PreTrainedModel) -> list[str]:
    """List the formats of other engines that a student fits as it is, of those that can be told without running it."""
    found = []
    for name in ("gguf", "qwen3_5"):
        with contextlib.suppress(ImportError, LimbeckError):  # an optional package is missing
            if not get_exporter(name).check(student, job.tokenizer):
                found.append(name)
    return found


def provenance(job: Job) -> dict[str, Any]:
    """Describe what a run is made of, for its manifest: teacher, student, text, seed, device, arithmetic."""
    return {
        **job.identity,
        "tokens_key": job.text.key,
        "train_tokens": job.text.train_tokens,
        "held_out_tokens": job.text.held_out_tokens,
        "texts": {
            name: {"key": text.key, "files": text.files, "contents": text.content_fingerprints}
            for name, text in job.texts.items()
        },
        "seed": job.recipe.seed,
        "device": str(job.device),
        "arithmetic": describe_precision(job),
        "backend": job.recipe.backend,
    }


def describe_precision(job: Job) -> dict[str, Any]:
    """Describe the arithmetic of a run: dtypes, determinism, compilation, attention."""
    with job.autocast():
        mixed = torch.is_autocast_enabled(job.device.type)
        products = torch.get_autocast_dtype(job.device.type) if mixed else torch.float32
    return {
        "products": str(products).removeprefix("torch."),
        "tf32": job.recipe.tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": job.recipe.deterministic,
        "compile": job.compile_enabled,
        "attention": job.recipe.attention,
    }
