"""Stages 1 and 2: each converted layer of the student learns alone, on the teacher's own input to that layer.

    stage = HiddenStage(DistillationPair(teacher, student, sites, autocast), target="attention")
    losses = stage.backward(batch, {"tokens": 2048})      # adds gradients; each layer's loss by module name

The teacher's backbone runs once without gradient. A hook behind each layer runs the student's layer on the same
arguments, takes the loss, runs backward and drops the graph. So one layer's graph is alive at a time, whatever the
depth, and the student's untrained layers never run. Stage 1 compares mixing matrices, stage 2 outputs (MOHAWK,
arXiv 2408.10189).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from limbeck.core.console import console
from limbeck.core.stage_settings import Hidden, Matrix
from limbeck.data.packing import Batch
from limbeck.models.attention_rows import compute_mixing_rows, output_attention_rows, supports_row_output
from limbeck.models.backbone import run_backbone, supports_packed_positions
from limbeck.models.hooks import DistillationPair, ModuleHook, first_output, hook_modules
from limbeck.ops.matrix_rows import gather_rows, sample_query_positions
from limbeck.training.losses import hidden_distance, matrix_distance

Counts = dict[str, float]  # what losses are divided by, by name


class LayerwiseStage:
    """Base of stages 1 and 2: which layers are compared, which parameters learn, and the pass in which they do."""

    eager = False  # whether the teacher has to return its attention matrices
    requires_targets = False  # every token is compared, those of questions too

    def __init__(self, pair: DistillationPair):
        self.teacher, self.student, self.sites, self.autocast = pair
        self.loss_scale = 1.0  # factor on the loss in `backward`, see limbeck.training.optim.LossScaler
        self.stopped: set[str] = set()  # names of modules that have converged and are skipped

    def backward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns each layer's share of the loss by module name."""
        with layerwise_losses({0: self}, batch, counts, train=True) as losses:
            run_backbone(self.teacher, batch)
        return losses[0]

    def evaluate(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Return each layer's loss on a batch, without gradients: its share, if given the counts of all batches."""
        with layerwise_losses({0: self}, batch, counts or self.count(batch), train=False) as losses:
            run_backbone(self.teacher, batch)
        return losses[0]

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        """Run a student's module on the teacher's arguments; returns its distance from the teacher's output, divided
        by its count."""
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        """Return the student's modules that are compared with the teacher's, by the name that both have."""
        return {site.module: self.student.get_submodule(site.module) for site in self.sites}

    def trained_modules(self) -> list[str]:
        """Return the names of the student's modules that learn."""
        return [site.module for site in self.sites]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their name in the student."""
        inside = {name: self.student.get_submodule(name).named_parameters() for name in self.trained_modules()}
        return {f"{module}.{name}": p for module, parameters in inside.items() for name, p in parameters}

    def clip_groups(self) -> list[list[str]]:
        """Return the names of these parameters layer by layer: layers do not interact, so each is clipped alone."""
        return [
            [f"{name}.{inner}" for inner, _ in self.student.get_submodule(name).named_parameters()]
            for name in self.trained_modules()
        ]

    def learning_rates(self, recipe: Hidden | Matrix) -> dict[str, float]:
        """Return the peak learning rate by parameter name."""
        return dict.fromkeys(self.parameters(), recipe.lr)

    def count(self, batch: Batch) -> Counts:
        """Count what this batch adds to the divisors of the losses."""
        return {"tokens": float(batch.input_ids.numel()), "sequences": float(len(batch.input_ids))}

    def prepare_batch(self, batch: Batch) -> None:
        """Prepare for a batch, before the teacher's pass."""

    def teacher_pass(self, names: list[str]) -> AbstractContextManager:
        """Return the context in which the teacher runs on the batch.

        Args:
            names: of all modules that learn from the pass, in any of the students.
        """
        return nullcontext()


@contextmanager
def layerwise_losses(
    stages: Mapping[int, LayerwiseStage],
    batch: Batch,
    counts: Counts,
    train: bool,
    errors: dict[int, Exception] | None = None,
) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Hook the students' layers behind the teacher's, for one pass of the teacher over the batch.

    Args:
        stages: of one kind with the same teacher, settings of the teacher's pass and autocast; one per student, by any
            number that stands for the student.
        counts: what the losses are divided by.
        train: add gradients, and skip the layers that have converged.
        errors: where the error of a student is put while the others go on; None raises it.

    Yields:
        For each student each layer's share of the loss by module name, filled by the pass.
    """
    losses: dict[int, dict[str, Tensor]] = {i: {} for i in stages}
    learners: dict[str, list[tuple[int, nn.Module]]] = {}  # by name of the teacher's module
    for i, stage in stages.items():
        for name, module in stage.modules().items():
            if not train or name not in stage.stopped:
                learners.setdefault(name, []).append((i, module))

    def make_hook(name: str) -> ModuleHook:
        def compare(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            for i, module in learners[name]:
                if errors is not None and i in errors:
                    continue
                try:
                    with torch.set_grad_enabled(train), stages[i].autocast():
                        loss = stages[i].loss(module, args, kwargs, output, counts)
                    if train:
                        # the teacher's pass around this is under autocast, which a backward pass should not be
                        with torch.autocast(loss.device.type, enabled=False):
                            loss.backward(torch.full_like(loss, stages[i].loss_scale))
                    losses[i][name] = loss.detach()
                except Exception as error:
                    if errors is None:
                        raise
                    errors[i] = error

        return compare

    trained = [n for one in stages.values() for n in one.trained_modules() if not train or n not in one.stopped]
    hooks = {name: make_hook(name) for name in learners}
    with teacher_hooks(list(stages.values()), batch, hooks, list(dict.fromkeys(trained))):
        yield losses


@contextmanager
def teacher_hooks(
    stages: Sequence[LayerwiseStage], batch: Batch, hooks: dict[str, ModuleHook], trained: list[str]
) -> Iterator[None]:
    """Prepare the stages for a batch and the teacher for its pass, without gradient.

    Args:
        hooks: what runs behind the teacher's modules, by their names.
        trained: names of the students' modules that learn from the pass.
    """
    for stage in stages:
        stage.prepare_batch(batch)
    first = stages[0]
    with ExitStack() as stack:
        stack.enter_context(first.teacher_pass(trained))
        stack.enter_context(torch.no_grad())
        stack.enter_context(first.autocast())
        stack.enter_context(hook_modules(first.teacher, hooks, first.eager))
        yield


class MatrixStage(LayerwiseStage):
    """Stage 1: the student's mixing matrix [B, H, T, T] against the teacher's attention matrix of the same layer.

    Args:
        sampled_queries: compare only so many rows of each matrix, drawn anew for each sequence; memory then grows with
            their number times T. A teacher that cannot return single rows still computes whole matrices, one layer at
            a time. None compares all rows.
        seed: of the rows that are drawn.
    """

    def __init__(self, pair: DistillationPair, sampled_queries: int | None = None, seed: int = 0):
        super().__init__(pair)
        self.num_sampled_queries, self.seed = sampled_queries, seed
        self.sampled_queries: Tensor | None = None  # positions of the current batch
        self.teacher_computes_rows = sampled_queries is not None and supports_row_output(
            self.teacher, self.trained_modules()
        )
        # eager is the only implementation that returns the matrices; one layer's are alive at a time
        self.eager = not self.teacher_computes_rows
        if sampled_queries is not None and not self.teacher_computes_rows:
            console.print(
                "matrix: This teacher cannot compute attention for selected queries only; "
                "using full attention matrices (more memory)."
            )

    def prepare_batch(self, batch: Batch) -> None:
        if self.num_sampled_queries is not None:
            positions = sample_query_positions(batch.cpu_input_ids, self.num_sampled_queries, self.seed)
            self.sampled_queries = positions.to(batch.input_ids.device, non_blocking=True)
            # runs the teacher once, the first time; that pass must not be asked for these rows
            supports_packed_positions(self.teacher)

    def teacher_pass(self, names: list[str]) -> AbstractContextManager:
        if self.sampled_queries is None or not self.teacher_computes_rows:
            return nullcontext()
        return output_attention_rows(self.teacher, names, self.sampled_queries)

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        target = output[1]
        if self.sampled_queries is not None and not self.teacher_computes_rows:
            target = gather_rows(target, self.sampled_queries, 2)
        matrix = compute_mixing_rows(module, args, kwargs, self.sampled_queries)
        return matrix_distance(matrix, target) / counts["sequences"]


class HiddenStage(LayerwiseStage):
    """Stage 2: the output of the student's attention, or of its whole block, against the teacher's.

    Args:
        target: "attention" or "block", whose output [B, T, D] is compared.
        loss: one of `limbeck.training.losses.HIDDEN_LOSSES`.
        train: "mixer", "attention" or "block", whose parameters learn.
    """

    def __init__(
        self, pair: DistillationPair, target: str = "attention", loss: str = "relative", train: str = "attention"
    ):
        super().__init__(pair)
        self.target, self.kind, self.train = target, loss, train

    def modules(self) -> dict[str, nn.Module]:
        names = [site.module if self.target == "attention" else site.block for site in self.sites]
        return {name: self.student.get_submodule(name) for name in names}

    def trained_modules(self) -> list[str]:
        name_of = {"mixer": lambda s: f"{s.module}.mixer", "attention": lambda s: s.module, "block": lambda s: s.block}
        return [name_of[self.train](site) for site in self.sites]

    def loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple, counts: Counts) -> Tensor:
        hidden, target = first_output(module(*args, **kwargs)), first_output(output)
        return hidden_distance(hidden, target, loss=self.kind) / counts["tokens"]
