"""The short convolution against torch's own, and in pieces."""

import pytest
import torch
from torch.nn import functional as F

from limbeck.ops import short_conv


def given(length: int = 11, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, length, 3, 5, dtype=torch.float64), torch.randn(width, 3, 5, dtype=torch.float64)


def test_it_is_torchs_depthwise_convolution():
    x, weight = given()
    y, state = short_conv.causal(x, weight)
    flat = F.pad(x.flatten(2).mT, (3, 0))
    want = F.conv1d(flat, weight.flatten(1).T.flip(-1).unsqueeze(1), groups=15).mT.view_as(x)
    assert torch.allclose(y, want)
    assert torch.equal(state, x[:, -3:])


@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_pieces_equal_the_whole(cut):
    x, weight = given()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0] * 11])
    for documents in (None, segments):
        whole, last = short_conv.causal(x, weight, segments=documents)
        parts = (
            [None, None]
            if documents is None
            else [documents[:, :cut], documents[:, cut:] - documents[:, cut - 1 : cut]]
        )
        first, state = short_conv.causal(x[:, :cut], weight, segments=parts[0])
        second, end = short_conv.causal(x[:, cut:], weight, state=state, segments=parts[1])
        assert torch.allclose(torch.cat([first, second], 1), whole)
        assert torch.allclose(end, last)


def test_documents_are_kept_apart():
    x, weight = given()
    segments = torch.tensor([0] * 4 + [1] * 7).expand(2, -1)
    y, state = short_conv.causal(x, weight, segments=segments)
    assert torch.allclose(y[:, :4], short_conv.causal(x[:, :4], weight)[0])
    alone, end = short_conv.causal(x[:, 4:], weight)
    assert torch.allclose(y[:, 4:], alone)
    assert torch.equal(state, end)


def test_gradcheck():
    x, weight = (z.requires_grad_(True) for z in given(5, 3))
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
    assert torch.autograd.gradcheck(lambda a, b: short_conv.causal(a, b, segments=segments), (x, weight))


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_delay_is_a_convolution_with_a_single_one(steps):
    x, _ = given(17)
    weight = torch.zeros(steps + 1, 3, 5, dtype=torch.float64)
    weight[-1] = 1
    valid = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) > 0.3
    y, last = short_conv.delay(x, steps)
    for got, expected in zip((y, last), short_conv.causal(x, weight)):
        assert torch.equal(got, expected)
    whole, end = short_conv.delay(x, steps, valid)
    wanted, state = short_conv.causal_masked(x, weight, valid)
    assert torch.equal(whole[valid], wanted[valid])
    assert torch.equal(end, state)
    first, state = short_conv.delay(x[:, :6], steps, valid[:, :6])
    second, state = short_conv.delay(x[:, 6:], steps, valid[:, 6:], state)
    assert torch.equal(torch.cat([first, second], 1)[valid], whole[valid])
    assert torch.equal(state, end)
