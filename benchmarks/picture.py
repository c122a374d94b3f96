"""The picture of the README: a student beside its teacher and the untrained window of its memory.

    limbeck distill                                                      # makes runs/limbeck
    python benchmarks/token_cost.py decode --out decoding.json           # times and caches by length
    python benchmarks/picture.py runs/limbeck decoding.json docs/images/student.png

Every number is read from the two files: cache and time of the next token from the benchmark, the loss on a passage that
comes again from the run's exam. Needs matplotlib (extra `report`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.report.figures.style import COLORS, create_figure, save_figure, use_log_scale, use_style

DECODED = {"teacher": "teacher", "recipe": "student"}  # names in the benchmark
STYLES: dict[str, dict[str, Any]] = {
    "teacher": {"color": COLORS[6], "marker": "o", "linestyle": "--"},
    "student": {"color": COLORS[0], "marker": "s"},
    "window": {"color": COLORS[1], "marker": "D", "linestyle": ":"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("decoding", type=Path, help="the file of token_cost.py decode --out")
    parser.add_argument("out", type=Path, help="a PNG or SVG file")
    args = parser.parse_args()
    try:
        draw_picture(read_exam(args.run), json.loads(args.decoding.read_text()), args.out)
    except LimbeckError as error:
        raise SystemExit(str(error)) from error
    print(args.out)


def read_exam(run: Path) -> dict[str, Any]:
    """Read the exam of a run's eval.json.

    Raises:
        LimbeckError: the run is not finished, or had no exam with a window beside it.
    """
    file = run / "eval.json"
    exam = json.loads(file.read_text()).get("exam") if file.is_file() else None
    if not exam or "window_perplexity" not in exam:
        raise LimbeckError(
            f"no exam with its window in {file}", expected="a finished run", hint="limbeck distill, to its end"
        )
    return exam


def list_repeats(exam: dict[str, Any], model: str) -> list[tuple[int, float]]:
    """List distances in tokens and the loss in nats on the second A of A B A."""
    prefix = f"{model}_repeat_loss@"
    return sorted((int(name.removeprefix(prefix)), value) for name, value in exam.items() if name.startswith(prefix))


def draw_picture(exam: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    """Draw cache and time of a token over the length, and the loss on what was read before over its distance."""
    with use_style():
        figure = create_figure(9.6, 2.9)
        cache, time, repeat = figure.subplots(1, 3)
        for benchmark_name, model in DECODED.items():
            own = [row for row in rows if row["model"] == benchmark_name]
            contexts = [row["context"] for row in own]
            cache.plot(contexts, [row["cache_mb"] for row in own], **STYLES[model])
            time.plot(contexts, [row["milliseconds"] for row in own], **STYLES[model])
        for axes, title, label in (
            (cache, "memory for the past", "MB, float32"),
            (time, "time of the next token", "ms, one CPU thread"),
        ):
            axes.set(title=title, ylabel=label, xlabel="tokens before", xscale="log")
            use_log_scale(axes.yaxis)
            contexts = sorted({row["context"] for row in rows})
            axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
            axes.minorticks_off()
        for model, name in (("teacher", "teacher"), ("window", "window, untrained"), ("student", "student")):
            distances, losses = zip(*list_repeats(exam, model))
            label = f"{name}: perplexity {exam[f'{model}_perplexity']:.2f}"
            repeat.plot(distances, losses, label=label, **STYLES[model])
            repeat.set_xticks(distances)
        repeat.set(
            title="a passage read before comes again", xlabel="tokens ago", ylabel="loss, nats a token", ylim=(0, None)
        )
        figure.legend(*repeat.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, out)


if __name__ == "__main__":
    main()
