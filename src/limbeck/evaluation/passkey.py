"""Pass-key retrieval over lengths, as Landmark Attention asks for it (arXiv 2305.16300, section 4.2).

    found = run_measure(get_measure("passkey"), subject, {"lengths": [1024, 4096], "samples": 10})
    found.values["passkey, 1024 tokens"], found.values["passkey, 1024 tokens, among 10"]

A number of one to five digits, said twice in one sentence, stands somewhere in repeated noise; the place is drawn.
"""

import random
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.console import progress
from limbeck.evaluation.haystacks import build_passkey_question
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult
from limbeck.evaluation.retrieval import (
    Lengths,
    RetrievalSettings,
    answer_question,
    filter_lengths_by_context,
    summarize_answers,
)
from limbeck.evaluation.subject import Subject


class PasskeySettings(RetrievalSettings):
    """Lengths are tokens of prompt and answer together; a pass key takes five tokens or fewer and its space."""

    lengths: Lengths = [256, 512, 1024, 2048, 4096]
    samples: Annotated[int, Field(ge=1)] = 10
    new_tokens: Annotated[int, Field(ge=1)] = 8


def measure_passkey(subject: Subject, settings: PasskeySettings) -> MeasureResult:
    """The same questions for every model with the same tokenizer and seed."""
    lengths = filter_lengths_by_context("passkey", subject, settings.lengths, settings.past_context)
    asked = []
    with progress("passkey", len(lengths) * settings.samples, "questions") as advance:
        for length in lengths:
            for sample in range(settings.samples):
                rng = random.Random(f"{subject.seed} {length} {sample}")
                depth = rng.random()
                question = build_passkey_question(
                    length, depth, subject.tokenizer, rng, settings.new_tokens, settings.distractors
                )
                asked.append(
                    answer_question(subject.model, subject.tokenizer, question, settings.new_tokens, settings.piece)
                )
                advance(1, note=f"{length} tokens")
    return summarize_answers({"passkey": asked}, settings.distractors + 1)


def draw_passkey(found: list[Measurement]) -> Any:
    """Share found by generation and chosen among the candidates, over length."""
    from limbeck.report.figures.style import create_figure

    figure = create_figure(8, 3.2)
    generated, chosen = figure.subplots(1, 2, sharey=True)
    for one in found:
        lengths = sorted({cell["length"] for cell in one.details["cells"]})
        among = one.settings["distractors"] + 1
        for axes, ending in ((generated, ""), (chosen, f", among {among}")):
            names = [f"passkey, {length} tokens{ending}" for length in lengths]
            axes.errorbar(
                lengths,
                [one.values[name] for name in names],
                [one.errors[name] for name in names],
                marker="o",
                markersize=3,
                capsize=2,
                label=one.model,
            )
    for axes, title in ((generated, "generated"), (chosen, "likeliest of the candidates")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    for among in {one.settings["distractors"] + 1 for one in found}:
        chosen.axhline(1 / among, color="grey", linestyle=":", linewidth=1)
    generated.set_ylabel("share of pass keys")
    generated.legend(fontsize=7)
    return figure


MEASURE = Measure("passkey", "pass-key retrieval over lengths", PasskeySettings, measure_passkey, draw_passkey)
