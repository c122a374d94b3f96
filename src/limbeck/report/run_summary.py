"""The summary of a run: Markdown for the screen and the run directory, and the parts that the model card shows too.

    print(format_summary(result))          # result: what limbeck.distill returns, or the content of eval.json

The card (`limbeck.report.model_card`) and the summary show the same tables of quality and memory and the same sentences
about the untrained window and the break-even length, so each is written here once.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from limbeck.core.console import format_bytes, format_duration
from limbeck.evaluation.baselines import describe_against_window, find_repeat_losses
from limbeck.models import format_ranges
from limbeck.report.privacy import is_local_path
from limbeck.report.teacher_info import get_teacher_name
from limbeck.report.text_tables import escape_markdown, format_code_span, format_markdown_table

MODELS = ("teacher", "student", "window")  # of the columns, as the values of the exam begin
EVAL_TOKENS = 50_000  # that the command to type next measures on, or all that there are
CACHE_LENGTHS = (512, 32_768)  # tokens at which the caches are compared: a paragraph, a long document


class RunSummary(dict):
    """What a run came to: the content of its eval.json, shown as tables in a notebook and by `print`.

    summary = limbeck.distill("quickstart")
    summary["held_out"]["student_perplexity"], summary.path / "curves.png"
    AutoModelForCausalLM.from_pretrained(summary.student_folder)
    """

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self["run"])

    @property
    def student_folder(self) -> Path:
        """The folder of the student, for `from_pretrained`."""
        return self.path / "student"

    def __repr__(self) -> str:
        held_out = self["held_out"]
        return (
            f"<run {self['run']}: {self['mixer']} in {self['layers']} layers of {self['teacher']}, perplexity "
            f"{held_out['student_perplexity']:.2f}, the teacher's {held_out['teacher_perplexity']:.2f}>"
        )

    def __str__(self) -> str:
        return format_summary(self)

    def _repr_markdown_(self) -> str:
        """Return what a notebook shows; its cells are code already, so the next commands are left out."""
        return format_summary(self, commands=False)


def format_summary(result: dict[str, Any], commands: bool = True) -> str:
    """Format a run as Markdown: quality beside the teacher, stages, parameters, memory, samples, the next commands."""
    held_out, memory, parameters = result["held_out"], result["memory"], result["parameters"]
    columns = ["stage", "tokens", "time", "tokens/s", "trained parameters", "result"]
    rows = [
        [
            stage["stage"],
            f"{stage['tokens']:,}",
            format_duration(stage["seconds"]),
            f"{stage['tokens'] / max(stage.get('fit_seconds', stage['seconds']), 1e-9):.0f}",
            f"{stage['trained_parameters']:,}",
            format_outcome(stage),
        ]
        for stage in result["stages"]
    ]
    if losses := list_guard_losses(result["stages"]):
        columns.append("held-out loss")
        rows = [[*row, loss] for row, loss in zip([["before training", *[""] * 5], *rows], losses)]
    stages = format_markdown_table(columns, rows, num_text_columns=len(columns))
    peak = result["peak_memory_bytes"]
    teacher = escape_markdown(get_teacher_name(result["teacher"]))
    blocks = [
        f"# {escape_markdown(result['mixer'])} in {result['layers']} layers of {teacher}",
        "; ".join(f"{name} in layers {format_ranges(layers)}" for name, layers in result["mixers"].items()) + "."
        if len(result["mixers"]) > 1
        else "",
        # not in results of earlier versions
        _capitalize(result["softmax_heads"]) + "." if result.get("softmax_heads") else "",
        f"Held-out text: {held_out['targets']:,} tokens of {format_code_span(result['text'])} in packed sequences of "
        f"{held_out['length']}.",
        format_result_table(result, [*list_quality_rows(result), *list_memory_rows(result)]),
        describe_exam(result),
        describe_window(result),
        describe_break_even(memory),
        stages,
        f"Parameters: {parameters['total']:,}, of which {parameters['added']:,} are new "
        f"and {parameters['copied']:,} came from the teacher. Seed {result['seed']}."
        + (f" Peak of resident memory: {format_bytes(peak)}." if peak else ""),
        _format_plan(result),
        f"Prompt: *{escape_markdown(result['prompt'])}*\n\n{format_samples(result)}" if result["samples"] else "",
    ]
    if commands:
        blocks += ["Next:", "\n".join(f"    {command}" for command in next_commands(result))]
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


def format_result_table(result: dict[str, Any], rows: list[list[str]]) -> str:
    """Format rows of label, teacher, student and window; a run without a window has no column for it."""
    columns = ["", "teacher", "student"]
    if "tokens" in result.get("window", {}):
        columns.append(f"untrained window, {result['window']['tokens']:,} tokens")
    return format_markdown_table(columns, [row[: len(columns)] for row in rows], num_text_columns=len(columns))


def list_quality_rows(result: dict[str, Any]) -> list[list[str]]:
    """Rows of label, teacher, student and window: the evaluation on held-out text, and the exam where there is one."""
    held_out, exam = result["held_out"], result.get("exam") or {}

    def format_cell(section: dict[str, Any], name: str, template: str, scale: float = 1.0) -> str:
        return template.format(scale * section[name]) if name in section else ""

    rows = [
        [
            "perplexity",
            f"{held_out['teacher_perplexity']:.2f}",
            f"**{held_out['student_perplexity']:.2f}**",
            format_cell(held_out, "window_perplexity", "{:.2f}"),
        ],
        [
            "same most likely token",
            "",
            f"{100 * held_out['top1_agreement']:.1f} %",
            format_cell(held_out, "window_top1_agreement", "{:.1f} %", 100),
        ],
        [
            "KL(teacher ‖ student), nats a token",
            "",
            f"{held_out['kl']:.3f}",
            format_cell(held_out, "window_kl", "{:.3f}"),
        ],
    ]
    for name, label, template, scale in _list_exam_values(exam):
        rows.append([label, *(format_cell(exam, f"{who}_{name}", template, scale) for who in MODELS)])
    return rows


def list_guard_losses(stages: list[dict[str, Any]]) -> list[str]:
    """Format the student's held-out losses, in nats a token: before training, then after each stage.

    A stage that was not taken says so. Empty for a run without `keep_better`.
    """
    verdicts = [stage["guard"] for stage in stages if "guard" in stage]
    if not verdicts:
        return []
    losses = ["not finite" if (loss := verdicts[0]["before"]) is None else f"{loss:.3f}"]
    for verdict in verdicts:
        loss = "not finite" if verdict["after"] is None else f"{verdict['after']:.3f}"
        losses.append(loss if verdict["kept"] else f"{loss}, not taken")
    return losses


def _list_exam_values(exam: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """List name, label, format and factor of the values that the exam has."""
    names = [name.removeprefix("student_") for name in exam if name.startswith("student_")]
    found = []
    for name in names:
        kind, _, tokens = name.partition("@")
        if kind == "perplexity":
            found.append((name, f"exam: perplexity of {int(tokens or exam['length']):,} tokens", "{:.2f}", 1.0))
        elif kind == "repeat_loss":
            label = f"exam: loss on a passage read {int(tokens):,} tokens before, nats a token"
            found.append((name, label, "{:.2f}", 1.0))
        elif kind == "distinct_bigrams":
            found.append((name, "exam: distinct bigrams of the continued prompt", "{:.0f} %", 100.0))
    return found


def list_memory_rows(result: dict[str, Any]) -> list[list[str]]:
    """Rows of label, teacher, student and window: the size of a sequence's cache at each of `CACHE_LENGTHS`."""
    memory, window = result["memory"], result.get("window", {})
    rows = []
    for tokens in CACHE_LENGTHS:
        teacher_bytes = tokens * memory["teacher_bytes_per_token"]
        student_bytes = memory["student_fixed_bytes"] + tokens * memory["student_bytes_per_token"]
        sizes = [teacher_bytes, student_bytes, *([window["state_bytes"]] if "state_bytes" in window else [])]
        rows.append([f"cache for {tokens:,} tokens", *map(format_bytes, sizes)])
    return rows


