"""Whole training steps as Limbeck's loop takes them, for the sections that time them.

with step_of(bench, teacher, student, "logits", rows=8, length=2048) as (step, tokens):
    bench.timed_step(step, tokens)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gpu_sections.bench import Bench
from limbeck.core.stage_settings import STAGES
from limbeck.data.dataset import BatchPrefetcher
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.compilation import compile_blocks, should_compile
from limbeck.models.hooks import DistillationPair
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.chunked_losses import TeacherLogitsFromCache
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.optim import StageOptimizer, clip_gradients
from limbeck.training.stage_protocol import accumulate_gradients, get_clip_groups
from limbeck.training.trainer import fetch_scalars

KINDS = {
    "matrix": lambda *common: MatrixStage(DistillationPair(*common)),
    "matrix, 64 rows": lambda *common: MatrixStage(DistillationPair(*common), sampled_queries=64),
    "hidden": lambda *common: HiddenStage(DistillationPair(*common)),
    "hidden, block": lambda *common: HiddenStage(DistillationPair(*common), target="block", train="block"),
    "logits, KL": lambda *common, **more: LogitsStage(DistillationPair(*common), ObjectiveWeights(), **more),
    "logits, CE and KL": lambda *common, **more: LogitsStage(
        DistillationPair(*common), ObjectiveWeights(ce=0.5, kl=0.5), **more
    ),
    "logits, CE alone": lambda *common, **more: Alone(
        DistillationPair(*common), ObjectiveWeights(ce=1.0, kl=0.0), **more
    ),
}


class Alone(LogitsStage):
    """Stage 3 with no teacher at all: its signal is one token of no weight."""

    def _signal(self, batch: Batch) -> TeacherLogitsFromCache:
        nothing = torch.zeros(*batch.input_ids.shape, 1, device=batch.input_ids.device)
        return TeacherLogitsFromCache(nothing.long(), nothing)


@contextmanager
def step_of(
    bench: Bench,
    teacher: Any,
    student: Any,
    kind: str,
    rows: int,
    length: int,
    micro: int = 1,
    document: int | None = None,
    checkpoint: bool = False,
    compile: bool | str = "auto",
) -> Iterator[tuple[Callable[[], None], int]]:
    """A step of a stage: batches from the host, gradients, clipping, AdamW, the losses as numbers.

    Args:
        kind: one of `KINDS`.
        rows: sequences of a micro-batch; micro: micro-batches of a step.
        document: tokens of a packed document; None: one a row.

    Yields:
        The step, and how many tokens it takes.
    """
    sites, fuse = find_attention_sites(teacher), should_compile(compile, bench.device)
    more = {"checkpoint_activations": checkpoint, "compiled": fuse} if kind.startswith("logits") else {}
    stage = KINDS[kind](teacher, student, sites, bench.autocast(), **more)
    name = kind.split(",")[0]
    settings = STAGES[name](stage=name, tokens=rows * micro * length, batch_size=rows * micro)
    parameters = stage.parameters()
    ahead = BatchPrefetcher(
        lambda _: [bench.batch(teacher, rows, length, document) for _ in range(micro)], bench.device
    )
    at = iter(range(10**9))
    with ExitStack() as stack:
        stack.callback(ahead.close)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = StageOptimizer(parameters, stage.learning_rates(settings), settings, stage.student)
        optimizer.set_lr_multiplier(1e-3)
        if fuse and name == "logits":
            for model in (teacher, student):
                supports_packed_positions(model)
                stack.enter_context(compile_blocks(model, [site.block for site in sites]))

        def step() -> None:
            sums = accumulate_gradients(stage, ahead.get_batches(next(at)))
            fetch_scalars(clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage)), sums)
            optimizer.step()
            optimizer.zero_grad()

        yield step, rows * micro * length
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def operations(teacher: Any, student: Any, trained: int, tokens: int, with_teacher: bool = True) -> float:
    """Floating-point operations of a step of stage 3: two for each weight and token in a product, forward and twice
    backward; attention, recurrences and recomputation are not counted, so the utilisation is a lower bound."""
    head = student.get_output_embeddings().weight.numel()
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    body = sum(p.numel() for p in student.parameters()) - (head if not tied else 0)
    forward = sum(p.numel() for p in teacher.parameters()) - (head if not tied else 0)
    return tokens * (4.0 * body + 2.0 * trained + (2.0 * forward if with_teacher else 0.0))
