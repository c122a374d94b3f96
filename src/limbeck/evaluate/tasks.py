"""Benchmarks through lm-evaluation-harness: scores, and how much of the teacher's a student keeps.

    limbeck eval runs/quickstart --tasks paper --set tasks.limit=200
    measure_tasks(subject, TaskSettings(names=["arc_easy", "piqa"]))

Tasks, formats and metrics are the harness' own; the data are a pack's where one has them (`limbeck.packs`), else the
hub's. A task's score is kept in the cache as soon as it is there, so a killed evaluation goes on, and a teacher is
scored once for all its students.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tqdm
from pydantic import Field

from limbeck.data.cache import cache_root, write_text
from limbeck.errors import LimbeckError, sentences
from limbeck.evaluate.fitting import Overlong
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import Found, Measure, Settings
from limbeck.evaluate.shares import Score, shares
from limbeck.evaluate.subject import Subject
from limbeck.identity import files_in, folder_of

# Tasks that another metric than accuracy stands for: options of unequal length, judged by likelihood per byte.
MAIN = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbookqa": "acc_norm"}
BOOTSTRAP = 1000  # resamples for metrics whose standard error has no formula
PROMPTS = 2  # raise when the same request reaches a model as other tokens: scores that are kept are asked for again


class TaskSettings(Settings):
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
    overlong: Overlong = "refuse"
    chat: bool = False
    include: str | None = None
    defaults: bool = True


def measure_tasks(subject: Subject, settings: TaskSettings) -> Found:
    """Scores of a subject and, for a student, what it keeps of its teacher's."""
    needs_the_harness()
    from limbeck.evaluate.harness import Catalogue

    catalogue = Catalogue(settings.include, settings.defaults)
    names = catalogue.expand(settings.names)
    scores = scores_of(subject, names, catalogue, settings)
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, score in scores.items():
        values |= {f"{name} {metric}": value for metric, value in score.values.items()}
        errors |= {f"{name} {metric}": error for metric, error in score.errors.items()}
        details[name] = {**score.details, "metric": score.metric, "chance": score.chance}
    about = {"tasks": names, "harness": harness_version(), "include": files_in(settings.include)}
    found = Found(values, errors, about, {"tasks": details})
    ours = {name: score for name, score in scores.items() if score.metric}
    if not ours:
        return found
    values["mean score"] = sum(score.main for score in ours.values()) / len(ours)
    errors["mean score"] = sum(score.error**2 for score in ours.values()) ** 0.5 / len(ours)
    if subject.student and subject.base is not None:
        theirs = scores_of(subject.teacher, list(ours), catalogue, settings)
        kept, spread, about = shares(ours, theirs, subject.seed)
        found.values |= kept
        found.errors |= spread
        found.details |= about
        found.details["teacher"] = {name: {"score": one.main, "error": one.error} for name, one in theirs.items()}
    return found


def check_tasks(settings: TaskSettings) -> None:
    """Raises LimbeckError for what can be seen before a model is loaded: no harness, tasks that there are not."""
    needs_the_harness()
    from limbeck.evaluate.harness import Catalogue

    Catalogue(settings.include, settings.defaults).expand(settings.names)


def scores_of(subject: Subject, names: list[str], catalogue: Any, settings: TaskSettings) -> dict[str, Score]:
    """A score for each task, from its file where the same model has been asked the same."""
    return {name: _score(subject, name, catalogue, settings) for name in names}


def needs_the_harness() -> None:
    """Raises LimbeckError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LimbeckError("benchmarks need lm-evaluation-harness", hint="pip install 'limbeck[eval]'")


def harness_version() -> str:
    """Of the package lm_eval."""
    return importlib.metadata.version("lm_eval")


def _score(subject: Subject, name: str, catalogue: Any, settings: TaskSettings) -> Score:
    from lm_eval import evaluate

    from limbeck.evaluate.scorer import Scorer

    origins = catalogue.origins(name, settings.source, settings.few_shot)
    path = _file(subject, name, origins, settings)
    known = None if subject.again else _kept(path)
    if known is not None:
        return known
    task = catalogue.build(name, settings.source, settings.few_shot)
    loaded = catalogue.manager.load([task])
    leaves = loaded["tasks"]
    for one in leaves.values():
        _set_examples(one, settings.few_shot, subject.seed)
    chosen = {leaf: _items(leaf, len(one.eval_docs), subject.seed, settings) for leaf, one in leaves.items()}
    scorer = Scorer(
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
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
            )
    except (ValueError, AssertionError) as error:
        raise LimbeckError(f"the harness refuses {name}: {sentences(error)}") from error
    score = _read(name, result, origins, list(leaves), settings)
    score.details["cuts"] = [asdict(cut) for cut in scorer.cuts]
    if path is not None:
        write_text(path, json.dumps(asdict(score)))
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
    from limbeck.evaluate.harness import quiet

    before = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(before, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), quiet():
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
) -> Score:
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
    return Score(
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
    """The metric that stands for a task: see `MAIN`, else accuracy, else the first of which more is better.

    It has to be a number for each item; "" where there is none.
    """

    def counts(metric: str) -> bool:
        return metric in values and isinstance(answers[0].get(metric.split(" (")[0]), int | float)

    rising = [metric for metric in values if better.get(metric.split(" (")[0])]
    wanted = [MAIN.get(name, ""), MAIN.get(leaves[0], ""), "acc", "exact_match", *rising]
    return next(filter(counts, wanted), "")


def _kept(path: Path | None) -> Score | None:
    """A score from its file; None where there is none, or none that can be read."""
    try:
        return Score(**json.loads(path.read_text(encoding="utf-8"))) if path is not None else None
    except (OSError, ValueError, TypeError):
        return None


def _file(subject: Subject, name: str, origins: dict[str, str], settings: TaskSettings) -> Path | None:
    """Where a score is kept; None for a model whose files are not known."""
    if folder_of(subject.folder) is None:
        return None
    asked = settings.model_dump(mode="json", exclude={"names", "source"})
    asked["include"] = files_in(settings.include)
    key = [subject.weights, str(subject.model.dtype), subject.seed, name, origins, asked, harness_version(), PROMPTS]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_root() / "scores" / subject.weights / f"{name}-{digest}.json"


def draw(found: list[Measurement]) -> Any:
    """Bars of the scores, see `limbeck.report.tasks`."""
    from limbeck.report.tasks import bars

    return bars(found)


MEASURE = Measure(
    "tasks",
    "benchmarks of lm-evaluation-harness, and the share of the teacher's scores",
    TaskSettings,
    measure_tasks,
    draw,
    check_tasks,
)
