"""Evaluate models side by side from Python: `limbeck.evaluate`, the counterpart of `limbeck eval`.

result = limbeck.evaluate("runs/gla", measure="agreement", tokens=4096)
result["runs/gla"]["agreement"]["kl"]                       # plain numbers; a notebook shows the table
limbeck.evaluate({"gla": student}, teacher=(model, tokenizer), data=documents)          # all in memory
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.errors import LimbeckError
from limbeck.core.storage import check_writable
from limbeck.data.in_memory import name_text
from limbeck.evaluation.baselines import run_measures
from limbeck.evaluation.measure import MEASURE_MODULES, Measurement, complete_settings, get_measure
from limbeck.evaluation.subject import Subject, SubjectLoader
from limbeck.models.loading import check_given_teacher
from limbeck.models.temporary import frozen, quiet_transformers
from limbeck.report.comparison import format_comparison, write_comparison

Model = str | Path | PreTrainedModel
TEACHER = "teacher"  # name in tables of a teacher in memory
STUDENT = "student"  # likewise of a student, where it has no other name


class Evaluation(dict):
    """Numbers by model, measure and name: `result["runs/gla"]["agreement"]["kl"]`; a notebook shows the table.

    measurements: the same with settings, standard errors, details for figures and provenance.
    """

    def __init__(self, measurements: Sequence[Measurement]):
        self.measurements = list(measurements)
        super().__init__()
        for one in self.measurements:
            self.setdefault(one.model, {})[one.measure] = dict(one.values)

    def __str__(self) -> str:
        return format_comparison(self.measurements)

    def _repr_markdown_(self) -> str:
        return format_comparison(self.measurements)

    def save(self, folder: str | Path) -> list[Path]:
        """Write table.md, values.csv and the figures of the measures into a folder; returns the files."""
        check_writable(Path(folder))
        return write_comparison(self.measurements, Path(folder))


def evaluate(
    student: Model | Sequence[Model] | Mapping[str, PreTrainedModel],
    teacher: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    measure: str | Sequence[str] = "agreement",
    *,
    data: Any = None,
    tokens: int | None = None,
    length: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    window: bool = True,
    control: bool = False,
    out: str | Path | None = None,
    seed: int = 0,
    ignore_cache: bool = False,
) -> Evaluation:
    """Measure models side by side: students beside their teacher, and beside the untrained window of their memory.

    Example:
        >>> student = limbeck.convert("my-teacher", mixer="gla")
        >>> result = limbeck.evaluate(student, "my-teacher", data=documents, length=64, tokens=512, window=False)
        >>> result["student"]["agreement"]["kl"] > 0
        True

    Args:
        student: a run directory, a folder or a Hub name; a model in memory; a list of these; or models in memory by the
            name that the table gives them: {"gla": model}. Teachers can be measured too.
        teacher: the model to compare with: a folder, a Hub name or "embedded"; or a model in memory with its tokenizer,
            (model, tokenizer). None: that of the student's run, which models in memory do not have.
        measure: a measure or several; `limbeck eval --list` shows them and their settings.
        data: the text: a source as in recipes, or a list of strings, a list of records or a `datasets.Dataset`. None:
            the held-out part of the run's text, or of the embedded text.
        tokens: how many tokens to evaluate on, for measures that count them.
        length: of a sequence in tokens; by default the run's.
        settings: other settings by measure: {"agreement": {"prefixes": 4}}.
        window: measure the untrained sliding window in the student's memory too.
        control: measure the teacher through the mixer `softmax` too, which must measure as the teacher.
        out: folder for the results; by default beside each run, and nowhere for models in memory.
        seed: of everything that is sampled.
        ignore_cache: measure again even where the result is stored.

    Returns:
        Plain numbers by model, measure and name.

    Raises:
        LimbeckError: no such model, measure, setting or text; or a model in memory without a teacher.
    """
    check_given_teacher(teacher)
    names = [measure] if isinstance(measure, str) else list(measure)
    chosen = [get_measure(name) for name in names]
    if unknown := set(settings or {}) - set(names):
        raise LimbeckError(
            f"settings of {', '.join(sorted(unknown))}, which is not measured",
            expected=f"settings by measure: {', '.join(names)}",
            hint=f"measure: {', '.join(MEASURE_MODULES)}",
        )
    given = {name: dict((settings or {}).get(name, {})) for name in names}
    completed = complete_settings(chosen, given, tokens, length)
    source = name_text(data)
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        folder = Path(out) if out is not None else None
        loader = SubjectLoader(
            None if isinstance(teacher, tuple) or not teacher else str(teacher), source, seed, folder
        )
        scratch = folder or Path(stack.enter_context(TemporaryDirectory()))
        if isinstance(teacher, tuple):
            stack.enter_context(frozen(teacher[0]))
            loader.adopt_teacher(TEACHER, *teacher, scratch)
        subjects = _iterate_subjects(loader, _name_models(student), scratch, stack)
        measurements = run_measures(
            subjects, chosen, completed, ignore_cache=ignore_cache, window=window, control=control
        )
    return Evaluation(measurements)


def _name_models(student: Any) -> dict[str, Model]:
    """Return the models by their names in tables."""
    if isinstance(student, Mapping):
        return dict(student)
    models = list(student) if isinstance(student, list | tuple) else [student]
    if not models:
        raise LimbeckError("no model to evaluate", expected="a run directory, a folder, a name or a model")
    loose = [model for model in models if not isinstance(model, str | Path)]
    if wrong := [model for model in loose if not isinstance(model, PreTrainedModel)]:
        raise LimbeckError(
            f"a {type(wrong[0]).__name__} in the place of a model",
            expected="a run directory, a folder, a name or a model of transformers",
        )
    named: dict[str, Model] = {}
    for model in models:
        number = f" {loose.index(model) + 1}" if model in loose and len(loose) > 1 else ""
        named[str(model) if isinstance(model, str | Path) else f"{STUDENT}{number}"] = model
    return named


def _iterate_subjects(
    loader: SubjectLoader, models: Mapping[str, Model], scratch: Path, stack: ExitStack
) -> Iterator[Subject]:
    """Load one model after another; those in memory are frozen until the end."""
    for name, model in models.items():
        if isinstance(model, str | Path):
            yield loader.load(str(model))
        else:
            stack.enter_context(frozen(model))
            yield loader.adopt(name, model, scratch)
