"""A model under evaluation: what was asked for, loaded, with its teacher and the text that it was not trained on.

    subjects = Subjects(teacher=None, data=None)
    subject = subjects.open("runs/quickstart")     # a run, a student's folder, 'embedded', a folder, a hub name
    subject.model, subject.tokenizer, subject.teacher, subject.held_out(512, tokens=8192)

A student is compared with the teacher of its run, which is loaded once for all subjects that share it.
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

from limbeck import assets
from limbeck.data import sources
from limbeck.data.packing import Sequences
from limbeck.data.shards import TokenStore
from limbeck.data.text import Text, open_text
from limbeck.errors import LimbeckError
from limbeck.identity import folder_of, model_of, tokenizer_in, weights_in
from limbeck.model.folders import check_folder
from limbeck.model.opening import is_student, open_model
from limbeck.recipe import Data, Recipe
from limbeck.stages.run import manifest_of
from limbeck.stages.teacher import load_teacher

HELD_OUT = "held-out part"  # of a text: what its run did not learn from


@dataclass
class Subject:
    """One model and what it is measured with. A teacher is its own teacher.

    name: as it was asked for.
    folder: what `from_pretrained` takes.
    home: where its measurements are kept.
    """

    name: str
    folder: str
    home: Path
    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe | None = None
    data: Data | None = None
    base: "Subject | None" = None
    seed: int = 0
    own: bool = False  # `data` is a text that its run learnt from, so the held-out part is measured
    again: bool = False  # measure anew what a measure keeps by itself

    @property
    def student(self) -> bool:
        """Whether it is one of ours."""
        return hasattr(self.model.config, "limbeck")

    @property
    def teacher(self) -> "Subject":
        """Raises LimbeckError for a student whose teacher is not known."""
        if not self.student:
            return self
        if self.base is None:
            raise LimbeckError(
                f"the teacher of {self.name} is not known", hint="--teacher embedded, a folder or a name"
            )
        return self.base

    @property
    def teacher_name(self) -> str | None:
        """What its teacher was asked for as; None for a student whose teacher is not known."""
        return self.teacher.name if self.base or not self.student else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the model and its tokenizer, of their files where these are on this machine."""
        folder = folder_of(self.folder)
        if folder is not None:
            return model_of(folder)
        return hashlib.sha256(f"{weights_in(self.model)} {tokenizer_in(self.tokenizer)}".encode()).hexdigest()[:16]

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the model that it is compared with; None where there is none but itself."""
        return self.base.weights if self.base is not None else None

    def held_out(self, length: int, tokens: int) -> tuple[Sequences, dict[str, Any]]:
        """Text that it was not trained on in packed sequences of `length` tokens, and which text that is.

        Of the text of its run that is the held-out part, of any other text all.

        Raises:
            LimbeckError: no text is known; see also `open_text`.
        """
        text, mine = self._text(length, tokens)
        assert self.data is not None
        sequences = text.held_out(length) if mine else text.all_in_order(length)
        return sequences, {"text": self.data.source, "part": HELD_OUT if mine else "all", "key": text.key}

    def text_key(self, length: int, tokens: int) -> tuple[str, str]:
        """Part and key of what `held_out` would give, from the text as it is now."""
        text, mine = self._text(length, tokens)
        text.close()
        return HELD_OUT if mine else "all", text.key

    def token_counts(self, length: int, most: int = 20_000_000) -> Tensor | None:
        """How often each token occurs in the training part of the same text, [vocabulary].

        Counted are the first `most` tokens of each source; None for a text that is streamed. See `held_out`.
        """
        text, _ = self._text(length, length)
        table: Any = self.model.get_input_embeddings()
        size = len(table.weight)
        counts = torch.zeros(size, dtype=torch.long)
        for part in text.parts:
            if not isinstance(part, TokenStore):
                return None
            counts += torch.from_numpy(np.bincount(part.train.tokens[:most], minlength=size))
        return counts

    def _text(self, length: int, tokens: int) -> tuple[Text, bool]:
        """Its text, opened, and whether a part of it was held out."""
        data, mine = self.data, self.own or (self.recipe is not None and self.data == self.recipe.data)
        if data is None:
            raise LimbeckError(f"no text to measure {self.name} on", hint="--data FILE, or --data embedded")
        mine = mine or data.source == "embedded"
        held_out = None if mine else 0
        opened = open_text(data, self.tokenizer, self.model, length=length, held_out=held_out, held_out_tokens=tokens)
        return opened, mine


@dataclass
class Subjects:
    """Opens subjects; keeps the teachers that it has loaded.

    teacher, data: for all subjects, in the place of what their runs say.
    """

    teacher: str | None = None
    data: str | None = None
    seed: int = 0
    out: Path | None = None
    homes: dict[str, Path] = field(default_factory=dict)
    _teachers: dict[str, Subject] = field(default_factory=dict)

    def open(self, name: str) -> Subject:
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
        learnt = learnt_text(data.source, recipe, folder.parent) if self.data and recipe is not None else None
        data = learnt or data
        home = folder.parent / "eval" if recipe is not None else Path("eval") / _slug(name)
        if self.out is not None:
            home = self.out / _slug(name)
        self.homes[name] = home
        place = str(folder) if folder.is_dir() else assets.resolve_teacher(name)
        of_a_run = folder != path
        if not of_a_run and (name in self._teachers or not is_student(place)):
            return self._softmax(name, home, data)
        model, tokenizer = open_model(place, student=of_a_run)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        base = self.teacher or (recipe.teacher if recipe else None)
        subject = Subject(name, place, home, model, tokenizer, recipe, data, seed=self.seed, own=learnt is not None)
        if base is not None:
            subject.base = self._softmax(base, home, data)
        return subject

    def lend(self, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
        """Use a teacher that is in memory already."""
        if name not in self._teachers:
            folder = assets.resolve_teacher(name)
            self._teachers[name] = Subject(name, folder, Path("eval") / _slug(name), model, tokenizer, seed=self.seed)

    def _softmax(self, name: str, home: Path, data: Data) -> Subject:
        if name not in self._teachers:
            folder = assets.resolve_teacher(name)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model, tokenizer = load_teacher(folder, device)
            self._teachers[name] = Subject(name, folder, home, model, tokenizer, data=data, seed=self.seed)
        known = self._teachers[name]
        return Subject(name, known.folder, home, known.model, known.tokenizer, data=data, seed=self.seed)


def learnt_text(source: str, recipe: Recipe, run: Path) -> Data | None:
    """How to open a text that a run learnt from, or a part of it, under whatever name; None for any other text.

    A document falls on its side of the split by its hash and the held-out share alone, so a part of a text holds out
    what the whole of it does.

    Args:
        source: as it is spelt now.
        run: the run's folder, which knows by content what is not where it was.
    """
    uses = [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]
    texts = manifest_of(run).get("texts", {})
    contents = {json.loads(name)["source"]: text.get("contents") or [] for name, text in texts.items()}
    for data in uses:
        if source == data.source:
            return data
        parts: list[Any] = [*data.sources] if data.sources else [data]
        recorded = contents.get(data.source, [])
        for part, content in zip(parts, [*recorded, *[None] * (len(parts) - len(recorded))]):
            if sources.is_part_of(source, part.source, content):
                facts = {"source": source, "sources": None, "text_field": part.text_field, "chat": part.chat}
                return data.model_copy(update=facts)
    return None


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"
