"""Our mixers against whole layers of transformers, float64: the same weights, outputs and gradients of all of them.

The layers' projections to q, k and v stay outside, their output projections are replaced by the identity; convolution,
gates, recurrence, head norm and output gate are compared in one piece.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from helpers.oracles import EXACT, Samples, agree, close, float64, heads, linear, mixer_case, modeling, randomised


def conv_weights(conv, widths):
    """Ours is [W, heads, width] and starts with the token itself, theirs [channels, 1, W] and ends with it."""
    parts = conv.weight.squeeze(1).T.flip(0).split([4 * w for w in widths], 1)
    return {f"conv.{n}": heads(p) for n, p in zip("qkv", parts, strict=True)}


def agree_with_layer(mixer, layer, weights, project, module):
    """`weights`: the mixer's parameters from the layer's; `project`: x -> q, k, v."""
    x = Samples("x")
    x.leaves |= dict(layer.named_parameters())

    def ours(x):
        given = weights()
        assert given.keys() == dict(mixer.named_parameters()).keys()
        return functional_call(mixer, given, (*project(x.x), x.x))[0].flatten(2)

    with float64(module):
        return agree(ours, lambda x: layer(x.x), x)


def exact_unit_length(monkeypatch, module):
    """Theirs is x/√(x² + 1e-6), ours x/max(√x², 1e-6): the same but for a millionth."""
    monkeypatch.setattr(module, "l2norm", lambda x, dim=-1, eps=0: F.normalize(x, dim=dim))


def without_projection(layer, name, rms=None, width=6):
    """The layer with the identity for its output projection; an epsilon that makes up for q's scale, which these layers
    have and ours leave to the norm."""
    setattr(layer, name, nn.Identity())
    if rms is not None:
        rms.variance_epsilon = 1e-6 / width
    return layer


def test_gated_deltanet_of_qwen3_next(monkeypatch):
    """Convolution, silu, unit length, log α = −exp(A) softplus(a + dt), β = σ(b), head norm times silu(z)."""
    module = modeling("qwen3_next")
    exact_unit_length(monkeypatch, module)
    config = module.Qwen3NextConfig(
        hidden_size=12, linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=6,
        linear_value_head_dim=4, linear_conv_kernel_dim=4, hidden_act="silu", num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    layer = randomised(module.Qwen3NextGatedDeltaNet(config, 0))
    without_projection(layer, "out_proj", layer.norm)
    mixer, _ = mixer_case("gated_deltanet", preset="published", groups=4)

    def parts():
        q, k, v, z = heads(layer.in_proj_qkvz.weight.T).split([6, 6, 4, 4], -1)
        b, a = heads(layer.in_proj_ba.weight.T).unbind(-1)
        return q, k, v, z, b, a

    def weights():
        _, _, _, z, b, a = parts()
        return {
            **conv_weights(layer.conv1d, (6, 6, 4)),
            "strength.weight": b.T, "strength.bias": torch.zeros(4).double(),
            "decay.weight": a.T, "decay.bias": layer.dt_bias, "log_rate": layer.A_log,
            "gate.weight": z.flatten(1).T, "gate.bias": torch.zeros(16).double(),
            "norm_weight": layer.norm.weight.expand(4, 4),
        }  # fmt: skip

    def project(x):
        return (torch.einsum("btd,dhk->bthk", x, w) for w in parts()[:3])

    agree_with_layer(mixer, layer, weights, project, module)


@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet_of_olmo_hybrid(monkeypatch, negative):
    """The same with write strengths up to 2."""
    module = modeling("olmo_hybrid")
    exact_unit_length(monkeypatch, module)
    config = module.OlmoHybridConfig(
        hidden_size=12, num_attention_heads=4, num_hidden_layers=2, linear_num_value_heads=4, linear_num_key_heads=4,
        linear_key_head_dim=6, linear_value_head_dim=4, linear_conv_kernel_dim=4, linear_allow_neg_eigval=negative,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    layer = randomised(module.OlmoHybridGatedDeltaNet(config, 0))
    without_projection(layer, "o_proj", layer.o_norm)
    mixer, _ = mixer_case("gated_deltanet", {"negative_eigenvalues": negative}, preset="published", groups=4)
    zeros = torch.zeros(16, dtype=torch.float64)

    def weights():
        return {
            **conv_weights(layer.conv1d, (6, 6, 4)),
            "strength.weight": layer.b_proj.weight, "strength.bias": zeros[:4],
            "decay.weight": layer.a_proj.weight, "decay.bias": layer.dt_bias, "log_rate": layer.A_log,
            "gate.weight": layer.g_proj.weight, "gate.bias": zeros,
            "norm_weight": layer.o_norm.weight.expand(4, 4),
        }  # fmt: skip

    def project(x):
        return (heads(linear(x, p)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))

    agree_with_layer(mixer, layer, weights, project, module)


def test_kda_of_kimi_linear(monkeypatch):
    """Low-rank decay per key channel, low-rank sigmoid gate after the head norm."""
    module = modeling("kimi_linear")
    exact_unit_length(monkeypatch, module)
    config = module.KimiLinearConfig(
        hidden_size=12, linear_num_heads=4, linear_head_dim=6, linear_conv_kernel_dim=4, num_hidden_layers=1,
        num_attention_heads=4, hidden_act="silu", layer_types=["linear_attention"],
    )  # fmt: skip
    layer = randomised(module.KimiLinearDeltaAttention(config, 0))
    without_projection(layer, "o_proj", layer.o_norm)
    mixer, _ = mixer_case("kda", {"gate_rank": 6}, preset="published", groups=4, value=6)

    def weights():
        gate = layer.forget_gate
        return {
            **conv_weights(layer.conv1d, (6, 6, 6)),
            "strength.weight": layer.b_proj.weight, "strength.bias": torch.zeros(4).double(),
            "decay_down.weight": gate.f_a_proj.weight, "decay_up.weight": gate.f_b_proj.weight,
            "decay_up.bias": gate.dt_bias, "log_rate": gate.A_log.flatten(),
            "gate_down.weight": layer.g_a_proj.weight, "gate.weight": layer.g_b_proj.weight,
            "gate.bias": torch.zeros(24).double(), "norm_weight": layer.o_norm.weight.expand(4, 6),
        }  # fmt: skip

    def project(x):
        return (heads(linear(x, p)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))

    agree_with_layer(mixer, layer, weights, project, module)


def test_mamba2_layer_of_transformers():
    """Convolution with silu, Δ = softplus(dt + bias), exp(−exp(A)Δ), keys Δ B, skip D x, silu(z), then one RMS norm."""
    module = modeling("mamba2")
    config = module.Mamba2Config(
        hidden_size=12, num_heads=4, head_dim=6, state_size=5, n_groups=4, expand=2, conv_kernel=4, chunk_size=8,
        use_conv_bias=False, use_bias=False, num_hidden_layers=1,
    )  # fmt: skip
    layer = randomised(module.Mamba2Mixer(config, 0)).eval()
    layer.norm.variance_epsilon, layer.norm.group_size = (
        1e-6,
        24,
    )  # its own groups are one, as many as B and C are there
    without_projection(layer, "out_proj")
    mixer, _ = mixer_case("mamba2", preset="published", groups=4, key=5, value=6, scale=1.0)

    def parts():
        return layer.in_proj.weight.split([24, 24, 20, 20, 4])

    def weights():
        v, k, q = layer.conv1d.weight.squeeze(1).T.flip(0).split([24, 20, 20], 1)
        return {
            "conv.q": heads(q), "conv.k": heads(k), "conv.v": heads(v),
            "step.weight": parts()[4], "step.bias": layer.dt_bias, "log_rate": layer.A_log, "skip": layer.D,
            "gate.weight": parts()[0], "gate.bias": torch.zeros(24).double(),
            "norm_weight": heads(layer.norm.weight),
        }  # fmt: skip

    def project(x):
        _, v, k, q, _ = parts()
        return heads(x @ q.T), heads(x @ k.T), heads(x @ v.T)

    agree_with_layer(mixer, layer, weights, project, module)


@pytest.mark.parametrize("strength", [1.0, 20.0])  # of the gates: up to exp(±15)
def test_mlstm_layer_of_xlstm(strength):
    """Soft-capped exponential input gate, sigmoid forget gate, stabilised memory and normaliser, head norm, sigmoid
    gate; in chunks and then token by token, with the states C, n and m. The peer adds ε to the denominator, 0 here."""
    module = modeling("xlstm")
    if module.external_xlstm:
        pytest.skip("transformers takes mLSTM from the xlstm package here")
    with float64(module):
        config = module.xLSTMConfig(
            hidden_size=12, num_heads=4, qk_dim_factor=2.0, v_dim_factor=2.0, chunk_size=16, eps=0.0, norm_eps=1e-6,
            num_hidden_layers=1,
        )  # fmt: skip
        layer = randomised(module.xLSTMLayer(config))
    with torch.no_grad():
        for gate in (layer.igate_preact, layer.fgate_preact):
            gate.weight.mul_(strength)
    without_projection(layer, "out_proj")
    mixer, _ = mixer_case("mlstm", preset="published", groups=4, value=6)

    def weights():
        return {
            "input_gate.weight": layer.igate_preact.weight, "input_gate.bias": layer.igate_preact.bias,
            "forget_gate.weight": layer.fgate_preact.weight, "forget_gate.bias": layer.fgate_preact.bias,
            "gate.weight": layer.ogate_preact.weight, "gate.bias": torch.zeros(24).double(),
            "norm_weight": heads(layer.multihead_norm.weight),
        }  # fmt: skip

    def project(x):
        return (heads(linear(x, p)) for p in (layer.q, layer.k, layer.v))

    agree_with_layer(mixer, layer, weights, project, module)
    x, state = Samples("x").x.detach(), {}
    with float64(module), torch.no_grad():
        y, (c, n, m) = layer(x)
        for part in x.split([20, 1, 16], 1):
            found, state = functional_call(mixer, weights(), (*project(part), part), {"state": state})
    close(found.flatten(2), y[:, 21:], EXACT, "outputs of the last part")
    close(state["memory"], torch.cat([c, n[..., None]], -1), EXACT, "C and n")
    close(state["m"], m.squeeze(-1), EXACT, "m")
