"""The end of a run: the student as a Hugging Face folder, measured beside its teacher, and what it all came from.

result = export_and_evaluate(job, run, student)          # writes student/, summary.md and eval.json
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.storage import atomic_folder, compute_sha256, read_manifest
from limbeck.core.system import get_peak_memory
from limbeck.evaluation.agreement import evaluate_agreement
from limbeck.evaluation.timing import measure_cache_sizes
from limbeck.models import group_layers_by_mixer
from limbeck.models.convert import count_student_parameters
from limbeck.models.generation import generate_continuation
from limbeck.models.loading import check_export
from limbeck.report.figures.curves import draw_loss_curves
from limbeck.report.run_summary import format_summary
from limbeck.training.run_directory import RunDirectory
from limbeck.training.setup import Job


def export_and_evaluate(
    job: Job, run: RunDirectory, student: PreTrainedModel, plot_curves: bool = True
) -> dict[str, Any]:
    """Export and evaluate a student; returns the summary that is kept as eval.json."""
    recipe = job.recipe
    student.eval()
    _export(job, run, student)
    stages = [{**s.model_dump(mode="json"), **run.load_stage_metrics(i)} for i, s in enumerate(recipe.stages)]
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    result = evaluate_run(job, student, stages, plan, recipe.evaluation.tokens, recipe.evaluation.new_tokens)
    if plot_curves and importlib.util.find_spec("matplotlib") and run.metrics_path.exists():
        draw_loss_curves(run.metrics_path, run.path / "curves.png")
    run.write_file("summary.md", format_summary(result))
    run.write_file("eval.json", json.dumps(result, indent=1) + "\n")
    return result


def evaluate_run(
    job: Job, student: PreTrainedModel, stages: list[dict[str, Any]], plan: dict[str, Any], tokens: int, new_tokens: int
) -> dict[str, Any]:
    """What is kept as eval.json.

    Args:
        stages: the settings and facts of each.
        plan: as plan.json has it.
        tokens: of held-out text, to measure on.
        new_tokens: of each sample.
    """
    recipe, evaluation = job.recipe, job.recipe.evaluation
    samples = {}
    if evaluation.prompt and new_tokens:
        for name, model in (("teacher", job.teacher), ("student", student)):
            samples[name] = generate_continuation(model, job.tokenizer, evaluation.prompt, new_tokens)
    report = count_student_parameters(student, recipe.student.copy_projections)
    return {
        "run": str(job.path),
        "teacher": recipe.teacher,
        "mixer": recipe.student.mixer,
        "mixers": group_layers_by_mixer(student.config.limbeck, job.num_layers),
        "layers": f"{len(job.sites)} of {job.num_layers}",
        "text": recipe.data.source,
        "held_out": evaluate_agreement(job.teacher, student, job.held_out_dataset(recipe.data), tokens, job.autocast),
        "parameters": vars(report),
        "stages": stages,
        "memory": measure_cache_sizes(job.teacher, student),
        "prompt": evaluation.prompt,
        "samples": samples,
        "evaluation": evaluation.model_dump(mode="json"),
        "compile_refused": job.compile_failures.reasons,
        "seed": recipe.seed,
        "peak_memory_bytes": get_peak_memory(),
        "plan": plan,
    }


def _export(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Save the student as a Hugging Face folder, whole or not at all; it is read again before it takes its place."""
    final = job.path / "student"
    with atomic_folder(final) as folder:
        student.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        check_export(folder, student, job.tokenizer)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": compute_sha256(file)} for file in folder.iterdir()}
        manifest = read_manifest(job.path)
        _set_aside(final, [manifest.get("exported"), manifest.get("exported_before")])
        # written before the folder is exchanged: a run that is killed in between knows both the old and the new one
        run.update_manifest(exported=files, exported_before=manifest.get("exported"))
    student.name_or_path = str(final)  # not the folder beside it, which is gone


def _set_aside(folder: Path, exports: list[dict[str, Any] | None]) -> None:
    """Keep the student of before under another name where somebody changed it, or put files into it.

    Args:
        exports: size and sha256 of each file of all students that the run wrote there.
    """
    known = [exported for exported in exports if exported]
    if not known or not (folder / "config.json").is_file():
        return
    names = {file.name for file in folder.iterdir()}
    if not any(names <= set(exported) and check_exported_files(folder, exported) is None for exported in known):
        place = folder.resolve()
        aside = next(p for n in range(1, 1000) if not (p := place.with_name(f"{place.name}-before-{n}")).exists())
        place.rename(aside)
        console.print(f"{folder} is not as it was written; what was there is kept as {aside}", markup=False)


def check_exported_files(folder: Path, exported: dict[str, Any] | None) -> str | None:
    """What is wrong with an exported student; None where its files are as they were written.

    Args:
        exported: size and sha256 of each, from the manifest; None for a run of a version that did not keep them.
    """
    if not (folder / "config.json").is_file():
        return "it is not there"
    for name, entry in (exported or {}).items():
        file = folder / name
        if not file.is_file():
            return f"{name} is gone"
        if file.stat().st_size != entry["bytes"] or compute_sha256(file) != entry["sha256"]:
            return f"{name} is not what was written there"
    return None


def describe_precision(job: Job) -> dict[str, Any]:
    """In which precision a run computes, and what is compiled."""
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


def provenance(job: Job) -> dict[str, Any]:
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
