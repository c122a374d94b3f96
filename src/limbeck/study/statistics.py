"""Whether arms differ: effects paired within a seed, a test over seeds, and a verdict.

    effect = Effect((Term(1.0, log_perplexity, {"student": ("retnet",)}), ...))
    decide_verdict(effect.compute_contrasts(rows), kind="more", margin=0.01).verdict     # "holds", ...

A row is an arm's record (`limbeck.study.results`). Seeds are the repetitions of a study, so each seed gives one number:
the mean over all conditions under which both sides were measured. The numbers of all seeds go into a two-sided
one-sample t test of their mean (differences within a seed are paired) and its t interval, so that the verdict and the
interval shown never disagree: an effect holds where its 95 % interval lies beyond the bound.
"""

import itertools
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from limbeck.core.errors import LimbeckError

ArmResult = dict[str, Any]
Metric = Callable[[ArmResult], float | None]
AxisFilter = dict[str, tuple[Any, ...]]  # axis -> values
Verdict = Literal["holds", "does not hold", "undecided"]

MIN_SEEDS = 3
ALPHA = 0.05
MIN_SEED_COVERAGE = 0.5  # a seed with fewer than this share of the fullest seed's arms is not there yet


class Contrasts(dict[str, list[float]]):
    """Single effects by seed, with what had to be left out of all seeds and which arms diverged."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        super().__init__(values or {})
        self.left_out: list[str] = []
        self.diverged: list[str] = []


@dataclass(frozen=True)
class Finding:
    """What the numbers of all seeds say.

    effect: their mean; low, high: its 95 % t interval; p: of the two-sided t test that the verdict rests on. All three
        are None where a test is impossible: too few seeds, or the same number from every seed.
    consistent: share of the single comparisons that point the same way as the statement.
    reason: why it is undecided, where that is so.
    left_out: arms that some seed lacks, so that they count in none; diverged: arms whose number is not finite.
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
    left_out: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Term:
    """A weight, the metric that is weighed, and the rows over which it is averaged at a place of the grid."""

    weight: float
    metric: Metric
    where: AxisFilter


@dataclass(frozen=True)
class Effect:
    """A weighted sum of averages, taken at every place of the grid where all of its terms were measured.

    Every seed is asked the same question: an arm that is missing in one seed is left out of all of them.

    within: only these rows count.
    """

    terms: tuple[Term, ...]
    within: AxisFilter | None = None

    def compute_contrasts(self, rows: list[ArmResult]) -> Contrasts:
        """The sum at each place, by seed."""
        # seed -> (place, term) -> member -> value
        tables: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
        names: dict[tuple[str, str], str] = {}
        free = {axis for term in self.terms for axis in term.where}
        if "mixer" in free:
            free.add("student")  # a student's name and its mixer say the same thing
        for row in rows:
            axes = row["axes"]
            if any(axes.get(axis) not in values for axis, values in (self.within or {}).items()):
                continue
            place = _key({a: v for a, v in axes.items() if a != "seed" and a not in free})
            member = _key({a: v for a, v in axes.items() if a in free})
            for number, term in enumerate(self.terms):
                value = term.metric(row) if _fits(row, term.where) else None
                if value is not None:
                    names[place, member] = _named(axes)
                    tables.setdefault(_seed(row), {}).setdefault((place, number), {})[member] = value
        return self._compare(tables, names)

    def _compare(
        self, tables: dict[str, dict[tuple[str, int], dict[str, float]]], names: dict[tuple[str, str], str]
    ) -> Contrasts:
        result = Contrasts()
        cells = {seed: {(*key, member) for key, row in at.items() for member in row} for seed, at in tables.items()}
        whole, common = _common(cells, result)
        every = {cell for seed in whole for cell in cells[seed]}
        result.left_out += sorted({names[place, member] for place, _, member in every - common})
        diverged = {
            f"{names[place, member]} (seed {seed})"
            for seed in whole
            for place, number, member in common
            if not math.isfinite(tables[seed][place, number][member])
        }
        result.diverged = sorted(diverged)
        for seed in whole:
            for place in dict.fromkeys(place for place, _ in tables[seed]):
                parts = [
                    [v for m, v in tables[seed].get((place, n), {}).items() if (place, n, m) in common]
                    for n in range(len(self.terms))
                ]
                if all(parts):
                    total = sum(term.weight * statistics.fmean(part) for term, part in zip(self.terms, parts))
                    result.setdefault(seed, []).append(total)
        return result


