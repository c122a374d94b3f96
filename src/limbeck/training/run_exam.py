"""The end of a run in figures: the student beside its teacher and beside the untrained window of its own memory.

    window = build_run_window(job, memory)               # a WindowBaseline, or the reason why there is none
    evaluate_held_out(job, student, window, tokens=8192)["window_perplexity"]
    evaluate_exam(job, student, window)["student_repeat_loss@512"]

Teacher and windows are the same for all runs on a teacher and a text, so what they came to is kept in the cache, by
content, and computed once for all students.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from limbeck.core import recipe as recipes
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.live import current
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.core.version import __version__
from limbeck.data.documents import fingerprint_source
from limbeck.data.special_tokens import encode_prompt
from limbeck.evaluation.agreement import clustered_standard_error, compare_students
from limbeck.evaluation.baselines import WindowBaseline, build_window_baseline
from limbeck.evaluation.exam import (
    GAPS,
    HELD_OUT_TEXT,
    REPEAT_TOKENS,
    SHORT_TOKENS,
    ExamDocuments,
    load_exam_documents,
    run_exam,
)
from limbeck.evaluation.free_running import compute_distinct_bigrams, decode
from limbeck.evaluation.long_text import get_context_length
from limbeck.evaluation.stored_states import StoredStates
from limbeck.models.packed import force_attention_masks
from limbeck.training.job import Job

EXAM_TOKENS = 2048
BIGRAM_TOKENS = 64  # of the greedy continuation whose bigrams are counted
WINDOW_VALUES = ("perplexity", "kl", "top1_agreement")  # of the window, in the evaluation on held-out text
REHEARSED_TOKENS = 32


def resolve_exam_tokens(evaluation: recipes.Evaluation, teacher: PreTrainedModel) -> int:
    """Return the tokens of each document in a run's exam; 0 where the recipe asks for none or the context is short."""
    if not evaluation.exam_documents:
        return 0
    context = get_context_length(teacher) or EXAM_TOKENS
    if evaluation.exam_tokens is not None:
        return min(evaluation.exam_tokens, context)
    return min(EXAM_TOKENS, context) if context >= SHORT_TOKENS else 0


def count_evaluation_tokens(evaluation: recipes.Evaluation, teacher: PreTrainedModel) -> int:
    """Count the tokens of a run's evaluation, as many as teacher and student read; the window reads half as many."""
    exam = evaluation.exam_documents * (resolve_exam_tokens(evaluation, teacher) + len(GAPS) * REPEAT_TOKENS)
    return 3 * (evaluation.tokens + (exam if resolve_exam_tokens(evaluation, teacher) else 0)) // 2


def build_run_window(job: Job, memory: dict[str, Any]) -> WindowBaseline | str:
    """Build the untrained window that takes as many bytes as the student's state; the reason, where there is none.

    Args:
        memory: what `measure_cache_sizes` measured.
    """
    try:
        window = build_window_baseline(job.teacher, *_compute_budget(job, memory))
    except LimbeckError as error:
        return error.found
    if job.recipe.attention == "mask":
        force_attention_masks(window.model)
    return window


def describe_run_window(job: Job, window: WindowBaseline | str, memory: dict[str, Any]) -> dict[str, Any]:
    """Return what eval.json says of a run's window: its size beside the student's, or `missing`, the reason."""
    if isinstance(window, str):
        return {"missing": window}
    budget, length = _compute_budget(job, memory)
    sizes = {"state_bytes": window.state_bytes, "student_state_bytes": budget, "length": length}
    return {"tokens": window.window, "sinks": window.sinks, **sizes}


def _compute_budget(job: Job, memory: dict[str, Any]) -> tuple[float, int]:
    """Return the bytes of the student's state and after how many tokens: of the exam, else of a held-out sequence."""
    length = resolve_exam_tokens(job.recipe.evaluation, job.teacher) or job.recipe.data.seq_len
    return memory["student_fixed_bytes"] + length * memory["student_bytes_per_token"], length


def evaluate_held_out(job: Job, student: PreTrainedModel, window: WindowBaseline | str, tokens: int) -> dict[str, Any]:
    """Compare the student with the teacher on held-out text, and the window, whose values begin with `window_`."""
    dataset = job.held_out_dataset(job.recipe.data)
    text = {"text": job.text.key, "length": dataset.length, "tokens": tokens}
    stored = None if isinstance(window, str) else _load(job, {**_describe(window), **text})
    others = [] if isinstance(window, str) or stored is not None else [window.model]
    states = StoredStates(_identify(job, {"kind": "teacher"}))
    own, *rest = compare_students(job.teacher, [student, *others], dataset, tokens, job.autocast, states=states)
    if rest and not isinstance(window, str):
        found = rest[0].summary()
        stored = {name: found["student_perplexity" if name == "perplexity" else name] for name in WINDOW_VALUES}
        _store(job, {**_describe(window), **text}, stored)
    return own.summary() | {f"window_{name}": value for name, value in (stored or {}).items()}


