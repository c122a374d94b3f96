"""The layout of Qwen3.5: Gated DeltaNet layers, and softmax layers of Qwen3 bodies, as a plain transformers folder.

    reasons = EXPORTER.check(student, tokenizer)
    tensors, config = map_tensors(student), make_config(student)
    EXPORTER.write(student, tokenizer, folder, "f32")        # AutoModelForCausalLM opens it without Limbeck

Qwen3.5's linear attention is S_t = a_t (I − b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ on unit q and k behind a convolution
of width four and silu (Yang et al. 2024, arXiv 2412.06464, eq. 10), then RMS norm, silu gate and output projection: the
mixer `gated_deltanet` with the options below. Differences are folded into weights: the head norm's weights into the
output projection, grouped heads written once for every query head, the convolution's window turned around, norm weights
less one. Qwen3.5's softmax layers have an output gate σ(Wx): with W = 0 it is one half, and the output projection is
doubled, which is exact.

A model of linear layers alone cannot be generated from in transformers, nor loaded by llama.cpp. So such a student gets
one more layer at the end whose output projections are zero.

Shapes: D model width, H heads, G key/value heads, K head width.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5TextConfig

from limbeck.core.errors import LimbeckError
from limbeck.models.export import Exporter, ExportPlan, Fit, Reason, Verification
from limbeck.models.export.body import (
    Body,
    check_body,
    check_structure,
    format_layers,
    list_mixers_by_layer,
    read_body,
)
from limbeck.models.export.container import widen
from limbeck.models.export.mixer_checks import Only, check_mixers
from limbeck.models.export.verification import (
    compare,
    compute_logits,
    compute_step_logits,
    sample_tokens,
    sum_model_losses,
)

MIXER = "gated_deltanet"
CONV = 4
OPTIONS = {
    "conv": Only((CONV,), "the format's convolution is four wide"),
    "conv_activation": Only(("silu",), "silu follows the convolution"),
    "rope": Only((False,), "the linear layers have no rotary embedding"),
    "heads": Only((0,), "the heads are the teacher's"),
    "state": Only((0.0, 1.0), "the state is as wide as a head"),
    "output_norm": Only(("rms",), "the head norm is an RMS norm"),
    "norm_over": Only(("head",), "the norm is over each head"),
    "norm_bias": Only((False,), "the head norm has no bias"),
    "output_gate": Only(("silu",), "the output gate is silu(Wx)"),
    "gate_rank": Only((0,), "the output gate has full rank"),
    "gate_bias": Only((False,), "the output gate has no bias"),
    "strength_bias": Only((False,), "the write strength is σ(w·x), without a bias"),
    "negative_eigenvalues": Only((False,), "write strengths are at most 1"),
}
FREE = {"write", "shortest", "longest", "qk_norm", "norm_eps"}  # the last two only where the body does not decide
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Difference of a logit, in standard deviations of all logits: the largest one, of rounded weights the typical one.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.5}


def check(student: Any, tokenizer: Any = None) -> list[Reason]:
    """Return why a student is no Qwen3.5 model; an empty list if it is one."""
    reasons = check_body(student)
    options = dict(OPTIONS)
    if not reasons:
        body = read_body(student)
        options["norm_eps"] = Only(
            (_norm_eps(body),), "the head norm has the body's epsilon, behind a factor of K^-1/2"
        )
        if body.has_qk_norms:
            options["qk_norm"] = Only((False,), "the linear layers take q and k before norms")
    body_reasons = list(reasons)
    reasons += check_mixers(student, MIXER, options, free=FREE, softmax=True)
    return reasons if body_reasons else reasons + _check_softmax_layers(student)


def _check_softmax_layers(student: Any) -> list[Reason]:
    """Check the layers that keep softmax: q/k norms, full rotary embedding, no window, the usual scale."""
    body, mixers = read_body(student), list_mixers_by_layer(student)
    layers = [i for i, mixer in enumerate(mixers) if mixer is None]
    if not layers:
        return []
    where = format_layers(layers, len(mixers))
    without = "student.softmax_layers=none"
    if not body.has_qk_norms:
        return [Reason(f"{where} keep softmax, and softmax layers of this format have q/k norms", without)]
    reasons = []
    rope = _rope_parameters(student.config)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append(Reason(f"{where} keep softmax with a scaled or partial rotary embedding", without))
    for layer in layers:
        attention = student.base_model.layers[layer].self_attn
        if getattr(attention, "sliding_window", None):
            reasons.append(Reason(f"layer {layer} keeps softmax in a sliding window", without))
        if abs(attention.scaling * body.head_width**0.5 - 1) > 1e-6:
            reasons.append(Reason(f"layer {layer} keeps softmax with a scale of {attention.scaling:g}", without))
        if {norm.weight.shape for norm in (attention.q_norm, attention.k_norm)} != {(body.head_width,)}:
            reasons.append(Reason(f"layer {layer} keeps softmax with q/k norms over all heads together", without))
    return reasons


def _norm_eps(body: Body) -> float:
    """Return Limbeck's epsilon, on the read-out Sᵀq, that equals the body's on K^(-1/2) Sᵀq."""
    return body.norm_eps * body.head_width


def get_rope_theta(config: Any) -> float:
    """Return the base of the rotary embedding's wavelengths."""
    return float(_rope_parameters(config).get("rope_theta", 10_000.0))


