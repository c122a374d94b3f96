"""The tables of a report as plain data, for the page and for Markdown: seeds together, a row for each student.

    groups = group_seeds(collection)        # all seeds of a student under one condition are one group
    for table in [*build_headline_tables(groups), *build_measure_tables(groups)]:
        table.columns, table.rows[0].cells

A *condition* is what a study varies besides students and seeds: stages, copied projections, budgets. Columns and rows
carry their `axis_values` (axis -> value), by which the page filters.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from limbeck.report.collection import TEACHER, Run, RunCollection
from limbeck.report.values import format_mean_std, format_name, get_window_name, get_window_tokens

MAX_VALUE_COLUMNS = 10  # numbers beside each other
TABLE_TITLES = {
    "held_out": "held-out text, the run's own evaluation",
    "exam": "exam",
    "window": "untrained window of the student's memory",
    "memory": "cache, from its shapes",
    "parameters": "parameters",
    "stages": "training",
}


@dataclass(frozen=True)
class HeadlineMetric:
    """A number that heads a report.

    value_names: values that may hold it; the one that most runs have is used.
    sign: 1 where more is better, -1 where less is better.
    teacher: the teacher's number in the same evaluations, in the order of `value_names`.
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
    HeadlineMetric(
        "perplexity of the exam", ("exam.perplexity", "exam.student_perplexity"), -1, 2 * ("exam.teacher_perplexity",)
    ),
    HeadlineMetric(
        "loss on a passage read 512 tokens before, nats a token",
        ("exam.repeat_loss@512", "exam.student_repeat_loss@512"),
        -1,
        2 * ("exam.teacher_repeat_loss@512",),
    ),
)
EXAM_METRIC = HEADLINE_METRICS[3]


@dataclass(frozen=True)
class SeedGroup:
    """All seeds of one student under one condition; the teacher's condition is empty."""

    student: str
    condition: dict[str, str]
    runs: list[Run]

    @property
    def axis_values(self) -> dict[str, str]:
        """What the page filters it by; {} for the teacher, which always stays."""
        return {} if self.student == TEACHER else {"student": self.student, **self.condition}

    def seed_values(self, name: str) -> list[float]:
        """The value of every seed that has it."""
        return [run.values[name] for run in self.runs if name in run.values]

    def mean(self, name: str) -> float | None:
        """Average over seeds; None where nothing was measured or a seed diverged."""
        numbers = self.seed_values(name)
        return statistics.fmean(numbers) if numbers and all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True)
class TableColumn:
    text: str
    axis_values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableCell:
    """sort_key: what a column is sorted by; None for an empty cell, which sorts last."""

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
    """Group the finished runs by student and condition."""
    groups: dict[tuple[str, ...], SeedGroup] = {}
    for run in collection.finished_runs:
        condition = {axis: run.axes[axis] for axis in collection.condition_axes if axis in run.axes}
        key = (run.student, *condition.values())
        groups.setdefault(key, SeedGroup(run.student, condition, [])).runs.append(run)
    return list(groups.values())


def list_conditions(groups: list[SeedGroup]) -> list[dict[str, str]]:
    """List the conditions in the order of their runs; [{}] where there is only one."""
    conditions = {tuple(group.condition.values()): group.condition for group in groups if group.condition}
    return list(conditions.values()) or [{}]


def format_condition(condition: dict[str, str]) -> str:
    """Put a condition into words: "stages 2+3, copied"."""
    words = {"yes": "copied", "no": "fresh"}
    return ", ".join(
        words.get(value, value) if axis == "copy_projections" else f"{format_axis(axis)} {value}"
        for axis, value in condition.items()
    )


def format_axis(axis: str) -> str:
    """Put an axis into words."""
    return "copying" if axis == "copy_projections" else axis.replace("_", " ")


