"""Operators of linear attention: causal recurrences of linear time, each in three forms that agree.

    from limbeck.ops import delta_rule
    o, state = delta_rule.chunked(q, k, v, beta, log_decay)                  # training and prefill
    o, state = delta_rule.recurrent(q1, k1, v1, beta1, g1, state=state)      # decoding
    m = delta_rule.matrix(q, k, beta, log_decay)                             # the mixing matrix: o = m v

Everything here is in torch and runs everywhere. On CUDA, `chunked`, `recurrent` and the convolution go to a kernel of
flash-linear-attention where there is one for the call (`limbeck.ops.fla`).

Legend: B batch, T time, H heads, G groups of keys or values, K key width, V value width, C chunk, N chunks.
"""

from limbeck.ops import (
    delta_rule,
    dplr,
    scalar_decay,
    short_conv,
    sliding_window,
    slot_attention,
    value_decay,
    vector_decay,
)

__all__ = [
    "delta_rule",
    "dplr",
    "scalar_decay",
    "short_conv",
    "sliding_window",
    "slot_attention",
    "value_decay",
    "vector_decay",
]

# names by which mixers in files beside students of 0.1 import them
convolution, diagonal_plus_rank_one = short_conv, dplr
