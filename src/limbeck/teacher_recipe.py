"""What a teacher that Limbeck trains itself is: its model, its text, its steps; `recipes/teachers/*.yaml`.

recipe = TeacherRecipe.load("small")
recipe.key                                     # hex: what tells one teacher from another
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from limbeck.data.cache import cache_root
from limbeck.recipe import BUILT_IN, Data, Document, Recipe, Trained, to_old_keys

FORMAT = 2  # raise when the same recipe makes another teacher: text, vocabulary, start or steps changed


class NextToken(Trained):
    """Steps of plain language modelling."""

    stage: Literal["next_token"]
    lr: Annotated[float, Field(gt=0)] = 3e-3


class Repeats(NextToken):
    """The same on lists of random tokens that come again (`limbeck.data.repeats`), before any text is read."""

    stage: Literal["repeats"]  # type: ignore[assignment]


class TeacherRecipe(Document):
    """A whole teacher."""

    built_in: ClassVar[Path] = BUILT_IN / "teachers"
    tagged: ClassVar[Mapping[str, type[Trained]]] = {"repeats": Repeats, "next_token": NextToken}

    name: str
    model: dict[str, Any]  # fields of the family's config in transformers, `model_type` among them
    init: Literal["random", "look_back"] = "random"  # weights before the first step, see `limbeck.teachers.lookback`
    vocab_size: Annotated[int, Field(ge=300)]  # tokens of the byte-level BPE, special ones included
    data: Data
    stages: Annotated[list[Annotated[NextToken | Repeats, Field(discriminator="stage")]], Field(min_length=1)]
    seed: int = Field(0, ge=0, lt=2**62)
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    save_total_limit: Annotated[int, Field(gt=0)] = 2
    trackers: list[str] = []

    @property
    def key(self) -> str:
        """Hash of all that the weights depend on, machine and versions aside."""
        settings = self.model_dump(mode="json", exclude={"name", "checkpoint_seconds", "save_total_limit", "trackers"})
        # by the names that the keys had first, so that teachers in a cache stay valid
        return hashlib.sha256(json.dumps([FORMAT, to_old_keys(settings)], sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the finished teacher is, or will be."""
        return cache_root() / "assets" / f"teacher-{self.name}-{self.key[:12]}"

    @classmethod
    def names(cls) -> list[str]:
        """Those that come with limbeck."""
        return sorted(path.stem for path in cls.built_in.glob("*.yaml"))


AnyRecipe = Recipe | TeacherRecipe  # what a run directory can be of
