"""Our delta rules and diagonal plus rank one against other people's reference code, as in test_oracles.py.

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
    forms,
    run,
    strengths,
    swapped,
    transformers_function,
)
from limbeck.ops import delta_rule, dplr


@forms
def test_delta_rule_of_fla(form):
    """S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, token by token and in chunks of 32; heads first."""
    ours, names = (lambda x: run(delta_rule, form, x.q, x.k, x.v, x.b, state=x.leaves.get("state"))), "q k v b"
    for name, options, x in (
        ("delta_rule_recurrence", True, Samples(names + " state")),
        ("delta_rule_chunkwise", False, Samples(names, length=64)),
    ):
        peer = fla("delta_rule/naive.py", name)

        def theirs(x, peer=peer, options=options):
            o, last = peer(*swapped(x.q * ROOT, x.k, x.v, x.b), **({"initial_state": x.state} if options else {}))
            return o.transpose(1, 2), last

        agree(ours, theirs, x)


def test_matrix_of_delta_rule_of_fla():
    """P (I + Diag(β) G)⁻¹ Diag(β); theirs is to multiply β v, so without the last factor. Values only: it writes in
    place."""
    peer = fla("delta_rule/naive.py", "delta_rule_parallel")
    x = Samples("q k v b", length=128)
    o, m = peer(*swapped(x.q.detach() * ROOT, x.k.detach(), x.v.detach(), x.b.detach()))
    ours = delta_rule.matrix(x.q, x.k, x.b)
    close(ours, m * x.b.transpose(1, 2)[:, :, None], EXACT, "matrix")
    close(torch.einsum("bhij,bjhv->bhiv", ours, x.v), o, EXACT, "output")


@forms
@strengths
def test_gated_delta_rule_of_fla(form, strength):
    """S_t = exp(g_t) (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ. Its two functions order β and g differently."""
    for name in ("naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"):
        peer = fla("gated_delta_rule/naive.py", name)
        agree(
            lambda x: run(delta_rule, form, x.q, x.k, x.v, x.b, strength * x.g, state=x.state),
            lambda x, peer=peer: peer(
                x.q, x.k, x.v, beta=x.b, g=strength * x.g, scale=1.0, initial_state=x.state, output_final_state=True
            ),
            Samples("q k v b g state"),
        )


@forms
@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_gated_delta_rule_of_transformers(form, family, name):
    """The same, with q and k shared by two value heads each."""
    peer = transformers_function(family, name)
    x = Samples("q k v b g state", groups=2)
    x.leaves["v"] = Samples("v").v.detach().requires_grad_()
    agree(
        lambda x: run(delta_rule, form, two(x), x.k, x.v, x.b, x.g, state=x.state),
        lambda x: peer(
            x.q[:, :, ::2] * ROOT, x.k, x.v, g=x.g, beta=x.b, initial_state=x.state, output_final_state=True
        ),
        x,
    )


def two(x):
    """Every other query for two heads each."""
    return x.q[:, :, ::2].repeat_interleave(2, 2)


@forms
@pytest.mark.parametrize("name", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_kda_of_fla(form, name):
    """S_t = (I − β_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ, with q and k shared by two value heads each."""
    peer = fla("kda/naive.py", name)
    x = Samples("q k v b w state", groups=2, length=32)
    x.leaves["v"] = Samples("v", length=32).v.detach().requires_grad_()
    options = {} if name == "naive_recurrent_kda" else {"chunk_size": 16}
    agree(
        lambda x: run(delta_rule, form, two(x), x.k, x.v, x.b, x.w, state=x.state),
        lambda x: peer(
            x.q[:, :, ::2], x.k, x.v, x.w, x.b, scale=1.0, initial_state=x.state, output_final_state=True, **options
        ),
        x,
    )


@forms
@strengths
@pytest.mark.parametrize("name", ["recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"])
@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid", "glm5_next"])
def test_kda_of_transformers(form, strength, family, name):
    """The same in three models' code."""
    peer = transformers_function(family, name)
    agree(
        lambda x: run(delta_rule, form, x.q, x.k, x.v, x.b, strength * x.w, state=x.state),
        lambda x: peer(x.q * ROOT, x.k, x.v, strength * x.w, x.b, initial_state=x.state, output_final_state=True),
        Samples("q k v b w state"),
    )


# ---------------------------------------------------------------- diagonal plus rank one


def reads_and_writes(x):
    """a = −κ and b = κ times a rate per channel, as in RWKV-7."""
    unit = F.normalize(x.u, dim=-1)
    return -unit, unit * x.r.sigmoid()


@forms
@strengths
@pytest.mark.parametrize("name", ["dplr_recurrence", "dplr_chunkwise"])
def test_diagonal_plus_low_rank_of_fla(form, name, strength):
    """S_t = Diag(exp g_t) S_{t-1} + β_t (α_tᵀ S_{t-1}) + k_t v_tᵀ, where α reads the state before it decays; heads
    first. RWKV-7 is this with α = −κ, β = a κ."""
    peer = fla("generalized_delta_rule/dplr/naive.py", name)

    def theirs(x):
        inputs = swapped(x.q * ROOT, x.k, x.v, *reads_and_writes(x), strength * x.w)
        o, last = peer(*inputs, initial_state=x.state)
        return o.transpose(1, 2), last

    agree(
        lambda x: run(dplr, form, x.q, x.k, x.v, *reads_and_writes(x), strength * x.w, state=x.state),
        theirs,
        Samples("q k v u r w state", length=64),
    )


@forms
@pytest.mark.parametrize("name", ["iplr_recurrence", "iplr_chunkwise"])
def test_identity_plus_low_rank_of_fla(form, name):
    """The same without decay."""
    peer = fla("generalized_delta_rule/iplr/naive.py", name)

    def theirs(x):
        o, last = peer(*swapped(x.q * ROOT, x.k, x.v, *reads_and_writes(x)), initial_state=x.state)
        return o.transpose(1, 2), last

    agree(
        lambda x: run(dplr, form, x.q, x.k, x.v, *reads_and_writes(x), torch.zeros_like(x.q), state=x.state),
        theirs,
        Samples("q k v u r state", length=64),
    )
