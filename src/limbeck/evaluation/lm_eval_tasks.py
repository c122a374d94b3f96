"""Benchmarks through lm-evaluation-harness: scores, and how much of the teacher's a student keeps.

    limbeck eval runs/quickstart --tasks paper --set tasks.limit=200
    measure_tasks(subject, TaskSettings(names=["arc_easy", "piqa"]))

Tasks, formats and metrics are the harness' own; the data are a pack's where one has them (`limbeck.data.offline.packs`), else the
hub's. A task's score is kept in the cache as soon as it is there, so a killed evaluation goes on, and a teacher is
scored once for all its students.

Token F1 of an answer against references, as LongBench scores question answering (Bai et al. 2024, arXiv 2308.14508).

    token_f1("The Eiffel Tower in Paris", "Eiffel tower")      # precision 2 of 4, recall 2 of 2: 0.667
    best_f1("Paris", ["in Paris, France", "Paris"])            # 1.0

Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single spaces. Tokens
are what spaces then separate, counted with their multiplicity; of several references the one that fits best counts.
`score_answers` is what task definitions of lm-evaluation-harness name in `process_results`.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
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

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.recovery import TaskScore, compute_recovery
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.truncation import OverlongPolicy
from limbeck.models.fingerprint import find_model_folder, fingerprint_folder

# Tasks that another metric than accuracy stands for: options of unequal length, judged by likelihood per byte.
PRIMARY_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbookqa": "acc_norm"}
BOOTSTRAP_ITERS = 1000  # resamples for metrics whose standard error has no formula
PROMPT_FORMAT_VERSION = (
    2  # raise when the same request reaches a model as other tokens: scores that are kept are asked for again
)


class TaskSettings(MeasureSettings):
    """Which tasks, how many items of each, and how they are asked.

    names: tasks, groups and tags of the harness; 'paper' is LAMBADA, WinoGrande, ARC-easy and -challenge, PIQA and
        HellaSwag.
    limit: items of each task; None for all.
    choose: which items: the first, or drawn with the run's seed.
    few_shot: examples in the context; None as the task says (0 for most).
    batch: rows at once, or "auto".
    source: where the data come from: a pack that has them, else the hub; or only one of the two.
    length: tokens of prompt and answer together; None for the model's context.
    overlong: what becomes of a prompt that does not fit: an error, or a cut in the middle or on the left.
    chat: put the questions into the model's chat template.
    include: a folder of further task definitions.
    defaults: whether the harness' own tasks are known; without them `include` says all.
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
    """Scores of a subject and, for a student, what it keeps of its teacher's."""
    require_lm_eval()
    from limbeck.evaluation.harness import TaskCatalog

    catalog = TaskCatalog(settings.include, settings.defaults)
    names = catalog.resolve_names(settings.names)
    scores = score_tasks(subject, names, catalog, settings)
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, score in scores.items():
        values |= {f"{name} {metric}": value for metric, value in score.values.items()}
        errors |= {f"{name} {metric}": error for metric, error in score.errors.items()}
        details[name] = {**score.details, "metric": score.metric, "chance": score.chance}
    about = {"tasks": names, "harness": lm_eval_version(), "include": fingerprint_folder(settings.include)}
    found = MeasureResult(values, errors, about, {"tasks": details})
    ours = {name: score for name, score in scores.items() if score.metric}
    if not ours:
        return found
    values["mean score"] = sum(score.primary_value for score in ours.values()) / len(ours)
    errors["mean score"] = sum(score.stderr**2 for score in ours.values()) ** 0.5 / len(ours)
    if subject.is_student and subject.teacher_or_none is not None:
        theirs = score_tasks(subject.teacher, list(ours), catalog, settings)
        kept, spread, about = compute_recovery(ours, theirs, subject.seed)
        found.values |= kept
        found.errors |= spread
        found.details |= about
        found.details["teacher"] = {
            name: {"score": one.primary_value, "error": one.stderr} for name, one in theirs.items()
        }
    return found


