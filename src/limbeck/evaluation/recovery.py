"""Recovery of a teacher's benchmark scores by its student.

    values, errors, details = compute_recovery(student, teacher)           # both: task -> TaskScore
    values["recovery"], values["recovery_above_chance"], values["alpha*"]
    record_mean(result, "mean score", student, teacher)               # without tasks on which the teacher only guesses

* recovery: student / teacher.
* recovery above chance: (student − chance) / (teacher − chance), as in RADLADS (Goldstein et al. 2025).
* C_α: share of the tasks on which student ≥ (1 − α) · teacher, the tolerance-corrected win-and-tie rate of Hauzenberger
  et al. 2026 (arXiv 2603.15590); α* is the least α with C_α ≥ 1/2.

All are means over tasks of equal weight. Tasks on which the teacher is less than two standard errors above chance are
left out of all of them: there is nothing to recover, and what a student scores there is noise. Standard errors of both
recoveries come from the delta method for a ratio of means over the same items: a bootstrap would draw samples in which
the teacher is at chance and divide by almost zero. Those of C_α and α* are bootstrapped over the items of each task,
the same items for both models.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limbeck.evaluation.measure import MeasureResult

TOLERANCES = (0.0, 0.01, 0.05, 0.1)
RESAMPLES = 1000
ROUNDING = 1e-9  # rounding error that must not turn a tie into a loss
STDERRS_ABOVE_CHANCE = 2.0  # standard errors by which a teacher must exceed chance


@dataclass
class TaskScore:
    """The score of a model on a task.

    metric: the primary metric; "" if there is none (perplexities), then the task enters no mean.
    values, errors: all metrics of the task, and their standard errors.
    chance: expected `metric` of guessing.
    items: `metric` of each item, in the order of the data.
    details: counts, versions, data, by task of a group.
    """

    metric: str
    values: dict[str, float]
    errors: dict[str, float]
    chance: float
    items: list[float]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def primary_value(self) -> float:
        """Value of the primary metric."""
        return self.values[self.metric]

    @property
    def stderr(self) -> float:
        """Standard error of the primary metric; 0 for a single item."""
        n = len(self.items)
        return float(np.std(self.items, ddof=1) / math.sqrt(n)) if n > 1 else 0.0

    @property
    def is_at_chance(self) -> bool:
        """Whether the score is less than two standard errors above guessing."""
        return self.primary_value <= self.chance + STDERRS_ABOVE_CHANCE * self.stderr


def compute_recovery(
    student: dict[str, TaskScore], teacher: dict[str, TaskScore], seed: int = 0
) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Compute recovery, recovery above chance, C_α and α*.

    Args:
        student, teacher: scores on the same items of the same tasks.
        seed: seed of the bootstrap.

    Returns:
        values, their standard errors, and details: required tolerances by task, the tasks that count and the others.
        No values if no task counts.
    """
    at_chance = list_at_chance(teacher)
    names = [name for name in student if name not in at_chance]
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for label, subtract_chance in (("recovery", False), ("recovery_above_chance", True)):
        ratios = [
            _ratio_with_stderr(student[name], teacher[name], teacher[name].chance if subtract_chance else 0.0)
            for name in names
        ]
        if ratios:
            values[label] = float(np.mean([ratio for ratio, _ in ratios]))
            # Tasks are independent, so the variance of their mean is the sum over the square of their number.
            errors[label] = math.sqrt(sum(error**2 for _, error in ratios)) / len(ratios)

    student_scores, teacher_scores = (
        np.array([scores[name].primary_value for name in names]) for scores in (student, teacher)
    )
    rng = np.random.default_rng(seed)
    student_draws, teacher_draws = np.empty((2, RESAMPLES, len(names)))
    for task, name in enumerate(names):
        items = np.stack([student[name].items, teacher[name].items])  # [2, items]
        draws = rng.integers(0, items.shape[1], size=(RESAMPLES, items.shape[1]))
        student_draws[:, task], teacher_draws[:, task] = items[:, draws].mean(axis=-1)
    if names:
        bootstrap = _tolerance_statistics(student_draws, teacher_draws)
        for label, value in _tolerance_statistics(student_scores, teacher_scores).items():
            values[label], errors[label] = float(value), float(np.std(bootstrap[label], ddof=1))
    details = {
        "tolerance_needed": dict(zip(names, required_tolerances(student_scores, teacher_scores).tolist())),
        "recovery_tasks": names,
        "teacher_at_chance": at_chance,
    }
    return values, errors, details


def list_at_chance(teacher: dict[str, TaskScore]) -> list[str]:
    """List the tasks on which a teacher is less than two standard errors above guessing: nothing there can be lost."""
    return [name for name, score in teacher.items() if score.is_at_chance]


def record_mean(result: MeasureResult, name: str, scores: dict[str, TaskScore], teacher: dict[str, TaskScore]) -> None:
    """Put the mean of a model's scores into a result, over the tasks on which its teacher is above chance.

    The others are named in `details["teacher_at_chance"]`, and tables mark them. There is no mean if no task is left.

    Args:
        teacher: its teacher's scores on the same tasks; its own if it is one, or if its teacher is unknown.
    """
    at_chance = list_at_chance(teacher)
    marked = result.details.setdefault("teacher_at_chance", [])
    marked += [task for task in at_chance if task not in marked]
    kept = [score for task, score in scores.items() if task not in at_chance]
    if kept:
        result.values[name] = sum(score.primary_value for score in kept) / len(kept)
        result.errors[name] = sum(score.stderr**2 for score in kept) ** 0.5 / len(kept)


def _ratio_with_stderr(student: TaskScore, teacher: TaskScore, chance: float) -> tuple[float, float]:
    """Compute (student - chance) / (teacher - chance) of a task and its standard error by the delta method."""
    denominator = teacher.primary_value - chance
    ratio = (student.primary_value - chance) / denominator
    n = len(teacher.items)
    if n < 2:
        return ratio, 0.0
    # Residual of each item around the ratio: its variance over the items, divided by n, is that of the numerator.
    residuals = np.asarray(student.items, float) - chance - ratio * (np.asarray(teacher.items, float) - chance)
    return ratio, float(np.std(residuals, ddof=1) / math.sqrt(n) / denominator)


def _tolerance_statistics(student: np.ndarray, teacher: np.ndarray) -> dict[str, np.ndarray]:
    """Compute C at each tolerance, and α*, from scores [..., tasks]."""
    required = required_tolerances(student, teacher)
    rates = {f"C at tolerance {alpha:g}": np.mean(required <= alpha + ROUNDING, axis=-1) for alpha in TOLERANCES}
    return rates | {"alpha*": critical_tolerance(required)}


def required_tolerances(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Compute for each task the least α ≥ 0 with student ≥ (1 − α) · teacher: [..., tasks]; 0 if it scores 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(teacher > 0, 1 - student / teacher, 0.0)
    return np.where(loss > ROUNDING, loss, 0.0)


def critical_tolerance(required: np.ndarray) -> np.ndarray:
    """Compute α*, the least α within which half of the tasks are, from [..., tasks]: [...]."""
    half = math.ceil(required.shape[-1] / 2)
    return np.sort(required, axis=-1)[..., half - 1]
