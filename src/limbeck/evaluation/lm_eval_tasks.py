"""The measure `tasks`: benchmarks of lm-evaluation-harness, and how much of its teacher's scores a student recovers.

    limbeck eval runs/quickstart --tasks paper --set tasks.limit=200
    measure_tasks(subject, TaskSettings(names=["arc_easy", "piqa"]))
    best_f1("Paris", ["in Paris, France", "Paris"])                    # 1.0: token F1, as LongBench scores answers

Tasks, formats and metrics are the harness' own; the data are those of an offline pack if one has them
(`limbeck.data.offline.packs`), else the Hub's. Scores are cached per task as soon as they are computed, so a killed
evaluation resumes, and a teacher is scored once for all its students.
"""

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tqdm
from pydantic import Field

from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.extras import require
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.data.offline.question_sets import draw_items
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.recovery import TaskScore, compute_recovery, record_mean
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.truncation import OverlongPolicy
from limbeck.models.fingerprint import find_model_folder, fingerprint_folder

# Tasks whose primary metric is not accuracy: options of unequal length, compared by likelihood per byte.
PRIMARY_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbookqa": "acc_norm"}
BOOTSTRAP_ITERS = 1000  # resamples for metrics whose standard error has no formula
# Part of the key of cached scores; increment it when the same request reaches a model as other tokens.
PROMPT_FORMAT_VERSION = 2


class TaskSettings(MeasureSettings):
    """Settings of the measure `tasks`.

    names: tasks, groups and tags of the harness; 'paper' is LAMBADA, WinoGrande, ARC-easy and -challenge, PIQA and
        HellaSwag.
    limit: items of each task; None for all.
    choose: which items: the first, or drawn with the run's seed.
    few_shot: examples in the context; None for the task's own number (0 for most).
    batch: batch size, or "auto".
    source: an offline pack if one has the data, else the Hub; or only one of the two.
    length: tokens of prompt and answer together; None for the model's context.
    overlong: treatment of prompts that do not fit: an error, or truncation in the middle or on the left.
    chat: apply the model's chat template.
    include: a folder of further task definitions.
    defaults: whether the harness' own tasks are available besides those of `include`.
    """

    names: list[str] = ["paper"]
    limit: Annotated[int, Field(gt=0)] | None = 200
    choose: Literal["first", "drawn"] = "drawn"
    few_shot: Annotated[int, Field(ge=0)] | None = None
    batch: Annotated[int, Field(gt=0)] | Literal["auto"] = 8
    source: Literal["auto", "pack", "hub"] = "auto"
    length: Annotated[int, Field(gt=0)] | None = None
    overlong: OverlongPolicy = "refuse"
    chat: bool = False
    include: str | None = None
    defaults: bool = True


def measure_tasks(subject: Subject, settings: TaskSettings) -> MeasureResult:
    """Score a subject and, for a student with a teacher, compute the recovery of the teacher's scores."""
    require_lm_eval()
    from limbeck.evaluation.harness import TaskCatalog  # needs the extra `eval`

    catalog = TaskCatalog(settings.include, settings.defaults)
    names = catalog.resolve_names(settings.names)
    scores = score_tasks(subject, names, catalog, settings)
    result = MeasureResult(
        values={},
        data={"tasks": names, "harness": lm_eval_version(), "include": fingerprint_folder(settings.include)},
        details={"tasks": {}},
    )
    for name, score in scores.items():
        result.values |= {f"{name} {metric}": value for metric, value in score.values.items()}
        result.errors |= {f"{name} {metric}": error for metric, error in score.errors.items()}
        result.details["tasks"][name] = {**score.details, "metric": score.metric, "chance": score.chance}
    # Perplexities have no primary metric and enter no mean.
    primary = {name: score for name, score in scores.items() if score.metric}
    if not primary:
        return result
    judged = primary
    if subject.is_student and subject.teacher_or_none is not None:
        judged = score_tasks(subject.teacher, list(primary), catalog, settings)
    record_mean(result, "mean score", primary, judged)
    if judged is not primary:
        values, errors, details = compute_recovery(primary, judged, subject.seed)
        result.values |= values
        result.errors |= errors
        result.details |= details
        result.details["teacher"] = {
            name: {"score": score.primary_value, "error": score.stderr} for name, score in judged.items()
        }
    return result


