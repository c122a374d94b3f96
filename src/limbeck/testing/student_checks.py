"""Checks on students: tiny models of every family with the mixer in place of their attention.

steps(MixerVariant("gla"), "llama")

What a student of a family has to do, on a tiny random model of it.

    StudentChecks(make_survey_model("qwen3"), "gla").steps()      # raises AssertionError with one line that says what went wrong

Every check compares the student with itself: by another way of computing the same it must say the same.
"""

import inspect
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from limbeck.data.packing import Batch
from limbeck.models import build_cache_kwargs, convert, get_mixers
from limbeck.models.backbone import run_backbone
from limbeck.models.cache import get_output_cache
from limbeck.testing.contract import SEQ_LEN, MixerVariant, assert_tensors_close, left_pad, register_check, sample_ids
from limbeck.testing.tiny_models import MASK_POSITION_FAMILIES, SURVEY_VOCAB_SIZE, make_tiny_model


@register_check("prefill in two pieces, then token by token, gives the logits of one pass")
@torch.no_grad()
def steps(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids()
    full = student(ids).logits
    cache = DynamicCache(config=student.config)
    ends = [20, 29, *range(30, SEQ_LEN + 1)]
    for begin, end in zip([0, *ends[:-1]], ends):
        part = student(ids[:, begin:end], **build_cache_kwargs(student, cache)).logits
        assert_tensors_close(
            part, full[:, begin:end], f"logits of tokens {begin} to {end}, with the cache of those before"
        )
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


@register_check("left-padded generation, greedy and with 3 beams, says what it says unpadded", slow=True)
@torch.no_grad()
def generation(variant: MixerVariant, family: str) -> None:
    student, ids = variant.build_student(family), sample_ids(length=20)
    inputs = left_pad(ids, 5)
    del inputs["position_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        both = student.generate(**inputs, num_beams=beams, **settings)
        for row, begin in ((ids[:1, :15], 5), (ids[1:], 0)):
            alone = student.generate(row, num_beams=beams, **settings)[0]
            got = both[0 if begin else 1, begin:]
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
    student, ids = (
        variant.build_student(family).train(),
        sample_ids(length=80),
    )  # what looks behind a window of 64 learns too
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
        student.save_pretrained(folder)
        loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True)
        again = Path(folder) / "again"
        loaded.save_pretrained(again)
        twice = AutoModelForCausalLM.from_pretrained(again)
    assert not info["missing_keys"], f"not saved: {', '.join(info['missing_keys'])}"
    assert not info["unexpected_keys"], f"saved but not known: {', '.join(info['unexpected_keys'])}"
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


SURVEY_SEQ_LEN, PREFILL, PADDING = 21, 12, 5
EXACT = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest logit; families compute norms and more in float32
GENERATION_KWARGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_random_ids(batch: int = 2, length: int = SURVEY_SEQ_LEN) -> Tensor:
    return torch.randint(7, SURVEY_VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(2))


class ModelChecks:
    """The checks on one model, teacher or student."""

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
        ids, parts = make_random_ids(), []
        positions = torch.arange(SURVEY_SEQ_LEN)[None].expand(len(ids), -1)
        full = self.model(ids, **_named(self.model, position_ids=positions), use_cache=False).logits
        cache = None
        for begin, end in zip((0, *ends[:-1]), ends):
            given = {**build_cache_kwargs(self.model, cache), "position_ids": positions[:, begin:end]}
            output = self.model(ids[:, begin:end], **_named(self.model, **given))
            cache = get_output_cache(output)
            assert cache is not None, "its forward pass returns no cache"
            parts.append(output.logits)
        self._same(torch.cat(parts, 1), full, "steps with a cache differ from one pass")

    def pieces(self) -> None:
        """The same with a prefill in three pieces."""
        self.steps((5, PREFILL, 18, *range(19, SURVEY_SEQ_LEN + 1)))

    def padding(self) -> None:
        """A left-padded row gives the logits that it gives alone."""
        ids = make_random_ids()
        alone = [self.model(row, use_cache=False).logits[0] for row in (ids[:1, :-PADDING], ids[1:])]
        inputs = left_pad_first_row(ids)
        problems = []
        for dropped in ("", "position_ids"):  # families with learned positions count them from the mask
            given = _named(self.model, **{k: v for k, v in inputs.items() if k != dropped})
            logits = self.model(**given, use_cache=False).logits
            problems.append(max(_error(logits[0, PADDING:], alone[0]), _error(logits[1], alone[1])))
        assert min(problems) < EXACT[self.dtype], "left padding changes the logits"

    def generate(self) -> None:
        """Greedy generation of a left-padded batch says what each row says alone."""
        ids = make_random_ids(length=PREFILL + PADDING)
        inputs = left_pad_first_row(ids)
        both = self.model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GENERATION_KWARGS)
        for index, row, begin in ((0, ids[:1, :-PADDING], PADDING), (1, ids[1:], 0)):
            alone = self.model.generate(row, attention_mask=torch.ones_like(row), **GENERATION_KWARGS)[0]
            got = both[index, begin:]
            assert torch.equal(got, alone), "left-padded generation says something else than unpadded"

    def _same(self, got: Tensor, expected: Tensor, problem: str) -> None:
        assert _error(got, expected) < EXACT[self.dtype], problem


class StudentChecks(ModelChecks):
    """The same on a student, and what only students do."""

    def __init__(self, teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all"):
        self.teacher = teacher
        super().__init__(make_student(teacher, mixer, layers))

    def save(self) -> None:
        """Saved and loaded by AutoModelForCausalLM it gives the same logits bit for bit, and generates the same."""
        student = self.model
        ids = make_random_ids(1, 9)
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            settings: Any = {"dtype": self.dtype, "output_loading_info": True}
            load: Any = AutoModelForCausalLM.from_pretrained
            loaded, info = load(folder, **settings)
        assert not info["missing_keys"], f"not saved: {sorted(info['missing_keys'])[0]}"
        assert not info["unexpected_keys"], f"saved but not known: {sorted(info['unexpected_keys'])[0]}"
        assert get_mixers(loaded).keys() == get_mixers(student).keys(), "mixers got lost"
        assert torch.equal(student(ids).logits, loaded(ids).logits), "the reloaded student gives other logits"
        assert torch.equal(*(m.generate(ids, **GENERATION_KWARGS) for m in (student, loaded))), (
            "it generates something else"
        )


def make_student(teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all") -> PreTrainedModel:
    """A student with new parameters away from their start, so that every gate does something."""
    student = convert(teacher, mixer, layers)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in get_mixers(student).values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def left_pad_first_row(ids: Tensor) -> dict[str, Tensor]:
    """Row 0 shortened and padded on the left, row 1 whole."""
    short = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), ids[:1, :-PADDING]], 1)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.cat([short, ids[1:]]), "attention_mask": mask, "position_ids": positions}


def _named(model: PreTrainedModel, **kwargs: Any) -> dict[str, Any]:
    """Those arguments that the model's forward pass names, or all where it takes any."""
    known = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in known}


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
