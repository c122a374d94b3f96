"""A model under evaluation, with its teacher and the text that it was not trained on.

    loader = SubjectLoader(teacher=None, data=None)
    subject = loader.load("runs/quickstart")     # a run, a student's folder, 'embedded', a folder, a Hub name
    subject.model, subject.tokenizer, subject.teacher, subject.load_held_out(512, tokens=8192)
    untrained = build_untrained_student(subject.teacher.model, subject.model, seed=0)

A student is compared with the teacher of its run, which is loaded once for all subjects that share it. The untrained
student is the teacher converted by the student's own plan, as stage 0 began: what a measure finds in it is due to the
initialisation of the mixers and the teacher's projections, the rest is due to training.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError, rewrite_hints
from limbeck.core.recipe import Recipe
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX
from limbeck.core.storage import read_manifest
from limbeck.core.text_settings import Data
from limbeck.data import documents
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.packing import SequenceDataset
from limbeck.data.token_store import TokenStore
from limbeck.models import convert, loading
from limbeck.models.fingerprint import (
    find_model_folder,
    fingerprint_checkpoint_with_tokenizer,
    fingerprint_model,
    fingerprint_tokenizer,
)
from limbeck.models.folders import check_folder
from limbeck.models.loading import is_student, load_model_and_tokenizer, load_teacher

HELD_OUT_PART = "held-out part"  # of a text: what its run was not trained on


@dataclass(frozen=True)
class Baseline:
    """What a baseline is (`limbeck.evaluation.baselines`).

    kind: "window", or "softmax", which is the teacher itself.
    window, sinks: in tokens; 0 without a window.
    state_bytes: of one sequence of a window, 0 for softmax, whose cache grows.
    """

    kind: str
    window: int = 0
    sinks: int = 0
    state_bytes: int = 0


@dataclass
class Subject:
    """A model with everything that its measures need. A teacher is its own teacher.

    name: as given on the command line.
    folder: argument of `from_pretrained`.
    output_dir: folder of its measurements.
    trained_on_data: `data` is a text that its run was trained on, so only the held-out part is used; for a teacher, the
        run that it stands beside.
    ignore_cache: also recompute what a measure caches by itself, such as scores of single tasks.
    baseline: what it is if it was made from a student's teacher, untrained, to be measured beside the student.
    content: identifies a model that was made, and is in no folder; None: its weights do.
    """

    name: str
    folder: str
    output_dir: Path
    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe | None = None
    data: Data | None = None
    teacher_or_none: "Subject | None" = None
    seed: int = 0
    trained_on_data: bool = False
    ignore_cache: bool = False
    baseline: Baseline | None = None
    content: str | None = None

    @property
    def is_student(self) -> bool:
        """Whether it is a converted model, hybrids included."""
        return hasattr(self.model.config, "limbeck")

    @property
    def teacher(self) -> "Subject":
        """Its teacher, itself if it is one; raises LimbeckError for a student whose teacher is unknown."""
        if not self.is_student:
            return self
        if self.teacher_or_none is None:
            raise LimbeckError(f"the teacher of {self.name} is unknown", hint="--teacher embedded, a folder or a name")
        return self.teacher_or_none

    @property
    def teacher_name(self) -> str | None:
        """Name of its teacher; None for a student whose teacher is unknown."""
        return self.teacher.name if self.teacher_or_none or not self.is_student else None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model and its tokenizer, of their files if they are on this machine."""
        if self.content is not None:
            return self.content
        folder = find_model_folder(self.folder)
        if folder is not None:
            return fingerprint_checkpoint_with_tokenizer(folder)
        return hashlib.sha256(
            f"{fingerprint_model(self.model)} {fingerprint_tokenizer(self.tokenizer)}".encode()
        ).hexdigest()[:16]

    @property
    def teacher_fingerprint(self) -> str | None:
        """Fingerprint of the model it is compared with; None for a teacher."""
        return self.teacher_or_none.fingerprint if self.teacher_or_none is not None else None

    def load_held_out(self, length: int, tokens: int) -> tuple[SequenceDataset, dict[str, Any]]:
        """Load text that it was not trained on, in packed sequences of `length` tokens, and say which text that is.

        This is the held-out part of a text its run was trained on, and all of any other text.

        Raises:
            LimbeckError: there is no text; see also `open_text_data`.
        """
        text, has_held_out = self._open_text(length, tokens)
        assert self.data is not None
        sequences = text.held_out_sequences(length) if has_held_out else text.all_sequences(length)
        return sequences, {"text": self.data.source, "part": HELD_OUT_PART if has_held_out else "all", "key": text.key}

    def held_out_key(self, length: int, tokens: int) -> tuple[str, str]:
        """Compute the part and key that `load_held_out` would return, from the text as it is now."""
        text, has_held_out = self._open_text(length, tokens)
        text.close()
        return HELD_OUT_PART if has_held_out else "all", text.key

    def count_token_frequencies(self, length: int, max_tokens: int = 20_000_000) -> Tensor | None:
        """Count how often each token occurs in the training part of the same text: [V].

        Counts the first `max_tokens` tokens of each source; None for a streamed text. See `load_held_out`.
        """
        text, _ = self._open_text(length, length)
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary_size = len(embeddings.weight)
        counts = torch.zeros(vocabulary_size, dtype=torch.long)
        for source in text.sources:
            if not isinstance(source, TokenStore):
                return None
            tokens = source.train.tokens[:max_tokens]
            counts += torch.from_numpy(np.bincount(tokens, minlength=vocabulary_size))
        return counts

    def _open_text(self, length: int, tokens: int) -> tuple[TextData, bool]:
        """Open its text; also says whether a part of it was held out from training."""
        if self.data is None:
            raise LimbeckError(f"no text to measure {self.name} on", hint="--data FILE, or --data embedded")
        # Small teachers are trained on the embedded text too, so its held-out part is the fair one for every model.
        has_held_out = self.trained_on_data or self.data.source == "embedded"
        held_out = None if has_held_out else 0
        with rewrite_hints({"--set data.seq_len=": "--seq-len "}):
            text = open_text_data(
                self.data, self.tokenizer, self.model, length=length, held_out=held_out, held_out_tokens=tokens
            )
        return text, has_held_out


