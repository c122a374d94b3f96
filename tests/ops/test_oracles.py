"""Our operators against other people's reference code: outputs, final states, and the gradients of every input.

Peers are flash-linear-attention's naive functions and the plain torch paths of transformers, both in float64, so that
agreement means 1e-10. Where a peer scales q by K^−½ without being asked it is given q·√K.
"""

import pytest
import torch
import torch.nn.functional as F

from helpers.oracles import (
    EXACT,
    ROOT,
    Samples,
    agree,
    close,
    fla,
    fla_folder,
    float64,
    forms,
    modeling,
    randomised,
    run,
    strengths,
    swapped,
    transformers_function,
)
from limbeck.ops import scalar_decay, value_decay, vector_decay


def test_flash_linear_attention_is_there():
    """The dev extra brings it; without it half of these tests would be empty."""
    assert (fla_folder() / "ops" / "gla" / "naive.py").exists()


# ---------------------------------------------------------------- scalar decay


@forms
def test_linear_attention_of_fla(form):
    """S_t = S_{t-1} + k_t v_tᵀ, token by token with a state and in chunks of 64."""
    peer = fla("linear_attn/naive.py", "naive_recurrent_linear_attn")
    agree(
        lambda x: run(scalar_decay, form, x.q, x.k, x.v, state=x.state),
        lambda x: peer(x.q, x.k, x.v, scale=1.0, initial_state=x.state, output_final_state=True),
        Samples("q k v state"),
    )
    peer = fla("linear_attn/naive.py", "naive_chunk_linear_attn")
    agree(
        lambda x: run(scalar_decay, form, x.q, x.k, x.v)[0],
        lambda x: peer(x.q, x.k, x.v, scale=1.0),
        Samples(length=128),
    )


