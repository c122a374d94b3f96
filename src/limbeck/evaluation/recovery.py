"""Recovery of a teacher's benchmark scores by its student.

    values, errors, details = compute_recovery(student, teacher)           # both: task -> TaskScore
    values["recovery"], values["recovery_above_chance"], values["alpha*"]

* recovery: student / teacher, over the tasks on which the teacher scores at all (two standard errors above zero).
* recovery above chance: (student − chance) / (teacher − chance), as in RADLADS (Goldstein et al. 2025). Tasks on which
  the teacher is less than two standard errors above chance are left out: there is nothing to recover.
* C_α: share of the tasks on which student ≥ (1 − α) · teacher, the tolerance-corrected win-and-tie rate of Hauzenberger
  et al. 2026 (arXiv 2603.15590); α* is the least α with C_α ≥ 1/2.

All are means over tasks of equal weight. Standard errors of both recoveries come from the delta method for a ratio of
means over the same items: a bootstrap would draw samples in which the teacher is at chance and divide by almost zero.
Those of C_α and α* are bootstrapped over the items of each task, the same items for both models.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
        values, their standard errors, and details: required tolerances by task, and the tasks of each mean.
    """
    names = list(student)
    scoring = [name for name in names if teacher[name].primary_value > STDERRS_ABOVE_CHANCE * teacher[name].stderr]
    above_chance = [name for name in names if not teacher[name].is_at_chance]
    values, errors = {}, {}
    for label, tasks, subtract_chance in (
        ("recovery", scoring, False),
        ("recovery_above_chance", above_chance, True),
    ):
        if tasks:
            ratios = [
                _ratio_with_stderr(student[name], teacher[name], teacher[name].chance if subtract_chance else 0.0)
                for name in tasks
            ]
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
    bootstrap = _tolerance_statistics(student_draws, teacher_draws)
    for label, value in _tolerance_statistics(student_scores, teacher_scores).items():
        values[label], errors[label] = float(value), float(np.std(bootstrap[label], ddof=1))
    details = {
        "tolerance_needed": dict(zip(names, required_tolerances(student_scores, teacher_scores).tolist())),
        "recovery_tasks": scoring,
        "recovery_above_chance_tasks": above_chance,
        "teacher_at_chance": [name for name in names if name not in above_chance],
    }
    return values, errors, details


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
