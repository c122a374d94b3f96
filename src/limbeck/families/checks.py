"""What a student of a family has to do, on a tiny random model of it.

    StudentChecks(tiny("qwen3"), "gla").steps()      # raises AssertionError with one line that says what went wrong

Every check compares the student with itself: by another way of computing the same it must say the same.
"""

import inspect
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.families.tiny import VOCABULARY
from limbeck.model import convert, mixers_of, with_cache
from limbeck.model.cache import cache_in

LENGTH, PREFILL, PADDING = 21, 12, 5
EXACT = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest logit; families compute norms and more in float32
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(7, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


class Checks:
    """The checks on one model, teacher or student."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype = model, model.dtype

    def forward(self) -> None:
        """Logits are finite, those of the last token depend on the first, and earlier ones not on later tokens."""
        ids = tokens()
        logits = self.model(ids, use_cache=False).logits
        assert logits.isfinite().all(), "logits are not finite"
        shorter = self.model(ids[:, :-4], use_cache=False).logits
        self._same(shorter, logits[:, :-4], "later tokens change earlier logits")
        ids[:, 0] = 6
        assert _error(self.model(ids, use_cache=False).logits[:, -1], logits[:, -1]) > 1e-7, "the past has no effect"

    def steps(self, ends: tuple[int, ...] = (PREFILL, *range(PREFILL + 1, LENGTH + 1))) -> None:
        """Prefill and then token by token with a cache gives the logits of one pass."""
        ids, parts = tokens(), []
        positions = torch.arange(LENGTH)[None].expand(len(ids), -1)
        full = self.model(ids, **_named(self.model, position_ids=positions), use_cache=False).logits
        cache = None
        for begin, end in zip((0, *ends[:-1]), ends):
            given = {**with_cache(self.model, cache), "position_ids": positions[:, begin:end]}
            output = self.model(ids[:, begin:end], **_named(self.model, **given))
            cache = cache_in(output)
            assert cache is not None, "its forward pass returns no cache"
            parts.append(output.logits)
        self._same(torch.cat(parts, 1), full, "steps with a cache differ from one pass")

    def pieces(self) -> None:
        """The same with a prefill in three pieces."""
        self.steps((5, PREFILL, 18, *range(19, LENGTH + 1)))

    def padding(self) -> None:
        """A left-padded row gives the logits that it gives alone."""
        ids = tokens()
        alone = [self.model(row, use_cache=False).logits[0] for row in (ids[:1, :-PADDING], ids[1:])]
        inputs = padded(ids)
        problems = []
        for dropped in ("", "position_ids"):  # families with learned positions count them from the mask
            given = _named(self.model, **{k: v for k, v in inputs.items() if k != dropped})
            logits = self.model(**given, use_cache=False).logits
            problems.append(max(_error(logits[0, PADDING:], alone[0]), _error(logits[1], alone[1])))
        assert min(problems) < EXACT[self.dtype], "left padding changes the logits"

    def generate(self) -> None:
        """Greedy generation of a left-padded batch says what each row says alone."""
        ids = tokens(length=PREFILL + PADDING)
        inputs = padded(ids)
        both = self.model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **SETTINGS)
        for index, row, begin in ((0, ids[:1, :-PADDING], PADDING), (1, ids[1:], 0)):
            alone = self.model.generate(row, attention_mask=torch.ones_like(row), **SETTINGS)[0]
            got = both[index, begin:]
            assert torch.equal(got, alone), "left-padded generation says something else than unpadded"

    def _same(self, got: Tensor, expected: Tensor, problem: str) -> None:
        assert _error(got, expected) < EXACT[self.dtype], problem


class StudentChecks(Checks):
    """The same on a student, and what only students do."""

    def __init__(self, teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all"):
        self.teacher = teacher
        super().__init__(student_of(teacher, mixer, layers))

    def save(self) -> None:
        """Saved and loaded by AutoModelForCausalLM it gives the same logits bit for bit, and generates the same."""
        student = self.model
        ids = tokens(1, 9)
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            settings: Any = {"dtype": self.dtype, "output_loading_info": True}
            load: Any = AutoModelForCausalLM.from_pretrained
            loaded, info = load(folder, **settings)
        assert not info["missing_keys"], f"not saved: {sorted(info['missing_keys'])[0]}"
        assert not info["unexpected_keys"], f"saved but not known: {sorted(info['unexpected_keys'])[0]}"
        assert mixers_of(loaded).keys() == mixers_of(student).keys(), "mixers got lost"
        assert torch.equal(student(ids).logits, loaded(ids).logits), "the reloaded student gives other logits"
        assert torch.equal(*(m.generate(ids, **SETTINGS) for m in (student, loaded))), "it generates something else"


def student_of(teacher: PreTrainedModel, mixer: str, layers: str | list[int] = "all") -> PreTrainedModel:
    """A student with new parameters away from their start, so that every gate does something."""
    student = convert(teacher, mixer, layers)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in mixers_of(student).values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def padded(ids: Tensor) -> dict[str, Tensor]:
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
