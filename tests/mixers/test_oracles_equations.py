"""Our mixers against their papers' equations, written out token by token with gates by hand from x.

In float64 with random parameters and grouped heads: outputs and the gradients of inputs and parameters, for sequences,
matrices and single tokens. The equations share no code with the mixers; only parameters are read from them.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers.oracles import agree, float64, heads, linear, mixer_case, wide
from limbeck import mixers

SCALE = 6**-0.5


def per_head(x, weight):
    """x W for each head; the keys' two matrices serve their groups."""
    return torch.einsum("bthk,hkj->bthj", x, weight)


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def scan(q, v, step, first=None):
    """o_t = S_tᵀ q_t with S_t = step(S_{t-1}, t); q, v [B, T, H, ·]."""
    s = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        s = step(s, t)
        out.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
    return torch.stack(out, 1)


def additive(q, k, v, a):
    """S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ, a [B, T, H, K] or [B, T, H, 1]."""
    return scan(q, v, lambda s, t: a[:, t, :, :, None] * s + outer(k[:, t], v[:, t]))


def delta(q, k, v, a, beta):
    """S_t = (I − β k kᵀ) Diag(a) S_{t-1} + β k vᵀ with that matrix written out."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)

    def step(s, t):
        rate = beta[:, t, :, None, None]
        return (eye - rate * outer(k[:, t], k[:, t])) @ (a[:, t, :, :, None] * s) + rate * outer(k[:, t], v[:, t])

    return scan(q, v, step)


# ---------------------------------------------------------------- one equation a mixer: m the mixer, x the samples


def retnet(m, x):
    gamma = 1 - 2.0 ** -(5 + torch.arange(4, dtype=torch.float64))
    return additive(x.q * SCALE, wide(x.k), wide(x.v), gamma[:, None].expand(*x.q.shape[:2], 4, 1))


def gla(m, x):
    a = torch.sigmoid(heads(linear(linear(x.x, m.decay_down), m.decay_up))) ** (1 / 16)
    return additive(x.q * SCALE, wide(x.k), wide(x.v), a)


def metala(m, x):
    a = torch.sigmoid(m.bias - wide(x.k)) ** (1 / 16)
    o = additive(x.q * SCALE, 1 - a, wide(x.v), a)
    if m.options.augment:
        o = o + torch.sigmoid((x.q * m.own * (1 - a)).sum(-1, keepdim=True) * wide(x.v))
    return o


def hgrn2(m, x):
    bound = torch.sigmoid(m.bound)
    a = bound + (1 - bound) * torch.sigmoid(m.bias - wide(x.k))
    q = x.q * torch.sigmoid(x.q) if m.options.swish else x.q
    return additive(q * SCALE, 1 - a, wide(x.v), a)


def mamba2(m, x):
    step = torch.log1p(torch.exp(linear(x.x, m.step)))[..., None]
    a = torch.exp(-m.log_rate.exp()[:, None] * step)
    return additive(x.q * SCALE, step * wide(x.k), wide(x.v), a) + m.skip[:, None] * wide(x.v)


def discrete_mamba2(m, x):
    a = torch.sigmoid(-linear(x.x, m.step))[..., None]  # exp(−softplus(z)) = σ(−z)
    return additive(x.q * SCALE, wide(x.k), wide(x.v), a) + m.skip[:, None] * wide(x.v)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def deltanet(m, x, a=None):
    most = 2 if m.options.negative_eigenvalues else 1
    a = torch.ones_like(x.q) if a is None else a
    return delta(unit(x.q), unit(wide(x.k)), wide(x.v), a, most * torch.sigmoid(linear(x.x, m.strength)))


def gated_deltanet(m, x):
    log = -m.log_rate.exp() * torch.log1p(torch.exp(linear(x.x, m.decay)))
    return deltanet(m, x, log.exp()[..., None])


def kda(m, x):
    raw = heads(linear(linear(x.x, m.decay_down), m.decay_up))
    return deltanet(m, x, torch.exp(-m.log_rate.exp()[:, None] * torch.log1p(torch.exp(raw))))


def rwkv6(m, x):
    a = torch.exp(-torch.exp(heads(linear(torch.tanh(linear(x.x, m.decay_down)), m.decay_up))))
    k, v, q = wide(x.k) * (1 - a if m.options.complement else 1), wide(x.v), x.q * SCALE
    s, out = 0 * outer(k[:, 0], v[:, 0]), []
    for t in range(q.shape[1]):
        out.append(torch.einsum("bhkv,bhk->bhv", s + m.bonus[..., None] * outer(k[:, t], v[:, t]), q[:, t]))
        s = a[:, t, ..., None] * s + outer(k[:, t], v[:, t])
    return torch.stack(out, 1)


def rwkv7_parts(m, x):
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(heads(linear(torch.tanh(linear(x.x, m.decay_down)), m.decay_up))))
    a = torch.sigmoid(heads(linear(linear(x.x, m.rate_down), m.rate_up)))
    k = unit(wide(x.k)) if m.options.unit_keys else wide(x.k)
    return w, a, unit(k * m.erase_scale), k * (1 + (a - 1) * m.rate_share)


def rwkv7(m, x):
    w, a, kappa, k = rwkv7_parts(m, x)
    v = wide(x.v)

    def step(s, t):
        return (torch.diag_embed(w[:, t]) - outer(a[:, t] * kappa[:, t], kappa[:, t])) @ s + outer(k[:, t], v[:, t])

    return scan(x.q * SCALE, v, step)


def mlstm(m, x):
    """Not stabilised: C_t = f C_{t-1} + e^i k vᵀ, n_t = f n_{t-1} + e^i k, h = Cᵀq / max(|nᵀq|, 1)."""
    gates = (15 * torch.tanh(linear(x.x, g) / 15) for g in (m.input_gate, m.forget_gate))
    i, f = next(gates).exp()[..., None], torch.sigmoid(next(gates))[..., None]
    q, k, v = x.q * SCALE, wide(x.k), wide(x.v)
    total = additive(q, i * k, torch.ones_like(v[..., :1]), f)
    return additive(q, i * k, v, f) / total.abs().clamp(min=1)


def gsa(m, x):
    """As a matrix: logits_im = Σ_j (q_i·k_j) s_jm Γ_ijm, p = softmax, M_ij = Σ_m p_im s_jm Γ_ijm."""
    a = torch.sigmoid(heads(linear(x.x, m.forget))) ** (1 / 16)
    g = a.log().cumsum(1)
    future = (distance(x.q) < 0)[:, :, None, None]
    between = torch.exp((g[:, :, None] - g[:, None]).masked_fill(future, float("-inf")))  # [B, T, T, H, M]
    s, q, k = 1 - a, x.q, wide(x.k)
    if m.options.swish:
        q, k = q * torch.sigmoid(q), k * torch.sigmoid(k)
    logits = torch.einsum("bihk,bjhk,bjhm,bijhm->bihm", q * SCALE, k, s, between)
    return torch.einsum("bihm,bjhm,bijhm,bjhv->bihv", logits.softmax(-1), s, between, wide(x.v))


def softmax(m, x, seen=lambda i, j: j <= i):
    rows, k, v = [], wide(x.k), wide(x.v)
    for i in range(x.q.shape[1]):
        js = [j for j in range(x.q.shape[1]) if seen(i, j)]
        weights = torch.exp((x.q[:, i, None] * k[:, js]).sum(-1) * SCALE)
        rows.append(torch.einsum("bjh,bjhv->bhv", weights / weights.sum(1, keepdim=True), v[:, js]))
    return torch.stack(rows, 1)


def sliding_window(m, x):
    return softmax(m, x, lambda i, j: j <= i and (i - j < m.options.window or j < m.options.sinks))


def lolcats(m, x):
    """Equation 6: exponentials near, relative to the largest, features far, one sum below the line."""
    o, scores, v, rows = m.options, dot(x.q, x.k) * SCALE, wide(x.v), []
    q, k = (per_head(z, m.linear.resize[n]) if o.width else z for n, z in (("q", x.q), ("k", x.k)))
    features = WEIGHTS[o.feature_map](m.linear, q, k)
    for i in range(x.q.shape[1]):
        near = [j for j in range(i + 1) if i - j < o.window or j < o.sinks]
        far = [j for j in range(i + 1) if j not in near]
        s = scores[:, :, i, near]
        soft = torch.sigmoid(m.factor)[:, None] * torch.exp(s - s.max(-1, keepdim=True).values)
        weights = torch.cat([soft, features[:, :, i, far]], -1)
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append(torch.einsum("bhj,bjhv->bhv", weights, v[:, near + far]))
    return torch.stack(rows, 1)


def window_memory(m, x):
    """The window's softmax, and R times the delta rule over keys and values `window` tokens late, sinks left out."""
    late, seen = m.options.window, m.options.window + m.options.sinks
    q, k, v, gates = x.q[:, seen:], x.k[:, seen - late : -late], x.v[:, seen - late : -late], x.x[:, seen:]
    if m.options.code_rank:
        codes = linear(x.x, m.code)
        q, k = (linear(codes, own).unflatten(-1, (-1, 6)) for own in (m.own_q, m.own_k))
        q, k, gates = q[:, seen:], k[:, seen - late : -late], gates + linear(codes, m.own_x)[:, seen - late : -late]
    new = SimpleNamespace(q=q, k=k, v=v, x=gates)
    far = torch.einsum("bthv,hvw->bthw", gated_deltanet(m.linear, new), m.readout)
    return sliding_window(m, x) + torch.cat([torch.zeros_like(far[:, :1]).expand(-1, seen, -1, -1), far], 1)