def check_task_settings(settings: TaskSettings) -> None:
    """Raises LimbeckError for what can be checked before a model is loaded: missing harness, unknown tasks."""
    require_lm_eval()
    from limbeck.evaluation.harness import TaskCatalog  # needs the extra `eval`

    TaskCatalog(settings.include, settings.defaults).resolve_names(settings.names)


def require_lm_eval() -> None:
    """Raises LimbeckError if lm-evaluation-harness is not installed."""
    require("lm_eval", "benchmarks")


def lm_eval_version() -> str:
    """Look up the installed version of lm_eval."""
    return importlib.metadata.version("lm_eval")


def score_tasks(subject: Subject, names: list[str], catalog: Any, settings: TaskSettings) -> dict[str, TaskScore]:
    """Score each task, or load its score if the same model was scored with the same settings."""
    return {name: _score_task(subject, name, catalog, settings) for name in names}


def _score_task(subject: Subject, name: str, catalog: Any, settings: TaskSettings) -> TaskScore:
    # both need the extra `eval`
    from lm_eval import evaluate

    # likewise
    from limbeck.evaluation.scorer import PreloadedHFLM

    data_sources = catalog.find_data_sources(name, settings.source, settings.few_shot)
    path = _score_path(subject, name, data_sources, settings)
    cached = None if subject.ignore_cache else _load_score(path)
    if cached is not None:
        return cached
    loaded = catalog.manager.load([catalog.load_task(name, settings.source, settings.few_shot)])
    leaves = loaded["tasks"]
    for task in leaves.values():
        _set_few_shot(task, settings.few_shot, subject.seed)
    items = {leaf: _select_items(leaf, len(task.eval_docs), subject.seed, settings) for leaf, task in leaves.items()}
    scorer = PreloadedHFLM(
        subject.model,
        subject.tokenizer,
        settings.batch,
        settings.length,
        settings.overlong,
        f"{name}, {subject.name}",
    )
    # The harness' bootstrap would fork; a fork of a process with threads can wait forever for a lock of one of them.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with _silence_output():
            output = evaluate(
                lm=scorer,
                task_dict=loaded,
                samples=items,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=True,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
            )
    except (ValueError, AssertionError) as error:
        raise LimbeckError(f"lm-evaluation-harness cannot run {name}: {summarize_error(error)}") from error
    score = _parse_output(name, output, data_sources, list(leaves), settings)
    score.details["cuts"] = [asdict(prompt) for prompt in scorer.truncated_prompts]
    if path is not None:
        atomic_write_text(path, json.dumps(asdict(score)))
    return score


def _set_few_shot(task: Any, few_shot: int | None, seed: int) -> None:
    """Set the number of examples as `simple_evaluate` does: a task that fixes it at 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if few_shot is not None and own != 0:
        task.set_config(key="num_fewshot", value=few_shot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


@contextmanager
def _silence_output() -> Iterator[None]:
    """Silence progress bars and prints of the harness; the scorer reports progress itself."""
    from limbeck.evaluation.harness import silence_harness  # needs the extra `eval`

    # The harness has no option for its bars, so their class is patched as long as it runs.
    original = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), silence_harness():
            yield
    finally:
        tqdm.tqdm.__init__ = original


def _select_items(leaf: str, total: int, seed: int, settings: TaskSettings) -> list[int]:
    """Select the indices of the items to score, ascending."""
    if settings.choose == "first":
        return list(range(min(total, settings.limit or total)))
    return draw_items(leaf, total, settings.limit, seed)


def _parse_output(
    name: str, output: dict[str, Any], data_sources: dict[str, str], leaves: list[str], settings: TaskSettings
) -> TaskScore:
    """Convert the output of `lm_eval.evaluate` for one task or group, with its tasks `leaves`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in output["results"][name].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or isinstance(value, str):
            continue
        metric, is_error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
        if filter_name != "none":  # a task may have several filters
            metric = f"{metric} ({filter_name})"
        (errors if is_error else values)[metric] = float(value)
    samples = [sample for leaf in leaves for sample in output["samples"][leaf]]
    metric = _select_primary_metric(name, leaves, values, output["higher_is_better"].get(name, {}), samples)
    bare_metric, _, filter_name = metric.rstrip(")").partition(" (")
    samples = [sample for sample in samples if sample["filter"] == (filter_name or "none")]
    multiple_choice = output["configs"][leaves[0]]["output_type"] == "multiple_choice"
    chance = [1 / len(sample["arguments"]) if multiple_choice else 0.0 for sample in samples]
    parts = {
        leaf: {
            "items": len(output["samples"][leaf]),
            "of": output["n-samples"][leaf]["original"],
            "chosen": "all" if settings.limit is None else settings.choose,
            "version": output["versions"].get(leaf),
            "few_shot": output["n-shot"].get(leaf),
            "data": data_sources.get(leaf, "hub"),
        }
        for leaf in leaves
    }
    return TaskScore(
        metric=metric,
        values=values,
        errors=errors,
        chance=sum(chance) / max(1, len(chance)),
        items=[float(sample[bare_metric]) for sample in samples] if metric else [],
        details={"parts": parts},
    )


