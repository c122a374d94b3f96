"""Chooses the fast tier: what `make test` runs in a few minutes, out of everything that `make test-full` runs.

    pytest                  # the fast tier
    pytest --full           # all tests

Left out of the fast tier are, of each test,

1. what is marked `slow`, the whole test or single cases of it;
2. all cases but the first n, where it is marked `fast_cases(n)`: the others are of the same kind;
3. if it has many cases and none of these marks: those in which no parameter has a value that an earlier case did not
   have, where all mixers of one operator count as one value. Every check, operator and family is tried, only not in
   every combination.

A test that is named on the command line (`file::name`) always runs.
"""

from collections import defaultdict
from typing import Any

import pytest

from limbeck import mixers
from limbeck.mixers.registry import is_registered

FEW = 4  # a test with so few cases is not a matrix
# one mixer of each operator (and, by themselves, those that have none): these stand for the others
FAST_MIXERS = ("gated_deltanet", "gla", "gsa", "mamba2", "rwkv7")


def select_fast(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split tests into those of the fast tier and the rest, in their order."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    chosen = {item for group in cases.values() for item in select_cases(group)}
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def select_cases(group: list[pytest.Item]) -> list[pytest.Item]:
    """Choose among the cases of one test."""
    quick = [item for item in group if item.get_closest_marker("slow") is None]
    limit = group[0].get_closest_marker("fast_cases")
    if limit is not None:
        return quick[: limit.args[0]]
    if len(quick) < len(group) or len(quick) <= FEW:
        return quick
    return cover_values(quick)


def cover_values(group: list[pytest.Item]) -> list[pytest.Item]:
    """Choose cases so that every value of every parameter is in one of them."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for item in sorted(group, key=has_other_mixer):
        spec = getattr(item, "callspec", None)
        values = set() if spec is None else {(name, describe(value, item)) for name, value in spec.params.items()}
        if spec is None or values - seen:
            chosen.append(item)
            seen |= values
    return chosen


def has_other_mixer(item: pytest.Item) -> bool:
    """Tell whether a parameter names a mixer for which another one stands."""
    spec = getattr(item, "callspec", None)
    return spec is not None and any(
        get_operator(value) is not None and value not in FAST_MIXERS for value in spec.params.values()
    )


def get_operator(value: Any) -> str | None:
    """Return the operator of a mixer's name; None for anything else, and for mixers that have none."""
    if not isinstance(value, str) or not is_registered(value):
        return None
    operator = mixers.get(value).operator
    return None if operator is None else operator.__name__


def describe(value: Any, item: pytest.Item) -> str:
    """Name a parameter's value, so that the same value has the same name in every case; else the case's own name."""
    name = get_operator(value) or getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return name
    text = repr(value)
    return text if len(text) < 500 and " at 0x" not in text else item.nodeid
