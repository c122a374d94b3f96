"""What a mixer has to fulfil: all checks by name, and running them on a mixer.

    for outcome in contract.run("gla", families=["llama", "gpt2"]):
        print(outcome.check.name, outcome.family, outcome.failure or "passed")

A check is a function `(variant)` or `(variant, family)` that raises AssertionError saying what went wrong. In tests:

    @pytest.mark.parametrize(("check", "family"), contract.cases())
    def test_contract(check, family):
        contract.CHECKS[check](Variant("my_mixer"), family)
"""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from limbeck.contract.families import FAMILIES
from limbeck.contract.variant import Variant
from limbeck.errors import LimbeckError, closest

FEW = ("llama", "opt")  # rotary and learned positions; grouped heads and all heads; tied and mask-counted


@dataclass(frozen=True)
class Check:
    """One clause of the contract."""

    name: str
    summary: str
    function: Callable[..., None]
    per_family: bool
    slow: bool  # left to a few families, or out, where a short form is asked for

    def __call__(self, variant: Variant, family: str | None = None) -> None:
        """Raises AssertionError where the mixer does not fulfil it."""
        self.function(variant, family) if self.per_family else self.function(variant)


@dataclass(frozen=True)
class Outcome:
    """What came of one check: `failure` is None where it passed."""

    check: Check
    family: str | None
    seconds: float
    failure: str | None


CHECKS: dict[str, Check] = {}


def check(summary: str, slow: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: puts a function into CHECKS under its own name."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        per_family = "family" in inspect.signature(function).parameters
        CHECKS[function.__name__] = Check(function.__name__, summary, function, per_family, slow)
        return function

    return add


def cases(families: list[str] | None = None, quick: bool = False) -> list[tuple[str, str | None]]:
    """All pairs of check and family; the family is None for what concerns the mixer alone.

    Args:
        families: which families; by default all, or the two of FEW if `quick`.
        quick: leave out the slow checks.
    """
    for family in families or []:
        if family not in FAMILIES:
            raise LimbeckError(f"unknown family '{family}'{closest(family, FAMILIES)}", expected=", ".join(FAMILIES))
    chosen = families or (FEW if quick else FAMILIES)
    return [
        (c.name, family)
        for c in CHECKS.values()
        if not (quick and c.slow)
        for family in (chosen if c.per_family else (None,))
    ]


def run(variant: str | Variant, families: list[str] | None = None, quick: bool = False) -> Iterator[Outcome]:
    """Run the contract on a mixer, one case after the other; a failure of any kind is an outcome, not an exception."""
    chosen = Variant(variant) if isinstance(variant, str) else variant
    chosen.cls  # noqa: B018  an unknown mixer is the caller's mistake, not a failed check
    for name, family in cases(families, quick):
        began, failure = time.monotonic(), None
        try:
            with torch.random.fork_rng(devices=[]):
                CHECKS[name](chosen, family)
        except Exception as error:
            text = str(error) or "no message"
            failure = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
        yield Outcome(CHECKS[name], family, time.monotonic() - began, failure)
