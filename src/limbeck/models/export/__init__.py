"""Exports: a student in the format of another engine, computed there exactly as here, or refused with the reasons.

    exporter = get_exporter("gguf")
    exporter.check(student, tokenizer)                       # [] if it fits; else every reason, with the switch for it
    write_export(exporter, student, tokenizer, folder, "f16")        # `record`: the files and what is known of them
    exporter.verify(student, tokenizer, folder)              # the engine's logits beside the student's
    exporter.score(folder, sequences)                        # the engine's loss on a text

One module a format; its `EXPORTER` is found by the table below. A format maps tensors to tensors and changes no number
beyond rounding, so a student has to be made to fit before it is trained: `fit` gives the settings for that
(`limbeck distill --for gguf`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError, suggest_closest

EXPORTER_MODULES = {"gguf": "gguf_file", "qwen3_5": "qwen3_5", "onnx": "onnx"}
# An engine may differ from the student by so many times what the student's own prompt and steps differ. Both are sums
# in float32 in another order, which an untrained student of thirty layers enlarges a thousandfold.
OWN_FACTOR = 3


@dataclass(frozen=True)
class Reason:
    """One thing in which a student does not fit a format."""

    problem: str  # what was found and why the format cannot hold it, as a clause without a period
    switch: str | None = None  # the setting that would have made it fit: "student.options.conv=0"

    def __str__(self) -> str:
        return self.problem + (f" (would fit: {self.switch})" if self.switch else "")


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write."""

    layout: str  # the architecture's name in the format
    files: dict[str, int]  # bytes by file name; estimates where a file is not a plain copy of tensors
    notes: list[str] = field(default_factory=list)  # what a reader of the files should know


@dataclass(frozen=True)
class Verification:
    """How far an engine's logits are from the student's, on the same tokens.

    Differences are absolute, over all tokens and the whole vocabulary. An exact file is judged by the largest one.
    Where weights are rounded, single logits move far: at the first tokens a head norm divides by next to nothing. A
    wrong tensor moves all of them, so a rounded file is judged by the typical one.
    """

    engine: str
    version: str
    tokens: int
    prompt_difference: float  # largest, with the tokens given at once
    step_difference: float  # largest, with the tokens given one by one and the state carried over
    typical_difference: float  # root of the mean square, in the worse of both
    logit_deviation: float  # standard deviation of the student's logits, the scale of the differences
    same_token: float  # share of positions with the same most likely token, in the worse of both
    bound: float  # of the largest difference, of the typical one for rounded weights, in standard deviations
    rounded: bool = False  # whether the file has other weights than the student, rounded ones
    own_difference: float = 0.0  # largest, of the student's logits as a prompt and step by step: its own rounding
    same_text_tokens: bool = True  # whether the engine's own tokenizer, where it has one, splits a sample text alike

    @property
    def passed(self) -> bool:
        """Whether both differences are within the bound (NaN is not), and texts are split alike."""
        if self.rounded:
            return self.typical_difference <= self.limit and self.same_text_tokens
        within = self.prompt_difference <= self.limit and self.step_difference <= self.limit
        return within and self.same_text_tokens

    @property
    def limit(self) -> float:
        """What is allowed: by the bound, or for exact files by what float32 alone does to this student."""
        allowed = self.bound * self.logit_deviation
        return allowed if self.rounded else max(allowed, OWN_FACTOR * self.own_difference)


@dataclass(frozen=True)
class Speech:
    """A greedy continuation of a prompt in an engine, and how fast a token came."""

    token_ids: list[int]
    tokens_per_second: float
    threads: int


class EngineMissingError(LimbeckError):
    """The engine that would verify an export is not installed."""


class EngineFailedError(LimbeckError):
    """The engine does not run what was written."""

    exit_code = 1


@dataclass(frozen=True)
class Fit:
    """Settings under which a student of a teacher fits a format, for a recipe."""

    mixer: str
    options: dict[str, Any]
    softmax_layers: str | None = None  # None: as the recipe has it


@dataclass(frozen=True)
class Exporter:
    """A format.

    Attributes:
        name: as in `--to`.
        summary: one line for tables and help.
        engine: what opens it.
        check: student, tokenizer -> reasons why they do not fit.
        plan: student, tokenizer, quantization -> what would be written.
        write: student, tokenizer, empty folder, quantization -> nothing; called for students that fit.
        verify: student, tokenizer, folder -> the engine beside the student. Raises EngineMissingError.
        score: folder, sequences of tokens -> the engine's loss in nats, summed over all tokens but each first one.
            Raises EngineMissingError.
        speak: folder, prompt's tokens, count -> so many tokens of the engine's; None where it is not made to speak.
        fit: config of a teacher, mixer that is asked for or None -> settings of a student that will fit. Raises
            LimbeckError where there are none.
        quantizations: precisions of the weights; the first is the default.
        packages: modules that `write` needs, of an extra.
    """

    name: str
    summary: str
    engine: str
    check: Callable[[Any, Any], list[Reason]]
    plan: Callable[[Any, Any, str], ExportPlan]
    write: Callable[[Any, Any, Path, str], None]
    verify: Callable[[Any, Any, Path], Verification]
    score: Callable[[Path, list[list[int]]], float]
    fit: Callable[[Any, str | None], Fit]
    quantizations: tuple[str, ...] = ("f32",)
    speak: Callable[[Path, list[int], int], Speech] | None = None
    packages: tuple[str, ...] = ()


def get_exporter(name: str) -> Exporter:
    """Return the exporter of a format; LimbeckError for an unknown name."""
    if name not in EXPORTER_MODULES:
        raise LimbeckError(
            f"unknown format '{name}'{suggest_closest(name, EXPORTER_MODULES)}", expected=", ".join(EXPORTER_MODULES)
        )
    # late: each format needs a package of its own
    return import_module(f"{__name__}.{EXPORTER_MODULES[name]}").EXPORTER


def check_exportable(exporter: Exporter, student: Any, tokenizer: Any, quantization: str | None = None) -> str:
    """Return the quantization to use; LimbeckError with all reasons if the student does not fit the format."""
    quantization = quantization or exporter.quantizations[0]
    if quantization not in exporter.quantizations:
        raise LimbeckError(
            f"no quantization '{quantization}'{suggest_closest(quantization, exporter.quantizations)}",
            expected=f"for {exporter.name}: {', '.join(exporter.quantizations)}",
        )
    reasons = exporter.check(student, tokenizer)
    if not reasons:
        return quantization
    listing = "\n".join(f"  - {reason}" for reason in reasons)
    raise LimbeckError(
        f"this student cannot be written as {exporter.name} without changing what it computes:\n{listing}",
        expected=exporter.summary,
        hint=f"limbeck distill --for {exporter.name}   (settings that fit, from the first step on)"
        if all(reason.switch for reason in reasons)
        else "another teacher or tokenizer: for some of this there is no switch",
    )
