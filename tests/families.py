"""Tiny random models of real families: every kind of attention that a mixer has to stand in for."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
FAMILIES = {
    "llama": {**LLAMA_LIKE, "tie_word_embeddings": True},  # grouped heads, tied
    "qwen2": {k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"},  # biases on q, k, v
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},  # q/k norms, head width apart from the model's
    "gemma2": {**LLAMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 8},  # soft caps, sliding layers, tied
    "gpt2": {**SHARED, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256},  # fused q, k, v; learned positions
    "opt": {**SHARED, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
            "word_embed_proj_dim": 48},  # learned positions counted from the mask
}  # fmt: skip


def tiny(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of that family in eval mode; weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
