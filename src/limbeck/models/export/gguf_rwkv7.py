"""The layout `arwkv7` of GGUF files: RWKV-7 in the place of a Llama-like body's attention, as llama.cpp computes it.

    reasons = check(student)                           # [] if it fits
    container = build(student)                         # keys and tensors for `gguf_file`

llama.cpp's layers are those of models/arwkv7.cpp: S_t = (Diag(w) − (a⊙κ) κᵀ) S_{t-1} + k vᵀ, the same equations as
limbeck.mixers.rwkv7 (Peng et al. 2025, arXiv 2503.14456, eq. 5 to 17), between the norms and the SwiGLU of the teacher.
What it has besides is switched off by its weights: the token shift (mixing weights 0) and the share of the first
layer's values (σ(−10⁴) = 0). Keys and values of grouped heads are written once for every head.

Shapes: D model width, H heads, K head width, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from limbeck.models.export import Fit, Reason
from limbeck.models.export.body import check_body, check_structure, list_mixers_by_layer, read_body
from limbeck.models.export.container import Container, widen
from limbeck.models.export.mixer_checks import Only, check_mixers

LAYOUT = "arwkv7"
NORM_EPS = 64e-5  # of the head norm, fixed in llama.cpp
HEAD_BLOCK = 32  # on CPUs, llama.cpp's RWKV-7 gives wrong numbers for other widths, without an error
CLOSED = -1e4  # a sigmoid's argument that makes it 0
OPTIONS = {
    "unit_keys": Only((False,), "the format writes keys as long as they are"),
    "conv": Only((0,), "the format shifts tokens before the projections, which no convolution behind them equals"),
    "conv_activation": Only(("none",), "there is no activation on q, k and v"),
    "rope": Only((False,), "there is no rotary embedding"),
    "heads": Only((0,), "the heads are the teacher's"),
    "state": Only((0.0, 1.0), "the state is as wide as a head"),
    "output_norm": Only(("none", "layer"), "the head norm is a layer norm"),
    "norm_over": Only(("head",), "the norm is over each head"),
    "output_gate": Only(("none", "inner"), "the gate is W₂ σ(W₁x)"),
}
FREE = {"rank", "write", "shortest", "longest", "norm_bias", "norm_eps", "qk_norm", "gate_rank", "gate_bias"}
NORMED = {"norm_eps": Only((NORM_EPS,), "the head norm's epsilon is fixed")}


def check(student: Any, tokenizer: Any = None) -> list[Reason]:
    """Return why the student is no `arwkv7` model; an empty list if it is one."""
    mixers = [mixer for mixer in list_mixers_by_layer(student) if mixer is not None]
    normed = any(mixer.options.output_norm == "layer" for mixer in mixers)
    body_reasons = check_body(student)
    reasons = body_reasons + check_mixers(
        student, "rwkv7", OPTIONS | (NORMED if normed else {}), free=FREE, softmax=False
    )
    if body_reasons:
        return reasons
    body = read_body(student)
    if body.heads * body.head_width != body.hidden:
        reasons.append(
            Reason(
                f"the heads are {body.heads} × {body.head_width} wide together and the model {body.hidden}; "
                "the format has square projections, so only a teacher whose heads are as wide as the model fits"
            )
        )
    if body.head_width % HEAD_BLOCK:
        reasons.append(
            Reason(f"the heads are {body.head_width} wide, and llama.cpp computes widths that {HEAD_BLOCK} divides")
        )
    if body.has_qk_norms and any(mixer.options.qk_norm for mixer in mixers):
        reasons.append(
            Reason("q and k pass the teacher's norms, which the format lacks", "student.options.qk_norm=false")
        )
    return reasons


def build(student: Any) -> Container:
    """Return keys and tensors of a student that `check` accepts."""
    body, mixers = read_body(student), list_mixers_by_layer(student)
    options: Any = mixers[0].options  # type: ignore[union-attr]
    gate_rank = options.gate_rank if options.output_gate == "inner" else 0
    container = Container(LAYOUT)
    container.keys = {
        "context_length": body.max_positions,
        "embedding_length": body.hidden,
        "block_count": body.layers,
        "feed_forward_length": body.intermediate,
        "attention.layer_norm_rms_epsilon": body.norm_eps,
        "attention.layer_norm_epsilon": NORM_EPS,
        "attention.head_count": 0,
        "attention.decay_lora_rank": options.rank,
        "attention.iclr_lora_rank": options.rank,
        "attention.value_residual_mix_lora_rank": options.rank,  # llama.cpp expects the rates' rank in layer 0
        "attention.gate_lora_rank": gate_rank,
        "wkv.head_size": body.head_width,
        "token_shift_count": 1,
    }
    embeddings = student.base_model.embed_tokens.weight
    container.add("token_embd.weight", embeddings)
    container.add("output.weight", student.get_output_embeddings().weight)
    container.add("output_norm.weight", student.base_model.norm.weight)
    for index, (block, mixer) in enumerate(zip(student.base_model.layers, mixers)):
        prefix = f"blk.{index}."
        container.add(f"{prefix}attn_norm.weight", block.input_layernorm.weight)
        container.add(f"{prefix}ffn_norm.weight", block.post_attention_layernorm.weight)
        for name, projection in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            container.add(f"{prefix}ffn_{name}.weight", getattr(block.mlp, projection).weight)
        for name, tensor, exact in _time_mixing(block.self_attn, mixer, body.heads):
            container.add(f"{prefix}time_mix_{name}", tensor, exact=exact)
    return container


def _time_mixing(attention: Any, mixer: Any, heads: int) -> list[tuple[str, Tensor, bool]]:
    """Return the tensors of a layer: name, values, and whether they are small ones that stay in float32."""
    hidden = attention.q_proj.in_features
    gated = mixer.options.output_gate == "inner"
    tensors = [
        # what Limbeck multiplies q by, the format expects in the weights
        ("receptance.weight", attention.q_proj.weight * mixer.shape.scale, False),
        ("key.weight", widen(attention.k_proj.weight, mixer.shape.kv_heads, heads), False),
        ("value.weight", widen(attention.v_proj.weight, mixer.shape.kv_heads, heads), False),
        ("output.weight", attention.o_proj.weight, False),
        ("w0.weight", mixer.decay_up.bias, True),
        ("w1.weight", mixer.decay_down.weight, True),
        ("w2.weight", mixer.decay_up.weight, True),
        ("a0.weight", mixer.rate_up.bias, True),
        ("a1.weight", mixer.rate_down.weight, True),
        ("a2.weight", mixer.rate_up.weight, True),
        ("k_k.weight", mixer.erase_scale.flatten(), True),
        ("k_a.weight", mixer.rate_share.flatten(), True),
        ("r_k.weight", mixer.bonus.flatten(), True),
        ("lerp_fused.weight", torch.zeros(6 if gated else 5, 1, 1, hidden), True),
        ("v0.weight", torch.full((hidden,), CLOSED), True),
        ("v1.weight", torch.zeros(mixer.options.rank, hidden), True),
        ("v2.weight", torch.zeros(hidden, mixer.options.rank), True),
    ]
    if mixer.options.output_norm == "layer":
        bias = mixer.norm_bias.flatten() if mixer.options.norm_bias else torch.zeros(hidden)
        tensors += [("ln.weight", mixer.norm_weight.flatten(), True), ("ln.bias", bias, True)]
    if gated:
        tensors += [("g1.weight", mixer.gate_down.weight, True), ("g2.weight", mixer.gate.weight, True)]
    return tensors


def fit(config: Any) -> Fit | None:
    """Return the settings of an RWKV-7 student that will fit; None for a teacher that has none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if check_structure(model):
        return None
    body = read_body(model)
    if body.has_qk_norms or body.heads * body.head_width != body.hidden or body.head_width % HEAD_BLOCK:
        return None
    return Fit("rwkv7", {"unit_keys": False, "output_norm": "layer", "norm_bias": True, "norm_eps": NORM_EPS})
