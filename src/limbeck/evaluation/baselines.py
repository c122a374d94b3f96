"""Baselines that nobody trained: the sliding window of a student's memory, and softmax as a mixer, the control arm.

    budget = CacheGrowth.measure(student).at(2048)                       # bytes of one sequence's state
    baseline = build_window_baseline(teacher, budget, length=2048)
    baseline.model, baseline.window, baseline.sinks, baseline.state_bytes
    describe_against_window(52.4, 19.1, baseline.window, baseline.sinks)
    # "An untrained sliding window of 142 tokens with 4 sinks, in the same memory, is better (19.10 against 52.40): ..."

A student whose window is better has not been worth its training, so each student is shown beside it. Window and sinks:
Xiao et al. 2023 (arXiv 2309.17453). Sizes are those of real caches.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import find_write_error
from limbeck.evaluation.measure import Measure, Measurement, parse_settings, run_measure
from limbeck.evaluation.subject import Baseline, Subject
from limbeck.evaluation.timing import CacheGrowth
from limbeck.models import convert
from limbeck.models.conversion import set_mixer_options

SINKS = 4
PROBE_TOKENS = 8  # of the passes that count a window's bytes, which do not grow


class WindowBaseline(NamedTuple):
    """A teacher with sliding-window attention in all layers.

    window, sinks: in tokens; a token sees itself and the `window` - 1 before it, and the document's first `sinks`.
    state_bytes: of one sequence.
    """

    model: PreTrainedModel
    window: int
    sinks: int
    state_bytes: int


def build_window_baseline(teacher: PreTrainedModel, budget: float, length: int) -> WindowBaseline:
    """Build the untrained window whose state takes as many bytes as another state, or less by under a token.

    The window has one token at least and `length` at most, with which it sees whole texts of that length. All weights
    outside of the attention modules are the teacher's own tensors. Layers in which the teacher itself has a sliding
    window get this one in its place.

    Args:
        budget: bytes of one sequence's state.
        length: tokens of the texts that it is measured on.

    Raises:
        LimbeckError: the teacher cannot be converted; see `limbeck.models.convert`.
    """
    model = convert(teacher, "sliding_window", options={"window": 1, "sinks": SINKS}, share_weights=True).eval()
    smallest = _count_state_bytes(model)
    per_token = _count_state_bytes(set_mixer_options(model, {"window": 2})) - smallest
    window = max(1, min(length, 1 + int((budget - smallest) // per_token)))
    set_mixer_options(model, {"window": window})
    return WindowBaseline(model, window, SINKS, smallest + (window - 1) * per_token)


def _count_state_bytes(model: PreTrainedModel) -> int:
    return CacheGrowth.measure(model, PROBE_TOKENS).measured[-1]


def build_softmax_control(teacher: PreTrainedModel) -> PreTrainedModel:
    """Build the control arm: the teacher with the mixer `softmax` in all layers, which must measure as the teacher."""
    return convert(teacher, "softmax", share_weights=True).eval().requires_grad_(False)


class RepeatLosses(NamedTuple):
    """Losses in nats a token on a passage that was read `distance` tokens before."""

    distance: int
    student: float
    window: float


def find_repeat_losses(
    student: Mapping[str, Any], window: Mapping[str, Any], student_prefix: str = "", window_prefix: str = ""
) -> RepeatLosses | None:
    """Find the losses on a repeated passage at the shortest distance that both have; None without any."""
    name = "repeat_loss@"
    distances = (int(key.split("@")[1]) for key in student if key.startswith(student_prefix + name))
    for distance in sorted(distances):
        if (key := f"{window_prefix}{name}{distance}") in window:
            return RepeatLosses(distance, student[f"{student_prefix}{name}{distance}"], window[key])
    return None


def describe_against_window(
    student: float,
    window_perplexity: float,
    window: int,
    sinks: int,
    same_memory: bool = True,
    text: str = "",
    repeat: RepeatLosses | None = None,
) -> str:
    """Say in one sentence whether a student beats the untrained window of its memory, by their perplexities.

    A student with the higher perplexity is not worth its training, unless what it saves on a repeated passage is more,
    in nats a token, than what it loses on the text.

    Args:
        student, window_perplexity: on the same text; a student that diverged has NaN or infinity.
        window, sinks: in tokens.
        same_memory: False where even a window of one token takes more memory than the student.
        text: where they were measured, as in " on held-out text".
        repeat: what both pay for a passage that comes again.
    """
    tokens = f"{window:,} token{'s' * (window != 1)}"
    memory = "in the same memory" if same_memory else "which takes more memory"
    name = f"untrained sliding window of {tokens} with {sinks} sinks"
    figures = f"{window_perplexity:.2f} against {student:.2f}{text}"
    forgotten = ""
    if repeat is not None and repeat.window - repeat.student > math.log(student / window_perplexity):
        forgotten = (
            f"forgets a passage read {repeat.distance:,} tokens before, on which it loses {repeat.window:.2f} nats a "
            f"token and the student {repeat.student:.2f}."
        )
    if f"{student:.2f}" == f"{window_perplexity:.2f}":
        equal = f"An {name}, {memory}, is as good ({figures})"
        return f"{equal}, but {forgotten}" if forgotten else f"{equal}, so the training has gained nothing."
    if student < window_perplexity:
        return f"It beats an {name}, {memory} ({student:.2f} against {window_perplexity:.2f}{text})."
    better = f"An {name}, {memory}, is better ({figures})"
    if forgotten:
        return f"{better}, but {forgotten}"
    return f"{better}: this student is not worth its training."


def run_measures(
    subjects: Iterable[Subject],
    measures: Sequence[Measure],
    settings: Mapping[str, dict[str, Any]],
    *,
    ignore_cache: bool = False,
    window: bool = True,
    control: bool = False,
) -> list[Measurement]:
    """Run measures on one model after another, and on what stands beside each (`measure_baselines`).

    Args:
        subjects: may load each model only when its turn comes.
        settings: of each measure by name, those that differ from the defaults.
    """
    measurements: list[Measurement] = []
    for subject in subjects:
        measurements += [run_measure(one, subject, settings[one.name], ignore_cache) for one in measures]
        for one in measures:
            beside = measure_baselines(
                one, subject, settings[one.name], ignore_cache, measurements, window=window, control=control
            )
            measurements += [other for other in beside if other not in measurements]
    return measurements


def measure_baselines(
    measure: Measure,
    subject: Subject,
    overrides: dict[str, Any],
    ignore_cache: bool = False,
    known: Sequence[Measurement] = (),
    *,
    window: bool = True,
    control: bool = False,
) -> list[Measurement]:
    """Measure what stands beside a model: a student's untrained window, and the control arm of its teacher.

    A window that cannot be built is said and left out.

    Args:
        measure: nothing is measured unless it has a `baseline_length`.
        known: results so far, among which that of another student with the same baseline may be.

    Raises:
        LimbeckError: the control arm cannot be built.
    """
    if measure.baseline_length is None or (subject.is_student and subject.teacher_or_none is None):
        return []
    teacher = subject.teacher
    name = Path(teacher.name).name
    made = []
    if window and subject.is_student:
        length = measure.baseline_length(subject, parse_settings(measure, overrides))
        budget = CacheGrowth.measure(subject.model).at(length)
        try:
            one = build_window_baseline(teacher.model, budget, length)
        except LimbeckError as error:
            console.print(f"{subject.name}: no untrained window beside it: {error.found}", markup=False)
        else:
            described = Baseline("window", one.window, one.sinks, one.state_bytes)
            made.append(_as_subject(one.model, f"untrained window {one.window} of {name}", described, subject))
    if control:
        model = build_softmax_control(teacher.model)
        made.append(_as_subject(model, f"softmax control of {name}, the teacher itself", Baseline("softmax"), subject))
    return [_measure_once(measure, one, overrides, ignore_cache, known) for one in made]


def _measure_once(
    measure: Measure, subject: Subject, overrides: dict[str, Any], ignore_cache: bool, known: Sequence[Measurement]
) -> Measurement:
    """Measure a baseline, unless the same was measured beside another student: its file is then taken over."""
    same = [one for one in known if (one.measure, one.model) == (measure.name, subject.name)]
    if same and not find_write_error(subject.output_dir):
        # whether model, text and settings are the same, `run_measure` finds out as for any stored result
        same[0].save(subject.output_dir)
        ignore_cache = False
    return run_measure(measure, subject, overrides, ignore_cache)


def _as_subject(model: PreTrainedModel, name: str, baseline: Baseline, student: Subject) -> Subject:
    """Make a baseline a subject that is measured on the student's text, beside the same teacher."""
    teacher = student.teacher
    described = f"{teacher.fingerprint} {baseline.kind} {baseline.window} {baseline.sinks}"
    return replace(
        student,
        name=name,
        folder="",
        output_dir=student.output_dir / "baselines" / f"{baseline.kind}{baseline.window or ''}",
        model=model,
        tokenizer=teacher.tokenizer,
        teacher_or_none=teacher,
        baseline=baseline,
        content=hashlib.sha256(described.encode()).hexdigest()[:16],
    )


