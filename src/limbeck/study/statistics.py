"""Test whether arms differ: effects paired within a seed, a test over seeds, and a verdict.

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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from limbeck.core.extras import require

ArmResult = dict[str, Any]
Metric = Callable[[ArmResult], float | None]
AxisFilter = dict[str, tuple[Any, ...]]  # axis -> values
Verdict = Literal["holds", "does not hold", "undecided"]

MIN_SEEDS = 3
ALPHA = 0.05
MIN_RANKED = 5  # names for the interval of a rank correlation
MIN_SEED_COVERAGE = 0.5  # a seed with fewer than this share of the fullest seed's arms is incomplete


class Contrasts(dict[str, list[float]]):
    """Effects by seed, one for each condition, with the arms left out of all seeds and those that diverged."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        super().__init__(values or {})
        self.left_out: list[str] = []
        self.diverged: list[str] = []


@dataclass(frozen=True)
class Finding:
    """The effect over all seeds, and the verdict that it allows.

    effect: their mean; low, high: its 95 % t interval; p: of the two-sided t test that the verdict rests on. All three
        are None where a test is impossible: too few seeds, or the same number from every seed.
    consistent: share of the comparisons, one for each seed and condition, that agree with the statement.
    reason: why it is undecided, where that is so.
    left_out: arms that some seed lacks, so that they count in none; diverged: arms whose value is not finite.
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
    """A weighted metric, averaged over the rows of a condition that `where` selects."""

    weight: float
    metric: Metric
    where: AxisFilter


@dataclass(frozen=True)
class Effect:
    """A weighted sum of averages, computed under every condition where all of its terms were measured.

    A condition is a value of each axis but the seed and those that the terms select by. All seeds compare the same
    arms: an arm that is missing in one seed is left out of all of them.

    within: only these rows count.
    """

    terms: tuple[Term, ...]
    within: AxisFilter | None = None

    def compute_contrasts(self, rows: list[ArmResult]) -> Contrasts:
        """Compute the sum under each condition, by seed."""
        # seed -> (condition, index of the term) -> member -> value
        tables: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
        names: dict[tuple[str, str], str] = {}
        term_axes = {axis for term in self.terms for axis in term.where}
        if "mixer" in term_axes:
            term_axes.add("student")  # a student's name and its mixer say the same thing
        for row in rows:
            axes = row["axes"]
            if any(axes.get(axis) not in values for axis, values in (self.within or {}).items()):
                continue
            condition = _axes_key({a: v for a, v in axes.items() if a != "seed" and a not in term_axes})
            member = _axes_key({a: v for a, v in axes.items() if a in term_axes})
            for index, term in enumerate(self.terms):
                value = term.metric(row) if _matches(row, term.where) else None
                if value is not None:
                    names[condition, member] = _format_axes(axes)
                    tables.setdefault(_get_seed(row), {}).setdefault((condition, index), {})[member] = value
        # the arms that several seeds repeat may be none of those that one side of the effect needs
        return self._compare(tables, names, allow_parts=True) or self._compare(tables, names, allow_parts=False)

    def _compare(
        self,
        tables: dict[str, dict[tuple[str, int], dict[str, float]]],
        names: dict[tuple[str, str], str],
        allow_parts: bool,
    ) -> Contrasts:
        result = Contrasts()
        cells = {
            seed: {(*key, member) for key, members in table.items() for member in members}
            for seed, table in tables.items()
        }
        complete_seeds, common = _find_common_cells(cells, result, allow_parts)
        all_cells = {cell for seed in complete_seeds for cell in cells[seed]}
        result.left_out += sorted({names[condition, member] for condition, _, member in all_cells - common})
        diverged = {
            f"{names[condition, member]} (seed {seed})"
            for seed in complete_seeds
            for condition, index, member in common
            if not math.isfinite(tables[seed][condition, index][member])
        }
        result.diverged = sorted(diverged)
        for seed in complete_seeds:
            for condition in dict.fromkeys(condition for condition, _ in tables[seed]):
                term_values = [
                    [
                        value
                        for member, value in tables[seed].get((condition, index), {}).items()
                        if (condition, index, member) in common
                    ]
                    for index in range(len(self.terms))
                ]
                if all(term_values):
                    total = sum(term.weight * statistics.fmean(values) for term, values in zip(self.terms, term_values))
                    result.setdefault(seed, []).append(total)
        return result


def difference(metric: Metric, plus: AxisFilter, minus: AxisFilter, within: AxisFilter | None = None) -> Effect:
    """Define the effect metric(plus) - metric(minus)."""
    return Effect((Term(1.0, metric, plus), Term(-1.0, metric, minus)), within)


def rank_correlation_by_seed(rows: list[ArmResult], axis: str, metric: Metric) -> Contrasts:
    """Compute Kendall's rank correlation of the students between neighboring values of an axis, by seed.

    Two values are compared with all other axes equal, over the students that every seed has at both.
    """
    values = sorted({row["axes"][axis] for row in rows if axis in row["axes"]}, key=lambda v: (str(type(v)), v))
    tables: dict[str, dict[tuple[str, Any], dict[str, float]]] = {}
    for row in rows:
        axes = row["axes"]
        if (value := metric(row)) is not None and axis in axes:
            condition = _axes_key({a: v for a, v in axes.items() if a not in ("seed", "student", "mixer", axis)})
            tables.setdefault(_get_seed(row), {}).setdefault((condition, axes[axis]), {})[axes["student"]] = value
    result = Contrasts()
    cells = {seed: {(*key, name) for key, row in table.items() for name in row} for seed, table in tables.items()}
    complete_seeds, common = _find_common_cells(cells, result)
    all_cells = {cell for seed in complete_seeds for cell in cells[seed]}
    result.left_out += sorted({f"{name} at {axis} {value}" for _, value, name in all_cells - common})
    for seed in complete_seeds:
        for condition in dict.fromkeys(condition for condition, _ in tables[seed]):
            for first, second in itertools.pairwise(values):
                first_values, second_values = (tables[seed].get((condition, value), {}) for value in (first, second))
                shared = [
                    name
                    for name in first_values
                    if (condition, first, name) in common and (condition, second, name) in common
                ]
                diverged = [
                    name
                    for name in shared
                    if not (math.isfinite(first_values[name]) and math.isfinite(second_values[name]))
                ]
                result.diverged += [f"{name} (seed {seed})" for name in diverged]
                if len(shared) > 2:
                    result.setdefault(seed, []).append(kendall_tau(first_values, second_values, shared))
    result.diverged = sorted(set(result.diverged))
    return result


def gap_at_equal_time(
    rows: list[ArmResult], metric: Metric, axis: str, name: str, references: tuple[str, ...], stage: str
) -> Contrasts:
    """Compute how much lower the metric of `name` is than that of references that trained as long, by seed.

    The references differ in their number of tokens. Between them the metric is interpolated, linearly in the logarithm
    of the seconds that the stage took. An arm that took less than the shortest is compared with that one; one that took
    longer than the longest is left out.

    Args:
        axis: whose values `name` and `references` are.
        stage: whose seconds count.
    """

    def read(row: ArmResult) -> tuple[float, float] | None:
        value = metric(row)
        seconds = sum(one["seconds"] for one in row.get("stages", []) if one["stage"] == stage)
        return None if value is None or seconds <= 0 else (math.log(seconds), value)

    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    arms: list[tuple[tuple[str, str], tuple[float, float]]] = []
    for row in rows:
        axes = row["axes"]
        key = _get_seed(row), _axes_key({a: v for a, v in axes.items() if a not in ("seed", axis)})
        point = read(row)
        if point is not None and axes.get(axis) in references:
            curves.setdefault(key, []).append(point)
        elif point is not None and axes.get(axis) == name:
            arms.append((key, point))
    result = Contrasts()
    for key, (time, value) in arms:
        curve = sorted(curves.get(key, []))
        if not math.isfinite(value):
            result.diverged.append(f"{name} (seed {key[0]})")
        if not curve or time > curve[-1][0]:
            result.left_out.append(f"{name} (seed {key[0]}), which took longer than all it could be compared with")
            continue
        result.setdefault(key[0], []).append(_interpolate(curve, time) - value)
    return result


def _interpolate(curve: list[tuple[float, float]], at: float) -> float:
    """Interpolate sorted points (x, y) linearly; before the first its y."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= at <= right:
            return low if right == left else low + (high - low) * (at - left) / (right - left)
    return curve[0][1]


