"""Tiny random models of real families: every kind of attention that a mixer has to stand in for.

model = tiny("gemma2")                          # two layers, 97 tokens, float32, in eval mode
model = tiny("mistral", sliding_window=64)      # with another setting of its config
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import LimbeckError, closest

VOCABULARY = 97
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_LIKE = {
    **SHARED,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WITHOUT_WIDTH = {name: value for name, value in LLAMA_LIKE.items() if name != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_LIKE, "tie_word_embeddings": True},  # grouped heads, tied embeddings
    "qwen2": WITHOUT_WIDTH,  # biases on q, k, v
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},  # q/k norms, heads wider than the model's width over their number
    "qwen3_moe": {**LLAMA_LIKE, **EXPERTS},  # mixture of experts
    "gemma2": {**LLAMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 8},  # soft caps, every other layer sliding
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},  # every layer sliding, untied embeddings
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
COUNTS_FROM_MASK = ("opt",)


def tiny(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of that family in eval mode; weights large enough that attention is far from uniform."""
    if family not in FAMILIES:
        raise LimbeckError(f"unknown family '{family}'{closest(family, FAMILIES)}", expected=", ".join(FAMILIES))
    if overrides:
        return _make(family, seed, overrides)
    return copy.deepcopy(_cached(family, seed))


@lru_cache(maxsize=32)
def _cached(family: str, seed: int) -> PreTrainedModel:
    return _make(family, seed, {})


def _make(family: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    config._experts_implementation = "eager"  # the others do not know float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
