"""A claim: a statement of the paper as something that a study's numbers can bear out or not.

    judge_claim("xlstm-first", CLAIMS["xlstm-first"], rows)["verdict"]      # "holds", "does not hold", "undecided"

A claim has one or several parts; it holds where all parts hold, and does not hold where one does not. The claims
themselves are in `limbeck.study.statements`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.study.statistics import Finding, Metric, Row, judge

MATTERS = 0.01  # nats a token: smaller differences are of no practical use


@dataclass(frozen=True)
class Part:
    """A testable half-sentence.

    kind: "more": the effect is above zero and matters; "little": it does not reach the margin.
    discrete: the effect is a count or a rank, of which equal seeds are to be expected and need no test.
    """

    says: str
    effect: Callable[[list[Row]], dict[str, list[float]]]
    kind: Literal["more", "little"] = "more"
    margin: float = MATTERS
    discrete: bool = False


@dataclass(frozen=True)
class Claim:
    """A statement with its source; `parts` may depend on which arms there are."""

    statement: str
    source: str
    unit: str
    parts: Callable[[list[Row]], list[Part]]


def value(name: str) -> Metric:
    """A value of the record as it is."""
    return lambda row: row["values"].get(name)


def log_perplexity(row: Row) -> float | None:
    """Loss on held-out text: of the measure `agreement`, else of the run's own evaluation."""
    found = row["values"].get("agreement.perplexity", row["values"].get("held_out.student_perplexity"))
    if found is None:
        return None
    return math.log(found) if found > 0 else math.nan  # NaN stays NaN, and is told as an arm that diverged


def by_length(measure: str, name: str, last: bool) -> Metric:
    """Of the values whose name has a number of tokens, the one at the shortest or longest length.

    Args:
        name: pattern with that number as its group; of several values of one length the mean is taken.
    """
    pattern = re.compile(rf"{measure}\.{name}$")

    def metric(row: Row) -> float | None:
        found: dict[int, list[float]] = {}
        for key, number in row["values"].items():
            if match := pattern.match(key):
                found.setdefault(int(match[1]), []).append(number)
        if len(found) < 2:
            return None
        chosen = found[max(found) if last else min(found)]
        return sum(chosen) / len(chosen)

    return metric


def mean_of(measure: str, name: str) -> Metric:
    """The mean of all values whose name fits the pattern."""
    pattern = re.compile(rf"{measure}\.{name}$")

    def metric(row: Row) -> float | None:
        found = [number for key, number in row["values"].items() if pattern.match(key)]
        return sum(found) / len(found) if found else None

    return metric


def judge_claim(name: str, claim: Claim, rows: list[Row]) -> dict[str, Any]:
    """A claim with its verdict, its parts' effects and why it is undecided, ready for JSON."""
    parts = claim.parts(rows)
    found = [judge(part.effect(rows), part.kind, part.margin, len(parts), part.discrete) for part in parts]
    return {
        "name": name,
        "statement": claim.statement,
        "source": claim.source,
        "unit": claim.unit,
        "verdict": _together(found),
        "findings": [
            {"says": part.says, "kind": part.kind, "margin": part.margin, **one.facts()}
            for part, one in zip(parts, found)
        ],
    }


def _together(found: list[Finding]) -> str:
    verdicts = [one.verdict for one in found]
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and all(verdict == "holds" for verdict in verdicts) else "undecided"
