"""The contract of a mixer: the registry of its checks, how they are run, and what they run on.

    for result in run_checks("gla", families=["llama", "gpt2"]):
        print(result.check.name, result.family, result.failure or "passed")

A check is a function `(variant)` or `(variant, family)` that raises AssertionError saying what is wrong. It runs on a
mixer under given options, on its own or in a tiny student:

    variant = MixerVariant("gla", {"conv": 4})
    module = variant.build_module()                          # float64, parameters moved away from their start
    q, k, v, x = sample_inputs(module, batch=2, length=70)
    student = variant.build_student("llama")

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, D model width.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import mixers
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.mixers import HeadShape, Mixer, State
from limbeck.models import convert, get_mixers
from limbeck.testing.tiny_models import FAMILIES, MASK_POSITION_FAMILIES, VOCAB_SIZE, make_tiny_model

EXACT = 1e-10  # difference allowed between two ways of computing the same in float64
SEQ_LEN = 37  # tokens in a student's input
QUICK_FAMILIES = ("llama", "opt")  # rotary and learned positions; grouped heads and all heads; tied and mask-counted
HEAD_SHAPE = HeadShape(hidden=12, heads=4, kv_heads=2, key_width=8, value_width=4, scale=0.35, layer=0, layers=2)


@dataclass(frozen=True)
class MixerVariant:
    """A mixer with options that override those of a preset."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    preset: str = "default"

    @property
    def mixer_class(self) -> type[Mixer]:
        return mixers.get(self.mixer)

    def with_options(self, **options) -> "MixerVariant":
        """Return the variant with these options changed."""
        return MixerVariant(self.mixer, {**self.options, **options}, self.preset)

    def build_module(
        self, shape: HeadShape = HEAD_SHAPE, dtype: torch.dtype = torch.float64, perturbation: float = 0.3
    ) -> Mixer:
        """Build the mixer on its own, its parameters moved by `perturbation` so that every gate does something."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = mixers.build(self.mixer, shape, self.options, self.preset).to(torch.float64)
            perturb_parameters(module, perturbation)
        return module.to(dtype)

    def build_student(
        self,
        family: str,
        dtype: torch.dtype = torch.float64,
        perturbation: float = 0.2,
        layers: str | list[int] = "all",
    ) -> PreTrainedModel:
        """Build a tiny student of a family, its mixers' parameters moved in the same way."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = make_tiny_model(family).to(dtype)  # type: ignore[arg-type]
            student = convert(teacher, self.mixer, layers, self.options, preset=self.preset)
            perturb_mixers(student, perturbation)
        return student


@torch.no_grad()
def perturb_parameters(module: Mixer, scale: float) -> None:
    """Add Gaussian noise of this scale to a mixer's parameters: at their start many gates have no effect."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def perturb_mixers(student: PreTrainedModel, scale: float) -> None:
    """Apply `perturb_parameters` to all mixers of a student."""
    for module in get_mixers(student).values():
        perturb_parameters(module, scale)


def sample_inputs(
    module: Mixer, batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Draw random q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] and x [B, T, D] for a mixer."""
    s = module.teacher_shape
    shapes = ((s.heads, s.key_width), (s.kv_heads, s.key_width), (s.kv_heads, s.value_width), (s.hidden,))
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, *rest, generator=draw, dtype=torch.float64).to(dtype) for rest in shapes]


def sample_ids(batch: int = 2, length: int = SEQ_LEN) -> Tensor:
    """Draw random token ids [B, T] without the special ones."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(2))


def left_pad(ids: Tensor, padding: int, family: str | None = None) -> dict[str, Tensor]:
    """Return a model's arguments for ids [2, T], row 0 shortened by `padding` tokens and padded on the left."""
    short = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids[:1, : ids.shape[1] - padding]], 1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    inputs = {"input_ids": torch.cat([short, ids[1:]]), "attention_mask": mask}
    if family not in MASK_POSITION_FAMILIES:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def assert_tensors_close(got: Tensor, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Raise AssertionError unless both are equal up to `tolerance` times the largest expected entry (at least 1)."""
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    assert got.isfinite().all(), f"{what}: not finite"
    got, expected = got.detach(), expected.detach()
    difference = (got - expected).abs()
    error = float(difference.max()) / max(1.0, float(expected.abs().max()))
    index = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert error <= tolerance, f"{what}: off by {error:.2e} (at most {tolerance:.0e}), the most at index {index}"


def select_state(state: State, index: int) -> State:
    """Select the state of one sequence of a batch."""
    return {name: tensor[index : index + 1] for name, tensor in state.items()}


@dataclass(frozen=True)
class Check:
    """One clause of the contract."""

    name: str
    summary: str
    function: Callable[..., None]
    per_family: bool
    slow: bool  # left out of a quick run

    def __call__(self, variant: MixerVariant, family: str | None = None) -> None:
        """Raise AssertionError if the mixer does not fulfil it."""
        self.function(variant, family) if self.per_family else self.function(variant)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `failure` is None if it passed."""

    check: Check
    family: str | None
    seconds: float
    failure: str | None


CHECKS: dict[str, Check] = {}


def register_check(summary: str, slow: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: register a function in CHECKS under its own name."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        per_family = "family" in inspect.signature(function).parameters
        CHECKS[function.__name__] = Check(function.__name__, summary, function, per_family, slow)
        return function

    return add


def list_cases(families: list[str] | None = None, quick: bool = False) -> list[tuple[str, str | None]]:
    """List all pairs of check and family; the family is None for checks of the mixer alone.

    Args:
        families: by default all, or QUICK_FAMILIES if `quick`.
        quick: leave out the slow checks.
    """
    for family in families or []:
        if family not in FAMILIES:
            raise LimbeckError(
                f"unknown family '{family}'{suggest_closest(family, FAMILIES)}", expected=", ".join(FAMILIES)
            )
    chosen = families or (QUICK_FAMILIES if quick else FAMILIES)
    return [
        (c.name, family)
        for c in CHECKS.values()
        if not (quick and c.slow)
        for family in (chosen if c.per_family else (None,))
    ]


def run_checks(
    variant: str | MixerVariant, families: list[str] | None = None, quick: bool = False
) -> Iterator[CheckResult]:
    """Run the contract on a mixer, one case after the other; a failure of any kind is a result, not an exception."""
    chosen = MixerVariant(variant) if isinstance(variant, str) else variant
    chosen.mixer_class  # noqa: B018  an unknown mixer is the caller's mistake, not a failed check
    for name, family in list_cases(families, quick):
        start, failure = time.monotonic(), None
        try:
            with torch.random.fork_rng(devices=[]):
                CHECKS[name](chosen, family)
        except Exception as error:
            text = str(error) or "no message"
            failure = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
        yield CheckResult(CHECKS[name], family, time.monotonic() - start, failure)