def difference(metric: Metric, plus: AxisFilter, minus: AxisFilter, within: AxisFilter | None = None) -> Effect:
    """metric(plus) - metric(minus)."""
    return Effect((Term(1.0, metric, plus), Term(-1.0, metric, minus)), within)


def rank_correlation_by_seed(rows: list[ArmResult], axis: str, metric: Metric) -> Contrasts:
    """Kendall's rank correlation of the students between neighboring values of an axis, by seed.

    Tables are compared at the same place of all other axes, over the students that every seed has in both.
    """
    values = sorted({row["axes"][axis] for row in rows if axis in row["axes"]}, key=lambda v: (str(type(v)), v))
    tables: dict[str, dict[tuple[str, Any], dict[str, float]]] = {}
    for row in rows:
        axes = row["axes"]
        if (value := metric(row)) is not None and axis in axes:
            place = _key({a: v for a, v in axes.items() if a not in ("seed", "student", "mixer", axis)})
            tables.setdefault(_seed(row), {}).setdefault((place, axes[axis]), {})[axes["student"]] = value
    result = Contrasts()
    cells = {seed: {(*at, name) for at, row in table.items() for name in row} for seed, table in tables.items()}
    whole, common = _common(cells, result)
    every = {cell for seed in whole for cell in cells[seed]}
    result.left_out += sorted({f"{name} at {axis} {value}" for _, value, name in every - common})
    for seed in whole:
        for place in dict.fromkeys(place for place, _ in tables[seed]):
            for here, there in itertools.pairwise(values):
                one, other = (tables[seed].get((place, value), {}) for value in (here, there))
                both = [name for name in one if (place, here, name) in common and (place, there, name) in common]
                lost = [name for name in both if not (math.isfinite(one[name]) and math.isfinite(other[name]))]
                result.diverged += [f"{name} (seed {seed})" for name in lost]
                if len(both) > 2:
                    result.setdefault(seed, []).append(kendall_tau(one, other, both))
    result.diverged = sorted(set(result.diverged))
    return result


def kendall_tau(one: dict[str, float], other: dict[str, float], names: list[str]) -> float:
    """Kendall's tau-a of two orders: a pair that is tied in either counts as neither agreement nor disagreement."""

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return sum(sign(one[a] - one[b]) * sign(other[a] - other[b]) for a, b in pairs) / len(pairs)