# ---------------------------------------------------------------- linear attention: a pair's weight by its formula


def dot(q, k):
    return torch.einsum("bihk,bjhk->bhij", q, wide(k))


def dpfp(x):
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    n = r.shape[-1]
    return torch.stack([r[..., i] * r[..., (i + 1) % n] for i in range(n)], -1)


def rebased(x, phi):
    """(q̂·k̂)²/K² with q̂ = γ ⊙ layernorm(q) + β."""
    centred = x - x.mean(-1, keepdim=True)
    return phi.gamma * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + phi.beta


def distance(q):
    at = torch.arange(q.shape[1], dtype=torch.float64)
    return at[:, None] - at


def both(f, m, q, k):
    """φ(q)·φ(k) for a map with parameters."""
    return dot(f(q, m.phi_q), f(k, m.phi_k))


def softmaxes(z, phi):
    y = per_head(z, phi.weight).exp()
    return torch.cat([y / y.sum(-1, keepdim=True), 1 / y / (1 / y).sum(-1, keepdim=True)], -1)


WEIGHTS = {
    "identity": lambda m, q, k: dot(q, k),
    "relu": lambda m, q, k: dot(q.clamp(min=0), k.clamp(min=0)),
    "elu1": lambda m, q, k: dot(*(torch.where(z > 0, z + 1, z.clamp(max=0).exp()) for z in (q, k))),
    "softmax": lambda m, q, k: dot(*(z.exp() / z.exp().sum(-1, keepdim=True) for z in (q, k))),
    "t2r": partial(both, lambda z, phi: (per_head(z, phi.weight) + phi.bias).clamp(min=0)),
    "hadamard": partial(both, lambda z, phi: per_head(z, phi.weight) * (per_head(z, phi.second) + phi.bias)),
    "dpfp": lambda m, q, k: dot(dpfp(q), dpfp(k)),
    "hedgehog": partial(both, softmaxes),
    "taylor": lambda m, q, k: 1 + (s := dot(q, k) / q.shape[-1] ** 0.5) + s**2 / 2,
    "rebased": lambda m, q, k: (both(rebased, m, q, k) / q.shape[-1]) ** 2,
    "cosformer": lambda m, q, k: dot(q.clamp(min=0), k.clamp(min=0)) * torch.cos(math.pi * distance(q) / (2 * 80)),
}


