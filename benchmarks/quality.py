"""What students are worth beside windows that nobody trained: the table of docs/project/quality.md.

    python benchmarks/quality.py                                        # all rows that need no training
    python benchmarks/quality.py --rows teacher window-64 heads-9       # some of them
    python benchmarks/quality.py --rows --runs runs/limbeck runs/hybrid --tasks      # trained students, and LAMBADA

Each row is the exam (`limbeck.evaluation.exam`: perplexity of the longest held-out articles, and the loss on a passage
read 512, 768 or 1,280 tokens before), the bytes of the state, and with --tasks the accuracy on LAMBADA. A figure is
kept in --out as soon as it is there, under a hash of all that it depends on, so the same command goes on where it was
stopped.

    teacher              softmax in all layers
    window-N             a window of N tokens and four sinks in all layers (178: 8 MiB with the embedded teacher)
    recipe-untrained     what the recipe `limbeck` starts from
    layers-N             the recipe `hybrid` with N whole layers of softmax instead of groups; chosen by recall
    heads-N              what the recipe `hybrid` starts from, with N groups of heads of softmax; chosen along the path
    a run                tokens and minutes are those of its eval.json
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from limbeck.cli.options import split_assignments
from limbeck.core.console import console
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.storage import atomic_write_text
from limbeck.core.system import flush_denormals
from limbeck.core.version import __version__
from limbeck.data.documents import fingerprint_source
from limbeck.evaluation.baselines import SINKS
from limbeck.evaluation.exam import HELD_OUT_TEXT
from limbeck.evaluation.exam import MEASURE as EXAM
from limbeck.evaluation.lm_eval_tasks import MEASURE as TASKS
from limbeck.evaluation.lm_eval_tasks import check_task_settings
from limbeck.evaluation.measure import Measure, MeasureSettings, parse_settings
from limbeck.evaluation.subject import Subject, SubjectLoader
from limbeck.evaluation.timing import CacheGrowth
from limbeck.models import convert
from limbeck.models.fingerprint import fingerprint_model
from limbeck.models.loading import load_teacher, resolve_teacher
from limbeck.report.text_tables import escape_markdown, format_markdown_table
from limbeck.training.job import Job
from limbeck.training.layer_selection import LayerScore, score_layers, select_layers
from limbeck.training.setup import build_student, prepare_job

# the cheapest and the most telling first
ROWS = (
    "teacher", "window-32", "window-64", "window-128", "window-178", "recipe-untrained",
    "heads-9", "layers-3", "heads-4", "layers-2", "heads-22", "layers-7",
)  # fmt: skip
COUNTED = ("window", "heads", "layers")  # rows whose name ends in a number
TASK = "lambada_openai"
NO_GROUPS = {"student.softmax_heads": "none"}
FORMAT = 1  # raise when the same models and texts give other figures
# of the choice of layers: as many tokens, and the same distance from A to A, as the choice of groups has
SCORED_LENGTH, SCORED_TOKENS = 768, 1536
COLUMNS = (
    "student", "constant MB", "growth, % of the teacher's", "tokens trained", "minutes", "perplexity@512", "perplexity",
    "repeat@512", "repeat@768", "repeat@1,280",
)  # fmt: skip
EXAM_VALUES = {
    "perplexity@512": "{:.2f}",
    "perplexity": "{:.2f}",
    "repeat_loss@512": "{:.2f}",
    "repeat_loss@768": "{:.2f}",
    "repeat_loss@1280": "{:.2f}",
}
ACCURACY = f"{TASK} acc"


class Results:
    """Figures in a JSON file, each under a hash of what it depends on."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise LimbeckError(f"{path} cannot be read: {error}", expected="a file of this script") from error
        if not isinstance(self.entries, dict):
            raise LimbeckError(f"{path} holds a list or a value", expected="a file of this script")

    def get(self, content: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return what is kept for `content`, or compute and keep it."""
        versions = [__version__, str(torch.__version__), transformers.__version__]
        whole = {"format": FORMAT, "versions": versions, **content}
        key = digest_facts(whole, 32)
        if key not in self.entries:
            self.entries[key] = {"of": whole, "found": compute()}
            atomic_write_text(self.path, json.dumps(self.entries, indent=1) + "\n")
        return self.entries[key]["found"]


def split_row_name(name: str) -> tuple[str, int]:
    """Split "heads-9" into "heads" and 9; rows without a number have 0.

    Raises:
        LimbeckError: there is no such row.
    """
    kind, _, number = name.partition("-")
    if kind in COUNTED and number.isdecimal() and int(number):
        return kind, int(number)
    if name in ("teacher", "recipe-untrained"):
        return name, 0
    raise LimbeckError(
        f"unknown row '{name}'",
        expected="teacher, recipe-untrained, or window-N, heads-N or layers-N with a number N above 0",
    )


def read_training(run: Path) -> tuple[int, float]:
    """Read the tokens and the minutes of a finished run's training; raises LimbeckError for any other folder."""
    try:
        stages = json.loads((run / "eval.json").read_text(encoding="utf-8"))["stages"]
        return sum(int(stage["tokens"]) for stage in stages), sum(float(stage["seconds"]) for stage in stages) / 60
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LimbeckError(f"{run} has no readable eval.json", expected="the folder of a finished run") from error


@dataclass
class Students:
    """Builds the students of the rows, all from one teacher.

    changes: keys of the recipes `limbeck` and `hybrid` that differ, such as the teacher.
    """

    results: Results
    changes: dict[str, Any]
    folder: Path  # for runs that never begin

    @cached_property
    def teacher(self) -> Subject:
        """The teacher, as a subject of measures."""
        name = Recipe.load("limbeck", self.changes).teacher
        folder = resolve_teacher(name)
        model, tokenizer = load_teacher(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return Subject(name, folder, self.folder, model, tokenizer)

    def build(self, name: str) -> Subject:
        """Build the student of a row that needs no training."""
        kind, number = split_row_name(name)
        model: PreTrainedModel
        if kind == "teacher":
            return self.teacher
        if kind == "window":
            options = {"window": number, "sinks": SINKS}
            model = convert(self.teacher.model, "sliding_window", options=options, share_weights=True)
        elif kind == "recipe-untrained":
            model = build_student(self._prepare("limbeck", {}))
        elif kind == "heads":
            model = build_student(self._prepare("hybrid", {"student.softmax_heads": number}))
        else:
            kept = select_layers(self._layer_scores, number, "recall")
            model = build_student(self._prepare("hybrid", {**NO_GROUPS, "student.softmax_layers": kept}))
        return self._as_subject(name, model)

    def load_run(self, run: Path) -> Subject:
        """Load the student of a run; raises LimbeckError if it has another teacher."""
        loader = SubjectLoader()
        loader.register_teacher(self.teacher.name, self.teacher.model, self.teacher.tokenizer)
        subject = loader.load(str(run))
        if subject.teacher.fingerprint != self.teacher.fingerprint:
            raise LimbeckError(
                f"the teacher of {run} is {subject.teacher.name}, and that of the other rows is {self.teacher.name}",
                expected="one teacher for all rows",
                hint=f"--rows --set teacher={subject.teacher.name}",
            )
        # its teacher has a row of its own
        return replace(subject, teacher_or_none=None)

    def _prepare(self, recipe: str, changes: dict[str, Any]) -> Job:
        """Prepare a run of a recipe, which chooses its groups of heads; without stages, whose text is not read here."""
        settings = {**self.changes, **changes, "stages": [], "out": str(self.folder / "run")}
        return prepare_job(Recipe.load(recipe, settings), (self.teacher.model, self.teacher.tokenizer))

    @cached_property
    def _layer_scores(self) -> list[LayerScore]:
        """What each layer is worth beside windows; kept in the results, since it takes minutes."""
        job = self._prepare("hybrid", NO_GROUPS)
        content = {
            "figure": "layer scores",
            "teacher": self.teacher.fingerprint,
            "text": job.text.key,
            "student": job.student.model_dump(mode="json"),
            "scored": [SCORED_LENGTH, SCORED_TOKENS],
        }
        length = min(SCORED_LENGTH, job.recipe.longest)
        texts = job.text.train_sequences(length, job.recipe.seed), job.text.held_out_sequences(length)

        def compute() -> list[dict[str, Any]]:
            scores = score_layers(
                job.teacher, build_student(job), job.sites, *texts, nullcontext, eval_tokens=SCORED_TOKENS
            )
            return [asdict(score) for score in scores]

        return [LayerScore(**score) for score in self.results.get(content, compute)]

    def _as_subject(self, name: str, model: PreTrainedModel) -> Subject:
        model.requires_grad_(False).eval()
        content = fingerprint_model(model)[:16]
        return Subject(name, "", self.folder, model, self.teacher.tokenizer, content=content)


def measure_student(
    subject: Subject, results: Results, exam: MeasureSettings, tasks: MeasureSettings | None
) -> dict[str, dict[str, float]]:
    """Measure a student, or look up what is kept: bytes of its state, exam, and tasks.

    Args:
        exam, tasks: settings of these measures; None: not measured.

    Returns:
        `values` and their standard `errors`, by name.
    """
    model = {"student": subject.fingerprint, "dtype": str(subject.model.dtype)}

    def count_bytes() -> dict[str, Any]:
        growth = CacheGrowth.measure(subject.model)
        return {"values": {"constant_bytes": growth.fixed_bytes, "bytes_per_token": growth.bytes_per_token}}

    def run(measure: Measure, settings: MeasureSettings) -> dict[str, Any]:
        with flush_denormals():
            result = measure.run(subject, settings)
        return {"values": result.values, "errors": result.errors}

    read = {"settings": exam.model_dump(mode="json"), "text": fingerprint_source(getattr(exam, "text", HELD_OUT_TEXT))}
    found = [
        results.get({"figure": "memory", **model}, count_bytes),
        results.get({"figure": "exam", **model, **read}, lambda: run(EXAM, exam)),
    ]
    if tasks is not None:
        read = {"settings": tasks.model_dump(mode="json")}
        found.append(results.get({"figure": "tasks", **model, **read}, lambda: run(TASKS, tasks)))
    return {part: {k: v for one in found for k, v in one.get(part, {}).items()} for part in ("values", "errors")}


def format_row(
    name: str, measured: dict[str, Any], teacher_growth: float, tokens: int, minutes: float, tasks: bool
) -> list[str]:
    """Format a row of the table: values with their standard errors, "–" where there is none."""
    values, errors = measured["values"], measured["errors"]
    names = {**EXAM_VALUES, **({ACCURACY: "{:.3f}"} if tasks else {})}
    cells = []
    for value, form in names.items():
        error = f" ± {form.format(errors[value])}" if value in errors else ""
        cells.append(form.format(values[value]) + error if value in values else "–")
    return [
        escape_markdown(name),
        f"{values['constant_bytes'] / 1e6:.1f}",
        f"{100 * values['bytes_per_token'] / teacher_growth:.1f}",
        f"{tokens:,}",
        f"{minutes:.0f}",
        *cells,
    ]


def make_table(args: argparse.Namespace, folder: Path) -> str:
    """Measure all rows and format them as Markdown."""
    for name in args.rows:
        split_row_name(name)
    exam = parse_settings(EXAM, {"text": args.text, "documents": args.documents})
    tasks = parse_settings(TASKS, {"names": [TASK], "limit": args.limit or None}) if args.tasks else None
    if tasks is not None:
        check_task_settings(tasks)
    changes = split_assignments(args.set, "teacher=folder")
    trained = {run: read_training(run) for run in args.runs}
    results = Results(args.out)
    students = Students(results, changes, folder)
    growth = CacheGrowth.measure(students.teacher.model).bytes_per_token
    rows = []

    def add(name: str, subject: Subject, tokens: int = 0, minutes: float = 0.0) -> None:
        measured = measure_student(subject, results, exam, tasks)
        rows.append(format_row(name, measured, growth, tokens, minutes, tasks is not None))
        console.print(" | ".join(rows[-1]), markup=False)

    for name in args.rows:
        add(name, students.build(name))
    for run, training in trained.items():
        add(run.name, students.load_run(run), *training)
    return format_markdown_table([*COLUMNS, *(["LAMBADA"] if tasks is not None else [])], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=ROWS, metavar="NAME", help="default: " + ", ".join(ROWS))
    parser.add_argument("--runs", nargs="*", default=(), type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("quality.json"), help="the file that keeps all figures")
    parser.add_argument("--documents", type=int, default=4, help="of the exam")
    parser.add_argument("--text", default=HELD_OUT_TEXT, help="of the exam")
    parser.add_argument("--tasks", action="store_true", help="LAMBADA too; needs the extra `eval`")
    parser.add_argument("--limit", type=int, default=200, help="items of LAMBADA, 0 for all")
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="keys of both recipes that differ")
    args = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(make_table(args, Path(folder)), end="")
    except LimbeckError as error:
        print(f"quality.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
