"""Stage 3: the whole student, running on its own hidden states, against labels and the teacher's logits.

    stage = LogitsStage(DistillationPair(teacher, student, sites, autocast), ObjectiveWeights(ce=0.5, kl=0.5))
    sums = stage.backward(batch, {"targets": 511})

The heads run on a chunk of tokens at a time and their gradient is formed there, so no tensor of all logits exists.
Where cross-entropy is the only objective the teacher runs for held-out text alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck.core import recipe as recipes
from limbeck.data.packing import Batch
from limbeck.data.teacher_logits import TeacherLogitsBatch
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.compilation import activation_checkpointing, list_decoder_blocks
from limbeck.models.hooks import DistillationPair
from limbeck.training.alignment import Counts
from limbeck.training.chunked_losses import (
    TeacherLogits,
    TeacherLogitsFromCache,
    TeacherLogitsFromHidden,
    choose_logit_chunk_size,
    logit_losses,
)
from limbeck.training.lora import LoraAdapters
from limbeck.training.losses import ObjectiveWeights


class LogitsStage:
    """See the module's docstring."""

    requires_targets = True  # what has no target teaches nothing here

    def __init__(
        self,
        pair: DistillationPair,
        weights: ObjectiveWeights,
        train: str = "body",
        chunk_size: int | None = None,
        adapters: LoraAdapters | None = None,
        checkpoint_activations: bool = False,
        compiled: bool = False,
    ):
        self.teacher, self.student, self.sites, self.autocast = pair
        self.weights, self.train, self.compiled = weights, train, compiled
        self.adapters = adapters
        self.loss_scale = 1.0  # gradients are so many times too large, see limbeck.training.optim
        self.stopped: set[str] = set()  # always empty: there is one loss
        self.blocks = list_decoder_blocks(self.student, self.sites[0].block) if checkpoint_activations else []
        self.teacher_head, self.student_head = LMHead(self.teacher), LMHead(self.student)
        self.chunk_size = chunk_size or choose_logit_chunk_size(self.teacher)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that learn: of the converted attention, of the body, all, or adapters and mixers."""
        if self.adapters is not None:
            return self.adapters.parameters()
        if self.train == "attention":
            prefixes = tuple(f"{site.module}." for site in self.sites)
            return {n: p for n, p in self.student.named_parameters() if n.startswith(prefixes)}
        ends = set()
        if self.train == "body":
            for module in (self.student.get_input_embeddings(), self.student.get_output_embeddings()):
                ends |= {id(p) for p in module.parameters()} if module is not None else set()
        return {n: p for n, p in self.student.named_parameters() if id(p) not in ends}

    def learning_rates(self, recipe: recipes.Logits) -> dict[str, float]:
        """Peak learning rate by parameter name: lr in the converted attention, lr_other elsewhere."""
        rest = recipe.lr / 5 if recipe.lr_other is None else recipe.lr_other
        prefixes = tuple(f"{site.module}." for site in self.sites)
        return {name: recipe.lr if name.startswith(prefixes) else rest for name in self.parameters()}

    def count(self, batch: Batch) -> Counts:
        """What this batch adds to the counts that the losses are divided by."""
        return {"targets": float(batch.n_targets)}

    def backward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its share of each loss."""
        teacher = None
        if set(self.weights.active()) - {"ce"} or isinstance(batch, TeacherLogitsBatch):  # else the labels say all
            with torch.no_grad(), self.autocast():
                teacher = self._signal(batch)
        with self.autocast(), self._draws(batch):
            with activation_checkpointing(self.student, self.blocks):
                student = run_backbone(self.student, batch)
            sums, gradient = self._losses(student, teacher, batch, self.loss_scale / max(counts["targets"], 1.0))
        student.backward(gradient)
        return self._shares(sums, counts["targets"])

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """The losses on a batch, without gradients: its share, given the counts of all; none without any target."""
        with self.autocast():
            sums, _ = self._losses(
                run_backbone(self.student, batch), self._signal(batch), batch, 1.0, compute_grad=False
            )
        return self._shares(sums, (counts or self.count(batch))["targets"])

    @contextmanager
    def _draws(self, batch: Batch) -> Iterator[None]:
        """An adapter's dropout is drawn from the batch itself, so that a resumed step draws what it drew before."""
        if self.adapters is None or not self.adapters.dropout:
            yield
            return
        with torch.random.fork_rng():
            place = torch.arange(1, batch.cpu_input_ids.numel() + 1, device=batch.cpu_input_ids.device)
            torch.manual_seed(int((batch.cpu_input_ids.flatten() * place).sum()))
            yield

    def _signal(self, batch: Batch) -> TeacherLogits:
        """What the teacher says of the batch: read from disk where it comes along, else asked now."""
        if isinstance(batch, TeacherLogitsBatch):
            return TeacherLogitsFromCache(batch.index, batch.log_q)
        return TeacherLogitsFromHidden(self.teacher_head, run_backbone(self.teacher, batch))

    def _losses(
        self, student: Tensor, signal: TeacherLogits | None, batch: Batch, scale: float, compute_grad: bool = True
    ):
        return logit_losses(
            self.student_head,
            student,
            signal,
            batch.targets,
            self.weights,
            scale,
            self.chunk_size,
            compute_grad=compute_grad,
            rows=batch.metadata.target_indices if batch.metadata else None,
            compiled=self.compiled,
        )

    def _shares(self, sums: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """Sums over the count of targets; nothing where that is none, for a mean over nothing is no number."""
        return {name: value / count for name, value in sums.items() if name != "count"} if count else {}
