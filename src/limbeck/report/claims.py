"""Claims as a page shows them: verdicts, numbers as text, and where on a number line effect, interval and seeds lie.

    claim = build_claim_views(study["claims"])[0]
    claim.verdict, claim.findings[0].effect, claim.findings[0].number_line.zero

A number line runs from 0 to 100 and holds zero, the margin, the interval and all seeds of one finding. The number
lines of a claim have one scale.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NumberLine:
    """Positions between 0 and 100; `low` and `high` are None with too few seeds for an interval."""

    zero: float
    margin: float
    effect: float
    low: float | None
    high: float | None
    seeds: list[float]


@dataclass(frozen=True)
class FindingView:
    """One part of a claim as text; "" where it was not measured."""

    description: str
    verdict: str
    effect: str
    interval: str
    p: str
    seeds: str
    consistency: str
    required: str
    reason: str
    number_line: NumberLine | None


@dataclass(frozen=True)
class ClaimView:
    """A statement with its verdict: "holds", "does not hold" or "undecided"."""

    name: str
    statement: str
    source: str
    unit: str
    verdict: str
    findings: list[FindingView]

    @property
    def css_class(self) -> str:
        """The verdict as a class of the style sheet."""
        return {"holds": "yes", "does not hold": "no"}.get(self.verdict, "open")

    @property
    def has_mixed_verdicts(self) -> bool:
        """Whether its findings have different verdicts."""
        return len({one.verdict for one in self.findings}) > 1


def build_claim_views(claims: list[dict[str, Any]]) -> list[ClaimView]:
    """Build the views of study.json's `claims`."""
    keys = ("name", "statement", "source", "unit", "verdict")
    return [ClaimView(**{key: one[key] for key in keys}, findings=_build_findings(one["findings"])) for one in claims]


def _build_findings(parts: list[dict[str, Any]]) -> list[FindingView]:
    marks = [mark for part in parts if part["effect"] is not None for mark in _list_marks(part)] or [0.0]
    return [_build_finding(part, min(marks), max(marks)) for part in parts]


def _list_marks(part: dict[str, Any]) -> list[float]:
    """List all numbers that a number line shows."""
    estimates = [part[key] for key in ("effect", "low", "high") if part[key] is not None]
    return [0.0, part["margin"], *estimates, *part["by_seed"].values()]


def _build_finding(part: dict[str, Any], left: float, right: float) -> FindingView:
    required = f"{'at least' if part['kind'] == 'more' else 'less than'} {part['margin']:g}"
    if part["effect"] is None:
        return FindingView(part["says"], part["verdict"], "", "", "", "", "", required, part["reason"], None)
    tested = part["low"] is not None
    return FindingView(
        part["says"],
        part["verdict"],
        _signed(part["effect"]),
        f"{_signed(part['low'])} to {_signed(part['high'])}" if tested else "",
        _p(part["p"]) if tested else "",
        str(len(part["by_seed"])),
        f"{100 * part['consistent']:.0f} % of {part['comparisons']}",
        required,
        part["reason"],
        _build_number_line(part, left, right),
    )


def _build_number_line(part: dict[str, Any], left: float, right: float) -> NumberLine:
    def position(value: float | None) -> Any:
        # 4 % of the width stay free on either side, where marks would be cut
        return None if value is None else round(4 + 92 * (value - left) / ((right - left) or 1.0), 2)

    positions = {key: position(part[key]) for key in ("margin", "effect", "low", "high")}
    return NumberLine(zero=position(0.0), **positions, seeds=[position(seed) for seed in part["by_seed"].values()])


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