def linear_attention(m, x):
    q, k = x.q, x.k
    if hasattr(m, "resize"):
        q, k = per_head(q, m.resize["q"]), per_head(k, m.resize["k"])
    weights = WEIGHTS[m.options.feature_map](m, q, k).tril()
    if m.options.normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    else:
        weights = weights * SCALE
    return torch.einsum("bhij,bjhv->bihv", weights, wide(x.v))


# ---------------------------------------------------------------- what follows the recurrence


def read_out(m, o, x):
    """Head norm, RWKV-7's bonus, output gate."""
    kind = m.options.output_norm
    if kind != "none":
        o = o - o.mean(-1, keepdim=True) if kind == "layer" else o
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.norm_weight
    if m.name == "rwkv7":
        o = o + (x.q * SCALE * rwkv7_parts(m, x)[3] * m.bonus).sum(-1, keepdim=True) * wide(x.v)
    if m.options.output_gate != "none":
        gate = heads(linear(x.x, m.gate))
        o = o * torch.sigmoid(gate) * (gate if m.options.output_gate == "silu" else 1)
    return o


CASES = {
    "retnet": (retnet, "retnet", {}),
    "gla": (gla, "gla", {"rank": 5}),
    "metala": (metala, "metala", {}),
    "metala-augmented": (metala, "metala", {"augment": True}),
    "hgrn2": (hgrn2, "hgrn2", {}),
    "hgrn2-swish": (hgrn2, "hgrn2", {"swish": True}),
    "mamba2": (mamba2, "mamba2", {}),
    "discrete_mamba2": (discrete_mamba2, "discrete_mamba2", {}),
    "deltanet": (deltanet, "deltanet", {}),
    "deltanet-negative": (deltanet, "deltanet", {"negative_eigenvalues": True, "output_norm": "rms"}),
    "gated_deltanet": (gated_deltanet, "gated_deltanet", {}),
    "gated_deltanet-negative": (gated_deltanet, "gated_deltanet", {"negative_eigenvalues": True}),
    "kda": (kda, "kda", {"rank": 3}),
    "rwkv6": (rwkv6, "rwkv6", {"rank": 5}),
    "rwkv6-complement": (rwkv6, "rwkv6", {"rank": 5, "complement": True, "output_norm": "layer"}),
    "rwkv7": (rwkv7, "rwkv7", {"rank": 5}),
    "rwkv7-published": (rwkv7, "rwkv7", {"rank": 5, "unit_keys": False, "output_norm": "layer"}),
    "mlstm": (mlstm, "mlstm", {}),
    "gsa": (gsa, "gsa", {"slots": 7}),
    "gsa-swish": (gsa, "gsa", {"slots": 7, "swish": True, "output_norm": "rms"}),
    "softmax": (softmax, "softmax", {}),
    "sliding_window": (sliding_window, "sliding_window", {"window": 5, "sinks": 2}),
    "sliding_window-no-sinks": (sliding_window, "sliding_window", {"window": 3, "sinks": 0}),
    "lolcats": (lolcats, "lolcats", {"window": 5}),
    "lolcats-sinks": (lolcats, "lolcats", {"window": 3, "sinks": 2, "output_norm": "rms"}),
    "lolcats-taylor": (lolcats, "lolcats", {"window": 4, "feature_map": "taylor", "width": 3}),
    "window_memory": (window_memory, "window_memory", {"window": 5, "sinks": 2}),
    "window_memory-codes": (window_memory, "window_memory", {"window": 3, "sinks": 0, "code_rank": 4}),
    "based": (linear_attention, "based", {"width": 3}),
    "rebased": (linear_attention, "rebased", {"width": 3}),
    "hedgehog": (linear_attention, "hedgehog", {}),
    "cosformer": (linear_attention, "cosformer", {"horizon": 80}),
}
for feature_map in WEIGHTS:
    option = {"feature_map": feature_map, "normalise": feature_map not in ("identity", "hadamard"), "horizon": 80}
    CASES[f"linear_attention-{feature_map}"] = (linear_attention, "linear_attention", option)


