"""What the contract is checked on: a mixer with its options, as a module on its own and in a tiny student.

    variant = Variant("gla", {"conv": 4})
    module = variant.module()                          # float64, parameters moved away from their start
    q, k, v, x = sample(module, batch=2, length=70)
    student = variant.student("llama")

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, D model width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import mixers
from limbeck.contract.families import COUNTS_FROM_MASK, VOCABULARY, tiny
from limbeck.mixers import HeadShape, Mixer, State
from limbeck.model import convert, mixers_of

EXACT = 1e-10  # what two ways of computing the same may differ by in float64
LENGTH = 37  # tokens in a student's input
SHAPE = HeadShape(hidden=12, heads=4, kv_heads=2, key_width=8, value_width=4, scale=0.35, layer=0, layers=2)


@dataclass(frozen=True)
class Variant:
    """A mixer under given options, which change what the preset says."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    preset: str = "default"

    @property
    def cls(self) -> type[Mixer]:
        return mixers.get(self.mixer)

    def but(self, **options) -> "Variant":
        """The same with these options changed."""
        return Variant(self.mixer, {**self.options, **options}, self.preset)

    def module(self, shape: HeadShape = SHAPE, dtype: torch.dtype = torch.float64, moved: float = 0.3) -> Mixer:
        """The mixer on its own, parameters `moved` away from their start so that every gate does something."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = mixers.build(self.mixer, shape, self.options, self.preset).to(torch.float64)
            _move(module, moved)
        return module.to(dtype)

    def student(
        self, family: str, dtype: torch.dtype = torch.float64, moved: float = 0.2, layers: str | list[int] = "all"
    ) -> PreTrainedModel:
        """A tiny student of that family, its mixers' parameters moved in the same way."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = tiny(family).to(dtype)  # type: ignore[arg-type]
            student = convert(teacher, self.mixer, layers, self.options, preset=self.preset)
            for module in mixers_of(student).values():
                _move(module, moved)
        return student


@torch.no_grad()
def _move(module: Mixer, by: float) -> None:
    for parameter in module.parameters():
        parameter.add_(by * torch.randn_like(parameter))


def sample(module: Mixer, batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] and x [B, T, D] for a mixer."""
    s = module.site
    shapes = ((s.heads, s.key_width), (s.kv_heads, s.key_width), (s.kv_heads, s.value_width), (s.hidden,))
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, *rest, generator=draw, dtype=torch.float64).to(dtype) for rest in shapes]


def ids_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Random token ids [B, T] without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def left_padded(ids: Tensor, padding: int, family: str | None = None) -> dict[str, Tensor]:
    """A student's arguments for row 0 shortened and padded on the left, row 1 whole."""
    short = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids[:1, : ids.shape[1] - padding]], 1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    given = {"input_ids": torch.cat([short, ids[1:]]), "attention_mask": mask}
    if family not in COUNTS_FROM_MASK:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


def same(got: Tensor, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """AssertionError unless both are equal up to `tolerance` times the largest number expected (at least 1)."""
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    assert got.isfinite().all(), f"{what}: not finite"
    got, expected = got.detach(), expected.detach()
    apart = (got - expected).abs()
    largest = float(apart.max()) / max(1.0, float(expected.abs().max()))
    where = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
    assert largest <= tolerance, f"{what}: off by {largest:.2e} (at most {tolerance:.0e}), the most at index {where}"


def rows(state: State, index: int) -> State:
    """The state of one sequence of a batch."""
    return {name: tensor[index : index + 1] for name, tensor in state.items()}
