"""The tables of a report as plain data, for the page and for Markdown: seeds together, a row a student under a condition.

    groups = group_seeds(collection)                 # all seeds of a student under a condition of the grid are one group
    for table in [*build_headline_tables(groups), *build_measure_tables(groups)]:
        table.columns, table.rows[0].cells

A *condition* is what a study varies beside students and seeds: stages, copying, budgets. What an entry belongs to is kept
as `axis_values` (axis -> value), by which the page filters.
"""

import math
import statistics
from dataclasses import dataclass, field

from limbeck.report.collection import TEACHER, Run, RunCollection
from limbeck.report.values import format_name, format_value, is_fraction

MAX_VALUE_COLUMNS = 10  # numbers beside each other
TABLE_TITLES = {
    "held_out": "held-out text, the run's own evaluation",
    "memory": "cache, from its shapes",
    "parameters": "parameters",
    "stages": "training",
}


@dataclass(frozen=True)
class HeadlineMetric:
    """A number that heads a report.

    value_names: values that hold it, the one that most runs have counts. teacher: the teacher's in the same evaluations.
    sign: 1 where more is better, -1 where less is.
    """

    title: str
    value_names: tuple[str, ...]
    sign: int
    teacher: tuple[str, ...] = ()


HEADLINE_METRICS = (
    HeadlineMetric(
        "perplexity of held-out text",
        ("agreement.perplexity", "held_out.student_perplexity"),
        -1,
        ("agreement.teacher_perplexity", "held_out.teacher_perplexity"),
    ),
    HeadlineMetric("KL(teacher ‖ student), nats a token", ("agreement.kl", "held_out.kl"), -1),
    HeadlineMetric("same most likely token", ("agreement.top1_agreement", "held_out.top1_agreement"), 1),
)


@dataclass(frozen=True)
class SeedGroup:
    """All seeds of one student under one condition. Runs without one, the teacher, have an empty one."""

    student: str
    condition: dict[str, str]
    runs: list[Run]

    @property
    def axis_values(self) -> dict[str, str]:
        """What it is filtered by; {} for a line that always stays."""
        return {} if self.student == TEACHER else {"student": self.student, **self.condition}

    def seed_values(self, name: str) -> list[float]:
        """That value of every seed."""
        return [run.values[name] for run in self.runs if name in run.values]

    def mean(self, name: str) -> float | None:
        """Mean over seeds; None where nothing was measured or a seed diverged."""
        numbers = self.seed_values(name)
        return statistics.fmean(numbers) if numbers and all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True)
