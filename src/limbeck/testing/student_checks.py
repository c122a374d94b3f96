"""Checks of students: the contract's, on tiny models of every family, and those of the survey, on any model.

    steps(MixerVariant("gla"), "llama")                               # a check of the contract
    StudentChecks(make_survey_model("qwen3"), "gla").steps()          # a check of the survey of families

Each raises AssertionError that says in one line what is wrong. A model is compared with itself: two ways of computing
the same have to agree. Both kinds of checks share the functions that compute those ways, and differ in tolerance: the
contract's models compute in float64 throughout, a family of the survey may compute norms in float32.
"""

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from limbeck.data.packing import Batch
from limbeck.models import build_cache_kwargs, convert, get_mixers
from limbeck.models.backbone import run_backbone
from limbeck.models.cache import get_output_cache
from limbeck.testing.contract import (
    SEQ_LEN,
    MixerVariant,
    assert_tensors_close,
    left_pad,
    perturb_mixers,
    register_check,
    sample_ids,
)
from limbeck.testing.tiny_models import MASK_POSITION_FAMILIES, SURVEY_VOCAB_SIZE, make_tiny_model

GENERATION_KWARGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# the survey's sequence, the part of it that is prefilled at once, and the padding of its first row, in tokens
SURVEY_SEQ_LEN, PREFILL, PADDING = 21, 12, 5
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the survey, relative to the largest logit


# Ways of computing that both kinds of checks compare


def run_in_steps(
    model: PreTrainedModel, ids: Tensor, ends: Sequence[int], cache: Any = None, positions: Tensor | None = None
) -> list[Tensor]:
    """Run ids [B, T] in pieces that end at `ends`, each with the cache of those before; return each piece's logits."""
    pieces = []
    for begin, end in zip((0, *ends[:-1]), ends):
        kwargs = build_cache_kwargs(model, cache)
        if positions is not None:
            kwargs["position_ids"] = positions[:, begin:end]
        output = model(ids[:, begin:end], **_accepted(model, **kwargs))
        cache = get_output_cache(output)
        assert cache is not None, "its forward pass returns no cache"
        pieces.append(output.logits)
    return pieces


def generate_padded_and_alone(
    model: PreTrainedModel, ids: Tensor, padding: int, **kwargs: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate from ids [2, T] with row 0 left-padded; yield each row's tokens in the batch, and those of it alone."""
    inputs = left_pad(ids, padding)
    settings = {**GENERATION_KWARGS, **kwargs}
    both = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    for index, row, begin in ((0, ids[:1, :-padding], padding), (1, ids[1:], 0)):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)[0]
        yield both[index, begin:], alone


