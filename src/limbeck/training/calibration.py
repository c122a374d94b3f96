"""Stage 0, calibration: the best output projection of each layer in closed form.

Given what the mixer puts out, the attention output is linear in the output projection, so the projection that comes
closest to the teacher's attention output solves a least-squares problem. The normal equations are summed over a few
thousand tokens of the teacher's own layer inputs, products included in float64 (rounded to fewer bits FᵀF need not be
positive definite), and solved in float64 with a ridge that pulls towards the weights that are there:

    (FᵀF + r m I) W = FᵀY + r m W0,    m the mean diagonal of FᵀF, r the ridge

    fits = NormalEquations(DistillationPair(teacher, student, sites, autocast))
    fits.add(batch)                        # as often as wanted
    fits.solve(ridge=1e-2)                 # writes the student's output projections
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.console import console
from limbeck.core.distributed import all_reduce_scalars, all_reduce_tensors
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.models import Site
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import DistillationPair, ModuleHook, hook_modules

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class NormalEquations:
    """FᵀF [E, E], FᵀY [E, D] and the size of Y per layer, E = H·V (+ 1 where the projection has a bias)."""

    def __init__(
        self,
        pair: DistillationPair,
        weight: str = "none",
    ):
        self.teacher, self.student, self.sites, self.autocast = pair
        self.weight = weight
        self.projections = {s.module: self.student.get_submodule(s.module).get_submodule(s.output) for s in self.sites}
        self.start = {name: _affine(projection) for name, projection in self.projections.items()}
        self.gram: dict[str, Tensor] = {}
        self.cross_products: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor | float] = dict.fromkeys(self.projections, 0.0)
        self.unexplained: dict[str, float] = {}  # share of Y's size by module, from the last `solve`

    def add(self, batch: Batch) -> None:
        """Add a batch's tokens to the sums."""
        add_batch([self], batch)

    def make_hook(self, site: Site) -> ModuleHook:
        """What runs behind the teacher's attention at a site: the student's, and its part of the sums."""
        module, projection = self.student.get_submodule(site.module), self.projections[site.module]

        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            caught: list[Tensor] = []
            handle = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
            try:
                module(*args, **kwargs)
            finally:
                handle.remove()
            self._accumulate(site.module, caught[0].flatten(0, -2).double(), output[0].flatten(0, -2).double())

        return visit

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Sum over all processes, once each has added what is its own."""
        for name, w0 in self.start.items():
            self.gram.setdefault(name, w0.new_zeros(len(w0), len(w0)))
            self.cross_products.setdefault(name, torch.zeros_like(w0))
        all_reduce_tensors([*self.gram.values(), *self.cross_products.values()])
        self.squares = dict(all_reduce_scalars({name: float(size) for name, size in self.squares.items()}))

    @torch.no_grad()
    def solve(self, ridge: float) -> float:
        """Write each layer's output projection; returns the unexplained share of Y's size, mean over layers.

        A layer that a ridge is too small for takes the next of `RIDGES` that is not, which is said.

        Args:
            ridge: share of the mean diagonal of FᵀF.

        Raises:
            LimbeckError: a layer's equations have no solution under any ridge.
        """
        raised: dict[str, float] = {}
        for name, projection in self.projections.items():
            for strength in (ridge, *(larger for larger in RIDGES if larger > ridge)):
                w = self._solution(name, strength)
                if w is not None:
                    break
            else:
                finite = bool(self.gram[name].isfinite().all() and self.cross_products[name].isfinite().all())
                raise LimbeckError(
                    f"stage calibrate: the least-squares problem of {name} has no solution under any ridge"
                    + ("" if finite else ", since its sums are not finite"),
                    expected="finite outputs of the mixer and of the teacher's attention",
                    hint="--set precision=fp32   (half precision overflows at 65,504)",
                )
            if strength != ridge:
                raised[name] = strength
            fty, squares = self.cross_products[name], float(self.squares[name])
            residual = squares - 2 * (w * fty).sum() + (w * (self.gram[name] @ w)).sum()
            self.unexplained[name] = float(residual / max(squares, 1e-30))
            _write_affine(projection, w)
        if raised:
            layers = ", ".join(f"{name} ({strength:g})" for name, strength in raised.items())
            console.print(f"calibrate: ridge {ridge:g} is too small for some layers, which take more: {layers}")
        return sum(self.unexplained.values()) / len(self.unexplained)

    def _solution(self, name: str, ridge: float) -> Tensor | None:
        """W [E, D] of a layer; None where the ridge is too small for a Cholesky factor."""
        ftf, fty, w0 = self.gram[name], self.cross_products[name], self.start[name]
        strength = ridge * ftf.diagonal().mean()
        system = ftf + strength * torch.eye(len(ftf), dtype=ftf.dtype, device=ftf.device)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            return None
        w = torch.cholesky_solve(fty + strength * w0, factor)
        return w if bool(w.isfinite().all()) else None

    def _accumulate(self, name: str, f: Tensor, y: Tensor) -> None:
        """Add a layer's inputs f [N, E] and targets y [N, D], both float64, which neither autocast nor TF32 touches."""
        if self.start[name].shape[0] > f.shape[1]:
            f = torch.cat([f, f.new_ones(len(f), 1)], 1)
        if self.weight == "inverse_norm":
            root = y.norm(dim=1, keepdim=True).clamp_min(1e-4).rsqrt()
            f, y = f * root, y * root
        ftf, fty = f.T @ f, f.T @ y
        self.gram[name] = self.gram[name] + ftf if name in self.gram else ftf
        self.cross_products[name] = self.cross_products[name] + fty if name in self.cross_products else fty
        self.squares[name] = self.squares[name] + y.square().sum()


@torch.no_grad()
def add_batch(fits: Sequence[NormalEquations], batch: Batch) -> None:
    """Add a batch's tokens to the sums of one or several students, of which the teacher is asked once."""
    visitors: dict[str, list[ModuleHook]] = {}
    for fit in fits:
        for site in fit.sites:
            visitors.setdefault(site.module, []).append(fit.make_hook(site))

    def all_of(visits: list[ModuleHook]) -> ModuleHook:
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            for one in visits:
                one(args, kwargs, output)

        return visit

    first = fits[0]
    with first.autocast(), hook_modules(first.teacher, {name: all_of(visits) for name, visits in visitors.items()}):
        run_backbone(first.teacher, batch)


def _affine(projection: nn.Module) -> Tensor:
    """Weight of a linear map with its bias as the last row, [inputs (+ 1), outputs] in float64."""
    weight = projection.weight.detach().double()
    weight = weight.T if isinstance(projection, nn.Linear) else weight  # GPT-2's Conv1D is stored the other way
    if projection.bias is None:
        return weight.clone()
    return torch.cat([weight, projection.bias.detach().double()[None]])


def _write_affine(projection: nn.Module, w: Tensor) -> None:
    if projection.bias is not None:
        projection.bias.copy_(w[-1])
        w = w[:-1]
    projection.weight.copy_(w.T if isinstance(projection, nn.Linear) else w)
