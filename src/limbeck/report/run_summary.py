"""The summary of a run, as Markdown for the run directory and for the screen.

print(format_summary(result))          # result: what limbeck.training.pipeline.distill returns
"""

import shlex
from typing import Any

from limbeck.core.console import format_bytes, format_duration
from limbeck.models import format_ranges
from limbeck.report.values import escape_markdown, format_code_span


def format_summary(result: dict[str, Any]) -> str:
    """Markdown: quality beside the teacher, stages, parameters, memory, samples, the next commands."""
    held, memory, parameters = result["held_out"], result["memory"], result["parameters"]
    lines = [
        f"# {escape_markdown(result['mixer'])} in {result['layers']} layers of {escape_markdown(result['teacher'])}",
        "",
        *_layers(result["mixers"]),
        f"Held-out text: {held['targets']:,} tokens of {format_code_span(result['text'])} in packed sequences of {held['length']}.",
        "",
        "| | teacher | student |",
        "|---|---|---|",
        f"| perplexity | {held['teacher_perplexity']:.2f} | **{held['student_perplexity']:.2f}** |",
        f"| same most likely token | | {100 * held['top1_agreement']:.1f} % |",
        f"| KL(teacher ‖ student), nats a token | | {held['kl']:.3f} |",
        f"| cache for 512 tokens | {format_bytes(512 * memory['teacher_bytes_per_token'])} "
        f"| {format_bytes(memory['student_fixed_bytes'] + 512 * memory['student_bytes_per_token'])} |",
        f"| cache for 32,768 tokens | {format_bytes(32768 * memory['teacher_bytes_per_token'])} "
        f"| {format_bytes(memory['student_fixed_bytes'] + 32768 * memory['student_bytes_per_token'])} |",
        "",
        _break_even(memory),
        "",
        "| stage | tokens | time | tokens/s | trained parameters | result |",
        "|---|---|---|---|---|---|",
    ]
    for stage in result["stages"]:
        speed = stage["tokens"] / max(stage.get("fit_seconds", stage["seconds"]), 1e-9)
        lines.append(
            f"| {stage['stage']} | {stage['tokens']:,} | {format_duration(stage['seconds'])} | {speed:.0f} "
            f"| {stage['trained_parameters']:,} | {_outcome(stage)} |"
        )
    lines += [
        "",
        f"Parameters: {parameters['total']:,}, of which {parameters['added']:,} are new "
        f"and {parameters['copied']:,} came from the teacher. Seed {result['seed']}. {_peak(result)}",
        *_plan(result),
    ]
    if result["samples"]:
        lines += ["", f"Prompt: *{escape_markdown(result['prompt'])}*", ""]
        lines += [f"- {name}: {escape_markdown(text)}" for name, text in result["samples"].items()]
    lines += [
        "",
        "Next:",
        "",
        *(f"    {command}" for command in next_commands(result)),
        "",
    ]
    return "\n".join(lines)


def next_commands(result: dict[str, Any]) -> list[str]:
    """What to type next, for this very run: its recipe brings teacher, text and tokens along."""
    run = str(result["run"])
    other = "gla" if "mlstm" in result["mixers"] else "mlstm"
    return [
        f"limbeck generate {shlex.quote(run)} 'Once upon a time'",
        f"limbeck eval {shlex.quote(run)} --tokens 50000",
        f"limbeck distill {shlex.quote(f'{run}/recipe.yaml')} --student {other} --out {shlex.quote(f'{run}-{other}')}",
    ]


def _layers(mixers: dict[str, list[int]]) -> list[str]:
    """What stands where, unless it is the same everywhere."""
    if len(mixers) == 1:
        return []
    return ["; ".join(f"{name} in layers {format_ranges(layers)}" for name, layers in mixers.items()) + ".", ""]


def _outcome(stage: dict[str, Any]) -> str:
    if stage["stage"] == "calibrate":
        return f"{100 * stage['unexplained']:.1f} % unexplained, ridge {stage['ridge']:g}"
    if stage["loss"] is None:
        return "no step"
    skipped = f", {stage['skipped']} steps skipped" if stage["skipped"] else ""
    early = sum(layer["stopped"] is not None for layer in stage.get("layers", {}).values())
    stopped = f", {early} of {len(stage['layers'])} layers stopped early" if early else ""
    return f"loss {stage['first_loss']:.3f} to {stage['loss']:.3f}{skipped}{stopped}"


def _break_even(memory: dict[str, Any]) -> str:
    if memory["break_even_tokens"] is None:
        return "The student's cache grows as fast as the teacher's: no layer was converted that keeps one."
    growth = "does not grow with length"
    if memory["student_bytes_per_token"]:
        per_token = format_bytes(memory["student_bytes_per_token"]), format_bytes(memory["teacher_bytes_per_token"])
        growth = "grows by {} a token (the teacher's by {})".format(*per_token)
    return f"The student's cache {growth}; it is the smaller one from {memory['break_even_tokens']:.0f} tokens on."


def _plan(result: dict[str, Any]) -> list[str]:
    """What the plan said, beside what happened."""
    plan = result.get("plan")
    if not plan:
        return []
    pairs = [
        f"{then['stage']} {format_duration(then['seconds'])} ({format_duration(now['seconds'])})"
        for then, now in zip(plan["stages"], result["stages"])
    ]
    if result["peak_memory_bytes"]:
        pairs.append(f"memory {format_bytes(plan['memory_bytes'])} ({format_bytes(result['peak_memory_bytes'])})")
    return ["", f"Planned, and in brackets what it took: {', '.join(pairs)}."]


def _peak(result: dict[str, Any]) -> str:
    peak = result["peak_memory_bytes"]
    return f"Peak of resident memory: {format_bytes(peak)}." if peak else ""
