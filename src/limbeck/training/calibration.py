"""Stage 0, calibration: the best output projection of each layer in closed form.

    facts, learned = calibrate(DistillationPair(teacher, student, sites, autocast), settings, data, position=0)

Given the mixer's output F, the attention output is linear in the output projection W, so the projection that comes
closest to the teacher's attention output Y solves a least-squares problem. Its normal equations are summed over a few
thousand tokens of the teacher's own layer inputs and solved with a ridge that pulls towards the initial weights W0:

    (FᵀF + r m I) W = FᵀY + r m W0,    m the mean diagonal of FᵀF, r the ridge

Sums and solution are in float64: rounded to fewer bits FᵀF need not be positive definite.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.collectives import all_reduce_scalars, all_reduce_tensors, broadcast_from_main
from limbeck.core.console import console, progress
from limbeck.core.distributed import get_local_rows, run_on_main
from limbeck.core.errors import LimbeckError
from limbeck.core.stage_settings import Calibrate
from limbeck.data.packing import Batch, SequenceDataset, take_sequences_with_targets
from limbeck.models import Site
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import DistillationPair, ModuleHook, hook_modules
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried where the recipe says "auto"
RIDGE_EVAL_SEQUENCES = 2  # sequences on which the ridge is chosen


def calibrate(
    pair: DistillationPair, settings: Calibrate, data: SequenceDataset, position: int
) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
    """Do stage 0 of one student, whose output projections are written in place.

    Args:
        position: of the stage's first sequence in `data`.

    Returns:
        The stage's facts, and the parameters of the output projections by name.
    """
    equations = NormalEquations(pair, settings.weight)
    seconds = accumulate_normal_equations([equations], settings, data, position)
    equations.all_reduce()
    return solve_calibration(equations, settings, data, position, seconds), get_output_projections(pair)


def get_output_projections(pair: DistillationPair) -> dict[str, nn.Parameter]:
    """Return the parameters of the converted layers' output projections, by name in the student."""
    names = [f"{site.module}.{site.output}" for site in pair.sites]
    return {f"{name}.{key}": p for name in names for key, p in pair.student.get_submodule(name).named_parameters()}


def count_calibration_sequences(settings: Calibrate, length: int) -> int:
    """Return the number of sequences of `length` tokens over which the normal equations are summed."""
    return max(1, round(settings.tokens / length))


def accumulate_normal_equations(
    students: Sequence["NormalEquations"], settings: Calibrate, data: SequenceDataset, position: int
) -> float:
    """Sum the normal equations of one or several students over the stage's tokens; returns the seconds it took."""
    began, length = time.monotonic(), data.length
    device = students[0].teacher.device
    sequences = count_calibration_sequences(settings, length)
    with progress("calibrate", sequences, "sequences") as advance:
        for start in range(0, sequences, settings.batch_size):
            size = min(settings.batch_size, sequences - start)
            first_row, rows = get_local_rows(size)
            if rows:
                add_batch(students, data.batch(position + start + first_row, rows).to(device))
            advance(size, note=f"{(start + size) * length / (time.monotonic() - began):.0f} tokens/s")
    return time.monotonic() - began


def solve_calibration(
    equations: "NormalEquations", settings: Calibrate, data: SequenceDataset, position: int, fit_seconds: float
) -> dict[str, Any]:
    """Solve the normal equations and write the output projections; returns the stage's facts.

    With `ridge: auto` each of `RIDGES` is tried and that of the lowest cross-entropy is taken, on the sequences that
    follow those of the sums.
    """
    began, sequences = time.monotonic(), count_calibration_sequences(settings, data.length)
    position += sequences
    trials: dict[str, dict[str, float]] = {}
    ridge = settings.ridge
    if ridge == "auto":
        evaluator = LogitsStage(equations.pair, ObjectiveWeights())
        batch, position = take_sequences_with_targets(data, position, RIDGE_EVAL_SEQUENCES)
        batch = batch.to(equations.teacher.device)
        with progress("choose the ridge", len(RIDGES), "fits") as advance:
            for candidate in RIDGES:
                unexplained = equations.solve(candidate)
                loss = float(evaluator.evaluate(batch)["ce"])
                trials[f"{candidate:g}"] = {"unexplained": unexplained, "loss": loss}
                advance(1, note=f"ridge {candidate:g}: loss {loss:.3f}")
        ridge = run_on_main(lambda: float(_best_ridge(trials)))
    unexplained = equations.solve(float(ridge))
    projections = [p for projection in equations.projections.values() for p in projection.parameters()]
    broadcast_from_main(projections)  # so that all processes go on with the same bits
    return {
        "fit_seconds": fit_seconds,
        "ridge": ridge,
        "unexplained": unexplained,
        "tried": trials,
        "tokens": sequences * data.length,
        "seconds": fit_seconds + time.monotonic() - began,
        "position": position,
        "trained_parameters": sum(p.numel() for p in projections),
    }


