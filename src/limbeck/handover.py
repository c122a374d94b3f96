"""The end of a run: the student as a Hugging Face folder, measured beside its teacher, and what it all came from.

result = hand_over(job, run, student)          # writes student/, summary.md and eval.json
"""

import importlib.util
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.data.cache import made_aside
from limbeck.evaluate.agreement import agreement
from limbeck.evaluate.memory import cache_sizes
from limbeck.generate import continuation
from limbeck.machine import peak_memory
from limbeck.model import by_mixer
from limbeck.model.convert import parameter_report
from limbeck.model.exported import check_export
from limbeck.prepare import Job
from limbeck.report.curves import draw
from limbeck.stages.run import RunDirectory
from limbeck.summary import write_summary


def hand_over(job: Job, run: RunDirectory, student: PreTrainedModel, curves: bool = True) -> dict[str, Any]:
    """Export and evaluate a student; returns the summary that is kept as eval.json."""
    recipe = job.recipe
    student.eval()
    _export(job, student)
    stages = [{**s.model_dump(mode="json"), **run.facts(i)} for i, s in enumerate(recipe.stages)]
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    result = measured(job, student, stages, plan, recipe.evaluation.tokens, recipe.evaluation.new_tokens)
    if curves and importlib.util.find_spec("matplotlib") and run.metrics.exists():
        draw(run.metrics, run.path / "curves.png")
    run.write("summary.md", write_summary(result))
    run.write("eval.json", json.dumps(result, indent=1) + "\n")
    return result


def measured(
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
            samples[name] = continuation(model, job.tokenizer, evaluation.prompt, new_tokens)
    report = parameter_report(student, recipe.student.copy_projections)
    return {
        "run": str(job.path),
        "teacher": recipe.teacher,
        "mixer": recipe.student.mixer,
        "mixers": by_mixer(student.config.limbeck, job.layers),
        "layers": f"{len(job.sites)} of {job.layers}",
        "text": recipe.data.source,
        "held_out": agreement(job.teacher, student, job.held_out(recipe.data), tokens, job.autocast),
        "parameters": vars(report),
        "stages": stages,
        "memory": cache_sizes(job.teacher, student),
        "prompt": evaluation.prompt,
        "samples": samples,
        "evaluation": evaluation.model_dump(mode="json"),
        "compile_refused": job.compiling.reasons,
        "seed": recipe.seed,
        "peak_memory_bytes": peak_memory(),
        "plan": plan,
    }


def _export(job: Job, student: PreTrainedModel) -> None:
    """Save the student as a Hugging Face folder, whole or not at all; it is read again before it takes its place."""
    with made_aside(job.path / "student") as folder:
        student.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        check_export(folder, student, job.tokenizer)


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
        "teacher": {"name": job.recipe.teacher, "architecture": type(job.teacher).__name__},
        "tokens_key": job.text.key,
        "train_tokens": job.text.train_tokens,
        "held_out_tokens": job.text.held_out_tokens,
        "texts": {name: {"key": text.key, "files": text.files} for name, text in job.texts.items()},
        "seed": job.recipe.seed,
        "device": str(job.device),
        "arithmetic": arithmetic_of(job),
        "backend": job.recipe.backend,
    }