def decide_verdict(
    contrasts: dict[str, list[float]],
    kind: Literal["more", "little"],
    margin: float,
    tests: int = 1,
    discrete: bool = False,
) -> Finding:
    """A verdict over seeds.

    "more" holds where the effect's interval lies above zero and the effect is at least `margin`, and does not hold
    where the interval lies below `margin`. "little" is its counterpart: it holds where the interval lies below
    `margin`, and does not where it lies above.

    Args:
        contrasts: single effects by seed (`Contrasts` also say what was left out).
        margin: the smallest effect that matters.
        tests: how many findings one rejection would overturn together; its level is divided by that.
        discrete: a count or a rank, of which equal seeds are to be expected and need no test.
    """
    left_out, diverged = getattr(contrasts, "left_out", []), getattr(contrasts, "diverged", [])
    by_seed = {seed: sum(values) / len(values) for seed, values in sorted(contrasts.items())}
    values = list(by_seed.values())

    def finding(verdict: Verdict, reason: str = "", low=None, high=None, p=None) -> Finding:
        singles = [value for values in contrasts.values() for value in values]
        agreeing = [value > 0 if kind == "more" else value < margin for value in singles]
        share = sum(agreeing) / len(agreeing) if agreeing else None
        effect = statistics.fmean(values) if values and all(map(math.isfinite, values)) else None
        seeds = {seed: value for seed, value in by_seed.items() if math.isfinite(value)}
        return Finding(verdict, effect, low, high, p, seeds, share, len(singles), reason, left_out, diverged)

    if not values:
        return finding("undecided", "not measured")
    if diverged or not all(map(math.isfinite, values)):
        return finding("undecided", f"not finite: {', '.join(diverged) or 'an effect'}")
    if len(values) < MIN_SEEDS:
        return finding("undecided", f"{len(values)} seed{'s' * (len(values) > 1)}, {MIN_SEEDS} are needed")
    mean = statistics.fmean(values)
    if max(values) == min(values):
        if not discrete:
            return finding("undecided", "every seed gave the same number, so the seed repeats nothing")
        yes = mean > 0 and mean >= margin if kind == "more" else mean < margin
        return finding("holds" if yes else "does not hold")
    low, high = t_interval(values, ALPHA)
    no_low, no_high = t_interval(values, ALPHA / tests)
    if kind == "more":
        yes, no, p = low > 0 and mean >= margin, no_high < margin, _p(values, 0.0)
    else:
        yes, no, p = high < margin, no_low > margin, _p(values, margin)
    if yes or no:
        return finding("holds" if yes else "does not hold", "", low, high, p)
    return finding("undecided", _why(kind, margin, mean, low, high), low, high, p)


def t_interval(values: list[float], alpha: float = ALPHA) -> tuple[float, float]:
    """The t interval of the mean that misses it with probability `alpha` for normal differences.

    A percentile bootstrap of three numbers is their minimum and maximum, and covers the mean in 76 of 100 studies.
    """
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(_scipy().t.ppf(1 - alpha / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


def _why(kind: str, margin: float, mean: float, low: float, high: float) -> str:
    """Name the condition that failed."""
    if kind == "more" and low > 0:
        return f"above zero, but smaller than {margin:g}, and the interval reaches beyond it"
    bound = 0.0 if kind == "more" else margin
    if low <= bound <= high:
        return f"the interval holds {bound:g}: the seeds differ too much for the size of the effect"
    return "the interval lies beyond the bound at the level of one test, not at that of several"


def _common(cells: dict[str, set], result: Contrasts) -> tuple[list[str], set]:
    """The seeds that are there, and what all of them have."""
    most = max((len(found) for found in cells.values()), default=0)
    whole = [seed for seed, found in cells.items() if len(found) >= MIN_SEED_COVERAGE * most]
    result.left_out += [f"seed {seed}, which is not complete" for seed in cells if seed not in whole]
    return whole, set.intersection(*(cells[seed] for seed in whole)) if whole else set()


def _seed(row: ArmResult) -> str:
    return str(row["axes"]["seed"])


def _key(axes: dict[str, Any]) -> str:
    return repr(sorted(axes.items()))


def _named(axes: dict[str, Any]) -> str:
    """An arm's values without the seed, for a reader."""
    return " ".join(f"{v}" if a in ("student", "stages") else f"{a}={v}" for a, v in axes.items() if _counts(a, v))


def _counts(axis: str, value: Any) -> bool:
    return axis not in ("seed", "mixer") and value not in (None, "all", "none")


def _fits(row: ArmResult, where: AxisFilter) -> bool:
    return all(row["axes"].get(axis) in values for axis, values in where.items())


def _p(values: list[float], null: float) -> float:
    """Two-sided p of a one-sample t test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences of rounding size
        return float(_scipy().ttest_1samp(values, null).pvalue)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise LimbeckError(
            "claims are tested with scipy, which is not there", hint="pip install 'limbeck[study]'"
        ) from error
    return stats