def describe_exam(result: dict[str, Any]) -> str:
    """Say what the exam is of, or why it is missing; "" where the run has none."""
    exam = result.get("exam")
    if not exam:
        return ""
    if "missing" in exam:
        return f"No exam: {exam['missing']}."
    error = exam["errors"].get("student_perplexity")
    spread = f"; the student's perplexity has a standard error of {error:.2g} over them" if error is not None else ""
    return (
        f"Exam: the {exam['documents']} longest documents of {format_code_span(exam['text'])}, each alone, up to "
        f"{exam['length']:,} tokens{spread}."
    )


def describe_window(result: dict[str, Any]) -> str:
    """Say whether the student beats the untrained window of its memory: on the exam, else on held-out text.

    "" for a run of a version that had no window.
    """
    window, exam, held_out = result.get("window", {}), result.get("exam") or {}, result["held_out"]
    if "missing" in window:
        return f"No untrained window stands beside the student: {window['missing']}."
    section, text = (exam, "") if "window_perplexity" in exam else (held_out, " on the held-out text")
    if "window_perplexity" not in section:
        return ""
    return describe_against_window(
        section["student_perplexity"],
        section["window_perplexity"],
        window["tokens"],
        window["sinks"],
        same_memory=window["state_bytes"] <= window["student_state_bytes"],
        text=text,
        repeat=find_repeat_losses(section, section, "student_", "window_"),
    )


