"""Stages 1 and 2: every converted layer learns alone, on the teacher's own input to it.

The teacher's body runs once without gradient; a hook behind each layer runs the student's layer on the same arguments,
takes the loss, runs backward and lets the graph go. So one layer's graph is alive at a time, whatever the depth, and
the student needs no copy of what it does not train.

    stage = HiddenStage(DistillationPair(teacher, student, sites, autocast), target="attention")
    sums = stage.backward(batch, {"tokens": 2048})      # gradients added; sums per layer
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from limbeck.core import recipe as recipes
from limbeck.core.console import console
from limbeck.data.packing import Batch
from limbeck.models.attention_rows import compute_mixing_rows, output_attention_rows, supports_row_output
from limbeck.models.backbone import run_backbone, supports_packed_positions
from limbeck.models.hooks import DistillationPair, hook_modules
from limbeck.ops.matrix_rows import gather_rows, sample_query_positions
from limbeck.training.losses import hidden_distance, matrix_distance

Counts = dict[str, float]


class LayerwiseStage:
    """What stages 1 and 2 share: which layers, which parameters, one tapped pass of the teacher."""

    eager = False
    requires_targets = False  # every token is compared, those of questions too

    def __init__(self, pair: DistillationPair):
        self.teacher, self.student, self.sites, self.autocast = pair
        self.loss_scale = 1.0  # gradients are so many times too large, see limbeck.training.optim
        self.stopped: set[str] = set()  # names of the modules that have converged and learn no more

    def modules(self) -> dict[str, nn.Module]:
        """The student's modules that run behind the teacher's of the same name."""
        return {site.module: self.student.get_submodule(site.module) for site in self.sites}

    def trained_modules(self) -> list[str]:
        """Names of the student's modules that learn."""
        return [site.module for site in self.sites]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their name in the student."""
        inside = {name: self.student.get_submodule(name).named_parameters() for name in self.trained_modules()}
        return {f"{module}.{name}": p for module, parameters in inside.items() for name, p in parameters}

    def clip_groups(self) -> list[list[str]]:
        """The names of these parameters, a list a layer: each layer's gradient is clipped for itself."""
        return [
            [f"{name}.{inner}" for inner, _ in self.student.get_submodule(name).named_parameters()]
            for name in self.trained_modules()
        ]

    def learning_rates(self, recipe: recipes.Hidden | recipes.Matrix) -> dict[str, float]:
        """Peak learning rate by parameter name."""
        return dict.fromkeys(self.parameters(), recipe.lr)

    def count(self, batch: Batch) -> Counts:
        """What this batch adds to the counts that the losses are divided by."""
        return {"tokens": float(batch.input_ids.numel()), "sequences": float(len(batch.input_ids))}

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        """The layer's loss, already divided by its count."""
        raise NotImplementedError

    def backward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns each layer's share of the loss by module name."""
        return self._run(batch, counts, train=True)

    def evaluate(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Each layer's loss on a batch, without gradients: its share, given the counts of all."""
        return self._run(batch, counts or self.count(batch), train=False)

    def prepare_batch(self, batch: Batch) -> None:
        """Make ready for a batch, before the teacher's pass."""

    def teacher_pass(self, names: list[str]) -> AbstractContextManager:
        """What the teacher's pass over the batch happens in.

        Args:
            names: of all modules that learn from the pass, of whichever student.
        """
        return nullcontext()

    def _run(self, batch: Batch, counts: Counts, train: bool) -> dict[str, Tensor]:
        return run_layerwise_pass([self], batch, counts, train)[0]


def run_layerwise_pass(
    stages: Sequence[LayerwiseStage],
    batch: Batch,
    counts: Counts,
    train: bool,
    failed: dict[int, Exception] | None = None,
) -> list[dict[str, Tensor]]:
    """One pass of the teacher, in which the layers of one or several students learn.

    Args:
        stages: of one kind with the same teacher, settings of the teacher's pass and autocast; a student each.
        counts: what the losses are divided by.
        train: add gradients.
        failed: where to put the error of a stage, by its place, while the others go on; without it errors are raised.

    Returns:
        Of each stage, each layer's share of the loss by module name.
    """
    losses: list[dict[str, Tensor]] = [{} for _ in stages]

    def learn(place: int, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        with torch.set_grad_enabled(train), stages[place].autocast():
            loss = stages[place].loss(module, args, kwargs, output, counts)
        if train:
            with torch.autocast(loss.device.type, enabled=False):  # the pass around us is under autocast
                loss.backward(torch.full_like(loss, stages[place].loss_scale))
        losses[place][name] = loss.detach()

    learners: dict[str, list[tuple[int, nn.Module]]] = {}
    for place, stage in enumerate(stages):
        left_out = stage.stopped if train else ()
        for name, module in stage.modules().items():
            if name not in left_out:
                learners.setdefault(name, []).append((place, module))

    def visitor(name: str):
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            for place, module in learners[name]:
                if failed is None:
                    learn(place, name, module, args, kwargs, output)
                elif place not in failed:
                    try:
                        learn(place, name, module, args, kwargs, output)
                    except Exception as error:
                        failed[place] = error

        return visit

    first = stages[0]
    names = list(
        dict.fromkeys(name for one in stages for name in one.trained_modules() if not train or name not in one.stopped)
    )
    with ExitStack() as stack:
        for stage in stages:
            stage.prepare_batch(batch)
        stack.enter_context(first.teacher_pass(names))
        stack.enter_context(torch.no_grad())
        stack.enter_context(first.autocast())
        stack.enter_context(hook_modules(first.teacher, {name: visitor(name) for name in learners}, first.eager))
        run_backbone(first.teacher, batch)
    return losses


class MatrixStage(LayerwiseStage):
    """Stage 1: the student's mixing matrix [B, H, T, T] against the teacher's attention matrix of the same layer.

    With `sampled_queries` only so many rows of each matrix are compared, drawn anew for each sequence: memory then grows with
    their number times the length. A teacher whose rows cannot be had alone makes its matrices whole, one at a time.
    """

    def __init__(
        self,
        pair: DistillationPair,
        sampled_queries: int | None = None,
        seed: int = 0,
    ):
        super().__init__(pair)
        self.num_sampled_queries, self.seed = sampled_queries, seed
        self.sampled_queries: Tensor | None = None  # of the batch at hand
        self.teacher_computes_rows = sampled_queries is not None and supports_row_output(
            self.teacher, self.trained_modules()
        )
        # otherwise eager, the only implementation that returns the matrices; one layer's are alive at a time
        self.eager = not self.teacher_computes_rows
        if sampled_queries is not None and not self.teacher_computes_rows:
            console.print("matrix: this teacher gives no single rows of its attention, so its matrices are made whole")

    def prepare_batch(self, batch: Batch) -> None:
        if self.num_sampled_queries is not None:
            drawn = sample_query_positions(batch.cpu_input_ids, self.num_sampled_queries, self.seed)
            self.sampled_queries = drawn.to(batch.input_ids.device, non_blocking=True)
            supports_packed_positions(
                self.teacher
            )  # tries the teacher on its first call, which knows nothing of these rows

    def teacher_pass(self, names: list[str]) -> AbstractContextManager:
        return (
            nullcontext()
            if self.sampled_queries is None or not self.teacher_computes_rows
            else output_attention_rows(self.teacher, names, self.sampled_queries)
        )

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        target = output[1]
        if self.sampled_queries is not None and not self.teacher_computes_rows:
            target = gather_rows(target, self.sampled_queries, 2)
        if self.sampled_queries is None:
            _, matrix = module(*args, **kwargs, output_matrix=True)
        else:
            matrix = compute_mixing_rows(module, args, kwargs, self.sampled_queries)
        return matrix_distance(matrix, target) / counts["sequences"]


class HiddenStage(LayerwiseStage):
    """Stage 2: the output of the student's attention, or of its whole block, against the teacher's."""

    def __init__(
        self,
        pair: DistillationPair,
        target: str = "attention",
        loss: str = "relative",
        train: str = "attention",
    ):
        super().__init__(pair)
        self.target, self.kind, self.train = target, loss, train

    def modules(self) -> dict[str, nn.Module]:
        names = [site.module if self.target == "attention" else site.block for site in self.sites]
        return {name: self.student.get_submodule(name) for name in names}

    def trained_modules(self) -> list[str]:
        by = {"mixer": lambda s: f"{s.module}.mixer", "attention": lambda s: s.module, "block": lambda s: s.block}
        return [by[self.train](site) for site in self.sites]

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        y = _first(module(*args, **kwargs))
        return hidden_distance(y, _first(output), loss=self.kind) / counts["tokens"]  # type: ignore[arg-type]


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
