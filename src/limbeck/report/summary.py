"""What a report says first: a paragraph, the numbers at a glance, what can be filtered, and break-even lengths.

" ".join(sentences(collection, lines))
"""

import re
from collections import Counter
from statistics import fmean

from limbeck.report.arms import TEACHER, Collection
from limbeck.report.grid import (
    METRICS,
    Cell,
    Column,
    Line,
    Row,
    Table,
    in_words,
    metric_name,
    named,
    of_teacher,
    places_of,
)

VERDICTS = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
}
BY_SHAPES = "memory.break_even_tokens"
BREAK_EVEN = re.compile(r"speed\.break_even_(time|memory)_tokens@batch(\d+)")


def sentences(collection: Collection, lines: list[Line]) -> list[str]:
    """What ran: teacher, students, places, seeds, tokens, time, what failed, how many claims hold."""
    arms = [arm for arm in collection.arms if arm.student != TEACHER]
    trained = [arm for arm in arms if arm.stages]
    teachers = list(dict.fromkeys(arm.axes["teacher"] for arm in arms if "teacher" in arm.axes))
    students, seeds, places = collection.students, collection.seeds, places_of(lines)
    told = _count(len(students), "student")
    if teachers:
        told += f" of the teacher{'s' * (len(teachers) > 1)} {_list(teachers)}"
    if len(places) > 1:
        told += f" at {len(places)} places of the grid ({_list([in_words(axis) for axis in collection.places])})"
    told += f" with {_count(len(seeds), 'seed')}" if seeds else ""
    found = [f"{told}: {_count(len(arms), 'arm' if collection.study else 'run')}."]
    if trained:
        tokens = sorted(arm.tokens for arm in trained)
        found.append(f"Each was trained on {_range(tokens)} tokens.")
    seconds = sum(arm.seconds or 0 for arm in arms)
    if seconds:
        saved = sum(arm.saved_seconds or 0 for arm in arms)
        share = f"; sharing the teacher's passes saved {_time(saved)} more" if saved >= 0.5 else ""
        found.append(f"Training took {_time(seconds)} in all{share}.")
    status = Counter(arm.status for arm in arms)
    if status["failed"] or status["open"]:
        counts = [f"{status[s]} {s}" for s in ("finished", "failed", "open") if status[s]]
        found.append(f"{_list(counts)}.")
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        parts = [f"{verdicts[v]} {words[verdicts[v] > 1]}" for v, words in VERDICTS.items() if verdicts[v]]
        found.append(f"Of {_count(len(collection.claims), 'claim')} {_list(parts)}.")
    return found


def glance(collection: Collection, lines: list[Line]) -> list[tuple[str, str, str]]:
    """Label, number and a remark, for the most important numbers."""
    found = []
    metric = METRICS[0]
    name = metric_name(metric, lines) or ""
    means = [(mean, line) for line in lines if line.student != TEACHER and (mean := line.mean(name)) is not None]
    if means:
        mean, best = min(means, key=lambda pair: pair[0])
        found.append(("lowest perplexity", f"{mean:.4g}", ", ".join(filter(None, [best.student, named(best.place)]))))
        if teacher := of_teacher(metric, name, lines):
            found.append(("the teacher's", f"{fmean(teacher):.4g}", "same text"))
    arms = [arm for arm in collection.arms if arm.student != TEACHER]
    done = sum(arm.status == "finished" for arm in arms)
    found.append(("finished", f"{done} of {len(arms)}", "arms" if collection.study else "runs"))
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        rest = f"{verdicts['does not hold']} do not, {verdicts['undecided']} undecided"
        found.append(("claims that hold", f"{verdicts['holds']} of {len(collection.claims)}", rest))
    seconds = sum(arm.seconds or 0 for arm in arms)
    if seconds:
        found.append(("training", _time(seconds), f"{sum(arm.tokens for arm in arms):,} tokens"))
    return found


def filters(collection: Collection) -> dict[str, list[str]]:
    """Axis -> values, of those with more than one."""
    found = {"student": collection.students}
    for axis in collection.places:
        found[axis] = list(dict.fromkeys(arm.axes[axis] for arm in collection.arms if axis in arm.axes))
    return {axis: values for axis, values in found.items() if len(values) > 1}


def break_even(lines: list[Line]) -> Table | None:
    """From which length on a student is smaller and faster than its teacher; None where that was not measured."""
    names = dict.fromkeys(name for line in lines for arm in line.members for name in arm.values)
    measured = [match for name in names if (match := BREAK_EVEN.match(name))]
    columns = [Column("student"), Column("smaller cache, by shapes")]
    for match in measured:
        told = "faster token" if match[1] == "time" else "smaller cache"
        columns.append(Column(f"{told}, measured, batch {match[2]}"))
    rows: dict[str, Row] = {}
    for line in lines:
        raced = any(name.startswith("speed.token_milliseconds@") for arm in line.members for name in arm.values)
        means = [line.mean(BY_SHAPES), *(line.mean(match[0]) for match in measured)]
        if line.student != TEACHER and (raced or means[0] is not None):
            never = ["", *("never" if raced else "" for _ in measured)]
            cells = [Cell(text if mean is None else f"{mean:,.0f}", mean) for mean, text in zip(means, never)]
            rows.setdefault(line.student, Row([Cell(line.student, line.student), *cells], {"student": line.student}))
    note = "Tokens of context from which on a student is smaller or faster than its teacher."
    return Table("Break-even lengths", note, columns, list(rows.values())) if rows else None


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else " and ".join([", ".join(words[:-1]), words[-1]]) if words else ""


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