def _select_primary_metric(
    name: str,
    leaves: list[str],
    values: dict[str, float],
    higher_is_better: dict[str, bool],
    samples: list[dict[str, Any]],
) -> str:
    """Select the metric that stands for a task, "" if no metric is a number for each item.

    The one of `PRIMARY_METRICS`, else accuracy, else exact match, else the first metric that is better when higher.
    """
    rising = [metric for metric in values if higher_is_better.get(metric.split(" (")[0])]
    candidates = [PRIMARY_METRICS.get(name, ""), PRIMARY_METRICS.get(leaves[0], ""), "acc", "exact_match", *rising]
    for metric in candidates:
        if metric in values and isinstance(samples[0].get(metric.split(" (")[0]), int | float):
            return metric
    return ""


def _load_score(path: Path | None) -> TaskScore | None:
    """Load a cached score; None if there is no readable one."""
    try:
        return TaskScore(**json.loads(path.read_text(encoding="utf-8"))) if path is not None else None
    except (OSError, ValueError, TypeError):
        return None


def _score_path(subject: Subject, name: str, data_sources: dict[str, str], settings: TaskSettings) -> Path | None:
    """Path of a cached score; None for a model whose files are not on this machine."""
    if find_model_folder(subject.folder) is None:
        return None
    plain_settings = settings.model_dump(mode="json", exclude={"names", "source"})
    plain_settings["include"] = fingerprint_folder(settings.include)
    key = [
        subject.fingerprint,
        str(subject.model.dtype),
        subject.seed,
        name,
        data_sources,
        plain_settings,
        lm_eval_version(),
        PROMPT_FORMAT_VERSION,
    ]
    digest = digest_facts(key, 16)
    return cache_root() / "scores" / subject.fingerprint / f"{name}-{digest}.json"


MEASURE = Measure(
    "tasks",
    "benchmarks of lm-evaluation-harness, and the share of the teacher's scores",
    TaskSettings,
    measure_tasks,
    check_task_settings,
)


# Token F1, as LongBench scores question answering (Bai et al. 2024, arXiv 2308.14508), with SQuAD's normalisation
# (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles. Tokens are separated by spaces and counted
# with their multiplicity.

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> list[str]:
    """Split an answer into normalized tokens.

    Punctuation goes before the articles, so "a." is an article and "a-b" a word.
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Compute the harmonic mean of precision and recall over tokens, in [0, 1]; 0 without a shared token."""
    answer_tokens, reference_tokens = Counter(normalize_answer(answer)), Counter(normalize_answer(reference))
    shared = (answer_tokens & reference_tokens).total()
    # 2 p r / (p + r) with p = shared / answer tokens and r = shared / reference tokens.
    return 2 * shared / (answer_tokens.total() + reference_tokens.total()) if shared else 0.0


def best_f1(answer: str, references: Sequence[str]) -> float:
    """Compute `token_f1` with the best matching reference."""
    return max((token_f1(answer, reference) for reference in references), default=0.0)


def score_answers(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a row with a list `answers`; task definitions name this function in `process_results`.

    The metric has the name that it has in the harness' own LongBench tasks.
    """
    return {"qa_f1_score": best_f1(results[0], doc["answers"])}