def _rope_parameters(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0})


# ------------------------------------------------------------------ the mapping


def list_layer_types(student: Any) -> list[str]:
    """Return the kind of every layer of the exported model; a null layer is the last one where one is needed."""
    kinds = ["full_attention" if mixer is None else "linear_attention" for mixer in list_mixers_by_layer(student)]
    return kinds if "full_attention" in kinds else [*kinds, "full_attention"]


def split_rotary(width: int) -> list[int]:
    """Return how a rotary embedding of `width` channels is shared by the three axes of position; text has one."""
    pairs = width // 2
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]


def make_config(student: Any) -> Qwen3_5TextConfig:
    """Make the config of the exported model."""
    body, kinds = read_body(student), list_layer_types(student)
    old = student.config
    config = Qwen3_5TextConfig(
        vocab_size=body.vocabulary,
        hidden_size=body.hidden,
        intermediate_size=body.intermediate,
        num_hidden_layers=len(kinds),
        num_attention_heads=body.heads,
        num_key_value_heads=body.kv_heads,
        head_dim=body.head_width,
        linear_conv_kernel_dim=CONV,
        linear_key_head_dim=body.head_width,
        linear_value_head_dim=body.head_width,
        linear_num_key_heads=body.heads,
        linear_num_value_heads=body.heads,
        layer_types=kinds,
        rms_norm_eps=body.norm_eps,
        tie_word_embeddings=body.tied,
        max_position_embeddings=body.max_positions or 32_768,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": get_rope_theta(old),
            "partial_rotary_factor": 1.0,
            "mrope_section": split_rotary(body.head_width),
            "mrope_interleaved": True,
        },
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    config.architectures = ["Qwen3_5ForCausalLM"]
    if interval := find_interval(kinds):
        config.full_attention_interval = interval
    return config


def find_interval(kinds: list[str]) -> int | None:
    """Return N where every Nth layer is softmax and no other; engines that do not read `layer_types` go by it."""
    interval = kinds.index("full_attention") + 1
    fits = all((kind == "full_attention") == (layer % interval == 0) for layer, kind in enumerate(kinds, 1))
    return interval if fits else None


def map_tensors(student: Any) -> dict[str, Tensor]:
    """Return the tensors of the exported model by their names in transformers, norm weights as they are multiplied.

    transformers stores the norms' weights less one (`to_stored`), GGUF as they are.
    """
    body, mixers, base = read_body(student), list_mixers_by_layer(student), student.base_model
    tensors = {"model.embed_tokens.weight": base.embed_tokens.weight, "model.norm.weight": base.norm.weight}
    if not body.tied:
        tensors["lm_head.weight"] = student.get_output_embeddings().weight
    for index, (block, mixer) in enumerate(zip(base.layers, mixers)):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = getattr(block, norm).weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = getattr(block.mlp, name).weight
        if mixer is None:
            layer = _map_softmax(block.self_attn, body)
            tensors |= {f"{prefix}self_attn.{name}": tensor for name, tensor in layer.items()}
        else:
            layer = _map_linear(block.self_attn, mixer, body)
            tensors |= {f"{prefix}linear_attn.{name}": tensor for name, tensor in layer.items()}
    if None not in mixers:
        tensors |= _null_layer(f"model.layers.{len(mixers)}.", body)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _map_linear(attention: Any, mixer: Any, body: Body) -> dict[str, Tensor]:
    """Return the tensors of a Gated DeltaNet layer."""
    groups, heads = body.kv_heads, body.heads
    projections = [attention.q_proj.weight] + [
        widen(projection.weight, groups, heads) for projection in (attention.k_proj, attention.v_proj)
    ]
    windows = [
        # [W, heads, K] with the token itself first, to [heads · K, W] with it last
        widen(mixer.conv[name].permute(1, 2, 0).flatten(0, 1), len(mixer.conv[name][0]), heads).flip(1)
        for name in ("q", "k", "v")
    ]
    return {
        "in_proj_qkv.weight": torch.cat(projections),
        "conv1d.weight": torch.cat(windows)[:, None],
        "in_proj_z.weight": mixer.gate.weight,
        "in_proj_b.weight": mixer.strength.weight,
        "in_proj_a.weight": mixer.decay.weight,
        "dt_bias": mixer.decay.bias,
        "A_log": mixer.log_rate,
        "norm.weight": torch.ones_like(mixer.norm_weight[0]),
        "out_proj.weight": attention.o_proj.weight * mixer.norm_weight.reshape(1, -1),
    }


