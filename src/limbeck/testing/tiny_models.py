"""Tiny random models of transformers' families, in float32 and eval mode.

    model = make_tiny_model("gemma2")                          # one of FAMILIES: two layers, 97 tokens
    model = make_tiny_model("mistral", sliding_window=64)      # with another setting of its config
    model = make_survey_model("qwen3_next")                    # any family: width 64, a layer of every kind

FAMILIES are nine with fixed sizes, chosen to cover every kind of attention that a mixer has to replace; the contract
runs on them. For the survey a model of any family in the installed transformers is made from its config class: sizes
are set by the names of the config's fields, and fields that the config derives from others are left to it. Lists with
an entry per layer keep one layer of every kind. What the names do not determine is in `EXTRA`.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from limbeck.core.errors import LimbeckError, suggest_closest

VOCAB_SIZE = 97
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_CONFIG = {
    **SHARED,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WITHOUT_WIDTH = {name: value for name, value in LLAMA_CONFIG.items() if name != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_CONFIG, "tie_word_embeddings": True},  # grouped heads, tied embeddings
    "qwen2": WITHOUT_WIDTH,  # biases on q, k, v
    "qwen3": {**LLAMA_CONFIG, "head_dim": 16},  # q/k norms, heads wider than the model's width over their number
    "qwen3_moe": {**LLAMA_CONFIG, **EXPERTS},  # mixture of experts
    "gemma2": {**LLAMA_CONFIG, "sliding_window": 8, "query_pre_attn_scalar": 8},  # soft caps, every other layer sliding
    "mistral": {**LLAMA_CONFIG, "sliding_window": 8},  # every layer sliding, untied embeddings
    "phi3": {**WITHOUT_WIDTH, "tie_word_embeddings": False, "partial_rotary_factor": 0.5},  # fused q, k, v; half RoPE
    "gpt2": {**SHARED, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256},  # learned positions, fused q, k, v
    "opt": {  # learned positions, counted from the mask
        **SHARED,
        "hidden_size": 48,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 48,
    },
}
# counts its positions from the mask: position ids beside a mask are one too many
MASK_POSITION_FAMILIES = ("opt",)


def make_tiny_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Make a random model of one of FAMILIES in eval mode.

    Args:
        seed: of the weights; the global random state is not changed.
        overrides: settings of the config.
    """
    if family not in FAMILIES:
        raise LimbeckError(
            f"unknown family '{family}'{suggest_closest(family, FAMILIES)}", expected=", ".join(FAMILIES)
        )
    if overrides:
        return _make(family, seed, overrides)
    return copy.deepcopy(_cached(family, seed))


@lru_cache(maxsize=32)
def _cached(family: str, seed: int) -> PreTrainedModel:
    return _make(family, seed, {})


