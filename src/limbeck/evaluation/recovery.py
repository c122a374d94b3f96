"""How much of its teacher's scores a student keeps, over a set of tasks.

    kept = compute_recovery(student, teacher)           # both: task -> TaskScore
    kept["recovery"], kept["recovery_above_chance"], kept["alpha*"]

* recovery: student / teacher, of the tasks on which the teacher scores at all (two standard errors above zero).
* recovery above chance: (student − chance) / (teacher − chance), as in RADLADS (Goldstein et al. 2025). A teacher that is
  itself at chance has nothing to keep: tasks on which it is less than two standard errors above are left out.
* C_α: share of the tasks on which student ≥ (1 − α) · teacher, the tolerance-corrected win-and-tie rate of Hauzenberger
  et al. 2026 (arXiv 2603.15590); α* is the least α with C_α ≥ 1/2.

All are means over tasks of equal weight. Standard errors of the two shares come from the delta method for a ratio of
means over the same items: a bootstrap meets draws in which the teacher is at chance and divides by next to nothing.
Those of C_α and α* are bootstrapped over the items of each task, the same items for both models.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOLERANCES = (0.0, 0.01, 0.05, 0.1)
RESAMPLES = 1000
ROUNDING = 1e-9  # what arithmetic may lose without turning a tie into a loss
STDERRS_ABOVE_CHANCE = 2.0  # standard errors above chance from which a teacher is said to do a task


@dataclass
class TaskScore:
    """One model on one task.

    metric: the one that stands for the task; "" where none does (perplexities), and it enters no mean.
    values, errors: all metrics of the task, and their standard errors.
    chance: what guessing gives of `metric`.
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
        """The value that stands for the task."""
        return self.values[self.metric]

    @property
    def stderr(self) -> float:
        """Its standard error; 0 where there is a single item."""
        n = len(self.items)
        return float(np.std(self.items, ddof=1) / math.sqrt(n)) if n > 1 else 0.0

    @property
    def is_at_chance(self) -> bool:
        """Less than two standard errors above guessing."""
        return self.primary_value <= self.chance + STDERRS_ABOVE_CHANCE * self.stderr


def required_tolerances(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """For each task the least α ≥ 0 with student ≥ (1 − α) · teacher; 0 where the teacher scores 0. [..., tasks]"""
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(teacher > 0, 1 - student / teacher, 0.0)
    return np.where(lost > ROUNDING, lost, 0.0)


def critical_tolerance(needed: np.ndarray) -> np.ndarray:
    """α*: the least α within which half of the tasks lie. [..., tasks] -> [...]"""
    half = math.ceil(needed.shape[-1] / 2)
    return np.sort(needed, axis=-1)[..., half - 1]


def compute_recovery(
    student: dict[str, TaskScore], teacher: dict[str, TaskScore], seed: int = 0
) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Values, their standard errors, and by task what was taken in.

    Args:
        student, teacher: the same tasks on the same items.
    """
    names = list(student)
    chance = np.array([teacher[name].chance for name in names])
    ours, theirs = (np.array([one[name].primary_value for name in names]) for one in (student, teacher))
    scored = np.array([teacher[name].primary_value > STDERRS_ABOVE_CHANCE * teacher[name].stderr for name in names])
    done = np.array([not teacher[name].is_at_chance for name in names])
    values, errors = {}, {}
    for label, floor, counted in (("recovery", 0 * chance, scored), ("recovery_above_chance", chance, done)):
        if counted.any():
            kept = [
                _ratio(student[name], teacher[name], float(floor[at])) for at, name in enumerate(names) if counted[at]
            ]
            values[label] = float(np.mean([ratio for ratio, _ in kept]))
            # tasks are independent, so the variance of their mean is the sum over the square of their number
            errors[label] = math.sqrt(sum(error**2 for _, error in kept)) / len(kept)
    rng = np.random.default_rng(seed)
    drawn_s, drawn_t = np.empty((2, RESAMPLES, len(names)))
    for at, name in enumerate(names):
        items = np.stack([student[name].items, teacher[name].items])  # [2, items]
        draws = rng.integers(0, items.shape[1], size=(RESAMPLES, items.shape[1]))
        drawn_s[:, at], drawn_t[:, at] = items[:, draws].mean(axis=-1)
    found, spread = _within_tolerance(ours, theirs), _within_tolerance(drawn_s, drawn_t)
    for label, value in found.items():
        values[label], errors[label] = float(value), float(np.std(spread[label], ddof=1))
    details = {
        "tolerance_needed": dict(zip(names, required_tolerances(ours, theirs).tolist())),
        "recovery_tasks": [name for name, one in zip(names, scored) if one],
        "recovery_above_chance_tasks": [name for name, one in zip(names, done) if one],
        "teacher_at_chance": [name for name, one in zip(names, done) if not one],
    }
    return values, errors, details


def _ratio(student: TaskScore, teacher: TaskScore, floor: float) -> tuple[float, float]:
    """(student - floor) / (teacher - floor) of one task and its standard error by the delta method."""
    above = teacher.primary_value - floor
    ratio = (student.primary_value - floor) / above
    n = len(teacher.items)
    if n < 2:
        return ratio, 0.0
    # the part of the ratio that an item adds to or takes from: its variance over the items, over n
    lost = np.asarray(student.items, float) - floor - ratio * (np.asarray(teacher.items, float) - floor)
    return ratio, float(np.std(lost, ddof=1) / math.sqrt(n) / above)


def _within_tolerance(ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """C at each tolerance, and alpha*; the arrays are [..., tasks]."""
    needed = required_tolerances(ours, theirs)
    found = {f"C at tolerance {alpha:g}": np.mean(needed <= alpha + ROUNDING, axis=-1) for alpha in TOLERANCES}
    return found | {"alpha*": critical_tolerance(needed)}
