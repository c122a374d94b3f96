"""The layout `qwen35` of GGUF files: the mapping of `qwen3_5` under llama.cpp's names.

    reasons = check(student)                           # [] if it fits
    container = build(student)                         # keys and tensors for `gguf_file`

llama.cpp keeps norm weights as they are multiplied, −exp(A) instead of A, and the convolution without its middle axis.
With as many key heads as value heads its order of heads is the usual one.
"""

from typing import Any

from torch import Tensor

from limbeck.models.export import qwen3_5
from limbeck.models.export.body import read_body
from limbeck.models.export.container import Container

LAYOUT = "qwen35"
check = qwen3_5.check
# names behind `model.layers.N.`: name behind `blk.N.`, and whether the tensor stays in float32
LAYER = {
    "input_layernorm.weight": ("attn_norm.weight", True),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", True),
    "mlp.gate_proj.weight": ("ffn_gate.weight", False),
    "mlp.up_proj.weight": ("ffn_up.weight", False),
    "mlp.down_proj.weight": ("ffn_down.weight", False),
    "self_attn.q_proj.weight": ("attn_q.weight", False),
    "self_attn.k_proj.weight": ("attn_k.weight", False),
    "self_attn.v_proj.weight": ("attn_v.weight", False),
    "self_attn.o_proj.weight": ("attn_output.weight", False),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", True),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", True),
    "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight", False),
    "linear_attn.in_proj_z.weight": ("attn_gate.weight", False),
    "linear_attn.in_proj_a.weight": ("ssm_alpha.weight", True),
    "linear_attn.in_proj_b.weight": ("ssm_beta.weight", True),
    "linear_attn.conv1d.weight": ("ssm_conv1d.weight", True),
    "linear_attn.dt_bias": ("ssm_dt.bias", True),
    "linear_attn.A_log": ("ssm_a", True),
    "linear_attn.norm.weight": ("ssm_norm.weight", True),
    "linear_attn.out_proj.weight": ("ssm_out.weight", False),
}
REST = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def build(student: Any) -> Container:
    """Return keys and tensors of a student that `check` accepts."""
    body, kinds, config = read_body(student), qwen3_5.list_layer_types(student), qwen3_5.make_config(student)
    container = Container(LAYOUT)
    container.keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": body.hidden,
        "block_count": len(kinds),
        "feed_forward_length": body.intermediate,
        "attention.head_count": body.heads,
        "attention.head_count_kv": body.kv_heads,
        "attention.key_length": body.head_width,
        "attention.value_length": body.head_width,
        "attention.layer_norm_rms_epsilon": body.norm_eps,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in kinds],
        "rope.freq_base": qwen3_5.get_rope_theta(student.config),
        "rope.dimension_count": body.head_width,
        "rope.dimension_sections": [*qwen3_5.split_rotary(body.head_width), 0],
        "ssm.conv_kernel": qwen3_5.CONV,
        "ssm.state_size": body.head_width,
        "ssm.group_count": body.heads,
        "ssm.time_step_rank": body.heads,
        "ssm.inner_size": body.heads * body.head_width,
    }
    for name, tensor in qwen3_5.map_tensors(student).items():
        if name in REST:
            container.add(REST[name], tensor)
            continue
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        target, exact = LAYER[rest]
        container.add(f"blk.{index}.{target}", _as_stored(rest, tensor), exact=exact)
    return container


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("A_log"):
        return -tensor.exp()
    return tensor[:, 0] if name.endswith("conv1d.weight") else tensor