@forms
@strengths
@pytest.mark.parametrize("name", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_simple_gla_of_fla(form, strength, name):
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ with one data-dependent decay per head."""
    peer = fla("simple_gla/naive.py", name)
    agree(
        lambda x: run(scalar_decay, form, x.q, x.k, x.v, strength * x.g, state=x.state),
        lambda x: peer(x.q, x.k, x.v, strength * x.g, scale=1.0, initial_state=x.state, output_final_state=True),
        Samples("q k v g state"),
    )


def test_matrix_of_simple_gla_of_fla():
    """(QKᵀ) ⊙ Γ, the matrix itself."""
    peer = fla("simple_gla/naive.py", "naive_parallel_simple_gla")
    agree(
        lambda x: scalar_decay.matrix(x.q, x.k, x.g),
        lambda x: peer(x.q, x.k, x.v, x.g, scale=1.0)[1],
        Samples("q k v g"),
    )


@forms
def test_retention_of_fla(form):
    """γ_h = 1 − 2^(−5−h), heads first."""
    peer = fla("retention/naive.py", "naive_retention")
    log_decay = torch.log1p(-(2.0 ** -(5 + torch.arange(4, dtype=torch.float64))))
    agree(
        lambda x: run(scalar_decay, form, x.q, x.k, x.v, log_decay)[0],
        lambda x: peer(*swapped(x.q * ROOT, x.k, x.v)).transpose(1, 2),
        Samples(),
    )


@forms
def test_hgrn_of_fla(form):
    """h_t = exp(g_t) ⊙ h_{t-1} + x_t: every channel is a head of width one."""
    peer = fla("hgrn/naive.py", "naive_recurrent_hgrn")
    one = torch.ones(2, 37, 4, 1, dtype=torch.float64)

    def ours(x):
        o, last = run(scalar_decay, form, one, one, x.v, x.g, state=x.state)
        return o.squeeze(-1), last.flatten(1)

    agree(
        ours,
        lambda x: peer(x.v.squeeze(-1), x.g, x.state.flatten(1), output_final_state=True),
        Samples("v g state", key=1, value=1),
    )


MAMBA2 = ["mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"]


@forms
@pytest.mark.parametrize("family", MAMBA2)
def test_mamba2_of_transformers(form, family):
    """S_t = exp(AΔ_t) S_{t-1} + Δ_t B_t x_tᵀ, y_t = S_tᵀ C_t + D x_t with B and C shared by groups of heads. Its states
    are [B, H, V, K]."""
    peer = transformers_function(family, "mamba2_chunk_scan")
    rate, skip = torch.tensor([-0.3, -1.0, -2.0, -0.1]).double(), torch.tensor([1.0, 0.0, -0.5, 2.0]).double()

    def ours(x):
        step = F.softplus(x.b)
        keys = x.k.repeat_interleave(2, 2) * step[..., None]
        queries = x.k.flip(1).repeat_interleave(2, 2)  # C has groups too
        o, last = run(scalar_decay, form, queries, keys, x.v, rate * step, state=x.state)
        return o + skip[:, None] * x.v, last

    def theirs(x):
        o, last = peer(
            x.v, x.b, rate, x.k, x.k.flip(1), chunk_size=8, D=skip, dt_softplus=True,
            initial_states=x.state.mT, return_final_states=True,
        )  # fmt: skip
        return o, last.mT

    x = Samples("k v b state", groups=2)
    x.leaves["v"] = torch.randn(2, 37, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.leaves["v"].requires_grad_()
    agree(ours, theirs, x)


@pytest.mark.parametrize("family", MAMBA2)
def test_mamba2_step_of_transformers(family):
    """The same, one token; it overwrites the state that it is given."""
    peer = transformers_function(family, "mamba2_selective_state_update")
    x = Samples("q k v b state", length=1)
    rate = torch.tensor([-0.3, -1.0, -2.0, -0.1]).double()
    state = x.state.detach().mT.clone()
    wide = (4, 3, 5)
    step = x.b[:, 0, :, None].expand(-1, -1, 3)
    wanted = peer(
        state, x.v[:, 0], step, rate[:, None, None].expand(wide), x.k[:, 0], x.q[:, 0], dt_softplus=True
    )  # fmt: skip
    step = F.softplus(x.b)
    o, last = scalar_decay.recurrent(x.q, x.k * step[..., None], x.v, rate * step, state=x.state)
    close(o[:, 0], wanted, EXACT, "output")
    close(last, state.mT, EXACT, "state")


@pytest.mark.parametrize("layer", [0, 1])
def test_lightning_attention_of_minimax(layer):
    """S_t = exp(−slope) S_{t-1} + k_t v_tᵀ, a constant decay per head that fades with the depth, no scale; all that
    its layer does about it is undone."""
    module = modeling("minimax")
    config = module.MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=2, block_size=8,
        layer_types=["linear_attention"] * 2,
    )  # fmt: skip
    with float64(module):
        peer = randomised(module.MiniMaxLightningAttention(config, layer))
        peer.norm, peer.out_proj, peer.output_gate = (torch.nn.Identity() for _ in range(3))
        x = Samples("x", hidden=16)
        x.leaves |= dict(peer.named_parameters())

        def ours(x, form):
            q, k, v = F.silu(peer.qkv_proj(x.x)).unflatten(-1, (4, -1)).chunk(3, -1)
            o, last = run(scalar_decay, form, q, k, v, -peer.slope_rate.flatten())
            return o.flatten(2) * torch.sigmoid(x.x), last

        for form in ("recurrent", "chunked"):
            agree(lambda x, form=form: ours(x, form), lambda x: peer(x.x, None, None), x)


# ---------------------------------------------------------------- vector and value decay


@forms
@strengths
def test_gla_of_fla(form, strength):
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ."""
    peer = fla("gla/naive.py", "naive_recurrent_gla")
    agree(
        lambda x: run(vector_decay, form, x.q, x.k, x.v, strength * x.w, state=x.state),
        lambda x: peer(x.q * ROOT, x.k, x.v, strength * x.w, initial_state=x.state, output_final_state=True),
        Samples("q k v w state"),
    )


@forms
@strengths
def test_gated_slot_attention_of_fla(form, strength):
    """Two passes: slot keys K_t = K_{t-1} Diag(α_t) + k_t s_tᵀ, p = softmax(K_tᵀ q_t), slot values
    V_t = Diag(α_t) V_{t-1} + s_t v_tᵀ. Its states are these two, [B, H, K, M] and [B, H, M, V]."""
    peer = fla("gsa/naive.py", "naive_recurrent_gsa")
    x = Samples("q k v w state", key=5, value=3)  # w: the decay of five slots
    x.leaves["keys"] = Samples("state", value=5, seed=1).leaves["state"]

    def ours(x):
        decay = strength * x.w
        write = -torch.expm1(decay)
        logits, keys = run(value_decay, form, x.q, x.k, write, decay, state=x.keys)
        o, values = run(vector_decay, form, logits.softmax(-1), write, x.v, decay, state=x.state)
        return o, keys, values

    def theirs(x):
        decay = strength * x.w
        write = -torch.expm1(decay)
        o, last = peer(x.q, x.k, x.v, write, decay, 1.0, initial_state=(x.keys, x.state), output_final_state=True)
        return o, *last

    agree(ours, theirs, x)