def whole(mixer, x):
    return mixer(x.q, x.k, x.v, x.x)[0]


def by_matrix(mixer, x):
    return mixer.forward_matrix(x.q, x.k, x.v, x.x)[0]


def token_by_token(mixer, x):
    out, state = [], {}
    for parts in zip(*(z.split(1, 1) for z in (x.q, x.k, x.v, x.x)), strict=True):
        y, state = mixer(*parts, state=state)
        out.append(y)
    return torch.cat(out, 1)


@pytest.mark.parametrize("form", [whole, by_matrix, token_by_token])
@pytest.mark.parametrize("case", CASES)
def test_mixer_is_its_equation(case, form):
    equation, name, options = CASES[case]
    mixer, x = mixer_case(name, options, length=70 if form is whole else 21)  # more than a chunk
    with float64():  # feature_maps.pairwise_products takes √2 in the default precision
        agree(lambda x: form(mixer, x), lambda x: read_out(mixer, equation(mixer, x), x), x)


def test_every_mixer_has_an_equation():
    covered = {name for _, name, _ in CASES.values()}
    covered |= {m for m in mixers.list_mixers() if f"linear_attention-{m}" in CASES}  # registered feature maps
    covered |= {"hybrid", "head_split"}  # made of two others: tests/mixers/test_hybrids.py, test_head_split.py
    assert set(mixers.list_mixers()) <= covered
