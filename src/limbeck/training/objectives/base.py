"""What a further objective of stage 3 is: the one interface of all plug-ins in this folder.

    class Mine(Objective):
        name = "mine"                                   # of its settings in limbeck.core.objectives

        def contribute(self, done, counts):             # after the passes of teacher and student over the text
            distance = ...                              # summed over tokens, with a graph to the student's states
            return self.scalar(distance / counts["tokens"])

An objective is a module: its parameters learn with the student's and stay with the checkpoints of the stage, and so do
its buffers. It draws no number that does not follow from the recipe's seed and the tokens of a sequence
(`limbeck.ops.matrix_rows.make_generators`), so a resumed run, or a step that is split differently, draws the same.

Legend: B batch, T time, D model width.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch, SequenceDataset
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.compilation import activation_checkpointing, list_decoder_blocks
from limbeck.models.hooks import DistillationPair
from limbeck.models.layers import parse_layers, parse_softmax_layers
from limbeck.training.chunked_losses import TeacherLogits, logit_losses
from limbeck.training.losses import ObjectiveWeights

Counts = Mapping[str, float]  # what losses are divided by: targets, tokens (of the text), and an objective's own


@dataclass
class Models:
    """Both models of a stage, and how a stage runs them."""

    pair: DistillationPair
    chunk_size: int
    checkpointed_blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.teacher, self.student, self.sites, self.autocast = self.pair
        self.teacher_head, self.student_head = LMHead(self.teacher), LMHead(self.student)
        self.blocks = list_decoder_blocks(self.student, self.sites[0].block)

    @property
    def width(self) -> int:
        """D."""
        return self.sites[0].shape.hidden

    def run_student(self, batch: Batch) -> Tensor:
        """Compute the student's hidden states [B, T, D], with the stage's activation checkpointing."""
        with activation_checkpointing(self.student, self.checkpointed_blocks):
            return run_backbone(self.student, batch)

    def measure(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        teacher: TeacherLogits | None,
        targets: Tensor,
        weights: ObjectiveWeights,
        scale: float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sum losses on logits over targets, with `scale` times their gradient at `hidden`; see `logit_losses`."""
        sums, gradient = logit_losses(head, hidden, teacher, targets, weights, scale, self.chunk_size)
        assert gradient is not None
        return sums, gradient


def parse_blocks(chosen: str | list[int], count: int, key: str) -> list[int]:
    """Parse numbers of decoder blocks: "all", "uniform 4" (all of fewer), "every 4", "0,2,5-9", or a list.

    Args:
        count: of the teacher's blocks.
        key: of the recipe, for the error.

    Raises:
        LimbeckError: there are no such blocks.
    """
    word, _, number = chosen.partition(" ") if isinstance(chosen, str) else ("", "", "")
    is_spread = word in ("every", "uniform")
    if word == "uniform" and number.isdigit() and int(number) >= count:
        chosen, is_spread = "all", False
    try:
        return (parse_softmax_layers if is_spread else parse_layers)(chosen, count)
    except LimbeckError as error:
        raise LimbeckError(
            f"{key} is {chosen!r}, the teacher has {count} blocks",
            expected=f"'all', 'uniform 2', 'every 2', or numbers from 0 to {count - 1} as 0,2,5-9",
        ) from error


@dataclass(frozen=True)
class Surroundings:
    """What settings have to fit: T, the number of the teacher's blocks, its tokenizer (None for a plan)."""

    length: int
    blocks: int
    tokenizer: PreTrainedTokenizerBase | None


@dataclass
class TextPass:
    """What teacher and student made of a micro-batch of text.

    batch: the text. student, teacher: hidden states [B, T, D] that go into the heads, the student's with a graph.
    student_blocks, teacher_blocks: outputs [B, T, D] of the blocks that objectives asked for, by name.
    logits: the teacher's, as the objectives before have left them; None where nothing asks for them.
    loss_scale: factor on all gradients, of fp16.
    """

    batch: Batch
    student: Tensor
    teacher: Tensor | None
    student_blocks: dict[str, Tensor]
    teacher_blocks: dict[str, Tensor]
    logits: TeacherLogits | None = None
    loss_scale: float = 1.0


@dataclass(frozen=True)
class Contribution:
    """An objective's share of a step's loss.

    value: the share, without the objective's weight, for the log.
    weighted: what is added to the stage's loss; zero for a loss that trains the teacher's side alone.
    roots: where backward passes begin, tensors with a graph and their gradients.
    """

    value: Tensor
    weighted: Tensor
    roots: list[tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """Base of the plug-ins: does nothing; each overrides what it needs.

    Args:
        settings: its part of the recipe.
        models: of the stage.
        seed: for its parameters and what it draws.

    reads: names of the blocks whose outputs it needs from both passes.
    reads_text: it needs the teacher's pass over the text.
    trains_teacher: the teacher's pass keeps its graph, for parameters that this objective has put into it.
    """

    name: ClassVar[str]
    reads_text: ClassVar[bool] = True
    trains_teacher: ClassVar[bool] = False
    single_process: ClassVar[str] = ""  # why it cannot be shared out over processes, if it cannot

    def __init__(self, settings: Any, models: Models, seed: int):
        super().__init__()
        self.settings, self.models, self.seed = settings, models, seed
        self.reads: list[str] = []

    @property
    def share(self) -> float:
        """Share of the sequences that `choose_rows` takes."""
        return 0.0

    @classmethod
    def check(cls, settings: Any, around: Surroundings, key: str) -> None:
        """Refuse settings before a run begins.

        Args:
            key: of these settings in the recipe, for the error.

        Raises:
            LimbeckError: they do not fit.
        """
        if hasattr(settings, "blocks"):
            parse_blocks(settings.blocks, around.blocks, f"{key}.blocks")

    def choose_rows(self, batch: Batch) -> Tensor | None:
        """Return which sequences [B] bool, on the CPU, are this objective's alone and leave the text; None for none."""
        return None

    def count(self, own: Batch | None) -> dict[str, float]:
        """Count what a micro-batch adds to the divisors of the losses.

        Args:
            own: the sequences that `choose_rows` took, if there are any.
        """
        return {}

    def is_found_in(self, counts: Counts) -> bool:
        """Whether a step with these counts has anything for this objective; what has not is left out of the log."""
        return counts["text_targets"] > 0

    def begin_step(self, held_out: SequenceDataset | None) -> None:
        """Prepare for an optimizer step, before its first micro-batch; gradients may be set here."""

    def teacher_pass(self, batch: Batch) -> AbstractContextManager:
        """Return the context in which the teacher reads the text."""
        return nullcontext()

    def change_logits(self, done: TextPass) -> TeacherLogits | None:
        """Return what stands in for the teacher's logits."""
        return done.logits

    def contribute(self, done: TextPass, counts: Counts) -> Contribution | None:
        """Compare the passes over the text; None if there is nothing to add."""
        return None

    def run_own(self, own: Batch, counts: Counts, loss_scale: float) -> Contribution | None:
        """Run what this objective does with the sequences that it took, its own passes included."""
        return None

    def peak_lr(self, lr: float) -> float:
        """Return the peak learning rate of this objective's parameters, by default the stage's."""
        own = getattr(self.settings, "lr", None)
        return lr if own is None else own

    def scalar(self, share: Tensor, loss_scale: float) -> Contribution:
        """Make a contribution of a scalar with a graph, already divided by its count."""
        weight = self.settings.weight
        value = share.detach().double()
        return Contribution(value, weight * value, [(share, share.new_tensor(weight * loss_scale))])
