"""A model under evaluation: what was asked for, loaded, with its teacher and the text that it was not trained on.

    subjects = SubjectLoader(teacher=None, data=None)
    subject = subjects.load("runs/quickstart")     # a run, a student's folder, 'embedded', a folder, a hub name
    subject.model, subject.tokenizer, subject.teacher, subject.load_held_out(512, tokens=8192)

A student is compared with the teacher of its run, which is loaded once for all subjects that share it.

The student before it learnt anything: the teacher converted by the student's own plan.

    fresh = build_untrained_student(teacher, student, seed=0)       # what stage 0 began with

What a measure finds in it is the mixer's start and the teacher's projections; the rest is what training changed.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Data, Recipe
from limbeck.core.storage import read_manifest
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
from limbeck.models.hooks import load_teacher
from limbeck.models.loading import is_student, load_model_and_tokenizer

HELD_OUT_PART = "held-out part"  # of a text: what its run did not learn from


@dataclass
class Subject:
    """One model and what it is measured with. A teacher is its own teacher.

    name: as it was asked for.
    folder: what `from_pretrained` takes.
    output_dir: where its measurements are kept.
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
    trained_on_data: bool = False  # `data` is a text that its run learnt from, so the held-out part is measured
    ignore_cache: bool = False  # measure anew what a measure keeps by itself

    @property
    def is_student(self) -> bool:
        """Whether it is one of ours."""
        return hasattr(self.model.config, "limbeck")

    @property
    def teacher(self) -> "Subject":
        """Raises LimbeckError for a student whose teacher is not known."""
        if not self.is_student:
            return self
        if self.teacher_or_none is None:
            raise LimbeckError(
                f"the teacher of {self.name} is not known", hint="--teacher embedded, a folder or a name"
            )
        return self.teacher_or_none

    @property
    def teacher_name(self) -> str | None:
        """What its teacher was asked for as; None for a student whose teacher is not known."""
        return self.teacher.name if self.teacher_or_none or not self.is_student else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model and its tokenizer, of their files where these are on this machine."""
        folder = find_model_folder(self.folder)
        if folder is not None:
            return fingerprint_checkpoint_with_tokenizer(folder)
        return hashlib.sha256(
            f"{fingerprint_model(self.model)} {fingerprint_tokenizer(self.tokenizer)}".encode()
        ).hexdigest()[:16]

    @property
    def teacher_fingerprint(self) -> str | None:
        """Fingerprint of the model that it is compared with; None where there is none but itself."""
        return self.teacher_or_none.fingerprint if self.teacher_or_none is not None else None

    def load_held_out(self, length: int, tokens: int) -> tuple[SequenceDataset, dict[str, Any]]:
        """Text that it was not trained on in packed sequences of `length` tokens, and which text that is.

        Of the text of its run that is the held-out part, of any other text all.

        Raises:
            LimbeckError: no text is known; see also `open_text_data`.
        """
        text, mine = self._text(length, tokens)
        assert self.data is not None
        sequences = text.held_out_sequences(length) if mine else text.all_sequences(length)
        return sequences, {"text": self.data.source, "part": HELD_OUT_PART if mine else "all", "key": text.key}

    def held_out_key(self, length: int, tokens: int) -> tuple[str, str]:
        """Part and key of what `load_held_out` would give, from the text as it is now."""
        text, mine = self._text(length, tokens)
        text.close()
        return HELD_OUT_PART if mine else "all", text.key

    def count_token_frequencies(self, length: int, max_tokens: int = 20_000_000) -> Tensor | None:
        """How often each token occurs in the training part of the same text, [vocabulary].

        Counted are the first `max_tokens` tokens of each source; None for a text that is streamed. See `load_held_out`.
        """
        text, _ = self._text(length, length)
        table: Any = self.model.get_input_embeddings()
        size = len(table.weight)
        counts = torch.zeros(size, dtype=torch.long)
        for part in text.sources:
            if not isinstance(part, TokenStore):
                return None
            counts += torch.from_numpy(np.bincount(part.train.tokens[:max_tokens], minlength=size))
        return counts

    def _text(self, length: int, tokens: int) -> tuple[TextData, bool]:
        """Its text, opened, and whether a part of it was held out."""
        data, mine = self.data, self.trained_on_data or (self.recipe is not None and self.data == self.recipe.data)
        if data is None:
            raise LimbeckError(f"no text to measure {self.name} on", hint="--data FILE, or --data embedded")
        mine = mine or data.source == "embedded"
        held_out = None if mine else 0
        opened = open_text_data(
            data, self.tokenizer, self.model, length=length, held_out=held_out, held_out_tokens=tokens
        )
        return opened, mine


@dataclass
class SubjectLoader:
    """Opens subjects; keeps the teachers that it has loaded.

    teacher, data: for all subjects, in the place of what their runs say.
    """

    teacher: str | None = None
    data: str | None = None
    seed: int = 0
    out: Path | None = None
    output_dirs: dict[str, Path] = field(default_factory=dict)
    _teachers: dict[str, Subject] = field(default_factory=dict)

    def load(self, name: str) -> Subject:
        """Load a model.

        Raises:
            LimbeckError: no model there, or its teacher or text cannot be had.
        """
        path = Path(name).expanduser()
        folder = path / "student" if (path / "student").is_dir() else path
        recipe_file = folder.parent / "recipe.yaml"
        if path.is_dir():
            check_folder(folder)
        recipe = Recipe.load(recipe_file, stored=True) if recipe_file.is_file() and folder.is_dir() else None
        data = Data(source=self.data) if self.data else recipe.data if recipe else Data(source="embedded")
        learnt = find_training_text(data.source, recipe, folder.parent) if self.data and recipe is not None else None
        data = learnt or data
        output_dir = folder.parent / "eval" if recipe is not None else Path("eval") / _slug(name)
        if self.out is not None:
            output_dir = self.out / _slug(name)
        self.output_dirs[name] = output_dir
        place = str(folder) if folder.is_dir() else loading.resolve_teacher(name)
        of_a_run = folder != path
        if not of_a_run and (name in self._teachers or not is_student(place)):
            return self._softmax(name, output_dir, data)
        model, tokenizer = load_model_and_tokenizer(place, require_student=of_a_run)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        base = self.teacher or (recipe.teacher if recipe else None)
        subject = Subject(
            name, place, output_dir, model, tokenizer, recipe, data, seed=self.seed, trained_on_data=learnt is not None
        )
        if base is not None:
            subject.teacher_or_none = self._softmax(base, output_dir, data)
        return subject

    def register_teacher(self, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
        """Use a teacher that is in memory already."""
        if name not in self._teachers:
            folder = loading.resolve_teacher(name)
            self._teachers[name] = Subject(name, folder, Path("eval") / _slug(name), model, tokenizer, seed=self.seed)

    def _softmax(self, name: str, output_dir: Path, data: Data) -> Subject:
        if name not in self._teachers:
            folder = loading.resolve_teacher(name)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model, tokenizer = load_teacher(folder, device)
            self._teachers[name] = Subject(name, folder, output_dir, model, tokenizer, data=data, seed=self.seed)
        known = self._teachers[name]
        return Subject(name, known.folder, output_dir, known.model, known.tokenizer, data=data, seed=self.seed)


def find_training_text(source: str, recipe: Recipe, run: Path) -> Data | None:
    """How to open a text that a run learnt from, or a part of it, under whatever name; None for any other text.

    A document falls on its side of the split by its hash and the held-out share alone, so a part of a text holds out
    what the whole of it does.

    Args:
        source: as it is spelt now.
        run: the run's folder, which knows by content what is not where it was.
    """
    uses = [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]
    texts = read_manifest(run).get("texts", {})
    contents = {json.loads(name)["source"]: text.get("contents") or [] for name, text in texts.items()}
    for data in uses:
        if source == data.source:
            return data
        parts: list[Any] = [*data.sources] if data.sources else [data]
        recorded = contents.get(data.source, [])
        for part, content in zip(parts, [*recorded, *[None] * (len(parts) - len(recorded))]):
            if documents.is_subset_of(source, part.source, content):
                facts = {"source": source, "sources": None, "text_field": part.text_field, "chat": part.chat}
                return data.model_copy(update=facts)
    return None


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"


def build_untrained_student(teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """An untrained student with the same mixers and options in the same layers.

    Everything outside the converted attention modules is the teacher's very tensors. Mixers that draw some of their
    start at random draw it from `seed`.
    """
    layers = student.config.limbeck["layers"]
    first = layers[0]
    rules = [{"layers": [one["layer"]], "mixer": one["mixer"], "options": one["options"]} for one in layers[1:]]
    numbers = [one["layer"] for one in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = convert(teacher, first["mixer"], numbers, options=first["options"], rules=rules, share_weights=True)
    return fresh.eval().requires_grad_(False)
