"""Padding in a batch of students' prompts and turns: it changes nothing, wherever it stands."""

import pytest
import torch
from transformers import DynamicCache

import limbeck
from limbeck.testing import CHECKS, MixerVariant
from limbeck.testing.tiny_models import VOCAB_SIZE

PRESETS = ("default", "published", "controlled")
EVERY = [(m, p) for m in limbeck.mixers.list_mixers() for p in PRESETS]
SIDES = {"ahead": [0, 0, 0, 0], "behind": [12, 12, 12, 12], "inside": [3, 7, 7, 9], "everywhere": [0, 2, 5, 12]}


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def spread(turn: torch.Tensor, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The turn [1, T] with padding put in ahead of those of its tokens, and which tokens are its own."""
    tokens, real = [], []
    for i in range(turn.shape[1] + 1):
        tokens += [0] * places.count(i)
        real += [False] * places.count(i)
        if i < turn.shape[1]:
            tokens.append(int(turn[0, i]))
            real.append(True)
    return torch.tensor([tokens]), torch.tensor(real)


@pytest.mark.parametrize(("mixer", "preset"), EVERY)
def test_padding_changes_nothing_in_any_mixer_with_a_convolution(mixer, preset):
    """The contract tries the default; presets and convolutions here."""
    CHECKS["padded_module"](
        MixerVariant(mixer, {} if preset == "published" or mixer == "softmax" else {"conv": 3}, preset)
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("mixer", "preset"), [(m, p) for m, p in EVERY if p == "published"])
@torch.no_grad()
def test_padding_in_a_later_turn_changes_nothing(mixer, preset, side):
    student = MixerVariant(mixer, preset=preset).build_student("llama")
    turns = [ids(20), ids(12, 1), ids(5, 2)]
    expected = student(torch.cat(turns, 1)).logits
    cache = DynamicCache(config=student.config)
    mask, begin = torch.ones(1, 0, dtype=torch.long), 0
    for number, turn in enumerate(turns):
        tokens, real = spread(turn, SIDES[side] if number == 1 else [])
        mask = torch.cat([mask, real[None].long()], 1)
        positions = begin + (real.long().cumsum(0) - 1).clamp(min=0)[None]
        got = student(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, real]
        end = begin + turn.shape[1]
        assert torch.allclose(got, expected[:, begin:end], atol=1e-9), f"turn {number}"
        begin = end
