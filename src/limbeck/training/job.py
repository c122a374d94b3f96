"""What a run works with: its recipe, models, texts and layers, as `training/setup.py` has checked them.

job = prepare_job(Recipe.load("limbeck"))
job.held_out_dataset(job.recipe.data).batch(0, 1)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core import recipe as recipes
from limbeck.core.recipe import Recipe
from limbeck.core.text_settings import Data
from limbeck.data.dataset import TextData
from limbeck.data.packing import SequenceDataset
from limbeck.models import Site
from limbeck.models.compilation import CompileLog, should_compile
from limbeck.models.hooks import DistillationPair


@dataclass
class Job:
    """Everything that a run works with, checked."""

    recipe: Recipe
    student: recipes.Student  # the recipe's, its groups of heads chosen
    device: torch.device
    autocast: Callable[[], Any]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, TextData]  # by `dataset_key`
    num_layers: int  # attention layers of the teacher
    sites: list[Site]  # attention layers that are converted
    path: Path
    identity: dict[str, Any] = field(default_factory=dict)  # of teacher and student, for the manifest; process 0 only
    compile_failures: CompileLog = field(default_factory=CompileLog)  # blocks that torch.compile could not compile

    @property
    def compile_enabled(self) -> bool:
        """Whether torch.compile is used for blocks and losses of stage 3."""
        return should_compile(self.recipe.compile, self.device)

    @property
    def text(self) -> TextData:
        """The recipe's text; a stage may have another."""
        return self.texts[dataset_key(self.recipe.data)]

    def make_pair(self, student: PreTrainedModel) -> DistillationPair:
        """Pair the teacher with a student of this job, for the stages."""
        return DistillationPair(self.teacher, student, self.sites, self.autocast)

    def train_dataset(self, data: Data) -> SequenceDataset:
        """Return the training sequences of a text."""
        return self.texts[dataset_key(data)].train_sequences(data.seq_len, self.recipe.seed)

    def held_out_dataset(self, data: Data) -> SequenceDataset:
        """Return the held-out sequences of a text."""
        return self.texts[dataset_key(data)].held_out_sequences(data.seq_len)

    def stage_held_out_dataset(self, stage: Any) -> SequenceDataset | None:
        """Return the held-out sequences of a stage's text; None for a stage that reads none, which then needs none."""
        rewarded = getattr(getattr(stage, "objectives", None), "teachers", None)
        if getattr(stage, "eval_steps", None) or (rewarded and rewarded.rule == "reinforce"):
            return self.held_out_dataset(self.recipe.text_of(stage))
        return None


def dataset_key(data: Data) -> str:
    """Identify a text by all of its settings except the sequence length."""
    settings = data.model_dump(mode="json", exclude={"seq_len", "cache_gb"})
    if data.documents == "packed":  # a key that the manifests of earlier versions do not have
        del settings["documents"]
    return json.dumps(settings)
