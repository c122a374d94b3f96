"""Stage 3: the whole student, running on its own hidden states, against labels and the teacher's logits.

    stage = LogitsStage(DistillationPair(teacher, student, sites, autocast), ObjectiveWeights(ce=0.5, kl=0.5))
    losses = stage.backward(batch, {"targets": 511})       # adds gradients; each loss by name

Both heads run on a chunk of tokens at a time (limbeck.training.chunked_losses), so no tensor of all logits exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck.core.stage_settings import Logits
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
    """Stage 3 of one student.

    Args:
        weights: of the objectives.
        train: "attention", "body" or "all", whose parameters learn; "lora" with `adapters`.
        chunk_size: tokens whose logits exist at a time; None chooses it.
        adapters: the LoRA adapters that learn, with the mixers, instead of all weights.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        compiled: fuse the passes over the logits by torch.compile.
    """

    requires_targets = True  # a sequence without a target has no loss

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
        self.loss_scale = 1.0  # factor on the loss in `backward`, see limbeck.training.optim.LossScaler
        self.stopped: set[str] = set()  # always empty: there is one loss
        self.checkpointed_blocks = (
            list_decoder_blocks(self.student, self.sites[0].block) if checkpoint_activations else []
        )
        self.teacher_head, self.student_head = LMHead(self.teacher), LMHead(self.student)
        self.chunk_size = chunk_size or choose_logit_chunk_size(self.teacher)

    def backward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its share of each loss by name."""
        teacher = None
        # cross-entropy alone needs no teacher, unless its logits come with the batch anyway
        if set(self.weights.active()) - {"ce"} or isinstance(batch, TeacherLogitsBatch):
            with torch.no_grad(), self.autocast():
                teacher = self._teacher_logits(batch)
        with self.autocast(), self._seeded_dropout(batch):
            with activation_checkpointing(self.student, self.checkpointed_blocks):
                hidden = run_backbone(self.student, batch)
            scale = self.loss_scale / max(counts["targets"], 1.0)
            sums, gradient = self._losses(hidden, teacher, batch, scale, compute_grad=True)
        hidden.backward(gradient)
        return _divide(sums, counts["targets"])

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Return the losses on a batch, without gradients: its share, if given the counts of all batches.

        Empty if there is no target at all.
        """
        with self.autocast():
            hidden = run_backbone(self.student, batch)
            sums, _ = self._losses(hidden, self._teacher_logits(batch), batch, 1.0, compute_grad=False)
        return _divide(sums, (counts or self.count(batch))["targets"])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their name in the student."""
        if self.adapters is not None:
            return self.adapters.parameters()
        if self.train == "attention":
            prefixes = tuple(f"{site.module}." for site in self.sites)
            return {n: p for n, p in self.student.named_parameters() if n.startswith(prefixes)}
        frozen = set()
        if self.train == "body":
            for module in (self.student.get_input_embeddings(), self.student.get_output_embeddings()):
                frozen |= {id(p) for p in module.parameters()} if module is not None else set()
        return {n: p for n, p in self.student.named_parameters() if id(p) not in frozen}

    def learning_rates(self, recipe: Logits) -> dict[str, float]:
        """Return the peak learning rate by parameter name: `lr` in the converted attention, `lr_other` elsewhere."""
        lr_other = recipe.lr / 5 if recipe.lr_other is None else recipe.lr_other
        prefixes = tuple(f"{site.module}." for site in self.sites)
        return {name: recipe.lr if name.startswith(prefixes) else lr_other for name in self.parameters()}

    def count(self, batch: Batch) -> Counts:
        """Count what this batch adds to the divisors of the losses."""
        return {"targets": float(batch.n_targets)}

    @contextmanager
    def _seeded_dropout(self, batch: Batch) -> Iterator[None]:
        """Seed the adapters' dropout by the batch itself, so that a resumed step draws what it drew before."""
        if self.adapters is None or not self.adapters.dropout:
            yield
            return
        with torch.random.fork_rng():
            positions = torch.arange(1, batch.cpu_input_ids.numel() + 1, device=batch.cpu_input_ids.device)
            torch.manual_seed(int((batch.cpu_input_ids.flatten() * positions).sum()))
            yield

    def _teacher_logits(self, batch: Batch) -> TeacherLogits:
        """Return the teacher's logits of a batch: from disk if they come with it, else from a pass of the teacher."""
        if isinstance(batch, TeacherLogitsBatch):
            return TeacherLogitsFromCache(batch.index, batch.log_q)
        return TeacherLogitsFromHidden(self.teacher_head, run_backbone(self.teacher, batch))

    def _losses(
        self, hidden: Tensor, teacher: TeacherLogits | None, batch: Batch, scale: float, compute_grad: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        return logit_losses(
            self.student_head,
            hidden,
            teacher,
            batch.targets,
            self.weights,
            scale,
            self.chunk_size,
            compute_grad=compute_grad,
            rows=batch.metadata.target_indices if batch.metadata else None,
            compiled=self.compiled,
        )


def _divide(sums: dict[str, Tensor], targets: float) -> dict[str, Tensor]:
    """Divide sums by the number of targets; empty if there are none, whose mean is undefined."""
    return {name: value / targets for name, value in sums.items() if name != "count"} if targets else {}
