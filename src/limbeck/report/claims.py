"""Claims as a page shows them: verdicts, numbers as text, and where on a line effect, interval and seeds lie.

    claim = claims_of(study["claims"])[0]
    claim.verdict, claim.findings[0].effect, claim.findings[0].strip.zero

A strip is a number line from 0 to 100 that holds zero, the margin, the interval and all seeds of one finding. The
strips of a claim have one scale.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Strip:
    """Positions between 0 and 100; `low` and `high` are None with too few seeds for an interval."""

    zero: float
    margin: float
    effect: float
    low: float | None
    high: float | None
    seeds: list[float]


@dataclass(frozen=True)
class Found:
    """One part of a claim, as text; empty where it is not known."""

    says: str
    verdict: str
    effect: str
    interval: str
    p: str
    seeds: str
    agree: str
    asked: str
    reason: str
    strip: Strip | None


@dataclass(frozen=True)
class Claim:
    """A statement with its verdict: "holds", "does not hold" or "undecided"."""

    name: str
    statement: str
    source: str
    unit: str
    verdict: str
    findings: list[Found]

    @property
    def kind(self) -> str:
        """The verdict as a word for the style."""
        return {"holds": "yes", "does not hold": "no"}.get(self.verdict, "open")

    @property
    def mixed(self) -> bool:
        """Whether its parts have different verdicts."""
        return len({one.verdict for one in self.findings}) > 1


def claims_of(claims: list[dict[str, Any]]) -> list[Claim]:
    """From study.json's `claims`."""
    words = ("name", "statement", "source", "unit", "verdict")
    return [Claim(**{key: one[key] for key in words}, findings=_findings(one["findings"])) for one in claims]


def _findings(parts: list[dict[str, Any]]) -> list[Found]:
    marks = [mark for part in parts if part["effect"] is not None for mark in _marks(part)] or [0.0]
    return [_found(part, min(marks), max(marks)) for part in parts]


def _marks(part: dict[str, Any]) -> list[float]:
    """All that a strip shows."""
    known = [part[key] for key in ("effect", "low", "high") if part[key] is not None]
    return [0.0, part["margin"], *known, *part["by_seed"].values()]


def _found(part: dict[str, Any], left: float, right: float) -> Found:
    asked = f"{'at least' if part['kind'] == 'more' else 'less than'} {part['margin']:g}"
    if part["effect"] is None:
        return Found(part["says"], part["verdict"], "", "", "", "", "", asked, part["reason"], None)
    known = part["low"] is not None
    return Found(
        part["says"],
        part["verdict"],
        _signed(part["effect"]),
        f"{_signed(part['low'])} to {_signed(part['high'])}" if known else "",
        _p(part["p"]) if known else "",
        str(len(part["by_seed"])),
        f"{100 * part['consistent']:.0f} % of {part['comparisons']}",
        asked,
        part["reason"],
        _strip(part, left, right),
    )


def _strip(part: dict[str, Any], left: float, right: float) -> Strip:
    def at(value: float | None) -> Any:
        return None if value is None else round(4 + 92 * (value - left) / ((right - left) or 1.0), 2)

    places = {key: at(part[key]) for key in ("margin", "effect", "low", "high")}
    return Strip(zero=at(0.0), **places, seeds=[at(seed) for seed in part["by_seed"].values()])


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