def select_value_name(metric: HeadlineMetric, groups: list[SeedGroup]) -> str | None:
    """Choose the name under which most groups have a metric; None where none has."""
    counts = {name: sum(bool(group.seed_values(name)) for group in groups) for name in metric.value_names}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def build_headline_tables(groups: list[SeedGroup]) -> list[ReportTable]:
    """Build the tables of perplexity, KL and agreement: students by conditions; for one condition a single table."""
    conditions = list_conditions(groups)
    chosen = [(metric, name) for metric in HEADLINE_METRICS if (name := select_value_name(metric, groups))]
    if not chosen:
        return []
    if len(conditions) > 1:
        return [_build_condition_table(metric, name, groups, conditions) for metric, name in chosen]
    columns = [TableColumn("student"), *(TableColumn(metric.title) for metric, _ in chosen)]
    rows = []
    for group in groups:
        cells = [
            _number_cell(name, group.seed_values(name), _is_best(metric, name, groups, group))
            for metric, name in chosen
        ]
        if group.student != TEACHER and any(cell.text for cell in cells):
            rows.append(TableRow([_text_cell(group.student), *cells], group.axis_values))
    windows = [get_window_values(name, groups) for _, name in chosen]
    rows = [*_build_window_rows(windows, [name for _, name in chosen]), *rows]
    teacher_cells = [_number_cell(name, get_teacher_values(metric, name, groups)) for metric, name in chosen]
    if any(cell.text for cell in teacher_cells):
        rows.insert(0, TableRow([_text_cell(TEACHER), *teacher_cells], {}, pinned=True))
    return [ReportTable("Quality", _describe_seeds(groups), columns, rows)]


def build_measure_tables(groups: list[SeedGroup]) -> list[ReportTable]:
    """Build the tables of all numbers: one for each measure, a row for each group."""
    names: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs:
            for name in run.values:
                section, _, value = name.partition(".")
                if not value.startswith("window_"):  # those have rows
                    names.setdefault(section, {}).setdefault(name)
    tables = []
    for measure, measure_names in names.items():
        columns = list(measure_names)
        parts = [columns[i : i + MAX_VALUE_COLUMNS] for i in range(0, len(columns), MAX_VALUE_COLUMNS)]
        for number, part in enumerate(parts, 1):
            title = TABLE_TITLES.get(measure, f"measure {measure}") + (
                f", {number} of {len(parts)}" if len(parts) > 1 else ""
            )
            tables.append(_build_measure_table(title, part, groups))
    return tables


def _build_measure_table(title: str, names: list[str], groups: list[SeedGroup]) -> ReportTable:
    """Build a table with a row for each group that has any of these values."""
    axes = list(dict.fromkeys(axis for group in groups for axis in group.condition))
    columns = [TableColumn(format_axis(one)) for one in ("student", *axes, "seeds")]
    columns += [TableColumn(format_name(name.partition(".")[2].replace(".", " "))) for name in names]
    rows = []
    for group in groups:
        cells = [_number_cell(name, group.seed_values(name)) for name in names]
        if any(cell.text for cell in cells):
            words = [_text_cell(one) for one in (group.student, *(group.condition.get(axis, "") for axis in axes))]
            count = len(group.runs)
            rows.append(
                TableRow([*words, TableCell(str(count), count), *cells], group.axis_values, group.student == TEACHER)
            )
    windows = [get_window_values(name, groups) for name in names]
    rows += _build_window_rows(windows, names, [TableCell("")] * (1 + len(axes)))
    return ReportTable(title, _describe_seeds(groups), columns, rows, num_text_columns=1 + len(axes))


def _build_condition_table(
    metric: HeadlineMetric, name: str, groups: list[SeedGroup], conditions: list[dict[str, str]]
) -> ReportTable:
    """Build a table of one metric with students as rows and conditions as columns."""
    columns = [
        TableColumn("student"),
        *(TableColumn(format_condition(condition), condition) for condition in conditions),
    ]
    rows = []
    for student in dict.fromkeys(group.student for group in groups if group.condition):
        by_condition = {tuple(group.condition.values()): group for group in groups if group.student == student}
        cells = []
        for condition in conditions:
            group = by_condition.get(tuple(condition.values()))
            best = group is not None and _is_best(metric, name, groups, group)
            cells.append(_number_cell(name, group.seed_values(name) if group else [], best))
        rows.append(TableRow([_text_cell(student), *cells], {"student": student}))
    by_condition_groups = [[one for one in groups if one.condition == condition] for condition in conditions]
    windows = [get_window_values(name, members) for members in by_condition_groups]
    rows = [*_build_window_rows(windows, [name] * len(windows)), *rows]
    teacher_cells = [_number_cell(name, get_teacher_values(metric, name, members)) for members in by_condition_groups]
    if any(cell.text for cell in teacher_cells):
        rows.insert(0, TableRow([_text_cell(TEACHER), *teacher_cells], {}, pinned=True))
    bold = " The best of each column is bold." if any(cell.best for row in rows for cell in row.cells) else ""
    return ReportTable(metric.title[0].upper() + metric.title[1:], _describe_seeds(groups) + bold, columns, rows)