def check_task_settings(settings: TaskSettings) -> None:
    """Raises LimbeckError for what can be seen before a model is loaded: no harness, tasks that there are not."""
    require_lm_eval()
    from limbeck.evaluation.harness import TaskCatalog

    TaskCatalog(settings.include, settings.defaults).resolve_names(settings.names)


def score_tasks(subject: Subject, names: list[str], catalog: Any, settings: TaskSettings) -> dict[str, TaskScore]:
    """A score for each task, from its file where the same model has been asked the same."""
    return {name: _score(subject, name, catalog, settings) for name in names}


def require_lm_eval() -> None:
    """Raises LimbeckError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LimbeckError("benchmarks need lm-evaluation-harness", hint="pip install 'limbeck[eval]'")


def lm_eval_version() -> str:
    """Of the package lm_eval."""
    return importlib.metadata.version("lm_eval")


def _score(subject: Subject, name: str, catalog: Any, settings: TaskSettings) -> TaskScore:
    from lm_eval import evaluate

    from limbeck.evaluation.scorer import PreloadedHFLM

    origins = catalog.find_data_sources(name, settings.source, settings.few_shot)
    path = _score_path(subject, name, origins, settings)
    known = None if subject.ignore_cache else _kept(path)
    if known is not None:
        return known
    task = catalog.load_task(name, settings.source, settings.few_shot)
    loaded = catalog.manager.load([task])
    leaves = loaded["tasks"]
    for one in leaves.values():
        _set_examples(one, settings.few_shot, subject.seed)
    chosen = {leaf: _items(leaf, len(one.eval_docs), subject.seed, settings) for leaf, one in leaves.items()}
    scorer = PreloadedHFLM(
        subject.model,
        subject.tokenizer,
        settings.batch,
        settings.length,
        settings.overlong,
        f"{name}, {subject.name}",
    )
    try:
        # else its bootstrap forks; a fork of a process with threads may wait for ever for a lock that one of them held
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        with _quiet():
            result = evaluate(
                lm=scorer,
                task_dict=loaded,
                samples=chosen,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=True,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
            )
    except (ValueError, AssertionError) as error:
        raise LimbeckError(f"the harness refuses {name}: {summarize_error(error)}") from error
    score = _read(name, result, origins, list(leaves), settings)
    score.details["cuts"] = [asdict(cut) for cut in scorer.truncated_prompts]
    if path is not None:
        atomic_write_text(path, json.dumps(asdict(score)))
    return score


def _set_examples(task: Any, few_shot: int | None, seed: int) -> None:
    """As `simple_evaluate` does it: what a task fixes at 0 stays 0."""
    fixed = task.get_config("num_fewshot")
    if few_shot is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=few_shot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no prints of the harness; ours tell how far it is."""
    from limbeck.evaluation.harness import silence_harness

    before = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(before, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), silence_harness():
            yield
    finally:
        tqdm.tqdm.__init__ = before


def _items(leaf: str, total: int, seed: int, settings: TaskSettings) -> list[int]:
    """Numbers of the items that are asked, ascending."""
    count = min(total, settings.limit or total)
    if settings.choose == "first":
        return list(range(count))
    return sorted(random.Random(f"{seed} {leaf}").sample(range(total), count))


