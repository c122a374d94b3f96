"""Initialize a small Llama-like model with weak induction heads, so that it learns to copy from its context at once.

    init_induction_heads(model)            # in place, right after random initialization; needs RoPE and tied embeddings

Copying from the context takes two steps (an induction head, arXiv 2209.11895): one head fetches the previous token at
each position, and a later head finds the position whose previous token is the current one. Neither helps without the
other, so from a random initialization both depend on chance: the small teacher had no trace of them after 1.66 M tokens
(docs/guides/studies.md). Here both are part of the initial weights, as in mimetic initialization (arXiv
2305.09828), but weak enough to be reshaped by training; all other weights stay random.

- Embeddings get a component u that all tokens share. In the first layer one head forms queries and keys from u alone,
  in the fastest RoPE frequencies, with the query rotated back by one token: it attends to the previous position.
- Its values are a projection P of that position's token, which it writes to directions Q of the residual stream.
- In the second layer one head per key-value group compares P of its own token with the content of Q, in the slow RoPE
  frequencies that hardly depend on distance, and adds the token that it finds to the stream; the tied head reads it.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError

FAST_FREQUENCIES = 5  # RoPE frequencies that tell a distance of one token from two
PREVIOUS_SCALE = 6.0  # of the queries and keys that attend to the previous position
WRITE_SCALE = 0.1  # of the first layer's output
MATCH_SCORE = 25.0  # attention score of a position whose previous token is the current token
COPY_SCALE = 3.0  # of the second layer's output


@torch.no_grad()
def init_induction_heads(model: PreTrainedModel, seed: int = 0) -> None:
    """Overwrite queries, keys, values and outputs of some heads in the first two layers.

    Args:
        seed: of the random basis of the residual stream.

    Raises:
        LimbeckError: the model does not have two such layers, RoPE or tied embeddings.
    """
    try:
        config, (first, second) = model.config, [layer.self_attn for layer in model.get_decoder().layers[:2]]
        frequencies = model.get_decoder().rotary_emb.inv_freq  # [K / 2], radians per token
        weights = [getattr(layer, f"{name}_proj").weight for layer in (first, second) for name in "qkvo"]
    except (AttributeError, ValueError) as error:
        raise LimbeckError(
            f"induction heads cannot be initialized in a {type(model).__name__}", expected="model_type: llama"
        ) from error
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise LimbeckError("induction heads need tied embeddings", hint="tie_word_embeddings: true")
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    width, groups, half = embeddings.shape[1], config.num_key_value_heads, len(frequencies)
    per_group, key_width = config.num_attention_heads // groups, 2 * half
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].to(embeddings.dtype)
    # orthogonal directions: u, P, Q, and those that the second layer copies
    shared, token_code, previous_code, copied = _split_rows(basis.T, [1, key_width, key_width, groups * key_width])
    size = float(embeddings.norm(dim=1).mean())
    embeddings -= embeddings @ shared.T @ shared
    embeddings += size * shared
    unit = math.sqrt(width) / (
        size * math.sqrt(2)
    )  # factor of the first RMSNorm: a token's embedding and u have length `size` each
    # no other weight may read u
    for module in model.get_decoder().layers.modules():
        if isinstance(module, nn.Linear) and module.in_features == width:
            module.weight -= module.weight @ shared.T @ shared

    # first layer: the first head, which attends to the previous position
    q, k, v, o = weights[:4]
    k[:key_width], q[:key_width] = 0.0, 0.0
    fast = torch.arange(min(FAST_FREQUENCIES, half))
    strength = PREVIOUS_SCALE / (unit * size)
    k[fast] = strength * shared
    q[fast] = strength * frequencies[fast, None].cos() * shared
    q[fast + half] = -strength * frequencies[fast, None].sin() * shared
    v[:key_width] = token_code
    o[:, :key_width] = WRITE_SCALE * previous_code.T

    # second layer: the first head of each group, which compares a part of the code
    q, k, v, o = weights[4:]
    slow = torch.arange(half - half // 2, half)
    slow_channels = torch.cat([slow, slow + half])
    part_width = key_width // groups
    for group in range(groups):
        part = slice(group * part_width, group * part_width + min(part_width, len(slow_channels)))
        channels = slow_channels[: part.stop - part.start]
        keys = slice(group * key_width, (group + 1) * key_width)
        queries = slice(group * per_group * key_width, (group * per_group + 1) * key_width)
        k[keys], q[queries] = 0.0, 0.0
        stream_norm = math.sqrt(2) * size  # approximately
        unit_here = math.sqrt(width) / stream_norm
        code_norm2 = len(channels) * size**2 / width  # of this part of a token's code
        gain = math.sqrt(MATCH_SCORE * math.sqrt(key_width) / (code_norm2 * unit_here * unit_here * WRITE_SCALE * unit))
        q[queries.start + channels] = gain * token_code[part]
        k[keys.start + channels] = gain * previous_code[part]
        v[keys] = copied[keys]
        o[:, queries] = COPY_SCALE * size * copied[keys].T


def _split_rows(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Split consecutive rows into groups of these sizes; LimbeckError if there are too few rows."""
    if sum(sizes) > len(rows):
        raise LimbeckError(
            f"a model width of {len(rows)} is too small for induction heads", expected=f"at least {sum(sizes)}"
        )
    return list(rows[: sum(sizes)].split(sizes))
