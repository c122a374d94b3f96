"""The tables of a report as plain data, for the page and for Markdown: seeds together, a row a student at a place.

    lines = lines_of(collection)                 # all seeds of a student at a place of the grid are one line
    for table in [*headline(lines), *by_measure(lines)]:
        table.columns, table.rows[0].cells

A *place* is what a study varies beside students and seeds: stages, copying, budgets. What an entry belongs to is kept
as `at` (axis -> value), by which the page filters.
"""

import math
import statistics
from dataclasses import dataclass, field

from limbeck.report.arms import TEACHER, Arm, Collection
from limbeck.report.naming import is_share, label, shown

WIDEST = 10  # numbers beside each other
PARTS = {
    "held_out": "held-out text, the run's own evaluation",
    "memory": "cache, from its shapes",
    "parameters": "parameters",
    "stages": "training",
}


@dataclass(frozen=True)
class Metric:
    """A number that heads a report.

    names: values that hold it, the one that most arms have counts. teacher: the teacher's in the same evaluations.
    sign: 1 where more is better, -1 where less is.
    """

    title: str
    names: tuple[str, ...]
    sign: int
    teacher: tuple[str, ...] = ()


METRICS = (
    Metric(
        "perplexity of held-out text",
        ("agreement.perplexity", "held_out.student_perplexity"),
        -1,
        ("agreement.teacher_perplexity", "held_out.teacher_perplexity"),
    ),
    Metric("KL(teacher ‖ student), nats a token", ("agreement.kl", "held_out.kl"), -1),
    Metric("same most likely token", ("agreement.top1_agreement", "held_out.top1_agreement"), 1),
)


@dataclass(frozen=True)
class Line:
    """All seeds of one student at one place. Arms that stand at no place, the teacher, have an empty one."""

    student: str
    place: dict[str, str]
    members: list[Arm]

    @property
    def at(self) -> dict[str, str]:
        """What it is filtered by; {} for a line that always stays."""
        return {} if self.student == TEACHER else {"student": self.student, **self.place}

    def numbers(self, name: str) -> list[float]:
        """That value of every seed."""
        return [arm.values[name] for arm in self.members if name in arm.values]

    def mean(self, name: str) -> float | None:
        """Mean over seeds; None where nothing was measured or a seed diverged."""
        numbers = self.numbers(name)
        return statistics.fmean(numbers) if numbers and all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True)
class Column:
    text: str
    at: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """sort: what a column is sorted by; None for an empty cell, which goes last."""

    text: str
    sort: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """Cells, the first of which names the row; a fixed row stays above the others."""

    cells: list[Cell]
    at: dict[str, str]
    fixed: bool = False


@dataclass(frozen=True)
class Table:
    """`words`: how many of the first columns hold words, not numbers."""

    title: str
    note: str
    columns: list[Column]
    rows: list[Row]
    words: int = 1


def lines_of(collection: Collection) -> list[Line]:
    """The finished arms, seeds together."""
    groups: dict[tuple[str, ...], Line] = {}
    for arm in collection.finished:
        place = {axis: arm.axes[axis] for axis in collection.places if axis in arm.axes}
        key = (arm.student, *place.values())
        groups.setdefault(key, Line(arm.student, place, [])).members.append(arm)
    return list(groups.values())


def places_of(lines: list[Line]) -> list[dict[str, str]]:
    """The places of a grid in the order of its arms; [{}] where there is nothing to tell apart."""
    found = {tuple(line.place.values()): line.place for line in lines if line.place}
    return list(found.values()) or [{}]


def named(place: dict[str, str]) -> str:
    """A place in words: "stages 2+3, copied"."""
    words = {"yes": "copied", "no": "fresh"}
    return ", ".join(
        words.get(value, value) if axis == "copy_projections" else f"{in_words(axis)} {value}"
        for axis, value in place.items()
    )


def in_words(axis: str) -> str:
    """An axis as people say it."""
    return "copying" if axis == "copy_projections" else axis.replace("_", " ")


def metric_name(metric: Metric, lines: list[Line]) -> str | None:
    """The name under which most lines have a metric."""
    counts = {name: sum(bool(line.numbers(name)) for line in lines) for name in metric.names}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def headline(lines: list[Line]) -> list[Table]:
    """Perplexity, KL and agreement: students by places, a table each; of a single place students by numbers."""
    places = places_of(lines)
    chosen = [(metric, name) for metric in METRICS if (name := metric_name(metric, lines))]
    if not chosen:
        return []
    if len(places) > 1:
        return [_pivot(metric, name, lines, places) for metric, name in chosen]
    columns = [Column("student"), *(Column(metric.title) for metric, _ in chosen)]
    rows = []
    for line in lines:
        cells = [_cell(name, line.numbers(name), _best(metric, name, lines, line)) for metric, name in chosen]
        if line.student != TEACHER and any(cell.text for cell in cells):
            rows.append(Row([_word(line.student), *cells], line.at))
    told = [_cell(name, of_teacher(metric, name, lines)) for metric, name in chosen]
    if any(cell.text for cell in told):
        rows.insert(0, Row([_word(TEACHER), *told], {}, fixed=True))
    return [Table("Quality", _seeds(lines), columns, rows)]


