"""Checks of a mixer's gradients, precision and behavior at extreme values, long inputs and under compilation.

precision(MixerVariant("gla"))      # raises AssertionError if it fails
"""

import torch
from torch import Tensor
from torch.func import functional_call

from limbeck.mixers import HeadShape, Mixer, Tokens
from limbeck.testing.contract import MixerVariant, assert_tensors_close, register_check, sample_inputs

SMALL = HeadShape(hidden=6, heads=2, kv_heads=1, key_width=3, value_width=4, scale=0.5)
NARROW = HeadShape(hidden=8, heads=2, kv_heads=2, key_width=8, value_width=8, scale=0.3)
# relative to the norm of the output, for parameters and inputs that are exact in the narrow type
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@register_check("gradients of inputs and parameters are right, across padding, documents and a state handed on")
def gradcheck(variant: MixerVariant) -> None:
    module = variant.build_module(SMALL)
    names, weights = zip(*module.named_parameters()) if list(module.parameters()) else ((), ())
    given = [z.requires_grad_() for z in sample_inputs(module, 2, 9)]
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :2] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 2, 2, 0, 0, 0]])

    def call(*tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[:4], dict(zip(names, tensors[4:]))
        out, state = [], None
        for begin, end in ((0, 6), (6, 8), (8, 9)):  # the last one a single token
            tokens = Tokens(valid[:, begin:end], segments[:, begin:end])
            arguments = tuple(z[:, begin:end] for z in inputs)
            y, state = functional_call(module, parameters, arguments, {"tokens": tokens, "state": state})
            out.append(y)
        return torch.cat(out, 1)

    try:
        torch.autograd.gradcheck(call, (*given, *weights), atol=1e-6, fast_mode=True)
    except RuntimeError as error:
        raise AssertionError(str(error)) from None


@register_check("at the start the output is finite, not zero and, without head norm, linear in v")
@torch.no_grad()
def start(variant: MixerVariant) -> None:
    q, k, v, x = sample_inputs(module := variant.build_module(perturbation=0.0), 2, 20)
    y, _ = module(q, k, v, x)
    assert y.isfinite().all(), "not finite"
    assert y.abs().amax((0, 1, 3)).all(), "a head puts out nothing but zeros"
    if module.options.conv_activation != "none":
        return
    module = variant.with_options(output_norm="none").build_module(perturbation=0.0)
    other = torch.randn(v.shape, generator=torch.Generator().manual_seed(4), dtype=v.dtype)
    parts = module(q, k, v, x)[0] + 2 * module(q, k, other, x)[0]
    assert_tensors_close(
        module(q, k, v + 2 * other, x)[0], parts, "the output for v + 2w beside the two outputs' sum", 1e-9
    )


@register_check("outputs, states and gradients stay finite with parameters at ±30 and hidden states 100 times as large")
def extreme_gates(variant: MixerVariant) -> None:
    for size in (1.0, 100.0):
        module = variant.build_module(NARROW, torch.float32)
        with torch.no_grad():
            for index, p in enumerate(module.parameters()):
                p.copy_(30 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
        q, k, v, x = sample_inputs(module, 1, 1024, dtype=torch.float32)
        given = [z.requires_grad_() for z in (q, k, v, size * x)]
        y, state = module(*given)
        what = f"parameters at ±30, hidden states at ±{size:.0f}"
        _finite(what, y, *state.values())
        (y / y.detach().abs().max().clamp_min(1)).square().mean().backward()
        gradients = {**_gradients(module), **dict(zip("qkvx", (z.grad for z in given)))}
        bad = [n for n, g in gradients.items() if g is not None and not g.isfinite().all()]
        assert not bad, f"{what}: gradient not finite: {', '.join(bad)}"


@register_check("outputs and states stay finite, and close to float64, over 32,768 tokens", slow=True)
@torch.no_grad()
def long_input(variant: MixerVariant) -> None:
    exact = variant.build_module(NARROW, perturbation=0.1)
    if exact.grows:
        return
    given = sample_inputs(exact, 1, 32768, dtype=torch.float32)
    y, state = variant.build_module(NARROW, torch.float32, perturbation=0.1)(*given)
    _finite("32,768 tokens", y, *state.values())
    _close(y[:, -64:], exact(*(z.double() for z in given))[0][:, -64:], "the last 64 of 32,768 tokens", 1e-3)


@register_check("float32 is within 1e-5 of float64 and bfloat16 within 3e-2, in a pass and token by token")
@torch.no_grad()
def precision(variant: MixerVariant) -> None:
    length = 256
    for dtype, bound in BOUNDS.items():
        module = variant.build_module(NARROW, dtype, perturbation=0.1)
        exact = variant.build_module(NARROW, perturbation=0.1)
        exact.load_state_dict(module.state_dict())  # the rounded numbers
        given = sample_inputs(module, 2, length, dtype=dtype)
        expected, _ = exact(*(z.double() for z in given))
        y, state = module(*(z[:, :-8] for z in given))
        assert y.dtype == dtype, f"{dtype} in, {y.dtype} out"
        steps = []
        for t in range(length - 8, length):
            step, state = module(*(z[:, t : t + 1] for z in given), state=state)
            steps.append(step)
        _close(y, expected[:, :-8], f"{dtype}, a pass", bound)
        _close(torch.cat(steps, 1), expected[:, -8:], f"{dtype}, token by token", bound)


@register_check("under autocast to bfloat16 outputs stay close and gradients finite")
def autocast(variant: MixerVariant) -> None:
    module = variant.build_module(NARROW, torch.float32, perturbation=0.1)
    given = [z.requires_grad_() for z in sample_inputs(module, 2, 128, dtype=torch.float32)]
    with torch.no_grad():
        expected, _ = module(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = module(*given)
        y.float().square().sum().backward()
    _close(y, expected, "autocast", BOUNDS[torch.bfloat16])
    grads = {**_gradients(module), **dict(zip("qkvx", (z.grad for z in given)))}
    bad = [n for n, g in grads.items() if g is not None and not g.isfinite().all()]
    assert not bad, f"autocast: gradient not finite: {', '.join(bad)}"


@register_check("torch.compile (aot_eager) changes neither outputs nor gradients", slow=True)
def compiled(variant: MixerVariant) -> None:
    module = variant.build_module()
    results = []
    for form in (module, _compile(module)):
        module.zero_grad()
        given = [z.requires_grad_() for z in sample_inputs(module, 2, 70)]
        y, state = form(*given)
        (y.square().mean() + sum(s.square().mean() for s in state.values() if s.requires_grad)).backward()
        with torch.no_grad():
            step, _ = form(*(z[:, :1] for z in given), state={name: s.detach() for name, s in state.items()})
        grads = {**_gradients(module), **dict(zip("qkvx", (z.grad for z in given)))}
        results.append({"output": y, "step": step, **{n: g.clone() for n, g in grads.items() if g is not None}})
    plain, other = results
    assert plain.keys() == other.keys(), f"compiled: gradients of {sorted(other)}, expected {sorted(plain)}"
    for name in plain:
        assert_tensors_close(other[name], plain[name], f"compiled: {name}")


def _gradients(module: Mixer) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def _compile(module: Mixer):
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", dynamic=False)


def _finite(what: str, *tensors: Tensor) -> None:
    assert all(t.isfinite().all() for t in tensors), f"{what}: not finite"


def _close(got: Tensor, expected: Tensor, what: str, bound: float) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm())
    assert error <= bound, f"{what}: off by {error:.1e} of the output's norm (at most {bound:.0e})"