def find_window(student: Measurement, measurements: list[Measurement]) -> Measurement | None:
    """Find the untrained window of a student's memory among measurements: the largest that the memory holds.

    None for a baseline or a teacher, for a student without one, and where only larger states were measured.
    """
    budget = student.values.get("state_bytes", student.data.get("state_bytes"))
    if budget is None or "baseline" in student.data or student.teacher in (None, student.model):
        return None
    windows = [
        one
        for one in measurements
        if (one.measure, one.settings, one.teacher) == (student.measure, student.settings, student.teacher)
        and one.data.get("key") == student.data.get("key")
        and one.data.get("baseline", {}).get("kind") == "window"
        and one.data["baseline"]["state_bytes"] <= budget
        and one.provenance.teacher_weights == student.provenance.teacher_weights
    ]
    return max(windows, key=lambda one: one.data["baseline"]["state_bytes"], default=None)


def describe_windows(measurements: list[Measurement]) -> list[str]:
    """Say of each student whether it beats its untrained window: on the exam, else on the text of the agreement."""
    sentences: dict[str, str] = {}
    for measure, text in (("exam", ""), ("agreement", " on its text")):
        for student in measurements:
            window = find_window(student, measurements) if student.measure == measure else None
            if window is not None and student.model not in sentences:
                facts = window.data["baseline"]
                sentence = describe_against_window(
                    student.values["perplexity"],
                    window.values["perplexity"],
                    facts["window"],
                    facts["sinks"],
                    text=text,
                    repeat=find_repeat_losses(student.values, window.values),
                )
                sentences[student.model] = f"{student.model}: {sentence}"
    return list(sentences.values())