def by_measure(lines: list[Line]) -> list[Table]:
    """All numbers: a table for each measure, a row for each line."""
    names: dict[str, dict[str, None]] = {}
    for line in lines:
        for arm in line.members:
            for name in arm.values:
                names.setdefault(name.partition(".")[0], {}).setdefault(name)
    tables = []
    for measure, mine in names.items():
        parts = [list(mine)[i : i + WIDEST] for i in range(0, len(mine), WIDEST)]
        for number, part in enumerate(parts, 1):
            title = PARTS.get(measure, f"measure {measure}") + (f", {number} of {len(parts)}" if len(parts) > 1 else "")
            tables.append(_numbers(title, part, lines))
    return tables


def _numbers(title: str, names: list[str], lines: list[Line]) -> Table:
    """A row for each line that has any of these values."""
    axes = list(dict.fromkeys(axis for line in lines for axis in line.place))
    columns = [Column(in_words(one)) for one in ("student", *axes, "seeds")]
    columns += [Column(label(name.partition(".")[2].replace(".", " "))) for name in names]
    rows = []
    for line in lines:
        cells = [_cell(name, line.numbers(name)) for name in names]
        if any(cell.text for cell in cells):
            words = [_word(one) for one in (line.student, *(line.place.get(axis, "") for axis in axes))]
            count = len(line.members)
            rows.append(Row([*words, Cell(str(count), count), *cells], line.at, line.student == TEACHER))
    return Table(title, _seeds(lines), columns, rows, words=1 + len(axes))


def _pivot(metric: Metric, name: str, lines: list[Line], places: list[dict[str, str]]) -> Table:
    """Students by places."""
    columns = [Column("student"), *(Column(named(place), place) for place in places)]
    rows = []
    for student in dict.fromkeys(line.student for line in lines if line.place):
        mine = {tuple(line.place.values()): line for line in lines if line.student == student}
        cells = []
        for place in places:
            line = mine.get(tuple(place.values()))
            beside = [one for one in lines if one.place == place]
            cells.append(
                _cell(name, line.numbers(name), _best(metric, name, beside, line)) if line is not None else Cell("")
            )
        rows.append(Row([_word(student), *cells], {"student": student}))
    told = [_cell(name, of_teacher(metric, name, [one for one in lines if one.place == place])) for place in places]
    if any(cell.text for cell in told):
        rows.insert(0, Row([_word(TEACHER), *told], {}, fixed=True))
    bold = " The best of each column is bold." if any(cell.best for row in rows for cell in row.cells) else ""
    return Table(metric.title[0].upper() + metric.title[1:], _seeds(lines) + bold, columns, rows)


def _best(metric: Metric, name: str, lines: list[Line], line: Line) -> bool:
    """Whether a line is the best of the students at its place."""
    rivals = [one for one in lines if one.place == line.place and one.student != TEACHER]
    means = [metric.sign * mean for one in rivals if (mean := one.mean(name)) is not None]
    mine = line.mean(name)
    return line.student != TEACHER and mine is not None and len(means) > 1 and metric.sign * mine == max(means)


def of_teacher(metric: Metric, name: str, lines: list[Line]) -> list[float]:
    """The teacher's own number, else as its students' evaluations have it on the same text, one for each seed."""
    own = [number for line in lines if line.student == TEACHER for number in line.numbers(name)]
    if own or not metric.teacher:
        return own
    theirs = metric.teacher[metric.names.index(name)]
    arms = [arm for line in lines for arm in line.members if theirs in arm.values]
    return list({arm.axes.get("seed"): arm.values[theirs] for arm in arms}.values())


def _cell(name: str, numbers: list[float], best: bool = False) -> Cell:
    """Mean and standard deviation over seeds."""
    if not numbers:
        return Cell("")
    lost = [number for number in numbers if not math.isfinite(number)]
    if lost:
        return Cell("diverged" if len(numbers) == 1 else f"diverged in {len(lost)} of {len(numbers)}")
    mean, spread = statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
    last = name.rpartition(".")[2]
    if not spread or is_share(last) or last.endswith("bytes"):
        return Cell(shown(last, mean, spread or None), mean, best)
    decimals = min(max(0, 1 - math.floor(math.log10(spread))), 8)
    return Cell(f"{mean:,.{decimals}f} ± {spread:.{decimals}f}", mean, best)


def _word(text: str) -> Cell:
    return Cell(text, text)


def _seeds(lines: list[Line]) -> str:
    """What ± stands for."""
    counts = sorted({len(line.members) for line in lines if line.student != TEACHER})
    if not counts or counts[-1] < 2:
        return "One seed."
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± standard deviation over {many} seeds."
