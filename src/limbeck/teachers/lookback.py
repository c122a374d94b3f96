"""A start from which looking back is learnt at once: two layers of attention that already do so, roughly.

    look_back(model)            # in place, right after the model was drawn; a Llama-like one with tied embeddings

Copying from the context takes two steps in a row (an induction head, arXiv 2209.11895): a head that fetches the token
before each place, and a later one that finds the place whose predecessor is the token at hand. Neither earns anything
without the other, so from a random start both wait for chance: the small teacher had no trace of them after
1.66 M tokens (docs/small_teacher.md). Here both are in the initial weights, in the manner of mimetic initialisation
(arXiv 2305.09828), weak enough that training shapes them; all else stays random.

- Embeddings get a component u that all tokens share. Heads of the first layer form their queries and keys from it
  alone: the fastest rotations of RoPE, the query turned back by one token, so each looks at the place before it.
- They write a projection P of that place's token into directions Q of the residual stream.
- A head of each key-value group in the second layer compares P of its own token with what stands in Q, by the slow
  rotations that hardly know the distance, and adds the token that it finds to the stream; the tied head reads it there.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.errors import LimbeckError

FAST = 5  # rotations that tell one token's distance from two
BEFORE = 6.0  # size of the queries and keys that look at the place before
WRITE = 0.1  # of what the first layer writes
MATCH = 25.0  # score of a place whose predecessor is the same token
COPY = 3.0  # of what the second layer writes


@torch.no_grad()
def look_back(model: PreTrainedModel, seed: int = 0) -> None:
    """Set queries, keys, values and outputs of some heads in the first two layers.

    Raises:
        LimbeckError: a model without such layers, RoPE or tied embeddings.
    """
    try:
        config, (first, second) = model.config, [layer.self_attn for layer in model.get_decoder().layers[:2]]
        rotations = model.get_decoder().rotary_emb.inv_freq  # [K / 2], radians a token
        parts = [getattr(layer, f"{name}_proj").weight for layer in (first, second) for name in "qkvo"]
    except (AttributeError, ValueError) as error:
        raise LimbeckError(
            f"a {type(model).__name__} cannot start looking back", expected="model_type: llama"
        ) from error
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise LimbeckError("a start that looks back needs tied embeddings", hint="tie_word_embeddings: true")
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    width, groups, half = table.shape[1], config.num_key_value_heads, len(rotations)
    per_group, key = config.num_attention_heads // groups, 2 * half
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].to(table.dtype)
    shared, codes, places, copies = _split(basis.T, [1, key, key, groups * key])
    size = float(table.norm(dim=1).mean())
    table -= table @ shared.T @ shared
    table += size * shared
    unit = math.sqrt(width) / (size * math.sqrt(2))  # the first norm's factor
    for module in model.get_decoder().layers.modules():  # nothing but those heads hears the shared component
        if isinstance(module, nn.Linear) and module.in_features == width:
            module.weight -= module.weight @ shared.T @ shared

    q, k, v, o = parts[:4]  # the first layer: one head, the first group
    k[:key], q[:key] = 0.0, 0.0
    fast = torch.arange(min(FAST, half))
    strength = BEFORE / (unit * size)
    k[fast] = strength * shared
    q[fast] = strength * rotations[fast, None].cos() * shared
    q[fast + half] = -strength * rotations[fast, None].sin() * shared
    v[:key] = codes
    o[:, :key] = WRITE * places.T

    q, k, v, o = parts[4:]  # the second layer: the first head of each group, with its share of the code
    slow = torch.arange(half - half // 2, half)
    slots = torch.cat([slow, slow + half])
    step = key // groups
    for group in range(groups):
        share = slice(group * step, group * step + min(step, len(slots)))
        head, mine = group * per_group * key, slots[: share.stop - share.start]
        k[group * key : (group + 1) * key], q[head : head + key] = 0.0, 0.0
        norm = math.sqrt(2) * size  # roughly, of the stream here
        now = math.sqrt(width) / norm
        token = len(mine) * size**2 / width  # squared length of a token's share of the code
        gain = math.sqrt(MATCH * math.sqrt(key) / (token * now * now * WRITE * unit))
        q[head + mine] = gain * codes[share]
        k[group * key + mine] = gain * places[share]
        copied = copies[group * key : (group + 1) * key]
        v[group * key : (group + 1) * key] = copied
        o[:, head : head + key] = COPY * size * copied.T


def _split(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Consecutive rows in stretches; LimbeckError where the width has no room for them."""
    if sum(sizes) > len(rows):
        raise LimbeckError(f"a width of {len(rows)}", expected=f"at least {sum(sizes)}, to start looking back")
    return list(rows[: sum(sizes)].split(sizes))
