"""Needle in a haystack by length and depth: RULER's three single needles, by generation and by likelihood.

    found = run_measure(get_measure("needle"), subject, {"lengths": [512, 1024], "samples": 4})
    found.values["niah 1, 512 tokens"], found.values["niah 1, 512 tokens, among 10"]

What the questions are stands in `limbeck.evaluation.haystacks`, how an answer is scored in `limbeck.evaluation.retrieval`.
RULER draws the depth of each needle at random; here every depth gets as many samples, so that a map can be drawn.
"""

import random
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.console import progress
from limbeck.evaluation.haystacks import Haystack, build_needle_question
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult
from limbeck.evaluation.retrieval import (
    Lengths,
    RetrievalAnswer,
    RetrievalSettings,
    answer_question,
    filter_lengths_by_context,
    summarize_answers,
)
from limbeck.evaluation.subject import Subject

Depth = Annotated[float, Field(ge=0, le=1)]


class NeedleSettings(RetrievalSettings):
    """Which needles.

    tasks: of S-NIAH-1 to 3.
    lengths: tokens of prompt and answer together.
    depths: where the needle stands, 0 at the beginning of the haystack and 1 at its end.
    samples: of each task, length and depth.
    new_tokens: how many are generated, and kept free in the length; RULER's number is 128.
    """

    tasks: list[Annotated[int, Field(ge=1, le=3)]] = [1, 2, 3]
    lengths: Lengths = [512, 1024, 2048]
    depths: Annotated[list[Depth], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    samples: Annotated[int, Field(ge=1)] = 2
    new_tokens: Annotated[int, Field(ge=1)] = 128


def measure_needle(subject: Subject, settings: NeedleSettings) -> MeasureResult:
    """All tasks at all lengths and depths; the same questions for every model with the same tokenizer and seed."""
    hay = Haystack.load()
    lengths = filter_lengths_by_context("needle", subject, settings.lengths, settings.past_context)
    asked: dict[str, list[RetrievalAnswer]] = {f"niah {task}": [] for task in settings.tasks}
    total = len(settings.tasks) * len(settings.depths) * settings.samples * len(lengths)
    with progress("needle", total, "questions") as advance:
        for task in settings.tasks:
            for length in lengths:
                for depth in settings.depths:
                    for sample in range(settings.samples):
                        rng = random.Random(f"{subject.seed} {task} {length} {depth} {sample}")
                        question = build_needle_question(
                            hay, task, length, depth, subject.tokenizer, rng, settings.new_tokens, settings.distractors
                        )
                        answer = answer_question(
                            subject.model, subject.tokenizer, question, settings.new_tokens, settings.piece
                        )
                        asked[f"niah {task}"].append(answer)
                        advance(1, note=f"S-NIAH-{task}, {length} tokens")
    return summarize_answers(asked, settings.distractors + 1)


def draw_needle(found: list[Measurement]) -> Any:
    """Heat maps of length and depth: a column a model, a row a task, once by generation and once among candidates."""
    from limbeck.report.figures.style import create_figure

    tasks = list(dict.fromkeys(cell["task"] for one in found for cell in one.details["cells"]))
    rows = [(task, how) for task in tasks for how in ("generated", "chosen")]
    figure = create_figure(0.9 + 1.9 * len(found), 0.6 + 1.25 * len(rows))
    panels = figure.subplots(len(rows), len(found), squeeze=False)
    for column, one in enumerate(found):
        for row, (task, how) in enumerate(rows):
            cells = [cell for cell in one.details["cells"] if cell["task"] == task]
            lengths = sorted({cell["length"] for cell in cells})
            depths = sorted({cell["depth"] for cell in cells})
            by_place = {(cell["depth"], cell["length"]): cell[how] for cell in cells}
            axes = panels[row][column]
            shown = axes.imshow(
                [[by_place[depth, length] for length in lengths] for depth in depths],
                vmin=0, vmax=1, aspect="auto", cmap="viridis",
            )  # fmt: skip
            axes.set_xticks(range(len(lengths)), lengths if row == len(rows) - 1 else [], fontsize=6)
            axes.set_yticks(range(len(depths)), depths if column == 0 else [], fontsize=6)
            if row == 0:
                axes.set_title(one.model, fontsize=7)
            if column == 0:
                axes.set_ylabel(f"{task}\n{how}\ndepth", fontsize=6)
    figure.supxlabel("tokens", fontsize=7)
    bar = figure.colorbar(shown, ax=panels, fraction=0.03)
    bar.ax.tick_params(labelsize=6)
    return figure


MEASURE = Measure(
    "needle", "RULER's single needles in a haystack, by length and depth", NeedleSettings, measure_needle, draw_needle
)