def kendall_tau(first: dict[str, float], second: dict[str, float], names: list[str]) -> float:
    """Compute Kendall's tau-a of two orders; a pair that is tied in either neither agrees nor disagrees."""

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return sum(sign(first[a] - first[b]) * sign(second[a] - second[b]) for a, b in pairs) / len(pairs)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two orders, over `names`; low, high: its 95 % interval; p: of no correlation.

    Interval and p are None for fewer than `MIN_RANKED` names, and for two equal or opposite orders, where the interval
    has no width. They treat the names as a sample of many: they say how far other names could differ, not other seeds.
    """

    rho: float
    low: float | None
    high: float | None
    p: float | None
    names: tuple[str, ...]


def correlate_ranks(first: dict[str, float], second: dict[str, float]) -> RankCorrelation | None:
    """Correlate the orders of the names that have a finite value on both sides; None for two of them, or ties alone.

    Ties share their mean rank. The interval is Fisher's z with the variance (1 + rho^2 / 2) / (n - 3) of Bonett and
    Wright (Psychometrika 65, 2000), the p value that of the t statistic with n - 2 degrees of freedom.
    """
    names = tuple(n for n in first if n in second and math.isfinite(first[n]) and math.isfinite(second[n]))
    if len(names) < 3 or any(len({side[name] for name in names}) < 2 for side in (first, second)):
        return None
    stats = _import_scipy_stats()
    found = stats.spearmanr([first[name] for name in names], [second[name] for name in names])
    rho = float(found.statistic)
    if len(names) < MIN_RANKED or abs(rho) > 1 - 1e-9:
        return RankCorrelation(rho, None, None, None, names)
    center = math.atanh(rho)
    half_width = float(stats.norm.ppf(1 - ALPHA / 2)) * math.sqrt((1 + rho * rho / 2) / (len(names) - 3))
    low, high = math.tanh(center - half_width), math.tanh(center + half_width)
    return RankCorrelation(rho, low, high, float(found.pvalue), names)


def decide_verdict(
    contrasts: dict[str, list[float]],
    kind: Literal["more", "little"],
    margin: float,
    tests: int = 1,
    discrete: bool = False,
) -> Finding:
    """Decide over seeds whether an effect holds.

    "more" holds where the effect's interval lies above zero and the effect is at least `margin`, and does not hold
    where the interval lies below `margin`. "little" is its counterpart: it holds where the interval lies below
    `margin`, and does not where it lies above.

    Args:
        contrasts: effects by seed (`Contrasts` also say what was left out).
        margin: the smallest effect that matters.
        tests: how many hypotheses the claim has. A single one that fails refutes it, so the level of a refutation is
            divided by that number (Bonferroni).
        discrete: the effect is a count or a rank; equal numbers from all seeds are expected then and need no test.
    """
    left_out, diverged = getattr(contrasts, "left_out", []), getattr(contrasts, "diverged", [])
    by_seed = {seed: sum(values) / len(values) for seed, values in sorted(contrasts.items())}
    values = list(by_seed.values())

    def finding(verdict: Verdict, reason: str = "", low=None, high=None, p=None) -> Finding:
        effects = [value for values in contrasts.values() for value in values]
        agreeing = [value > 0 if kind == "more" else value < margin for value in effects]
        share = sum(agreeing) / len(agreeing) if agreeing else None
        effect = statistics.fmean(values) if values and all(map(math.isfinite, values)) else None
        seeds = {seed: value for seed, value in by_seed.items() if math.isfinite(value)}
        return Finding(verdict, effect, low, high, p, seeds, share, len(effects), reason, left_out, diverged)

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
        confirmed = mean > 0 and mean >= margin if kind == "more" else mean < margin
        return finding("holds" if confirmed else "does not hold")
    low, high = t_interval(values, ALPHA)
    corrected_low, corrected_high = t_interval(values, ALPHA / tests)
    if kind == "more":
        confirmed, refuted, p = low > 0 and mean >= margin, corrected_high < margin, _t_test_p(values, 0.0)
    else:
        confirmed, refuted, p = high < margin, corrected_low > margin, _t_test_p(values, margin)
    if confirmed or refuted:
        return finding("holds" if confirmed else "does not hold", "", low, high, p)
    return finding("undecided", _explain_undecided(kind, margin, mean, low, high), low, high, p)


def t_interval(values: list[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Compute the t interval of the mean, which misses it with probability `alpha` for normal differences.

    A percentile bootstrap of three numbers is their minimum and maximum, and covers the mean in 76 of 100 studies.
    """
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half_width = float(_import_scipy_stats().t.ppf(1 - alpha / 2, len(values) - 1)) * error
    return mean - half_width, mean + half_width