def _best_ridge(trials: dict[str, dict[str, float]]) -> str:
    """Return the ridge of the lowest finite loss.

    Raises:
        LimbeckError: the loss is not finite with any ridge.
    """
    losses = {name: trial["loss"] for name, trial in trials.items() if math.isfinite(trial["loss"])}
    if not losses:
        raise LimbeckError(
            "stage calibrate: the loss is not finite with any ridge",
            expected="a finite loss with at least one ridge",
            hint="--set precision=fp32, or another mixer; more tokens do not help",
        )
    return min(losses, key=losses.__getitem__)


class NormalEquations:
    """The normal equations of one student: FᵀF [E, E], FᵀY [E, D] and the squared size of Y, for each layer.

    E = H·V, plus one where the projection has a bias.

    Args:
        weight: of a token in the sums, "none" or "inverse_norm" (one over the norm of its target).
    """

    def __init__(self, pair: DistillationPair, weight: str = "none"):
        self.pair, self.weight = pair, weight
        self.teacher, self.student, self.sites, self.autocast = pair
        self.projections = {s.module: self.student.get_submodule(s.module).get_submodule(s.output) for s in self.sites}
        self.initial = {name: _read_affine(projection) for name, projection in self.projections.items()}
        self.gram: dict[str, Tensor] = {}  # FᵀF
        self.cross_products: dict[str, Tensor] = {}  # FᵀY
        self.squares: dict[str, Tensor | float] = dict.fromkeys(self.projections, 0.0)  # of Y
        self.unexplained: dict[str, float] = {}  # share of Y's squared size by module, from the last `solve`

    def add(self, batch: Batch) -> None:
        """Add a batch's tokens to the sums."""
        add_batch([self], batch)

    def make_hook(self, site: Site) -> ModuleHook:
        """Make the hook for the teacher's attention at a site: it runs the student's and adds to the sums."""
        module, projection = self.student.get_submodule(site.module), self.projections[site.module]

        def accumulate(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            inputs: Tensor | None = None
            handle = projection.register_forward_pre_hook(_stop_with_input)
            try:
                module(*args, **kwargs)
            except _ProjectionReached as reached:
                inputs = reached.inputs
            finally:
                handle.remove()
            assert inputs is not None, "a converted layer ends in its output projection"
            self._accumulate(site.module, inputs.flatten(0, -2).double(), output[0].flatten(0, -2).double())

        return accumulate

    def _accumulate(self, name: str, f: Tensor, y: Tensor) -> None:
        """Add a layer's inputs f [N, E] and targets y [N, D], in float64, which neither autocast nor TF32 affects."""
        if self.initial[name].shape[0] > f.shape[1]:
            f = torch.cat([f, f.new_ones(len(f), 1)], 1)  # the bias is a weight of a constant input
        if self.weight == "inverse_norm":
            root = y.norm(dim=1, keepdim=True).clamp_min(1e-4).rsqrt()
            f, y = f * root, y * root
        gram, cross_products = f.T @ f, f.T @ y
        self.gram[name] = self.gram[name] + gram if name in self.gram else gram
        self.cross_products[name] = (
            self.cross_products[name] + cross_products if name in self.cross_products else cross_products
        )
        self.squares[name] = self.squares[name] + y.square().sum()

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Sum over all processes, after each has added its own batches."""
        for name, w0 in self.initial.items():  # a process without rows has no sums yet
            self.gram.setdefault(name, w0.new_zeros(len(w0), len(w0)))
            self.cross_products.setdefault(name, torch.zeros_like(w0))
        all_reduce_tensors([*self.gram.values(), *self.cross_products.values()])
        self.squares = dict(all_reduce_scalars({name: float(size) for name, size in self.squares.items()}))

    @torch.no_grad()
    def solve(self, ridge: float) -> float:
        """Write each layer's output projection; returns the unexplained share of Y's squared size, mean over layers.

        A layer for which the ridge is too small takes the smallest of `RIDGES` that works, and a message says so.

        Args:
            ridge: share of the mean diagonal of FᵀF.

        Raises:
            LimbeckError: a layer's equations have no solution with any ridge.
        """
        raised: dict[str, float] = {}
        for name, projection in self.projections.items():
            for layer_ridge in (ridge, *(larger for larger in RIDGES if larger > ridge)):
                w = self._solve_layer(name, layer_ridge)
                if w is not None:
                    break
            else:
                finite = bool(self.gram[name].isfinite().all() and self.cross_products[name].isfinite().all())
                raise LimbeckError(
                    f"stage calibrate: the least-squares problem of {name} has no solution with any ridge"
                    + ("" if finite else " because its sums are not finite"),
                    expected="finite outputs of the mixer and of the teacher's attention",
                    hint="--set precision=fp32   (half precision overflows at 65,504)",
                )
            if layer_ridge != ridge:
                raised[name] = layer_ridge
            fty, squares = self.cross_products[name], float(self.squares[name])
            residual = squares - 2 * (w * fty).sum() + (w * (self.gram[name] @ w)).sum()
            self.unexplained[name] = float(residual / max(squares, 1e-30))
            _write_affine(projection, w)
        if raised:
            layers = ", ".join(f"{name} ({layer_ridge:g})" for name, layer_ridge in raised.items())
            console.print(f"calibrate: ridge {ridge:g} is too small for some layers; using larger ones there: {layers}")
        return sum(self.unexplained.values()) / len(self.unexplained)

    def _solve_layer(self, name: str, ridge: float) -> Tensor | None:
        """Return W [E, D] of a layer, None if the ridge is too small for a Cholesky factorization."""
        ftf, fty, w0 = self.gram[name], self.cross_products[name], self.initial[name]
        strength = ridge * ftf.diagonal().mean()
        system = ftf + strength * torch.eye(len(ftf), dtype=ftf.dtype, device=ftf.device)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            return None
        w = torch.cholesky_solve(fty + strength * w0, factor)
        return w if bool(w.isfinite().all()) else None


class _ProjectionReached(Exception):
    """Carries the input of an output projection out of its attention module: nothing behind it is needed."""

    def __init__(self, inputs: Tensor):
        super().__init__("the input of an output projection is read in stage 0 only")
        self.inputs = inputs


def _stop_with_input(projection: nn.Module, args: tuple) -> None:
    raise _ProjectionReached(args[0])


@torch.no_grad()
def add_batch(students: Sequence[NormalEquations], batch: Batch) -> None:
    """Add a batch's tokens to the sums of one or several students, in one pass of the teacher."""
    hooks: dict[str, list[ModuleHook]] = {}
    for equations in students:
        for site in equations.sites:
            hooks.setdefault(site.module, []).append(equations.make_hook(site))

    def chain(module_hooks: list[ModuleHook]) -> ModuleHook:
        def run_all(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            for hook in module_hooks:
                hook(args, kwargs, output)

        return run_all

    first = students[0]
    with first.autocast(), hook_modules(first.teacher, {name: chain(hooks[name]) for name in hooks}):
        run_backbone(first.teacher, batch)


def _read_affine(projection: nn.Module) -> Tensor:
    """Return the weight of a linear map with its bias as the last row, [inputs (+ 1), outputs] in float64."""
    weight = projection.weight.detach().double()
    weight = weight.T if isinstance(projection, nn.Linear) else weight  # GPT-2's Conv1D is stored transposed
    if projection.bias is None:
        return weight.clone()
    return torch.cat([weight, projection.bias.detach().double()[None]])


def _write_affine(projection: nn.Module, w: Tensor) -> None:
    if projection.bias is not None:
        projection.bias.copy_(w[-1])
        w = w[:-1]
    projection.weight.copy_(w.T if isinstance(projection, nn.Linear) else w)