def save_and_reload(model: PreTrainedModel, folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Save a model and load it by AutoModelForCausalLM; no tensor may be missing or left over."""
    model.save_pretrained(folder)
    loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"], f"not saved: {', '.join(sorted(info['missing_keys']))}"
    assert not info["unexpected_keys"], f"saved but not loaded: {', '.join(sorted(info['unexpected_keys']))}"
    return loaded


# The contract's checks


@register_check("prefill in two pieces, then token by token, gives the logits of one pass")
@torch.no_grad()
def steps(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids()
    full = student(ids).logits
    ends = [20, 29, *range(30, SEQ_LEN + 1)]
    begin = 0
    for end, piece in zip(ends, run_in_steps(student, ids, ends, DynamicCache(config=student.config))):
        assert_tensors_close(
            piece, full[:, begin:end], f"logits of tokens {begin} to {end}, with the cache of those before"
        )
        begin = end
    changed = ids.clone()
    changed[:, 0] = 5
    apart = (student(changed).logits[:, -1] - full[:, -1]).abs().max()
    assert apart > 1e-6, "the first token makes no difference to the last one's logits"


@register_check("a left-padded row gives the logits that it gives alone")
@torch.no_grad()
def padding(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids()
    logits = student(**left_pad(ids, 5, family)).logits
    assert_tensors_close(logits[0, 5:], student(ids[:1, :-5]).logits[0], "logits of the row with 5 tokens of padding")
    assert_tensors_close(logits[1], student(ids[1:]).logits[0], "logits of the row beside it")


@register_check("left-padded generation, greedy and with 3 beams, gives the tokens of unpadded generation", slow=True)
@torch.no_grad()
def generation(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids(length=20)
    for beams in (1, 3):
        for got, alone in generate_padded_and_alone(student, ids, 5, num_beams=beams):
            assert torch.equal(got, alone), f"{beams} beams: {got[-6:].tolist()} padded, {alone[-6:].tolist()} alone"


@register_check("documents packed into one row give what they give apart")
@torch.no_grad()
def packing(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids()
    positions = torch.cat([torch.arange(13), torch.arange(SEQ_LEN - 13)])[None].expand(2, -1)
    packed = run_backbone(student, Batch(ids, positions, ids))
    for part in (slice(0, 13), slice(13, SEQ_LEN)):
        alone = student.base_model(ids[:, part], use_cache=False).last_hidden_state
        assert_tensors_close(
            packed[:, part], alone, f"hidden states of the document at tokens {part.start} to {part.stop}"
        )


@register_check("the mixing matrix is lower triangular and times v it is the output")
@torch.no_grad()
def matrix_in_student(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids()
    sites, caught = list(get_mixers(student)), {}
    for name in sites:

        def catch(module, args, kwargs, output, name=name):
            caught[name] = (args, kwargs, output)

        student.get_submodule(name).register_forward_hook(catch, with_kwargs=True)
    padded = family not in MASK_POSITION_FAMILIES
    student(**(left_pad(ids, 4, family) if padded else {"input_ids": ids}), use_cache=False)
    for name in sites:
        args, kwargs, out = caught.pop(name)
        again, matrix = student.get_submodule(name)(*args, **kwargs, output_matrix=True)
        heads = get_mixers(student)[name].teacher_shape.heads
        assert matrix.shape == (2, heads, SEQ_LEN, SEQ_LEN), f"{name}: matrix of shape {list(matrix.shape)}"
        assert torch.equal(matrix, matrix.tril()), f"{name}: the matrix looks ahead"
        valid = slice(4 if padded else 0, None)
        assert_tensors_close(again[:, valid], out[0][:, valid], f"{name}: matrix times v beside the output")


@register_check("gradients reach every parameter of the student, and none of the mixer's is zero")
def gradients(variant: MixerVariant, family: str) -> None:
    student = variant.build_student(family).train()
    ids = sample_ids(length=80)  # longer than a window of 64, so that what attends beyond it gets gradients too
    student(ids, labels=ids).loss.backward()
    none = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not none, f"no finite gradient: {', '.join(none)}"
    zero = [
        f"{site}.{n}"
        for site, module in get_mixers(student).items()
        for n, p in module.named_parameters()
        if not p.grad.abs().sum() > 0
    ]
    assert not zero, f"gradient is zero: {', '.join(zero)}"


@register_check("saving and reloading gives every tensor back bit for bit, twice", slow=True)
@torch.no_grad()
def saving(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family, torch.float32, perturbation=0.05), sample_ids(1, 9)
    with tempfile.TemporaryDirectory() as folder:
        loaded = save_and_reload(student, Path(folder))
        twice = save_and_reload(loaded, Path(folder) / "again")
    assert type(loaded).__mro__[2] is type(make_tiny_model(family)), f"loaded as {type(loaded).__mro__}"
    before = student.state_dict()
    for model in (loaded, twice):
        after = model.state_dict()
        assert before.keys() == after.keys()
        other = [name for name in before if not torch.equal(before[name], after[name])]
        assert not other, f"came back changed: {', '.join(other)}"
        assert torch.equal(student(ids).logits, model(ids).logits), "the reloaded student gives other logits"


@register_check("a student in bfloat16, and one under autocast, stays close to float32")
@torch.no_grad()
def half_precision(variant: MixerVariant) -> None:
    student, ids = variant.build_student("llama", torch.float32, perturbation=0.0), sample_ids()
    exact = student(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = student(ids).logits
    half = student.to(torch.bfloat16)(ids).logits  # type: ignore[arg-type]
    for name, logits in (("autocast", mixed), ("bfloat16", half)):
        assert logits.isfinite().all(), f"{name}: not finite"
        error = float((logits - exact).norm() / exact.norm())
        assert error < 0.1, f"{name}: logits are off by {100 * error:.0f} % (at most 10 %)"


# The survey's checks


def make_random_ids(batch: int = 2, length: int = SURVEY_SEQ_LEN) -> Tensor:
    """Return random token ids [B, T] for a model of the survey."""
    return torch.randint(7, SURVEY_VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(2))


class ModelChecks:
    """Checks of one model, teacher or student."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype = model, model.dtype

    def forward(self) -> None:
        """Logits are finite, those of the last token depend on the first, and earlier ones not on later tokens."""
        ids = make_random_ids()
        logits = self.model(ids, use_cache=False).logits
        assert logits.isfinite().all(), "logits are not finite"
        shorter = self.model(ids[:, :-4], use_cache=False).logits
        self._same(shorter, logits[:, :-4], "later tokens change earlier logits")
        ids[:, 0] = 6
        assert _error(self.model(ids, use_cache=False).logits[:, -1], logits[:, -1]) > 1e-7, "the past has no effect"

    def steps(self, ends: tuple[int, ...] = (PREFILL, *range(PREFILL + 1, SURVEY_SEQ_LEN + 1))) -> None:
        """Prefill and then token by token with a cache gives the logits of one pass."""
        ids = make_random_ids()
        positions = torch.arange(SURVEY_SEQ_LEN)[None].expand(len(ids), -1)
        full = self.model(ids, **_accepted(self.model, position_ids=positions), use_cache=False).logits
        pieces = run_in_steps(self.model, ids, ends, positions=positions)
        self._same(torch.cat(pieces, 1), full, "steps with a cache differ from one pass")

    def pieces(self) -> None:
        """The same with a prefill in three pieces."""
        self.steps((5, PREFILL, 18, *range(19, SURVEY_SEQ_LEN + 1)))

    def padding(self) -> None:
        """A left-padded row gives the logits that it gives alone."""
        ids = make_random_ids()
        alone = [self.model(row, use_cache=False).logits[0] for row in (ids[:1, :-PADDING], ids[1:])]
        inputs = left_pad(ids, PADDING)
        errors = []
        for dropped in ("", "position_ids"):  # families with learned positions count them from the mask
            kwargs = _accepted(self.model, **{k: v for k, v in inputs.items() if k != dropped})
            logits = self.model(**kwargs, use_cache=False).logits
            errors.append(max(_error(logits[0, PADDING:], alone[0]), _error(logits[1], alone[1])))
        assert min(errors) < TOLERANCES[self.dtype], "left padding changes the logits"

    def generate(self) -> None:
        """Greedy generation of a left-padded batch says what each row says alone."""
        for got, alone in generate_padded_and_alone(self.model, make_random_ids(length=PREFILL + PADDING), PADDING):
            assert torch.equal(got, alone), "left-padded generation says something else than unpadded"

    def _same(self, got: Tensor, expected: Tensor, problem: str) -> None:
        assert _error(got, expected) < TOLERANCES[self.dtype], problem


class StudentChecks(ModelChecks):
    """The same checks on a student of `teacher`, and that of saving it."""

    def __init__(self, teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all"):
        self.teacher = teacher
        super().__init__(make_student(teacher, mixer, layers))

    def save(self) -> None:
        """Saved and loaded by AutoModelForCausalLM it has the same weights bit for bit, the same logits, and text."""
        student = self.model
        ids = make_random_ids(1, 9)
        with tempfile.TemporaryDirectory() as folder:
            loaded = save_and_reload(student, Path(folder), dtype=self.dtype)
        assert get_mixers(loaded).keys() == get_mixers(student).keys(), "mixers got lost"
        before, after = student.state_dict(), loaded.state_dict()
        other = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
        assert not other, f"came back changed: {', '.join(other)}"
        # not bit for bit: on some CPUs products of experts are rounded by where their weights lie in memory
        expected = student(ids).logits
        error = (loaded(ids).logits - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, "the reloaded student gives other logits"
        assert torch.equal(*(m.generate(ids, **GENERATION_KWARGS) for m in (student, loaded))), (
            "it generates something else"
        )


def make_student(teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all") -> PreTrainedModel:
    """Convert a teacher into a student whose mixers' parameters are moved from their start, so that every gate acts."""
    student = convert(teacher, mixer, layers)
    torch.manual_seed(1)
    perturb_mixers(student, 0.1)
    return student


def _accepted(model: PreTrainedModel, **kwargs: Any) -> dict[str, Any]:
    """Return those arguments that the model's forward pass accepts."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
