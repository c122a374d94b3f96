"""Operators are differentiated once, by hand: asked a second time they refuse, on every route and in every way."""

import pytest
import torch

from limbeck.core.errors import LimbeckError
from limbeck.ops import cpu, delta_rule, dplr, scalar_decay, sliding_window, value_decay, vector_decay

SHAPE = (1, 130, 2, 3)


def draw(*shape: int, positive: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return (x.abs().neg() if positive else x).requires_grad_()


def calls():
    torch.manual_seed(0)
    q, k, v, a, b = (draw(*SHAPE) for _ in range(5))
    scalar, vector, rate = draw(*SHAPE[:3], positive=True), draw(*SHAPE, positive=True), draw(*SHAPE[:3])
    return {
        "no decay": (lambda: scalar_decay.chunked(q, k, v), (q, k)),
        "scalar decay": (lambda: scalar_decay.chunked(q, k, v, scalar), (q, scalar)),
        "vector decay": (lambda: vector_decay.chunked(q, k, v, vector), (k, vector)),
        "value decay": (lambda: value_decay.chunked(q, k, v, vector), (v, vector)),
        "delta rule": (lambda: delta_rule.chunked(q, k, v, rate), (q, rate)),
        "gated delta rule": (lambda: delta_rule.chunked(q, k, v, rate, vector), (k, q)),
        "rank one": (lambda: dplr.chunked(q, k, v, a, b, vector), (a, b)),
        "weights of a window": (lambda: sliding_window.evicting(q, k, v, window=8, normalize=False)[::2], (q, k)),
    }


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("name", calls())
def test_a_second_derivative_is_refused(name, general, monkeypatch):
    if general:  # what runs on an accelerator without kernels
        monkeypatch.setattr(cpu, "plan_chunks", lambda *given: None)
    run, (first, second) = calls()[name]
    for inputs in ([second], [first], [first, second]):
        o, _ = run()
        slope = torch.autograd.grad(o.square().sum(), first, create_graph=True)[0]
        with pytest.raises(LimbeckError, match="second derivative"):
            torch.autograd.grad(slope.square().sum(), inputs)
    o, _ = run()
    slope = torch.autograd.grad(o.square().sum(), first, create_graph=True)[0]
    with pytest.raises(LimbeckError, match="second derivative"):
        slope.square().sum().backward()


def test_the_recurrent_form_has_second_derivatives():
    q, k, v = (draw(1, 5, 2, 3) for _ in range(3))
    assert torch.autograd.gradgradcheck(lambda *given: scalar_decay.recurrent(*given)[0], (q, k, v))
