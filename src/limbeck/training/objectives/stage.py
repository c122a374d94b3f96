"""Stage 3 with further objectives: the passes of `LogitsStage`, of which every plug-in gets to see what it asks for.

    stage = ObjectivesStage(pair, ObjectiveWeights(ce=1, kl=1), Objectives(gram={"weight": 0.1}), seed=0)
    losses = stage.backward(batch, stage.count(batch))        # loss, ce, kl, ..., and each objective by its name

`loss` is the stage's own plus weight × value of each objective. A recipe without objectives gets a `LogitsStage`, so
nothing here can change it. The held-out loss stays that of the stage's own ce, kl and so on, so that students with
different objectives are measured by one number.
"""

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.objectives import Objectives
from limbeck.core.stage_settings import Logits
from limbeck.data.packing import Batch, SequenceDataset
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import DistillationPair, record_outputs
from limbeck.training.chunked_losses import TeacherLogitsFromHidden
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, TextPass
from limbeck.training.objectives.registry import PLUGINS

PREFIX = "objectives."  # of the names of their parameters, which the student does not have
TEXT_METRICS = ("ce", "kl", "teacher_ce", "agree")


class ObjectivesStage(LogitsStage):
    """Stage 3 of one student with further objectives.

    Args:
        weights: of the stage's own objectives.
        chosen: settings of the further ones.
        seed: of their parameters and of what they draw.
        settings: as of `LogitsStage`.
    """

    def __init__(
        self, pair: DistillationPair, weights: ObjectiveWeights, chosen: Objectives, seed: int, **settings: Any
    ):
        super().__init__(pair, weights, **settings)
        self.models = Models(pair, self.chunk_size, self.checkpointed_blocks)
        reference = next(self.student.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # each draws from a stream of its own: what one chooses says nothing of what another does
            made = {
                name: PLUGINS[name](one, self.models, seed + zlib.crc32(name.encode()))
                for name, one in chosen.active().items()
            }
        self.objectives: dict[str, Objective] = {
            name: objective.to(reference.device, reference.dtype) for name, objective in made.items()
        }
        self.reads = list(dict.fromkeys(block for one in made.values() for block in one.reads))
        self.asks_teacher = bool(set(weights.active()) - {"ce"}) or any(one.reads_text for one in made.values())
        self.only_text: bool | None = None  # for rehearsals: whether all sequences are text, or all an objective's

    def backward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=batch.input_ids.device)
        metrics = TEXT_METRICS if self.asks_teacher else TEXT_METRICS[:1]
        on_text = dict.fromkeys([*self.weights.active(), *metrics]) if counts["text_targets"] else {}
        found = [name for name, one in self.objectives.items() if one.is_found_in(counts)]
        # the same names in every micro-batch of a step, for processes sum them in order; not those of which the whole
        # step has nothing, whose mean would be zero over zero
        losses = dict.fromkeys(["loss", *on_text, *found], zero)
        text, own = self._split(batch)
        if text is not None:
            self._learn_from_text(text, counts, losses)
        for name, rows in own.items():
            with self._seeded_dropout(rows):
                contribution = self.objectives[name].run_own(rows, counts, self.loss_scale)
            _add(losses, name, contribution)
            _run_backward(contribution.roots if contribution else [])
        return losses

    def evaluate(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        return super().evaluate(batch, {"targets": (counts or self.count(batch))["all_targets"]})

    def count(self, batch: Batch) -> dict[str, float]:
        """Count what this batch adds to the divisors of the losses.

        Returns:
            targets: of the text that is read and what objectives add; text_targets, tokens: of that text alone;
            all_targets: of all text, for the held-out loss; objectives' own.
        """
        text, own = self._split(batch)
        text_targets = float(text.n_targets) if text is not None else 0.0
        counts = {"targets": text_targets, "text_targets": text_targets, "all_targets": float(batch.n_targets)}
        counts["tokens"] = float(text.input_ids.numel()) if text is not None else 0.0
        for name, objective in self.objectives.items():
            for key, number in objective.count(own.get(name)).items():
                counts[key] = counts.get(key, 0.0) + number
        return counts

    def begin_step(self, held_out: SequenceDataset | None) -> None:
        """Let the objectives prepare for an optimizer step."""
        for objective in self.objectives.values():
            objective.begin_step(held_out)
            for parameter in objective.parameters():
                if parameter.grad is not None:  # the trainer divides all gradients by the loss scale
                    parameter.grad *= self.loss_scale

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**super().parameters(), **self._own_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """Return what the objectives remember between steps, by name, for checkpoints."""
        named = ((name, one.named_buffers()) for name, one in self.objectives.items())
        return {f"{PREFIX}{name}.{inner}": tensor for name, tensors in named for inner, tensor in tensors}

    def learning_rates(self, recipe: Logits) -> dict[str, float]:
        own = {f"{PREFIX}{name}.{inner}": one.peak_lr(recipe.lr) for name, inner, _, one in self._list_own()}
        return {**super().learning_rates(recipe), **own}

    def clip_groups(self) -> list[list[str]]:
        """Return the names of the student's and of the objectives' parameters: neither is clipped for the other."""
        own = list(self._own_parameters())
        return [list(super().parameters()), own] if own else []

    def rehearsal_kinds(self) -> list[tuple[float, Callable[[], None]]]:
        """Return the shares of sequences that are read as text and of those that an objective takes.

        With each goes a call after which all sequences are of that kind, so that a rehearsal meets both.
        """
        share = max((one.share for one in self.objectives.values()), default=0.0)
        kinds = {True: 1 - share, False: share}
        return [(part, partial(setattr, self, "only_text", kind)) for kind, part in kinds.items() if part]

    def _list_own(self) -> list[tuple[str, str, nn.Parameter, Objective]]:
        return [(name, inner, p, one) for name, one in self.objectives.items() for inner, p in one.named_parameters()]

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{PREFIX}{name}.{inner}": parameter for name, inner, parameter, _ in self._list_own()}

    def _split(self, batch: Batch) -> tuple[Batch | None, dict[str, Batch]]:
        """Return the sequences that are read as text, and by objective those that it takes."""
        own: dict[str, Batch] = {}
        is_text = torch.ones(len(batch.cpu_input_ids), dtype=torch.bool)
        for name, objective in self.objectives.items():
            chosen = objective.choose_rows(batch)
            if chosen is None:
                continue
            if self.only_text is not None:
                chosen = torch.full_like(chosen, not self.only_text)
            if (chosen := chosen & is_text).any():
                own[name] = _select(batch, chosen)
                is_text &= ~chosen
        return (_select(batch, is_text) if is_text.any() else None), own

    def _learn_from_text(self, text: Batch, counts: Counts, losses: dict[str, Tensor]) -> None:
        """Run both models over the text and add the gradients; adds to `losses`."""
        objectives = self.objectives
        teacher_hidden, teacher_blocks = self._run_teacher(text) if self.asks_teacher else (None, {})
        with self.autocast(), self._seeded_dropout(text):
            with record_outputs(self.student, self.reads) as student_blocks:
                hidden = self.models.run_student(text)
            done = TextPass(text, hidden, teacher_hidden, student_blocks, teacher_blocks, loss_scale=self.loss_scale)
            if teacher_hidden is not None:
                done.logits = TeacherLogitsFromHidden(self.teacher_head, teacher_hidden)
            for objective in objectives.values():
                done.logits = objective.change_logits(done)
            scale = self.loss_scale / max(counts["targets"], 1.0)
            sums, gradient = self._losses(hidden, done.logits, text, scale, compute_grad=True)
            contributions = {name: objective.contribute(done, counts) for name, objective in objectives.items()}
        assert gradient is not None
        for name, total in sums.items():
            if name in losses:
                losses[name] = losses[name] + total / counts["targets" if name == "loss" else "text_targets"]
        roots = [(hidden, gradient)]
        for name, contribution in contributions.items():
            _add(losses, name, contribution)
            roots += contribution.roots if contribution else []
        _run_backward(roots)

    def _run_teacher(self, text: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the teacher as the objectives want it; returns its hidden states and its blocks' outputs."""
        keeps_graph = any(one.trains_teacher for one in self.objectives.values())
        with torch.set_grad_enabled(keeps_graph), self.autocast(), ExitStack() as stack:
            for objective in self.objectives.values():
                stack.enter_context(objective.teacher_pass(text))
            outputs = stack.enter_context(record_outputs(self.teacher, self.reads))
            hidden = run_backbone(self.teacher, text)
        # blocks are targets: what an objective trains in the teacher learns from its own loss, behind the last block
        return hidden, {name: output.detach() for name, output in outputs.items()}


def _select(batch: Batch, rows: Tensor) -> Batch:
    return batch if rows.all() else batch.select_rows(rows.to(batch.input_ids.device)).to(batch.input_ids.device)


def _add(losses: dict[str, Tensor], name: str, contribution: Contribution | None) -> None:
    if contribution is not None:
        losses[name] = losses[name] + contribution.value
        losses["loss"] = losses["loss"] + contribution.weighted


def _run_backward(roots: list[tuple[Tensor, Tensor]]) -> None:
    if roots:
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
