"""Our mixers against flash-linear-attention's naive functions, fed with gates computed here as its layers have them.

In float64, outputs and the gradients of inputs and parameters; the softmax mixers against transformers' too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from helpers.oracles import (
    Samples,
    agree,
    fla,
    float64,
    heads,
    linear,
    mixer_case,
    swapped,
    transformers_function,
    wide,
)
from limbeck.mixers import Tokens
from limbeck.mixers.feature_maps import FEATURE_MAPS

NONE = Tokens()


@pytest.fixture(autouse=True)
def _double():
    """feature_maps.pairwise_products takes √2 in the default precision."""
    with float64():
        yield


def attended(mixer, x):
    """Output of the mixer's operator and its state, ahead of norm and gate."""
    o, state = mixer.attend(x.q, x.k, x.v, x.x, NONE, {})
    return o, state.get("memory")


def test_retnet_of_fla():
    """Retention with γ_h = 1 − 2^(−5−h)."""
    peer = fla("retention/naive.py", "naive_retention")
    mixer, x = mixer_case("retnet")
    agree(
        lambda x: attended(mixer, x)[0],
        lambda x: peer(*swapped(x.q, wide(x.k), wide(x.v))).transpose(1, 2),
        x,
    )


def test_gla_of_fla():
    """Decay logsigmoid(W₂W₁x + b)/16."""
    peer = fla("gla/naive.py", "naive_recurrent_gla")
    mixer, x = mixer_case("gla")

    def theirs(x):
        decay = F.logsigmoid(heads(linear(linear(x.x, mixer.decay_down), mixer.decay_up))) / 16
        return peer(x.q, wide(x.k), wide(x.v), decay, output_final_state=True)

    agree(lambda x: attended(mixer, x), theirs, x)


def test_hgrn2_of_fla():
    """g = log(β + (1 − β) σ(f)), k = 1 − exp(g), q = swish(q); ours takes f = b − k from the teacher's keys."""
    peer = fla("gla/naive.py", "naive_recurrent_gla")
    mixer, x = mixer_case("hgrn2", {"swish": True})

    def theirs(x):
        bound = torch.sigmoid(mixer.bound)
        g = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(mixer.bias - wide(x.k)))
        return peer(F.silu(x.q), 1 - g.exp(), wide(x.v), g, output_final_state=True)

    agree(lambda x: attended(mixer, x), theirs, x)


@pytest.mark.parametrize("name", ["naive_recurrent_rwkv6", "naive_chunk_rwkv6"])
def test_rwkv6_of_fla(name):
    """o_t = (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t, log w = −exp(d + W₂ tanh(W₁ x)); heads first."""
    recurrent = name == "naive_recurrent_rwkv6"
    peer = fla(f"rwkv6/{'recurrent' if recurrent else 'chunk'}_naive.py", name)
    mixer, x = mixer_case("rwkv6", length=32)

    def theirs(x):
        decay = -torch.exp(heads(linear(torch.tanh(linear(x.x, mixer.decay_down)), mixer.decay_up)))
        q = x.q if recurrent else x.q * 6**-0.5  # the chunked one does not scale
        options = {"output_final_state": True} if recurrent else {"chunk_size": 8}
        o = peer(*swapped(q, wide(x.k), wide(x.v), decay), mixer.bonus, **options)
        return (o[0].transpose(1, 2), o[1]) if recurrent else o.transpose(1, 2)

    agree(lambda x: attended(mixer, x), theirs, x, grads=recurrent)  # the chunked one has none: it writes in place


def test_rwkv7_of_fla():
    """Decay, rate, κ and keys as its layer has them, the state by dplr_recurrence, then norm, bonus and gate. Its last
    function multiplies by the gate itself."""
    peer = fla("generalized_delta_rule/dplr/naive.py", "dplr_recurrence")
    update = fla("rwkv7/fused_k_update.py", "k_update_ref")
    correct = fla("rwkv7/gate_output_correction.py", "gate_output_correction_ref")
    mixer, x = mixer_case("rwkv7", {"conv": 0, "rank": 5, "gate_rank": 3}, preset="published", groups=4, value=6)

    def theirs(x):
        decay = -0.6065306597126334 * linear(torch.tanh(linear(x.x, mixer.decay_down)), mixer.decay_up).sigmoid()
        rate = linear(linear(x.x, mixer.rate_down), mixer.rate_up).sigmoid()
        unit = F.normalize(x.k * mixer.erase_scale, dim=-1)
        k = update(x.k, heads(rate), mixer.rate_share)
        o, _ = peer(*swapped(x.q, k, x.v, -unit, unit * heads(rate), heads(decay)))
        o = group_norm(o.transpose(1, 2), mixer)
        gate = linear(linear(x.x, mixer.gate_down).sigmoid(), mixer.gate)  # as its LoRA class has it, without a bias
        return correct(o.flatten(2), x.q * 6**-0.5, k, mixer.bonus, x.v, gate)

    agree(lambda x: mixer(x.q, x.k, x.v, x.x)[0].flatten(2), theirs, x)


