"""Chooses the fast tier: what `make test` runs in a few minutes, out of everything that `make test-full` runs.

    pytest                  # the fast tier
    pytest --full           # all tests

Left out of the fast tier are tests marked `slow`, and of the large matrices of parameters those cases in which no
parameter has a value that an earlier case of the same test did not have: every mixer, every check, every operator and
every family is still tried, only not in every combination. A single test that is named on the command line always runs.
"""

from collections import defaultdict
from typing import Any

import pytest

FEW = 4  # a test with so few cases is not a matrix


def select_fast(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split tests into those of the fast tier and the rest, in their order."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    chosen: set[pytest.Item] = set()
    for group in cases.values():
        group = [item for item in group if item.get_closest_marker("slow") is None]
        chosen.update(group if len(group) <= FEW else cover_values(group))
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def cover_values(group: list[pytest.Item]) -> list[pytest.Item]:
    """Choose cases so that every value of every parameter is in one of them, the first that has it."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for item in group:
        spec = getattr(item, "callspec", None)
        values = set() if spec is None else {(name, describe(value, item)) for name, value in spec.params.items()}
        if spec is None or values - seen:
            chosen.append(item)
            seen |= values
    return chosen


def describe(value: Any, item: pytest.Item) -> str:
    """Name a parameter's value, so that the same value has the same name in every case; else the case's own name."""
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return name
    text = repr(value)
    return text if len(text) < 500 and " at 0x" not in text else item.nodeid