def _is_best(metric: HeadlineMetric, name: str, groups: list[SeedGroup], group: SeedGroup) -> bool:
    """Whether a group is the best of at least two students under its condition."""
    candidates = [one for one in groups if one.condition == group.condition and one.student != TEACHER]
    means = [metric.sign * mean for one in candidates if (mean := one.mean(name)) is not None]
    mean = group.mean(name)
    return group.student != TEACHER and mean is not None and len(means) > 1 and metric.sign * mean == max(means)


def get_teacher_values(metric: HeadlineMetric, name: str, groups: list[SeedGroup]) -> list[float]:
    """Get the teacher's own number, else the one in its students' evaluations on the same text, one for each seed."""
    own = [number for group in groups if group.student == TEACHER for number in group.seed_values(name)]
    if own or not metric.teacher:
        return own
    teacher_name = metric.teacher[metric.value_names.index(name)]
    runs = [run for group in groups for run in group.runs if teacher_name in run.values]
    return list({run.axes.get("seed"): run.values[teacher_name] for run in runs}.values())


def get_window_values(name: str, groups: list[SeedGroup]) -> dict[int, list[float]]:
    """Get the untrained windows' numbers beside the students' values of this name, by tokens of the window.

    Students of the same memory have the same window, which counts once for each seed.
    """
    found: dict[int, dict[str | None, float]] = {}
    for run in (run for group in groups for run in group.runs):
        tokens = get_window_tokens(name, run.values)
        if tokens is not None:
            found.setdefault(tokens, {})[run.axes.get("seed")] = run.values[get_window_name(name)]
    return {tokens: list(found[tokens].values()) for tokens in sorted(found)}


def _build_window_rows(
    windows: list[dict[int, list[float]]], names: list[str], words: Sequence[TableCell] = ()
) -> list[TableRow]:
    """Build a row for each untrained window.

    Args:
        windows: the values of each column, by tokens of the window.
        names: the value's name of each column.
        words: cells between the row's name and its values.
    """
    rows = []
    for tokens in sorted({tokens for column in windows for tokens in column}):
        cells = [_number_cell(name, column.get(tokens, [])) for name, column in zip(names, windows)]
        rows.append(TableRow([_text_cell(f"untrained window, {tokens:,} tokens"), *words, *cells], {}, pinned=True))
    return rows


def describe_windows(groups: list[SeedGroup]) -> list[str]:
    """Say which students beat the untrained window of their memory: on the exam, else on the held-out text."""
    for metric in (EXAM_METRIC, HEADLINE_METRICS[0]):
        name = select_value_name(metric, groups)
        if name is None:
            continue
        better: list[str] = []
        worse: list[str] = []
        for group in groups:
            windows = get_window_values(name, [group])
            if windows and group.student != TEACHER:
                window = statistics.fmean(number for numbers in windows.values() for number in numbers)
                mean = group.mean(name)
                label = ", ".join(filter(None, [group.student, format_condition(group.condition)]))
                (better if mean is not None and mean < window else worse).append(label)
        text = "the exam" if metric is EXAM_METRIC else "held-out text"
        compared = f"on {text} than an untrained sliding window of the same memory"
        sentences = [f"Better {compared}: {'; '.join(better)}."] if better else []
        if worse:
            sentences.append(f"No better {compared}, and not worth the training: {'; '.join(worse)}.")
        if sentences:
            return sentences
    return []


def _number_cell(name: str, numbers: list[float], best: bool = False) -> TableCell:
    """Show mean and standard deviation over seeds; a group of which a seed diverged has no place in the order."""
    text = format_mean_std(name, numbers)
    finite = bool(numbers) and all(map(math.isfinite, numbers))
    return TableCell(text, statistics.fmean(numbers), best) if finite else TableCell(text)


def _text_cell(text: str) -> TableCell:
    return TableCell(text, text)


def _describe_seeds(groups: list[SeedGroup]) -> str:
    """Say what the numbers are means of."""
    counts = sorted({len(group.runs) for group in groups if group.student != TEACHER})
    if not counts or counts[-1] < 2:
        return "One seed."
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± standard deviation over {number} seeds."