class TableColumn:
    text: str
    axis_values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableCell:
    """sort_key: what a column is sorted by; None for an empty cell, which goes last."""

    text: str
    sort_key: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells, the first of which names the row; a pinned row stays above the others."""

    cells: list[TableCell]
    axis_values: dict[str, str]
    pinned: bool = False


@dataclass(frozen=True)
class ReportTable:
    """`num_text_columns`: how many of the first columns hold words, not numbers."""

    title: str
    note: str
    columns: list[TableColumn]
    rows: list[TableRow]
    num_text_columns: int = 1


def group_seeds(collection: RunCollection) -> list[SeedGroup]:
    """The finished runs, seeds together."""
    groups: dict[tuple[str, ...], SeedGroup] = {}
    for run in collection.finished_runs:
        condition = {axis: run.axes[axis] for axis in collection.condition_axes if axis in run.axes}
        key = (run.student, *condition.values())
        groups.setdefault(key, SeedGroup(run.student, condition, [])).runs.append(run)
    return list(groups.values())


def list_conditions(groups: list[SeedGroup]) -> list[dict[str, str]]:
    """The conditions of a grid in the order of its runs; [{}] where there is nothing to tell apart."""
    found = {tuple(group.condition.values()): group.condition for group in groups if group.condition}
    return list(found.values()) or [{}]


def format_condition(condition: dict[str, str]) -> str:
    """A condition in words: "stages 2+3, copied"."""
    words = {"yes": "copied", "no": "fresh"}
    return ", ".join(
        words.get(value, value) if axis == "copy_projections" else f"{format_axis(axis)} {value}"
        for axis, value in condition.items()
    )


def format_axis(axis: str) -> str:
    """An axis as people say it."""
    return "copying" if axis == "copy_projections" else axis.replace("_", " ")


def select_value_name(metric: HeadlineMetric, groups: list[SeedGroup]) -> str | None:
    """The name under which most lines have a metric."""
    counts = {name: sum(bool(group.seed_values(name)) for group in groups) for name in metric.value_names}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def build_headline_tables(groups: list[SeedGroup]) -> list[ReportTable]:
    """Perplexity, KL and agreement: students by conditions, a table each; of a single condition students by numbers."""
    conditions = list_conditions(groups)
    chosen = [(metric, name) for metric in HEADLINE_METRICS if (name := select_value_name(metric, groups))]
    if not chosen:
        return []
    if len(conditions) > 1:
        return [_pivot(metric, name, groups, conditions) for metric, name in chosen]
    columns = [TableColumn("student"), *(TableColumn(metric.title) for metric, _ in chosen)]
    rows = []
    for group in groups:
        cells = [_cell(name, group.seed_values(name), _best(metric, name, groups, group)) for metric, name in chosen]
        if group.student != TEACHER and any(cell.text for cell in cells):
            rows.append(TableRow([_word(group.student), *cells], group.axis_values))
    told = [_cell(name, get_teacher_values(metric, name, groups)) for metric, name in chosen]
    if any(cell.text for cell in told):
        rows.insert(0, TableRow([_word(TEACHER), *told], {}, pinned=True))
    return [ReportTable("Quality", _seeds(groups), columns, rows)]


def build_measure_tables(groups: list[SeedGroup]) -> list[ReportTable]:
    """All numbers: a table for each measure, a row for each group."""
    names: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs:
            for name in run.values:
                names.setdefault(name.partition(".")[0], {}).setdefault(name)
    tables = []
    for measure, mine in names.items():
        parts = [list(mine)[i : i + MAX_VALUE_COLUMNS] for i in range(0, len(mine), MAX_VALUE_COLUMNS)]
        for number, part in enumerate(parts, 1):
            title = TABLE_TITLES.get(measure, f"measure {measure}") + (
                f", {number} of {len(parts)}" if len(parts) > 1 else ""
            )
            tables.append(_numbers(title, part, groups))
    return tables


def _numbers(title: str, names: list[str], groups: list[SeedGroup]) -> ReportTable:
    """A row for each line that has any of these values."""
    axes = list(dict.fromkeys(axis for group in groups for axis in group.condition))
    columns = [TableColumn(format_axis(one)) for one in ("student", *axes, "seeds")]
    columns += [TableColumn(format_name(name.partition(".")[2].replace(".", " "))) for name in names]
    rows = []
    for group in groups:
        cells = [_cell(name, group.seed_values(name)) for name in names]
        if any(cell.text for cell in cells):
            words = [_word(one) for one in (group.student, *(group.condition.get(axis, "") for axis in axes))]
            count = len(group.runs)
            rows.append(
                TableRow([*words, TableCell(str(count), count), *cells], group.axis_values, group.student == TEACHER)
            )
    return ReportTable(title, _seeds(groups), columns, rows, num_text_columns=1 + len(axes))


def _pivot(metric: HeadlineMetric, name: str, groups: list[SeedGroup], conditions: list[dict[str, str]]) -> ReportTable:
    """Students by conditions."""
    columns = [
        TableColumn("student"),
        *(TableColumn(format_condition(condition), condition) for condition in conditions),
    ]
    rows = []
    for student in dict.fromkeys(group.student for group in groups if group.condition):
        mine = {tuple(group.condition.values()): group for group in groups if group.student == student}
        cells = []
        for condition in conditions:
            group = mine.get(tuple(condition.values()))
            beside = [one for one in groups if one.condition == condition]
            cells.append(
                _cell(name, group.seed_values(name), _best(metric, name, beside, group))
                if group is not None
                else TableCell("")
            )
        rows.append(TableRow([_word(student), *cells], {"student": student}))
    told = [
        _cell(name, get_teacher_values(metric, name, [one for one in groups if one.condition == condition]))
        for condition in conditions
    ]
    if any(cell.text for cell in told):
        rows.insert(0, TableRow([_word(TEACHER), *told], {}, pinned=True))
    bold = " The best of each column is bold." if any(cell.best for row in rows for cell in row.cells) else ""
    return ReportTable(metric.title[0].upper() + metric.title[1:], _seeds(groups) + bold, columns, rows)


def _best(metric: HeadlineMetric, name: str, groups: list[SeedGroup], group: SeedGroup) -> bool:
    """Whether a group is the best of the students under its condition."""
    rivals = [one for one in groups if one.condition == group.condition and one.student != TEACHER]
    means = [metric.sign * mean for one in rivals if (mean := one.mean(name)) is not None]
    mine = group.mean(name)
    return group.student != TEACHER and mine is not None and len(means) > 1 and metric.sign * mine == max(means)


def get_teacher_values(metric: HeadlineMetric, name: str, groups: list[SeedGroup]) -> list[float]:
    """The teacher's own number, else as its students' evaluations have it on the same text, one for each seed."""
    own = [number for group in groups if group.student == TEACHER for number in group.seed_values(name)]
    if own or not metric.teacher:
        return own
    theirs = metric.teacher[metric.value_names.index(name)]
    runs = [run for group in groups for run in group.runs if theirs in run.values]
    return list({run.axes.get("seed"): run.values[theirs] for run in runs}.values())


def _cell(name: str, numbers: list[float], best: bool = False) -> TableCell:
    """Mean and standard deviation over seeds."""
    if not numbers:
        return TableCell("")
    lost = [number for number in numbers if not math.isfinite(number)]
    if lost:
        return TableCell("diverged" if len(numbers) == 1 else f"diverged in {len(lost)} of {len(numbers)}")
    mean, spread = statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
    last = name.rpartition(".")[2]
    if not spread or is_fraction(last) or last.endswith("bytes"):
        return TableCell(format_value(last, mean, spread or None), mean, best)
    decimals = min(max(0, 1 - math.floor(math.log10(spread))), 8)
    return TableCell(f"{mean:,.{decimals}f} ± {spread:.{decimals}f}", mean, best)


def _word(text: str) -> TableCell:
    return TableCell(text, text)


def _seeds(groups: list[SeedGroup]) -> str:
    """What ± stands for."""
    counts = sorted({len(group.runs) for group in groups if group.student != TEACHER})
    if not counts or counts[-1] < 2:
        return "One seed."
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± standard deviation over {many} seeds."
