"""Checks of a mixer on its own: its forms against each other, state, masks and documents, presets and shared options.

    split(MixerVariant("gla"))      # raises AssertionError if it fails

All in float64. Sequences are longer than two chunks of the operators, so that the state between chunks is tested too.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from limbeck.mixers import PRESETS, State, Tokens
from limbeck.testing.contract import (
    HEAD_SHAPE,
    MixerVariant,
    assert_tensors_close,
    register_check,
    sample_inputs,
    select_state,
)

LONG = 150  # more than two chunks of 64
CUTS = ((1, 64, 65, 66), (63, 128), (100,), (7, 8, 9, 140, 149))
DOCUMENTS = (40, 24, 1, 5, 60, 20)  # one ends with the first chunk, one is a single token, one spans a chunk boundary
ALL_SWITCHES = {"conv": 4, "conv_activation": "silu", "output_norm": "layer", "output_gate": "sigmoid", "gate_rank": 2}
SWITCHES: tuple[dict[str, Any], ...] = (
    {"heads": HEAD_SHAPE.heads // 2},
    {"state": 0.5},
    {"state": 2.0},
    {"heads": 1, "state": 0.25, "output_norm": "rms", "output_gate": "silu"},
    {"output_norm": "layer", "norm_over": "gated", "norm_bias": True, "output_gate": "inner", "gate_rank": 3},
    ALL_SWITCHES,
)


@register_check("the name, summary and options are in order; every parameter starts finite; no unsaved buffers")
def described(variant: MixerVariant) -> None:
    cls = variant.mixer_class
    assert cls.name, "the class has no `name`"
    assert len(cls.summary.splitlines()) == 1, "`summary` is not one line"
    module = variant.build_module(perturbation=0.0)
    again = cls.options_class.parse(asdict(module.options), cls.name)
    assert again == module.options, f"options do not survive being written down: {module.options} became {again}"
    bad = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    assert not bad, f"not set by reset_parameters: {', '.join(bad)}"
    lost = set(dict(module.named_buffers())) - set(module.state_dict())
    assert not lost, f"buffers that are not saved are lost on loading: {', '.join(lost)}; compute them in `inputs`"


@register_check("any split of a sequence with the state handed on gives what the whole gives")
@torch.no_grad()
def split(variant: MixerVariant) -> None:
    module = variant.build_module()
    given = sample_inputs(module, 2, LONG)
    originals = [z.clone() for z in given]
    whole, last = module(*given)
    assert whole.shape == (2, LONG, module.teacher_shape.heads, module.teacher_shape.value_width), list(whole.shape)
    for cuts in CUTS:
        state: State | None = None
        for begin, end in zip((0, *cuts), (*cuts, LONG)):
            before = {name: tensor.clone() for name, tensor in (state or {}).items()}
            part, new = module(*_cut(given, begin, end), state=state)
            assert_tensors_close(part, whole[:, begin:end], f"cut at {cuts}: tokens {begin} to {end}")
            for name, tensor in (state or {}).items():
                assert torch.equal(tensor, before[name]), f"the state '{name}' that was handed in was written to"
            state = new
        assert state is not None
        assert state.keys() == last.keys(), f"cut at {cuts}: state has {sorted(state)}, expected {sorted(last)}"
        for name in last:
            assert_tensors_close(state[name].double(), last[name].double(), f"cut at {cuts}: the last state's '{name}'")
    assert all(torch.equal(a, b) for a, b in zip(given, originals)), "q, k, v or x was written to"


@register_check("one token at a time, a whole pass, and the mixing matrix times v are the same")
@torch.no_grad()
def three_forms(variant: MixerVariant) -> None:
    module = variant.build_module()
    length = 70
    given = sample_inputs(module, 2, length)
    whole, _ = module(*given)
    by_matrix, matrix = module.forward_matrix(*given)
    assert_tensors_close(by_matrix, whole, "matrix times v beside the whole pass")
    assert matrix.shape == (2, module.teacher_shape.heads, length, length), f"the matrix has shape {list(matrix.shape)}"
    assert torch.equal(matrix, matrix.tril()), "the matrix looks ahead"
    state: State | None = None
    for t in range(length):
        y, state = module(*_cut(given, t, t + 1), state=state)
        assert_tensors_close(y[:, 0], whole[:, t], f"token {t} alone beside the whole pass")


@register_check(
    "padding changes nothing, ahead, inside or behind, whatever stands in it, in the pass, the matrix and the state"
)
@torch.no_grad()
def padded_module(variant: MixerVariant) -> None:
    module = variant.build_module()
    at = torch.arange(LONG)
    draw = torch.Generator().manual_seed(7)
    valid_tokens = {
        "3 tokens of padding ahead": at >= 3,
        "70 tokens of padding ahead": at >= 70,  # the first of the pieces below is all padding
        "20 tokens of padding behind": at < 130,
        "padding between two turns": (at >= 2) & ((at < 61) | (at >= 75)),
        "padding in every third place": torch.rand(LONG, generator=draw) > 0.3,
        "no padding, beside others": at >= 0,
    }
    valid = torch.stack(list(valid_tokens.values()))
    given = sample_inputs(module, len(valid), LONG)
    for z in given:
        z[~valid] = 100.0
    y, last = module(*given, tokens=Tokens(valid))
    by_matrix, matrix = module.forward_matrix(*given, tokens=Tokens(valid))
    pieces, state = [], None
    for begin, end in ((0, 64), (64, 65), (65, LONG)):
        piece = Tokens(valid[:, begin:end])
        part, state = module(*_cut(given, begin, end), tokens=piece, state=state)
        pieces.append(part)
    more = sample_inputs(module, 1, 9, seed=5)
    for row, (what, real) in enumerate(valid_tokens.items()):
        alone, end = module(*(z[row : row + 1, real] for z in given))
        assert_tensors_close(y[row, real], alone[0], what)
        assert_tensors_close(torch.cat(pieces, 1)[row, real], alone[0], f"{what}, in three pieces")
        assert_tensors_close(by_matrix[row, real], alone[0], f"{what}, by the matrix")
        assert not matrix[row][:, real][:, :, ~real].any(), f"{what}: the matrix reads padding"
        for name, after in (("", last), (" in three pieces", state)):
            assert after is not None
            follows = module(*more, state=select_state(after, row))[0]
            assert_tensors_close(follows, module(*more, state=end)[0], f"{what}: what follows its state{name}")


@register_check("packed documents are kept apart in the pass, the matrix and the state")
@torch.no_grad()
def documents(variant: MixerVariant) -> None:
    module = variant.build_module()
    given = sample_inputs(module, 2, LONG)
    segments = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).expand(2, -1)
    tokens = Tokens(segments=segments)
    before, more = sample_inputs(module, 2, 5, seed=3), sample_inputs(module, 2, 9, seed=5)
    _, start = module(*before)
    y, last = module(*given, tokens=tokens, state=start)
    by_matrix, matrix = module.forward_matrix(*given, tokens=tokens)
    apart = segments[:, None, :, None] != segments[:, None, None, :]
    assert not matrix.masked_select(apart.expand_as(matrix)).any(), "the matrix reads another document"
    begin, end = 0, None
    for number, count in enumerate(DOCUMENTS):
        part = _cut(given, begin, begin + count)
        alone, end = module(*part, state=None if number else start)
        assert_tensors_close(y[:, begin : begin + count], alone, f"document {number} of {DOCUMENTS}")
        plain = module(*part)[0]
        assert_tensors_close(
            by_matrix[:, begin : begin + count], plain, f"document {number} of {DOCUMENTS}, by the matrix"
        )
        begin += count
    assert_tensors_close(
        module(*more, state=last)[0], module(*more, state=end)[0], "what follows the last document's state"
    )


@register_check("the state does not grow and holds exactly state_numel() numbers a sequence")
@torch.no_grad()
def state_size(variant: MixerVariant) -> None:
    module = variant.build_module()
    if module.grows:
        return
    shapes: dict[str, torch.Size] = {}
    for length in (1, 2, 64, LONG):
        _, state = module(*sample_inputs(module, 3, length))
        for name, tensor in state.items():
            assert tensor.shape[0] == 3, f"state '{name}' {list(tensor.shape)} does not have the batch first"
            first = shapes.setdefault(name, tensor.shape)
            assert tensor.shape == first, f"state '{name}': {list(first)}, after {length} tokens {list(tensor.shape)}"
        assert state.keys() == shapes.keys(), f"state: {sorted(shapes)}, after {length} tokens {sorted(state)}"
    actual = sum(shape.numel() // 3 for shape in shapes.values())
    declared = module.state_numel()
    detail = ", ".join(f"{name} {list(shape[1:])}" for name, shape in shapes.items())
    assert actual == declared, f"state_numel() is {declared}, the state holds {actual}: {detail}"


def _cut(given: list[Tensor], begin: int, end: int) -> list[Tensor]:
    return [z[:, begin:end] for z in given]


@register_check("every preset builds, and under it splits, forms and state size hold")
def presets(variant: MixerVariant) -> None:
    for preset in PRESETS:
        chosen = MixerVariant(variant.mixer, variant.options, preset)
        for check in (three_forms, split, state_size):
            _run_under(f"preset {preset}", check, chosen)


@register_check(
    "merged heads, smaller and larger states, convolution, norm and gate: splits, forms, padding, state size hold"
)
def switches(variant: MixerVariant) -> None:
    for options in SWITCHES:
        chosen = variant.with_options(**options)
        for check in (three_forms, split, padded_module, state_size):
            _run_under(" ".join(f"{name}={value}" for name, value in options.items()), check, chosen)


def _run_under(options: str, check: Any, variant: MixerVariant) -> None:
    """Run a check and name the options in its failure."""
    try:
        check(variant)
    except AssertionError as error:
        raise AssertionError(f"{options}: {check.__name__}: {error}") from None
