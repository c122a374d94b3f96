"""The card's sections about a run: training, results, memory, sample text.

    text = "\n\n".join(run_sections(RunFacts(recipe, result, manifest)))

Every number is from the run's own files.
"""

from dataclasses import dataclass
from typing import Any

from limbeck.console import as_bytes, as_time
from limbeck.report.naming import code, literal


@dataclass(frozen=True)
class RunFacts:
    """A finished run as published: recipe, eval.json and manifest.json, local paths taken out."""

    recipe: dict[str, Any]
    result: dict[str, Any]
    manifest: dict[str, Any]


def run_sections(run: RunFacts) -> list[str]:
    """Markdown, a section each; empty where the run has nothing to say."""
    return [_training(run), _results(run), _memory(run.result["memory"]), _sample(run.result)]


def _training(run: RunFacts) -> str:
    data, stages = run.recipe["data"], run.result["stages"]
    if not stages:
        return ""
    lines = [
        "## Training",
        "",
        f"Text: {_text(data['source'])}, in packed sequences of {data['seq_len']} tokens. "
        f"Seed {run.result['seed']}, on {run.manifest.get('gpu') or 'CPU'}.",
        "",
        "| stage | learns | tokens | learning rate | loss at start | loss at end | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for settings, facts in zip(run.recipe["stages"], stages):
        learns = settings.get("train", "attention" if settings["stage"] != "calibrate" else "output projections")
        rate = f"{settings['lr']:g}" if "lr" in settings else "closed form"
        if "unexplained" in facts:
            losses = ["", f"{100 * facts['unexplained']:.1f} % unexplained"]
        else:
            losses = [f"{facts['first_loss']:.3f}", f"{facts['loss']:.3f}"]
        cells = [settings["stage"], learns, f"{facts['tokens']:,}", rate, *losses, as_time(facts["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _results(run: RunFacts) -> str:
    held, made = run.result["held_out"], run.manifest
    versions = ", ".join(f"{name} {made[name]}" for name in ("limbeck", "torch", "transformers", "python"))
    return "\n".join(
        [
            "## Results",
            "",
            f"Held-out part of the same text: {held['targets']:,} tokens in sequences of {held['length']}.",
            "",
            "| | teacher | student |",
            "|---|---|---|",
            f"| perplexity | {held['teacher_perplexity']:.2f} | {held['student_perplexity']:.2f} |",
            f"| same most likely token | | {100 * held['top1_agreement']:.1f} % |",
            f"| KL(teacher ‖ student), nats a token | | {held['kl']:.3f} |",
            "",
            "Measured at the end of `limbeck distill recipe.yaml` with the recipe below "
            f"({versions}). To measure again, in the run's directory: "
            f"`limbeck eval student --tokens {run.recipe['evaluation']['tokens']}`.",
        ]
    )


def _memory(memory: dict[str, Any]) -> str:
    lines = ["## Memory", "", "| cache of one sequence | teacher | student |", "|---|---|---|"]
    for tokens in (512, 32_768):
        teacher = tokens * memory["teacher_bytes_per_token"]
        student = memory["student_fixed_bytes"] + tokens * memory["student_bytes_per_token"]
        lines.append(f"| {tokens:,} tokens | {as_bytes(teacher)} | {as_bytes(student)} |")
    even = memory["break_even_tokens"]
    if even is None:
        said = "The student's cache grows as fast as the teacher's."
    elif memory["student_bytes_per_token"]:
        said = (
            f"The student's cache grows with length too, but slower; it is the smaller one from {even:.0f} tokens on."
        )
    else:
        said = f"The student's cache does not grow with length; it is the smaller one from {even:.0f} tokens on."
    return "\n".join([*lines, "", f"{said} Counted on real caches in float32."])


def _sample(result: dict[str, Any]) -> str:
    if not result["samples"]:
        return ""
    lines = ["## Sample", "", f"Greedy continuations of: *{literal(result['prompt'])}*", ""]
    lines += [f"- {name}: {literal(text)}" for name, text in result["samples"].items()]
    return "\n".join(lines)


def _text(source: str) -> str:
    if source == "embedded" or source.startswith("embedded:"):
        return f"{code(source)} (what comes with limbeck; its sources and licences are listed in `limbeck.data.corpus`)"
    return code(source)