def group_norm(o, mixer):
    """RWKV's GroupNorm with a group a head."""
    weight, bias = mixer.norm_weight.flatten(), mixer.norm_bias.flatten()
    return heads(F.group_norm(o.flatten(2).flatten(0, 1), 4, weight, bias, eps=1e-6).unflatten(0, o.shape[:2]))


def rms_norm(o, mixer):
    """One norm over all heads, as fla's layers have it behind `rearrange(o, "... h d -> ... (h d)")`."""
    return heads(F.rms_norm(o.flatten(2), (o.shape[2] * o.shape[3],), mixer.norm_weight.flatten(), eps=1e-6))


PUBLISHED = {
    "rwkv6": lambda o, mixer, x: group_norm(o, mixer) * F.silu(heads(linear(x.x, mixer.gate))),
    "hgrn2": lambda o, mixer, x: rms_norm(o, mixer),
    "gsa": lambda o, mixer, x: rms_norm(o, mixer),
    "gla": lambda o, mixer, x: (
        F.rms_norm(o, (6,), eps=1e-6) * mixer.norm_weight * F.silu(heads(linear(x.x, mixer.gate)))
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_follows_the_recurrence_is_the_authors(name):
    """Norm and gate of the `published` preset behind the operator's output, which other tests have compared."""
    mixer, x = mixer_case(name, {"conv": 0}, preset="published", value=6)
    agree(
        lambda x: mixer(x.q, x.k, x.v, x.x)[0],
        lambda x: PUBLISHED[name](attended(mixer, x)[0], mixer, x),
        x,
    )


def test_gated_slot_attention_of_fla():
    """Decay logsigmoid(f)/16 per slot, write weights 1 − α, swish on q and k."""
    peer = fla("gsa/naive.py", "naive_recurrent_gsa")
    mixer, x = mixer_case("gsa", {"slots": 7, "swish": True})

    def theirs(x):
        decay = F.logsigmoid(heads(linear(x.x, mixer.forget))) / 16
        q, k = F.silu(x.q), wide(F.silu(x.k))
        o, last = peer(q, k, wide(x.v), 1 - decay.exp(), decay, output_final_state=True)
        return o, *last

    def ours(x):
        o, state = mixer.attend(x.q, x.k, x.v, x.x, NONE, {})
        return o, state["keys"], state["values"]

    agree(ours, theirs, x)


@pytest.mark.parametrize("name", ["naive_recurrent_linear_attn", "naive_chunk_linear_attn"])
def test_normalised_linear_attention_of_fla(name):
    """elu(q)+1 and elu(k)+1, divided by the sum of the weights (plus 1e-10 there)."""
    peer = fla("linear_attn/naive.py", name)
    mixer, x = mixer_case("linear_attention", length=64)

    def theirs(x):
        return peer(F.elu(x.q) + 1, wide(F.elu(x.k) + 1), wide(x.v), scale=1.0, normalize=True)

    agree(lambda x: attended(mixer, x)[0], theirs, x, 1e-8)


@pytest.mark.parametrize("name", ["naive_parallel_based", "naive_chunk_based"])
def test_based_of_fla(name):
    """Weights 1 + s + s²/2 with s = q·k/√K, heads first; it adds 1e-6 to their sum."""
    peer = fla("based/naive.py", name)
    mixer, x = mixer_case("based", {"width": 0}, length=32)
    options = {"chunk_size": 8} if name == "naive_chunk_based" else {}
    agree(
        lambda x: attended(mixer, x)[0],
        lambda x: peer(*swapped(x.q, wide(x.k), wide(x.v)), **options).transpose(1, 2),
        x,
        1e-5,
    )
    if name == "naive_parallel_based":
        mixer, x = mixer_case("linear_attention", {"feature_map": "taylor", "normalise": False}, scale=1.0)
        agree(
            lambda x: attended(mixer, x)[0],
            lambda x: peer(*swapped(x.q, wide(x.k), wide(x.v)), use_norm=False).transpose(1, 2),
            x,
        )


def test_rebased_of_fla():
    """Weights (q̂·k̂)²/K of layer-normed q and k, heads first; ours are (q̂·k̂)²/K², which no normalised row shows.
    Compared without the normaliser, to which it adds 1e-6."""
    peer = fla("rebased/naive.py", "naive_parallel_rebased")
    mixer, x = mixer_case("linear_attention", {"feature_map": "rebased", "normalise": False}, scale=1.0)

    def theirs(x):
        q, k = (F.layer_norm(z, (6,)) * m.gamma + m.beta for z, m in ((x.q, mixer.phi_q), (x.k, mixer.phi_k)))
        return peer(*swapped(q, wide(k), wide(x.v)), use_norm=False).transpose(1, 2)

    agree(lambda x: attended(mixer, x)[0] * 6, theirs, x)


MAPS = {
    "dpfp": ("DPFPFeatureMap", {"nu": 1}, {}),
    "t2r": ("T2RFeatureMap", {"bias": True}, {"layer.weight": "weight", "layer.bias": "bias"}),
    "hadamard": (
        "HadamardFeatureMap",
        {},
        {"layer1.weight": "weight", "layer2.weight": "second", "layer2.bias": "bias"},
    ),
    "taylor": ("TaylorFeatureMap", {}, {}),
    "rebased": ("RebasedFeatureMap", {"use_beta": False}, {"gamma": "gamma"}),
}


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_of_fla(name):
    """φ(q)·φ(k), but for ReBased's factor 1/K; theirs share their weights over heads. Hedgehog is left out: theirs is
    one softmax over ±2Wx, ours the two softmaxes of the paper and LoLCATs (test_oracle_equations.py)."""
    kind, options, names = MAPS[name]
    helpers = ("flatten_diag_outer_product_off1", "_triu_indices")
    theirs = fla("feature_map.py", kind, *helpers, folder="modules")(6, **options).double()
    ours = FEATURE_MAPS[name](4, 6).double()
    x = Samples("q k", key=6, unit=False)
    make = torch.Generator().manual_seed(2)
    given = {}
    for theirs_name, ours_name in names.items():
        size = dict(theirs.named_parameters())[theirs_name].shape
        w = x.leaves[ours_name] = torch.randn(size, generator=make, dtype=torch.float64).requires_grad_()
        given[ours_name] = w.T.expand(4, *w.T.shape) if w.dim() == 2 else w.expand(4, -1)
        given[theirs_name] = w
    if name == "hadamard":
        given["layer1.bias"] = torch.zeros(6, dtype=torch.float64)  # ours has none there

    def weights(phi, of_phi):
        mine = {n: given[n] for n in given if n in of_phi}
        q, k = (functional_call(phi, mine, (z,)) for z in (x.q, x.k))
        return torch.einsum("bihf,bjhf->bhij", q, k)

    mine = dict(ours.named_parameters())
    mine.pop("beta", None)
    if name == "rebased":
        torch.nn.init.zeros_(ours.beta)
    factor = 6 if name == "rebased" else 1
    theirs_names = dict(theirs.named_parameters())
    agree(lambda _: weights(ours, mine) * factor, lambda _: weights(theirs, theirs_names), x)


def test_decay_gates_of_fla():
    """log α = −exp(A) softplus(w·x + dt), per head in Gated DeltaNet and per channel in KDA."""
    peer = fla("gated_delta_rule/gate.py", "naive_gdn_gate")
    mixer, x = mixer_case("gated_deltanet")
    x.leaves = {n: x.leaves[n] for n in ("x", "decay.weight", "decay.bias", "log_rate")}
    agree(lambda x: mixer.log_decay(x.x), lambda x: peer(linear(x.x, mixer.decay), mixer.log_rate), x)
    peer = fla("kda/gate.py", "naive_kda_gate")
    mixer, x = mixer_case("kda")
    x.leaves = {n: x.leaves[n] for n in ("x", "decay_down.weight", "decay_up.weight", "decay_up.bias", "log_rate")}

    def theirs(x):
        raw = F.linear(linear(x.x, mixer.decay_down), mixer.decay_up.weight)
        return peer(heads(raw), mixer.log_rate, mixer.decay_up.bias)

    agree(lambda x: mixer.log_decay(x.x), theirs, x)


# ---------------------------------------------------------------- softmax attention


def eager(x, mask):
    """transformers' eager attention of Llama; mask: what a query may see, bool, [T, T]."""
    attention = transformers_function("llama", "eager_attention_forward")
    module = nn.Module()
    module.num_key_value_groups = 2
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return attention(module.eval(), *swapped(x.q, x.k, x.v), bias, 6**-0.5)[0]


def test_softmax_of_llama_and_of_fla():
    """softmax(QKᵀ/√K) V with two query heads a group, causal."""
    mixer, x = mixer_case("softmax")
    causal = torch.ones(21, 21).tril().bool()
    agree(lambda x: attended(mixer, x)[0], lambda x: eager(x, causal), x)
    peer = fla("attn/naive.py", "naive_parallel_attn")
    agree(lambda x: attended(mixer, x)[0], lambda x: peer(x.q, x.k, x.v)[0], x)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_sliding_window_of_transformers_and_of_fla(window, sinks):
    """The last `window` tokens (the token itself counts) by transformers' mask of Mistral and the like, and the first
    `sinks`; without sinks fla's window too."""
    masking = pytest.importorskip("transformers.masking_utils")
    mixer, x = mixer_case("sliding_window", {"window": window, "sinks": sinks})
    allowed = masking.sliding_window_causal_mask_function(window)
    at = torch.arange(21)
    mask = torch.stack([allowed(None, None, i, at) for i in at])
    mask |= torch.ones(21, 21).tril().bool() & (at < sinks)
    agree(lambda x: attended(mixer, x)[0], lambda x: eager(x, mask), x)
    if not sinks:
        peer = fla("attn/naive.py", "naive_parallel_attn")
        agree(lambda x: attended(mixer, x)[0], lambda x: peer(x.q, x.k, x.v, window_size=window)[0], x)