@dataclass
class SubjectLoader:
    """Loads subjects, and each teacher only once.

    teacher, data: used for all subjects instead of those of their runs.
    seed: seed of everything that is sampled.
    out: parent of the output folders; None for `eval` beside the model.
    output_dirs: output folder of each subject loaded so far.
    """

    teacher: str | None = None
    data: str | None = None
    seed: int = 0
    out: Path | None = None
    output_dirs: dict[str, Path] = field(default_factory=dict)
    _teachers: dict[str, Subject] = field(default_factory=dict)
    _run_texts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, name: str) -> Subject:
        """Load a model with its teacher.

        The teacher of a run that came before is measured on the same part of the same text as that run.

        Raises:
            LimbeckError: there is no such model, or its teacher or text is not available.
        """
        path = Path(name).expanduser()
        folder = path / "student" if (path / "student").is_dir() else path
        recipe_file = folder.parent / "recipe.yaml"
        if path.is_dir():
            check_folder(folder)
        recipe = Recipe.load(recipe_file, stored=True) if recipe_file.is_file() and folder.is_dir() else None
        data = Data(source=self.data) if self.data else recipe.data if recipe else Data(source="embedded")
        training_text = None
        if self.data and recipe is not None:
            training_text = find_training_text(data.source, recipe, folder.parent)
        data = training_text or data
        output_dir = folder.parent / "eval" if recipe is not None else Path("eval") / _slug(name)
        if self.out is not None:
            output_dir = self.out / _slug(name)
        self.output_dirs[name] = output_dir
        checkpoint = str(folder) if folder.is_dir() else loading.resolve_teacher(name)
        is_run = folder != path
        if not is_run and (name in self._teachers or not is_student(checkpoint)):
            return replace(self._load_teacher(name, output_dir, data), **self._run_texts.get(name, {}))
        model, tokenizer = load_model_and_tokenizer(checkpoint, require_student=is_run)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        subject = Subject(
            name,
            checkpoint,
            output_dir,
            model,
            tokenizer,
            recipe,
            data,
            seed=self.seed,
            trained_on_data=training_text is not None or (recipe is not None and data == recipe.data),
        )
        teacher = self.teacher or (recipe.teacher if recipe else None)
        if teacher is not None:
            subject.teacher_or_none = self._load_teacher(teacher, output_dir, data)
            if recipe is not None:
                self._run_texts.setdefault(teacher, {"data": data, "trained_on_data": subject.trained_on_data})
        return subject

    def adopt(self, name: str, model: PreTrainedModel, output_dir: Path) -> Subject:
        """Make a subject of a model in memory, beside the loader's teacher, whose tokenizer it has.

        Args:
            output_dir: parent of the folder of its measurements.

        Raises:
            LimbeckError: the loader has no teacher, or its teacher or text is not available.
        """
        if self.teacher is None:
            raise LimbeckError(
                f"the model '{name}' is in memory, so its teacher and tokenizer are unknown",
                expected="a teacher: a folder, a Hub name, 'embedded', or (model, tokenizer)",
                hint='limbeck.evaluate(student, teacher="embedded")',
            )
        data = Data(source=self.data or "embedded")
        self.output_dirs[name] = folder = output_dir / _slug(name)
        teacher = self._load_teacher(self.teacher, folder, data)
        subject = Subject(name, "", folder, model, teacher.tokenizer, data=data, seed=self.seed)
        if subject.is_student:
            subject.teacher_or_none = teacher
        return subject

    def adopt_teacher(self, name: str, model: PreTrainedModel, tokenizer: Any, output_dir: Path) -> None:
        """Use a model in memory as the teacher of all subjects.

        Args:
            output_dir: parent of the folder of its measurements.
        """
        self.teacher = name
        self._teachers[name] = Subject(name, "", output_dir / _slug(name), model, tokenizer, seed=self.seed)

    def register_teacher(self, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
        """Use a teacher that is in memory already."""
        if name not in self._teachers:
            folder = loading.resolve_teacher(name)
            self._teachers[name] = Subject(name, folder, Path("eval") / _slug(name), model, tokenizer, seed=self.seed)

    def _load_teacher(self, name: str, output_dir: Path, data: Data) -> Subject:
        """Load a softmax model once; each caller gets a subject with its own output folder and text."""
        if name not in self._teachers:
            folder = loading.resolve_teacher(name)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model, tokenizer = load_teacher(folder, device)
            self._teachers[name] = Subject(name, folder, output_dir, model, tokenizer, data=data, seed=self.seed)
        loaded = self._teachers[name]
        return Subject(name, loaded.folder, output_dir, loaded.model, loaded.tokenizer, data=data, seed=self.seed)


def find_training_text(source: str, recipe: Recipe, run: Path) -> Data | None:
    """Find how a run opened a text that it was trained on, or a part of it, under any name; None for other texts.

    Whether a document is held out depends on its hash and the held-out share alone, so a part of a text holds out the
    same documents as the whole.

    Args:
        source: the text as it is named now.
        run: the run's folder; its manifest identifies by content texts that have been moved.
    """
    manifest_texts = read_manifest(run).get("texts", {})
    contents = {json.loads(key)["source"]: text.get("contents") or [] for key, text in manifest_texts.items()}
    for data in [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]:
        if source == data.source:
            return data
        parts = data.list_sources()
        recorded = contents.get(data.source, [])
        for part, content in zip(parts, [*recorded, *[None] * (len(parts) - len(recorded))]):
            if documents.is_subset_of(source, part.source.removeprefix(REPEATED_TEXT_PREFIX), content):
                changes = {"source": source, "sources": None, "text_field": part.text_field, "chat": part.chat}
                return data.model_copy(update=changes)
    return None


def _slug(name: str) -> str:
    """Turn a model's name into that of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"


def build_untrained_student(teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Build an untrained student with the same mixers and options in the same layers.

    Everything outside the converted attention modules shares the teacher's tensors. Mixers with random initial values
    draw them from `seed`.
    """
    layers = student.config.limbeck["layers"]
    first = layers[0]
    rules = [{"layers": [layer["layer"]], "mixer": layer["mixer"], "options": layer["options"]} for layer in layers[1:]]
    indices = [layer["layer"] for layer in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = convert(teacher, first["mixer"], indices, options=first["options"], rules=rules, share_weights=True)
    return model.eval().requires_grad_(False)
