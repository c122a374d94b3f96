"""The linear-time recurrences, each in three forms that agree: `recurrent`, `chunked` and `matrix`.

What stands here is in torch and runs everywhere; on CUDA the first two and the convolution go to a kernel where one
takes the call (`limbeck.ops.fla`).

    from limbeck.ops import delta_rule
    o, state = delta_rule.chunked(q, k, v, beta, log_decay)

Shapes: B batch, T time, H heads, G groups of keys or values, K key width, V value width, C chunk, N chunks.
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
