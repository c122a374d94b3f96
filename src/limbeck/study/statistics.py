"""Is a difference between arms there? Effects paired within a seed, a test over seeds, and a verdict.

    effect = Difference("perplexity", log_perplexity, plus={"student": ("retnet",)}, minus={"student": ("gla",)})
    judge(effect.by_seed(rows), kind="more", margin=0.01).verdict          # "holds", "does not hold", "undecided"

A row is an arm's record (`limbeck.study.record`). What repeats a study is a seed, so a seed gives one number: the mean
over all places of the grid at which both sides were measured. The numbers of all seeds go into a paired t test (one
sample of differences) and a percentile bootstrap of their mean, both from scipy.
"""

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from limbeck.errors import LimbeckError

Row = dict[str, Any]
Metric = Callable[[Row], float | None]
Where = dict[str, tuple[Any, ...]]  # axis -> values
Verdict = Literal["holds", "does not hold", "undecided"]

FEWEST_SEEDS = 3
ALPHA = 0.05
RESAMPLES = 9999


@dataclass(frozen=True)
class Finding:
    """What the numbers of all seeds say.

    effect: their mean; low, high: its 95 % bootstrap interval; p: of the one-sided paired t test of the verdict.
    consistent: share of the single comparisons that point the same way as the statement.
    reason: why it is undecided, where that is so.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    by_seed: dict[str, float]
    consistent: float | None = None
    comparisons: int = 0
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Term:
    """A weight, the metric that is weighed, and the rows over which it is averaged at a place of the grid."""

    weight: float
    metric: Metric
    where: Where


@dataclass(frozen=True)
class Effect:
    """A weighted sum of averages, taken at every place of the grid where all of its terms were measured.

    within: only these rows count.
    """

    terms: tuple[Term, ...]
    within: Where | None = None

    def at_places(self, rows: list[Row]) -> dict[str, list[float]]:
        """The sum at each place, by seed."""
        free = {axis for term in self.terms for axis in term.where}
        places: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if all(row["axes"].get(axis) in values for axis, values in (self.within or {}).items()):
                rest = {a: v for a, v in row["axes"].items() if a != "seed" and a not in free}
                places.setdefault((str(row["axes"]["seed"]), repr(sorted(rest.items()))), []).append(row)
        found: dict[str, list[float]] = {}
        for (seed, _), members in places.items():
            parts = [self._average(term, members) for term in self.terms]
            if all(part is not None for part in parts):
                total = sum(term.weight * part for term, part in zip(self.terms, parts) if part is not None)
                found.setdefault(seed, []).append(total)
        return found

    @staticmethod
    def _average(term: Term, members: list[Row]) -> float | None:
        chosen = [row for row in members if all(row["axes"].get(a) in v for a, v in term.where.items())]
        values = [value for value in (term.metric(row) for row in chosen) if value is not None and math.isfinite(value)]
        return sum(values) / len(values) if values else None


def difference(metric: Metric, plus: Where, minus: Where, within: Where | None = None) -> Effect:
    """metric(plus) - metric(minus)."""
    return Effect((Term(1.0, metric, plus), Term(-1.0, metric, minus)), within)


def judge(found: dict[str, list[float]], kind: Literal["more", "little"], margin: float, tests: int = 1) -> Finding:
    """A verdict over seeds.

    "more" holds where the effect is above zero and at least `margin`, and does not hold where it is below `margin`.
    "little" is its counterpart: it holds where the effect is below `margin`, and does not where it is above.

    Args:
        found: single effects by seed.
        margin: the smallest effect that matters.
        tests: how many findings one rejection would overturn together; its level is divided by that.
    """
    singles = [value for values in found.values() for value in values]
    by_seed = {seed: sum(values) / len(values) for seed, values in sorted(found.items())}
    values = list(by_seed.values())
    if not values:
        return Finding("undecided", None, None, None, None, {}, reason="not measured")
    mean = statistics.fmean(values)
    agreeing = [value > 0 if kind == "more" else value < margin for value in singles]
    consistent = sum(agreeing) / len(agreeing)
    if len(values) < FEWEST_SEEDS:
        reason = f"{len(values)} seed{'s' * (len(values) > 1)}, {FEWEST_SEEDS} are needed"
        return Finding("undecided", mean, None, None, None, by_seed, consistent, len(singles), reason)
    low, high = _interval(values)
    above, below = _p(values, 0.0 if kind == "more" else margin, "greater"), _p(values, margin, "less")
    level = ALPHA / tests
    if kind == "more":
        yes, no = above < ALPHA and low > 0 and mean >= margin, below < level and high < margin
        p = above
    else:
        yes, no = below < ALPHA and high < margin, above < level and low > margin
        p = below
    verdict: Verdict = "holds" if yes else "does not hold" if no else "undecided"
    reason = "" if verdict != "undecided" else "the seeds differ too much for the size of the effect"
    return Finding(verdict, mean, low, high, p, by_seed, consistent, len(singles), reason)


def _p(values: list[float], null: float, alternative: str) -> float:
    """One-sided p of a one-sample t test; of equal values 0 or 1."""
    if max(values) == min(values):
        return float(not (values[0] > null if alternative == "greater" else values[0] < null))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences of rounding size
        return float(_scipy().ttest_1samp(values, null, alternative=alternative).pvalue)


def _interval(values: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean, the same for the same values."""
    if max(values) == min(values):
        return values[0], values[0]
    found = _scipy().bootstrap((values,), _mean, n_resamples=RESAMPLES, method="percentile", rng=0, vectorized=True)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean(values: Any, axis: int = -1) -> Any:
    """The mean along an axis, as scipy's bootstrap calls it."""
    return values.mean(axis=axis)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise LimbeckError(
            "claims are tested with scipy, which is not there", hint="pip install 'limbeck[study]'"
        ) from error
    return stats