def evaluate_exam(
    job: Job, student: PreTrainedModel, window: WindowBaseline | str, rehearsal: bool = False
) -> dict[str, Any] | None:
    """Examine teacher, student and window on the recipe's documents (`limbeck.evaluation.exam`).

    Args:
        rehearsal: read all documents, but run only the beginning of one through the models.

    Returns:
        None where there is no exam; `missing`, the reason, where the text that comes with Limbeck cannot be had; else
        `<teacher, student or window>_<value>`, their `errors`, `by_position`, and `window_loss_difference`, student
        minus window in nats a token over the same documents.

    Raises:
        LimbeckError: a text of the recipe's own is missing, or has too few or too short documents.
    """
    evaluation = job.recipe.evaluation
    length = resolve_exam_tokens(evaluation, job.teacher)
    if not length:
        return None
    try:
        documents = load_exam_documents(evaluation.exam_text, job.tokenizer, evaluation.exam_documents, length)
    except LimbeckError as error:
        if evaluation.exam_text != HELD_OUT_TEXT:
            raise
        return {"missing": error.found}
    if rehearsal:
        length = min(length, REHEARSED_TOKENS)
        documents = ExamDocuments(documents.source, [documents.tokens[0][:length]], documents.prefix)
    models: dict[str, tuple[PreTrainedModel, dict[str, Any] | None]] = {
        "teacher": (job.teacher, {"kind": "teacher"}),
        "student": (student, None),
    }
    if not isinstance(window, str):
        models["window"] = window.model, _describe(window)
    text = {
        "exam": fingerprint_source(evaluation.exam_text),
        "documents": [len(ids) for ids in documents.tokens],
        "repeats": [REPEAT_TOKENS, *GAPS],
        "prompt": evaluation.prompt,
    }
    records: dict[str, dict[str, Any]] = {}
    for name, (model, content) in models.items():
        identity = None if content is None or rehearsal else {**content, **text}
        records[name] = _compute_once(job, identity, lambda m=model, n=name: _examine(job, m, documents, length, n))  # type: ignore[misc]
        if not rehearsal:
            current().show(f"exam perplexity: {name}", f"{records[name]['values']['perplexity']:.2f}")
    return {
        "text": evaluation.exam_text,
        "documents": len(documents.tokens),
        "length": max(map(len, documents.tokens)),
        "repeat_tokens": REPEAT_TOKENS,
        **{f"{name}_{key}": value for name, record in records.items() for key, value in record["values"].items()},
        **_compare_with_window(records),
        "errors": {
            f"{name}_{key}": value for name, record in records.items() for key, value in record["errors"].items()
        },
        "by_position": {name: record["by_position"] for name, record in records.items()},
    }


def _examine(job: Job, model: PreTrainedModel, documents: ExamDocuments, length: int, name: str) -> dict[str, Any]:
    """Examine one model: values, errors, loss by position, and the mean loss and the targets of each document."""
    with job.autocast():
        result = run_exam(model, documents, length, label=f"exam of the {name}")
        values, errors = result.summarize()
        if job.recipe.evaluation.prompt:
            prompt = torch.tensor([encode_prompt(job.tokenizer, job.recipe.evaluation.prompt)], device=model.device)
            values["distinct_bigrams"] = compute_distinct_bigrams(decode(model, prompt, BIGRAM_TOKENS))
    return {
        "values": values,
        "errors": errors,
        "by_position": result.average_by_position()[0],
        "by_document": [float(losses.double().mean()) for losses in result.documents],
        "targets": [len(losses) for losses in result.documents],
    }


def _compare_with_window(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the loss of the student minus that of the window, document by document, with its standard error."""
    if "window" not in records:
        return {}
    student, window = records["student"], records["window"]
    targets = torch.tensor(student["targets"])
    differences = torch.tensor(student["by_document"]).double() - torch.tensor(window["by_document"]).double()
    per_target = differences.repeat_interleave(targets)
    index = torch.arange(len(targets)).repeat_interleave(targets)
    found = {"window_loss_difference": float(per_target.mean())}
    error = clustered_standard_error(per_target, index)
    return found if error is None else {**found, "window_loss_difference_standard_error": error}


# ------------------------------------------------------------------ what baselines came to, by content


def _describe(window: WindowBaseline) -> dict[str, Any]:
    return {"kind": "window", "window": window.window, "sinks": window.sinks}


def _compute_once(job: Job, identity: dict[str, Any] | None, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a stored result of the same content, or compute and store it; without an identity only compute."""
    stored = _load(job, identity) if identity else None
    if stored is None:
        stored = compute()
        if identity:
            _store(job, identity, stored)
    return stored


def _load(job: Job, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read what was stored of a baseline; None if there is nothing, or nothing readable."""
    path = _get_path(job, identity)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        return None


def _store(job: Job, identity: dict[str, Any], values: dict[str, Any]) -> None:
    """Keep what a baseline came to, unless it diverged; a cache that cannot be written is no reason to fail."""
    path = _get_path(job, identity)
    finite = all(math.isfinite(value) for value in values.get("values", values).values() if isinstance(value, float))
    if path is not None and finite:
        with suppress(LimbeckError, OSError):
            atomic_write_text(path, json.dumps(values) + "\n")


def _get_path(job: Job, identity: dict[str, Any]) -> Path | None:
    """Return the file of a baseline's results, named by all that they depend on; None for a quantized teacher."""
    content = _identify(job, identity)
    if content is None:
        return None
    return cache_root() / "baselines" / f"{digest_facts(content, 32)}.json"


def _identify(job: Job, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Add to what is asked all else that a result of the teacher depends on; None for a quantized teacher."""
    teacher, recipe = job.identity.get("teacher", {}), job.recipe
    if not teacher.get("tensors"):
        return None
    return {
        **identity,
        **{name: teacher[name] for name in ("tensors", "config", "tokenizer")},
        "arithmetic": [job.device.type, recipe.precision, recipe.tf32, recipe.attention, recipe.backend],
        "versions": [__version__, str(torch.__version__), transformers.__version__],
    }