def describe_break_even(memory: dict[str, Any]) -> str:
    """Say in a sentence or two from which length on the student's cache is the smaller one."""
    if memory["break_even_tokens"] is None:
        return "The student's cache grows as fast as the teacher's: no converted layer had a cache that grows."
    growth = "does not grow with length"
    if memory["student_bytes_per_token"]:
        student, teacher = (format_bytes(memory[f"{who}_bytes_per_token"]) for who in ("student", "teacher"))
        growth = f"grows by {student} a token (the teacher's by {teacher})"
    tokens = memory["break_even_tokens"]
    return f"The student's cache {growth}; it is smaller than the teacher's beyond {tokens:.0f} tokens."


def format_samples(result: dict[str, Any]) -> str:
    """Format the greedy continuations of the prompt as a list, one item for each model."""
    return "\n".join(f"- {name}: {escape_markdown(text)}" for name, text in result["samples"].items())


def next_commands(result: dict[str, Any]) -> list[str]:
    """List the commands to type next for this very run: talk to the student, measure it, hand it on."""
    run = shlex.quote(str(result["run"]))
    talk = f"limbeck generate {run} {shlex.quote(result['prompt'] or 'Once upon a time')}"
    if result.get("chats"):
        talk = f"limbeck chat {run}"
    measures = "agreement,exam" if "student_perplexity" in (result.get("exam") or {}) else "agreement"
    tokens = min(EVAL_TOKENS, result.get("held_out_tokens") or EVAL_TOKENS)
    evaluate = f"limbeck eval {run} --measure {measures} --tokens {tokens}"
    if result.get("exports"):
        hand_on = f"limbeck export {run} --to {result['exports'][0]}"
        if result["exports"][0] == "gguf":
            return [talk, evaluate, f"{hand_on} --quantization q8_0", f"limbeck chat {run} --engine llama.cpp"]
    elif is_local_path(result["teacher"]) or Path(result["teacher"]).is_dir():  # whose license nobody has told
        hand_on = f"limbeck report {run}"
    else:
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(result["run"]).name).strip("-")
        hand_on = f"limbeck push {run} your-name/{name or 'student'} --plan"
    return [talk, evaluate, hand_on]


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def format_outcome(stage: dict[str, Any]) -> str:
    """Format what a stage came to: the unexplained part of a calibration, else the loss and what was left out."""
    if stage["stage"] == "calibrate":
        return f"{100 * stage['unexplained']:.1f} % unexplained, ridge {stage['ridge']:g}"
    if stage["loss"] is None:
        return "no step"
    skipped = f", {stage['skipped']} steps skipped" if stage["skipped"] else ""
    num_stopped = sum(layer["stopped"] is not None for layer in stage.get("layers", {}).values())
    stopped = f", {num_stopped} of {len(stage['layers'])} layers stopped early" if num_stopped else ""
    return f"loss {stage['first_loss']:.3f} to {stage['loss']:.3f}{skipped}{stopped}"


def _format_plan(result: dict[str, Any]) -> str:
    """Set the actual times and memory beside the planned ones; "" for a run without a plan."""
    plan = result.get("plan")
    if not plan:
        return ""
    pairs = [
        f"{planned['stage']} {format_duration(actual['seconds'])} ({format_duration(planned['seconds'])})"
        for planned, actual in zip(plan["stages"], result["stages"])
    ]
    if result["peak_memory_bytes"]:
        pairs.append(f"memory {format_bytes(result['peak_memory_bytes'])} ({format_bytes(plan['memory_bytes'])})")
    return f"Actual (planned): {', '.join(pairs)}."
