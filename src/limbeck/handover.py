"""The end of a run: the student as a Hugging Face folder, measured beside its teacher, and what it all came from.

result = hand_over(job, run, student)          # writes student/, summary.md and eval.json
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.console import console
from limbeck.data.cache import no_room_is_an_error, sha256_of
from limbeck.evaluate.agreement import agreement
from limbeck.evaluate.memory import cache_sizes
from limbeck.generate import continuation
from limbeck.machine import peak_memory
from limbeck.model import by_mixer
from limbeck.model.convert import parameter_report
from limbeck.prepare import Job
from limbeck.report.curves import draw
from limbeck.stages.run import RunDirectory, manifest_of
from limbeck.summary import write_summary


def hand_over(job: Job, run: RunDirectory, student: PreTrainedModel, curves: bool = True) -> dict[str, Any]:
    """Export and evaluate a student; returns the summary that is kept as eval.json."""
    recipe = job.recipe
    student.eval()
    _export(job, run, student)
    evaluation = recipe.evaluation
    stages = [{**s.model_dump(mode="json"), **run.facts(i)} for i, s in enumerate(recipe.stages)]
    samples = {}
    if evaluation.prompt and evaluation.new_tokens:
        for name, model in (("teacher", job.teacher), ("student", student)):
            samples[name] = continuation(model, job.tokenizer, evaluation.prompt, evaluation.new_tokens)
    report = parameter_report(student, recipe.student.copy_projections)
    result = {
        "run": str(job.path),
        "teacher": recipe.teacher,
        "mixer": recipe.student.mixer,
        "mixers": by_mixer(student.config.limbeck, job.layers),
        "layers": f"{len(job.sites)} of {job.layers}",
        "text": recipe.data.source,
        "held_out": agreement(job.teacher, student, job.held_out(recipe.data), evaluation.tokens, job.autocast),
        "parameters": vars(report),
        "stages": stages,
        "memory": cache_sizes(job.teacher, student),
        "prompt": evaluation.prompt,
        "samples": samples,
        "evaluation": evaluation.model_dump(mode="json"),
        "compile_refused": job.compiling.reasons,
        "seed": recipe.seed,
        "peak_memory_bytes": peak_memory(),
        "plan": json.loads((run.path / "plan.json").read_text(encoding="utf-8")),
    }
    if curves and importlib.util.find_spec("matplotlib") and run.metrics.exists():
        draw(run.metrics, run.path / "curves.png")
    run.write("summary.md", write_summary(result))
    run.write("eval.json", json.dumps(result, indent=1) + "\n")
    return result


def _export(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Save the student as a Hugging Face folder, whole or not at all."""
    final = job.path / "student"
    temporary = job.path / ".student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with no_room_is_an_error(job.path):
        student.save_pretrained(temporary)
        job.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in temporary.iterdir()}
        _make_way(final, manifest_of(job.path).get("exported"))
        temporary.rename(final)
        run.manifest(exported=files)


def _make_way(folder: Path, exported: dict[str, Any] | None) -> None:
    """Delete the student of before; one that somebody changed, or put files into, is kept under another name."""
    foreign = exported and folder.is_dir() and any(file.name not in exported for file in folder.iterdir())
    if foreign or (exported and (folder / "config.json").is_file() and missing_of(folder, exported)):
        aside = next(p for n in range(1, 1000) if not (p := folder.with_name(f"{folder.name}-before-{n}")).exists())
        folder.rename(aside)
        console.print(f"{folder} is not as it was written; what was there is kept as {aside}", markup=False)
    shutil.rmtree(folder, ignore_errors=True)


def missing_of(folder: Path, exported: dict[str, Any] | None) -> str | None:
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
        if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            return f"{name} is not what was written there"
    return None


def arithmetic_of(job: Job) -> dict[str, Any]:
    """In which precision a run computes, and what is compiled."""
    with job.autocast():
        mixed = torch.is_autocast_enabled(job.device.type)
        products = torch.get_autocast_dtype(job.device.type) if mixed else torch.float32
    return {
        "products": str(products).removeprefix("torch."),
        "tf32": job.recipe.tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": job.recipe.deterministic,
        "compile": job.compiles,
        "attention": job.recipe.attention,
    }


def provenance(job: Job) -> dict[str, Any]:
    return {
        **job.identity,
        "tokens_key": job.text.key,
        "train_tokens": job.text.train_tokens,
        "held_out_tokens": job.text.held_out_tokens,
        "texts": {
            name: {"key": text.key, "files": text.files, "contents": text.contents} for name, text in job.texts.items()
        },
        "seed": job.recipe.seed,
        "device": str(job.device),
        "arithmetic": arithmetic_of(job),
        "backend": job.recipe.backend,
    }