def _read(
    name: str, result: dict[str, Any], origins: dict[str, str], leaves: list[str], settings: TaskSettings
) -> TaskScore:
    """The harness' result in our terms."""
    values, errors = {}, {}
    for key, value in result["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or isinstance(value, str):
            continue
        if kind != "none":  # a filter's name, where a task has several
            metric = f"{metric.removesuffix('_stderr')} ({kind})" + ("_stderr" if metric.endswith("_stderr") else "")
        if metric.endswith("_stderr"):
            errors[metric.removesuffix("_stderr")] = float(value)
        else:
            values[metric] = float(value)
    better = result["higher_is_better"].get(name, {})
    answers = [one for leaf in leaves for one in result["samples"][leaf]]
    metric = _main(name, leaves, values, better, answers)
    bare, _, kind = metric.rstrip(")").partition(" (")
    answers = [one for one in answers if one["filter"] == (kind or "none")]
    choice = result["configs"][leaves[0]]["output_type"] == "multiple_choice"
    guessing = [1 / len(one["arguments"]) if choice else 0.0 for one in answers]
    details = {
        leaf: {
            "items": len(result["samples"][leaf]),
            "of": result["n-samples"][leaf]["original"],
            "chosen": "all" if settings.limit is None else settings.choose,
            "version": result["versions"].get(leaf),
            "few_shot": result["n-shot"].get(leaf),
            "data": origins.get(leaf, "hub"),
        }
        for leaf in leaves
    }
    return TaskScore(
        metric=metric,
        values=values,
        errors=errors,
        chance=sum(guessing) / max(1, len(guessing)),
        items=[float(one[bare]) for one in answers] if metric else [],
        details={"parts": details},
    )


def _main(
    name: str, leaves: list[str], values: dict[str, float], better: dict[str, bool], answers: list[dict[str, Any]]
) -> str:
    """The metric that stands for a task: see `PRIMARY_METRICS`, else accuracy, else the first of which more is better.

    It has to be a number for each item; "" where there is none.
    """

    def counts(metric: str) -> bool:
        return metric in values and isinstance(answers[0].get(metric.split(" (")[0]), int | float)

    rising = [metric for metric in values if better.get(metric.split(" (")[0])]
    wanted = [PRIMARY_METRICS.get(name, ""), PRIMARY_METRICS.get(leaves[0], ""), "acc", "exact_match", *rising]
    return next(filter(counts, wanted), "")


def _kept(path: Path | None) -> TaskScore | None:
    """A score from its file; None where there is none, or none that can be read."""
    try:
        return TaskScore(**json.loads(path.read_text(encoding="utf-8"))) if path is not None else None
    except (OSError, ValueError, TypeError):
        return None


def _score_path(subject: Subject, name: str, origins: dict[str, str], settings: TaskSettings) -> Path | None:
    """Where a score is kept; None for a model whose files are not known."""
    if find_model_folder(subject.folder) is None:
        return None
    asked = settings.model_dump(mode="json", exclude={"names", "source"})
    asked["include"] = fingerprint_folder(settings.include)
    key = [
        subject.fingerprint,
        str(subject.model.dtype),
        subject.seed,
        name,
        origins,
        asked,
        lm_eval_version(),
        PROMPT_FORMAT_VERSION,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_root() / "scores" / subject.fingerprint / f"{name}-{digest}.json"


def draw_tasks(found: list[Measurement]) -> Any:
    """Bars of the scores, see `limbeck.report.figures.measures`."""
    from limbeck.report.figures.measures import draw_benchmarks

    return draw_benchmarks(found)


MEASURE = Measure(
    "tasks",
    "benchmarks of lm-evaluation-harness, and the share of the teacher's scores",
    TaskSettings,
    measure_tasks,
    draw_tasks,
    check_task_settings,
)


ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> list[str]:
    """The tokens of an answer. Punctuation goes before the articles, so "a." is an article and "a-b" a word."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over tokens, in [0, 1]; 0 where they share none, empty ones included."""
    said, meant = Counter(normalize_answer(answer)), Counter(normalize_answer(reference))
    shared = (said & meant).total()
    # 2 p r / (p + r) with p = shared / said and r = shared / meant.
    return 2 * shared / (said.total() + meant.total()) if shared else 0.0


def best_f1(answer: str, references: Sequence[str]) -> float:
    """`token_f1` against the reference that fits best."""
    return max((token_f1(answer, reference) for reference in references), default=0.0)


def score_answers(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness' `process_results` for a row with a list `answers`; the metric has the name that it has there."""
    return {"qa_f1_score": best_f1(results[0], doc["answers"])}
