"""Gated slot attention: a softmax over slots, each a decaying average of keys and of values.

    K_t = K_{t-1} Diag(a_t) + k_t s_tᵀ,    V_t = Diag(a_t) V_{t-1} + s_t v_tᵀ,    o_t = V_tᵀ softmax(K_tᵀ q_t)

with M slots, a_t = exp(log_decay_t) and write weights s_t ∈ R^M (GSA, arXiv 2409.07146, equations 10 to 12): value
decay, softmax, vector decay.

    o, keys, values = slot_attention.chunked(q, k, v, write, log_decay)                               # a sequence
    o, keys, values = slot_attention.recurrent(q1, k1, v1, w1, g1, keys=keys, values=values)          # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); write and log_decay [B,T,H,M]; keys [B,H,K,M] and values [B,H,M,V]; segments [B,T] non-decreasing document
numbers, the incoming states belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

from torch import Tensor

from limbeck.ops import value_decay, vector_decay
from limbeck.ops.fla import accelerated


@accelerated("slot_attention")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    log_decay: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition, one token after the other: for decoding, and as the reference of the other forms.

    Returns:
        o [B,T,H,V] in v's dtype, and the slots' keys [B,H,K,M] and values [B,H,M,V] in float32 (float64 for float64
        inputs).
    """
    logits, keys = value_decay.recurrent(q, k, write, log_decay, state=keys, segments=segments)
    o, values = vector_decay.recurrent(logits.softmax(-1), write, v, log_decay, state=values, segments=segments)
    return o, keys, values


@accelerated("slot_attention")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    log_decay: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the same recurrence in chunks, for training and prefill; returns what `recurrent` returns."""
    logits, keys = value_decay.chunked(q, k, write, log_decay, state=keys, segments=segments)
    o, values = vector_decay.chunked(logits.softmax(-1), write, v, log_decay, state=values, segments=segments)
    return o, keys, values


def matrix(q: Tensor, k: Tensor, write: Tensor, log_decay: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Build the mixing matrix M [B,H,T,T], lower triangular: with zero initial states o = M v, head by head."""
    if q.shape[1] == 1:
        logits, _ = value_decay.recurrent(q, k, write, log_decay, segments=segments)
    else:
        logits, _ = value_decay.chunked(q, k, write, log_decay, segments=segments)
    return vector_decay.matrix(logits.softmax(-1), write, log_decay, segments=segments)