def _make(family: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    config._experts_implementation = "eager"  # the others do not support float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _enlarge_weights(model, 4)
    return model.eval()


@torch.no_grad()
def _enlarge_weights(model: PreTrainedModel, factor: float) -> None:
    """Scale matrices and add noise to vectors, so that attention is far from uniform and biases are not zero."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


SURVEY_VOCAB_SIZE = 99
MAX_PARAMETERS = 4_000_000  # more means that no pattern set the size of some field
DEPTH = r"num_hidden_layers|(num_|n_)?(decoder_|encoder_)?layers?|num_blocks|num_layers_per_stack"

# value of a field by a pattern of its full name; the first match counts
SIZES: list[tuple[str, Any]] = [
    (r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?", SURVEY_VOCAB_SIZE),
    (r".*vocab(_size)?(_base)?", 64),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start)_token_id", 1),
    (r"(eos|sep|forced_eos|cls)_token_id", 2),
    (r".*_token_(id|index)", 5),
    (r"max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length", 256),
    (r".*(window|chunk).*(size|length|len)?", 8),
    (DEPTH, 2),
    (r".*(period|interval|every_n_layers|layer_group_size|n_layers_per_.*)", 2),
    (r"first_k_dense_replace|num_dense_layers|(attn|expert)_layer_offset|moe_layer_(start|end)_index", 1),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    # layers of convolutions and states that stand beside attention
    (r"ssm_state_size|mamba_d_state|state_size", 16),
    (r"mamba_d_ssm", 128),
    (r"n_mamba_heads|mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"mamba_(num_heads|n_heads)", 8),
    (r".*(time_step|dt)_rank", 4),
    # experts
    (r"n_group|topk_group", 1),
    (r"(n_routed|n_shared|num_shared|num|num_local|moe_num|moe_num_shared)_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|zero_expert_num", 2),
    # attention
    (r"index_n_heads", 2),
    (r"index_topk.*", 16),
    (r".*(key_value|kv|num_key)_heads", 2),
    (r".*(attention_heads|n_heads?|num_heads|num_value_heads)", 4),
    (r"(q|kv|o)_lora_rank", 24),
    (r"qk_rope_head_dim|rotary_dim|qk_nope_head_dim", 8),
    (r"v_head_dim", 12),
    (r".*(head_dim|head_size|kv_channels|dim_head|d_head)|query_pre_attn_scalar", 16),
    (r".*(rank|d_rel)", 8),
    (r"log_scaling_n_floor|floor_scale|rel_extent|hidden_size_per_layer_input", 16),
    # widths
    (r"lru_width|adapter_(in_dim|out_dim|input_size)|hidden_size_global", 64),
    (r".*(hidden_size|d_model|n_embd|emb(edding)?_(dim|size)|proj_dim|embed_dim)", 64),
    (r".*(intermediate|ffn|feed_forward|inner|mlp)_?.*(size|dim)|dff|dim_ff|n_inner|d_inner", 96),
]
# fields that are set although the class's own default is None
OPTIONAL_FIELDS = (
    r".*_token_id|(?!indexer).*head_dim|.*experts.*|topk_group|n_group|moe_intermediate_size|num_key_value_heads"
)
DECODER = {"is_decoder": True}  # turns encoders into decoders
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ALTERNATING, "num_hidden_layers": 4},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ALTERNATING, "num_hidden_layers": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "chunk_size_lm_head": 0,
        "local_num_chunks_after": 0,
        "lsh_num_chunks_after": 0,
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 48),
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def list_families() -> list[str]:
    """List the model types of all causal language models in the installed transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_survey_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Make a random model of any family in eval mode.

    Raises:
        LimbeckError: there is no such family, or its model remains large.
        Exception: any error of the family's own code.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LimbeckError(
            f"no causal language model '{family}' in transformers{suggest_closest(family, list_families())}"
        )
    cls = CONFIG_MAPPING[family]
    config = cls(**shrink_config_kwargs(cls))
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if parameters > MAX_PARAMETERS:
        raise LimbeckError(f"it still has {parameters:,} parameters after every known field was made small")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    _enlarge_weights(model, 3)
    return model.eval()


def shrink_config_kwargs(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the arguments with which a config class describes a tiny model."""
    try:
        default: Any = cls()
    except Exception:  # some classes require arguments
        default = cls

    def read(name: str) -> Any:
        try:
            return getattr(default, name, None)
        except Exception:  # fields that differ between layers
            return None

    kwargs: dict[str, Any] = {}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}  # type: ignore[arg-type]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = field.name
        if name in inherited:
            continue
        if name in cls.sub_configs:
            kind = type(read(name)) if isinstance(read(name), PreTrainedConfig) else cls.sub_configs[name]
            if dataclasses.is_dataclass(kind):
                kwargs[name] = {**shrink_config_kwargs(kind), "model_type": kind.model_type}  # type: ignore
        elif name in DECODER:
            kwargs[name] = DECODER[name]
        elif type(field.default) is int or re.fullmatch(OPTIONAL_FIELDS, name):
            size = next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                kwargs[name] = size
    if "kv_lora_rank" in kwargs:  # latent attention: as many key heads as query heads, rotation on a part of a head
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
        if "head_dim" in kwargs:
            kwargs["head_dim"] = kwargs["qk_rope_head_dim"]
    return {**kwargs, **_shrink_layer_lists(cls, read, kwargs), **EXTRA.get(cls.model_type, {})}


def _shrink_layer_lists(
    cls: type[PreTrainedConfig], read: Callable[[str], Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Shorten lists with an entry per layer to one layer of every kind (at least two, at most four)."""
    depth_name = next((name for name in kwargs if re.fullmatch(DEPTH, name)), None)
    if depth_name is None:
        return {}
    lists = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = read(field.name)
        if field.name not in kwargs and isinstance(value, list | tuple) and len(value) == read(depth_name) > 2:
            lists[field.name] = list(value)
    if not lists:
        return {}
    rows = list(zip(*(map(str, values) for values in lists.values())))
    chosen = [rows.index(kind) for kind in dict.fromkeys(rows)][:4]
    chosen = (chosen * 2)[: max(2, len(chosen))]
    return {depth_name: len(chosen), **{name: [values[i] for i in chosen] for name, values in lists.items()}}
