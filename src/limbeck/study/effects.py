r"""What claims compare: numbers of one arm (metrics), and effects that are more than a difference of two metrics.

    log_perplexity(row)                                     # nats a token on held-out text
    select_mean("recall", r"recall, \d+ pairs")(row)
    make_gain_over_window(("softmax",))(rows)["0"]          # an effect: of each seed, one number an arm

A metric reads an arm's record and is None where that was not measured. An effect gives its sizes by seed, as
`limbeck.study.statistics` judges them.
"""

import math
import re
from collections.abc import Callable

from limbeck.study.statistics import ArmResult, Contrasts, Metric, Term, contrast_common_arms


def select_value(name: str) -> Metric:
    """Build the metric that reads one value of an arm's record."""
    return lambda row: row["values"].get(name)


def log_perplexity(row: ArmResult) -> float | None:
    """Read the loss on held-out text, in nats a token: of the measure `agreement`, else of the run's own evaluation."""
    perplexity = row["values"].get("agreement.perplexity", row["values"].get("held_out.student_perplexity"))
    if perplexity is None:
        return None
    # NaN stays NaN, and is reported as an arm that diverged
    return math.log(perplexity) if perplexity > 0 else math.nan


def select_by_length(measure: str, name: str, last: bool) -> Metric:
    """Build the metric that reads a value at the shortest or longest of the lengths where it was measured.

    Args:
        name: pattern of the value's name, with the length in tokens as its group; several values of one length are
            averaged.
        last: whether to read it at the longest length.
    """
    pattern = re.compile(rf"{measure}\.{name}$")

    def metric(row: ArmResult) -> float | None:
        values_by_length: dict[int, list[float]] = {}
        for key, value in row["values"].items():
            if match := pattern.match(key):
                values_by_length.setdefault(int(match[1]), []).append(value)
        if len(values_by_length) < 2:
            return None
        chosen = values_by_length[max(values_by_length) if last else min(values_by_length)]
        return sum(chosen) / len(chosen)

    return metric


def select_mean(measure: str, name: str) -> Metric:
    """Build the metric that averages all values whose name matches the pattern."""
    pattern = re.compile(rf"{measure}\.{name}$")

    def metric(row: ArmResult) -> float | None:
        values = [value for key, value in row["values"].items() if pattern.match(key)]
        return sum(values) / len(values) if values else None

    return metric


def loss_growth_terms(where: dict, weight: float) -> tuple[Term, Term]:
    """Return the rise of the loss from the first to the last stretch of a long text, as terms of an effect."""
    name = r"loss, tokens \d+ to (\d+)"
    return (
        Term(weight, select_by_length("positions", name, last=True), where),
        Term(-weight, select_by_length("positions", name, last=False), where),
    )


def token_time_growth(rows: list[ArmResult]) -> dict[str, list[float]]:
    """Compute how much a token's time grows from the shortest to the longest context, as a share of the former."""
    last, first = (select_by_length("speed", r"token_milliseconds@(\d+)x1", last=is_last) for is_last in (True, False))
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        shortest, longest = first(row), last(row)
        if shortest and longest:
            by_seed.setdefault(str(row["axes"]["seed"]), []).append(longest / shortest - 1)
    return by_seed


def token_time_gain(rows: list[ArmResult]) -> dict[str, list[float]]:
    """Compute the logarithm of the teacher's time for a token over the student's, after the longest context."""
    time = select_by_length("speed", r"token_milliseconds@(\d+)x1", last=True)
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        student_time, teacher_time = time(row), time({"values": row.get("teacher") or {}})
        if student_time and teacher_time:
            by_seed.setdefault(str(row["axes"]["seed"]), []).append(math.log(teacher_time / student_time))
    return by_seed


def cache_growth(rows: list[ArmResult]) -> dict[str, list[float]]:
    """Compute the bytes by which a token makes the student's cache grow, as a share of the teacher's."""
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        student_bytes, teacher_bytes = (
            row["values"].get(f"memory.{model}_bytes_per_token") for model in ("student", "teacher")
        )
        if student_bytes is not None and teacher_bytes:
            by_seed.setdefault(str(row["axes"]["seed"]), []).append(student_bytes / teacher_bytes)
    return by_seed


def make_gain_over_window(controls: tuple[str, ...]) -> Callable[[list[ArmResult]], Contrasts]:
    """Build the effect: how much lower each student's loss is than that of the untrained window of its memory.

    On the exam, whose documents are longer than a window; on the run's held-out text where there is none.

    Args:
        controls: mixers of arms that are no student: their memory is the teacher's, and so is their window.
    """

    def compute(rows: list[ArmResult]) -> Contrasts:
        gains = []
        for row in rows:
            values = row["values"]
            section = "exam" if "exam.window_perplexity" in values else "held_out"
            window, student = (values.get(f"{section}.{model}_perplexity") for model in ("window", "student"))
            if window is not None and student is not None and row["axes"]["mixer"] not in controls:
                gain = math.log(window) - math.log(student) if min(window, student) > 0 else math.nan
                gains.append((row, gain))
        return contrast_common_arms(gains)

    return compute


def make_window_comparison(windows: tuple[str, ...], linear: tuple[str, ...]) -> Callable[[list[ArmResult]], Contrasts]:
    """Build the effect: how much lower the loss of the best window is than that of each linear student.

    The two may go through different stages: what is compared is a budget's best use. Teacher and budget are equal.
    """

    def compute(rows: list[ArmResult]) -> Contrasts:
        losses: dict[tuple[str, str], tuple[list[float], list[tuple[ArmResult, float]]]] = {}
        for row in rows:
            axes, loss = row["axes"], log_perplexity(row)
            if loss is not None and axes["mixer"] in windows + linear:
                key = (str(axes["seed"]), repr((axes.get("teacher"), axes.get("tokens"))))
                of_windows, of_linear = losses.setdefault(key, ([], []))
                if axes["mixer"] in windows:
                    of_windows.append(loss)
                else:
                    of_linear.append((row, loss))
        return contrast_common_arms(
            (row, loss - min(of_windows))
            for of_windows, of_linear in losses.values()
            if of_windows
            for row, loss in of_linear
        )

    return compute