def _map_softmax(attention: Any, body: Body) -> dict[str, Tensor]:
    """Return the tensors of a softmax layer: its gate is one half, so its output projection is doubled."""
    queries = attention.q_proj.weight.unflatten(0, (body.heads, body.head_width))
    return {
        "q_proj.weight": torch.cat([queries, torch.zeros_like(queries)], 1).flatten(0, 1),
        "k_proj.weight": attention.k_proj.weight,
        "v_proj.weight": attention.v_proj.weight,
        "o_proj.weight": 2 * attention.o_proj.weight,
        "q_norm.weight": attention.q_norm.weight,
        "k_norm.weight": attention.k_norm.weight,
    }


def _null_layer(prefix: str, body: Body) -> dict[str, Tensor]:
    """Return the tensors of a layer that adds nothing to the residual stream."""
    d, width = body.hidden, body.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (2 * body.heads * width, d),
        "self_attn.k_proj.weight": (body.kv_heads * width, d),
        "self_attn.v_proj.weight": (body.kv_heads * width, d),
        "self_attn.o_proj.weight": (d, body.heads * width),
        "mlp.gate_proj.weight": (body.intermediate, d),
        "mlp.up_proj.weight": (body.intermediate, d),
        "mlp.down_proj.weight": (d, body.intermediate),
    }
    norms = {"input_layernorm": d, "post_attention_layernorm": d, "self_attn.q_norm": width, "self_attn.k_norm": width}
    tensors = {f"{prefix}{name}": torch.zeros(shape) for name, shape in shapes.items()}
    return tensors | {f"{prefix}{name}.weight": torch.ones(size) for name, size in norms.items()}


def to_stored(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as transformers stores it: norm weights less one, but for the norm inside a linear layer."""
    is_norm = name.endswith(("layernorm.weight", "_norm.weight", "model.norm.weight"))
    return tensor - 1 if is_norm else tensor


# ------------------------------------------------------------------ the exporter


def plan(student: Any, tokenizer: Any, quantization: str) -> ExportPlan:
    """Return what would be written."""
    size = sum(tensor.numel() for tensor in map_tensors(student).values()) * DTYPES[quantization].itemsize
    kinds = list_layer_types(student)
    notes = [f"{kinds.count('linear_attention')} linear layers, {kinds.count('full_attention')} softmax layers"]
    if len(kinds) > len(list_mixers_by_layer(student)):
        notes.append("the last layer is a null layer: engines refuse a model of linear layers alone")
    return ExportPlan("Qwen3_5ForCausalLM", {"model.safetensors": size, "config.json": 0, "tokenizer.json": 0}, notes)


def write(student: Any, tokenizer: Any, folder: Path, quantization: str) -> None:
    """Write config, weights, generation settings and tokenizer as transformers does."""
    config = make_config(student)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: to_stored(name, tensor).to(DTYPES[quantization]) for name, tensor in map_tensors(student).items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.config.dtype = DTYPES[quantization]
    if student.generation_config is not None:
        model.generation_config = student.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def verify(student: Any, tokenizer: Any, folder: Path) -> Verification:
    """Run the written model in transformers beside the student, as a prompt and step by step."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = sample_tokens(student)
    return compare(
        compute_logits(student, ids),
        compute_logits(model, ids),
        compute_step_logits(model, ids),
        own_steps=compute_step_logits(student, ids),
        engine="transformers",
        version=transformers.__version__,
        bound=BOUNDS[config.dtype or torch.float32],
        rounded=config.dtype == torch.bfloat16,
    )


def score(folder: Path, sequences: list[list[int]]) -> float:
    """Sum the written model's loss in nats over all tokens but the first of each sequence, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return sum_model_losses(model, sequences)


def fit(config: Any, mixer: str | None = None) -> Fit:
    """Return the settings of a student of this teacher that will fit."""
    if mixer not in (None, MIXER):
        raise LimbeckError(f"the format has no {mixer}", expected=MIXER, hint=f"--student {MIXER}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if reasons := check_structure(model):
        raise LimbeckError(
            "no student of this teacher fits the format: " + "; ".join(map(str, reasons)),
            expected="a teacher with the body of Llama, Mistral, SmolLM or Qwen3",
            hint="another --teacher",
        )
    body = read_body(model)
    options: dict[str, Any] = {name: only.values[0] for name, only in OPTIONS.items()}
    return Fit(MIXER, options | {"norm_eps": _norm_eps(body), "qk_norm": not body.has_qk_norms})


EXPORTER = Exporter(
    name="qwen3_5",
    summary="a Qwen3.5 model: Gated DeltaNet in a Llama-like body, with softmax layers only of Qwen3 bodies",
    engine="transformers",
    check=check,
    plan=plan,
    write=write,
    verify=verify,
    score=score,
    fit=fit,
    quantizations=tuple(DTYPES),
)
