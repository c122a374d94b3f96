"""What the fast tier leaves out of the tests, on small stand-ins for collected tests."""

from types import SimpleNamespace

import pytest

from helpers.tiers import FAST_MIXERS, get_operator, select_fast
from limbeck import mixers


class Item:
    """A collected case: its parameters, and the marks of its test or its own."""

    def __init__(self, test: str, marks: list[pytest.MarkDecorator], **parameters) -> None:
        self.nodeid = f"{test}[{'-'.join(map(str, parameters.values()))}]"
        self.marks = {mark.name: mark.mark for mark in marks}
        self.callspec = SimpleNamespace(params=parameters)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)


def choose(items: list[Item]) -> list[dict]:
    chosen, rest = select_fast(items)
    assert [item for item in items if item in chosen] == chosen, "the order is kept"
    assert {*chosen, *rest} == {*items}
    assert len(chosen) + len(rest) == len(items)
    return [item.callspec.params for item in chosen]


def test_one_mixer_stands_for_each_operator():
    operators = [get_operator(name) for name in mixers.list_mixers()]
    assert sorted(map(get_operator, FAST_MIXERS)) == sorted({operator for operator in operators if operator})


def test_of_mixers_those_stay_that_stand_for_an_operator_or_have_none():
    names = [name for name in mixers.list_mixers() if mixers.get(name).__module__.startswith("limbeck.")]
    left = [case["mixer"] for case in choose([Item("t", [], mixer=name) for name in names])]
    assert left == [name for name in names if name in FAST_MIXERS or get_operator(name) is None]


def test_a_mixer_that_alone_has_another_value_stays():
    cases = [Item("t", [], mixer=name, packed=name != "kda") for name in ("kda", "gla", "gsa", "mamba2", "rwkv7")]
    assert {"mixer": "kda", "packed": False} in choose(cases)


def test_of_a_matrix_each_value_stays_once():
    assert choose([Item("t", [], a=a, b=b) for a in (1, 2, 3) for b in (1, 2)]) == [
        {"a": 1, "b": 1},
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {"a": 3, "b": 1},
    ]


def test_few_cases_all_stay():
    assert len(choose([Item("t", [], a=a, b=b) for a in (1, 2) for b in (1, 2)])) == 4


def test_what_is_slow_goes_and_of_marked_cases_all_others_stay():
    assert choose([Item("t", [pytest.mark.slow], a=1)]) == []
    marks = [[], [], [], [], [], [pytest.mark.slow]]
    assert choose([Item("t", mark, a=i, b=1) for i, mark in enumerate(marks)]) == [{"a": i, "b": 1} for i in range(5)]


def test_the_first_cases_stay_where_a_test_says_how_many():
    first = pytest.mark.fast_cases(2)
    assert choose([Item("t", [first], a=i) for i in range(7)]) == [{"a": 0}, {"a": 1}]
    slow = [[first, pytest.mark.slow], [first], [first], [first]]
    assert choose([Item("t", mark, a=i) for i, mark in enumerate(slow)]) == [{"a": 1}, {"a": 2}]
