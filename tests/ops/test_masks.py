"""A mask is read once a pass, and again when it is another: written to, of other chunks, made where nobody counts."""

import pytest
import torch

import limbeck
from limbeck.models.attention import token_mask_from_attention_mask
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE

LENGTH = 12


def square(padding: int = 0, document: int = 0, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """[1, 1, T, T]: padding ahead, and a document that begins at that token."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, :padding] = False
    mask[document:, :document] = False
    mask = mask[None, None]
    return mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e9)


def flat(padding: int = 0) -> torch.Tensor:
    return (torch.arange(LENGTH) >= padding).long()[None]


BUFFERS = {
    "padding": (square(), square(padding=4)),
    "documents": (square(), square(document=5)),
    "no more documents": (square(document=5), square()),
    "additive": (square(dtype=torch.float32), square(padding=4, dtype=torch.float32)),
    "two-dimensional": (flat(), flat(4)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", BUFFERS)
def test_a_mask_that_is_written_to_is_read_again(name, inference):
    student = limbeck.convert(make_tiny_model("llama"), "gated_deltanet")
    ids = torch.randint(3, VOCAB_SIZE, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    old, new = BUFFERS[name]
    with torch.inference_mode() if inference else torch.no_grad():
        buffer = old.clone()
        before = student(ids, attention_mask=buffer).logits
        buffer.copy_(new)
        after = student(ids, attention_mask=buffer).logits
        fresh = student(ids, attention_mask=new.clone()).logits
    assert torch.equal(after[:, -1], fresh[:, -1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-4)


def test_one_mask_serves_all_layers_and_is_looked_at_again_for_other_questions():
    mask = square(document=6)
    tokens = token_mask_from_attention_mask(mask, LENGTH)
    assert token_mask_from_attention_mask(mask, LENGTH) is tokens
    on, anew = torch.arange(LENGTH)[None], (torch.arange(LENGTH) % 6)[None]
    assert tokens.segments.tolist() == [[0] * 6 + [1] * 6]
    assert (
        token_mask_from_attention_mask(mask, LENGTH, positions=on, chunk=6).segments is None
    )  # a chunk ends there, no document
    assert token_mask_from_attention_mask(mask, LENGTH, positions=anew, chunk=6).segments.tolist() == [
        [0] * 6 + [1] * 6
    ]
    on.copy_(anew)
    assert token_mask_from_attention_mask(mask, LENGTH, positions=on, chunk=6).segments.tolist() == [[0] * 6 + [1] * 6]
    assert token_mask_from_attention_mask(mask, LENGTH, positions=on, chunk=5).segments is not None