def _explain_undecided(kind: str, margin: float, mean: float, low: float, high: float) -> str:
    """Explain why neither the statement nor its opposite is supported."""
    if kind == "more" and low > 0:
        return f"above zero, but smaller than {margin:g}, and the interval reaches beyond it"
    bound = 0.0 if kind == "more" else margin
    if low <= bound <= high:
        return f"the interval holds {bound:g}: the seeds differ too much for the size of the effect"
    return "the interval lies beyond the bound at the level of one test, not at that of several"


def contrast_common_arms(effects: Iterable[tuple[ArmResult, float]]) -> Contrasts:
    """Return the effects of arms by seed; an arm that is missing in one seed is left out of all of them."""
    tables: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row, effect in effects:
        arm = _axes_key({axis: value for axis, value in row["axes"].items() if axis != "seed"})
        names[arm] = _format_axes(row["axes"])
        tables.setdefault(_get_seed(row), {})[arm] = effect
    result = Contrasts()
    seeds, common = _find_common_cells({seed: set(table) for seed, table in tables.items()}, result)
    result.left_out += sorted({names[arm] for seed in seeds for arm in tables[seed].keys() - common})
    result |= {seed: [effect for arm, effect in tables[seed].items() if arm in common] for seed in seeds if common}
    return result


def _find_common_cells(cells: dict[str, set], result: Contrasts, allow_parts: bool = True) -> tuple[list[str], set]:
    """Find the seeds that are complete, and the cells that all of them have; notes the other seeds in `result`.

    Args:
        allow_parts: a study may repeat only a part of its arms: where several seeds have the same cells, fewer than the
            others, and a test would have too few seeds without them, all seeds count and the other arms do not.
    """
    max_cells = max((len(seed_cells) for seed_cells in cells.values()), default=0)
    complete_seeds = [seed for seed, seed_cells in cells.items() if len(seed_cells) >= MIN_SEED_COVERAGE * max_cells]
    others = [seed for seed in cells if seed not in complete_seeds]
    if allow_parts and len(others) > 1 and len(complete_seeds) < MIN_SEEDS <= len(cells):
        common = set.intersection(*cells.values())
        if common and all(cells[seed] == cells[others[0]] for seed in others):
            return list(cells), common
    result.left_out += [f"seed {seed}, which is not complete" for seed in others]
    return complete_seeds, set.intersection(*(cells[seed] for seed in complete_seeds)) if complete_seeds else set()


def _get_seed(row: ArmResult) -> str:
    return str(row["axes"]["seed"])


def _axes_key(axes: dict[str, Any]) -> str:
    return repr(sorted(axes.items()))


def _format_axes(axes: dict[str, Any]) -> str:
    """Format an arm's axes for a reader, without the seed and what is at its default."""
    return " ".join(f"{v}" if a in ("student", "stages") else f"{a}={v}" for a, v in axes.items() if _is_shown(a, v))


def _is_shown(axis: str, value: Any) -> bool:
    return axis not in ("seed", "mixer") and value not in (None, "all", "none")


def _matches(row: ArmResult, where: AxisFilter) -> bool:
    return all(row["axes"].get(axis) in values for axis, values in where.items())


def _t_test_p(values: list[float], null: float) -> float:
    """Compute the two-sided p of a one-sample t test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences of rounding size
        return float(_import_scipy_stats().ttest_1samp(values, null).pvalue)


def _import_scipy_stats() -> Any:
    require("scipy", "tests of claims")
    # late: an optional dependency
    from scipy import stats

    return stats
