"""What decoding costs in memory: bytes of state against bytes of keys and values, measured on real caches.

    memory = cache_sizes(teacher, student, length=512)
    memory["break_even_tokens"]

Nothing is computed from a formula: both models fill a cache and its tensors are counted.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from limbeck.model import cache_bytes, with_cache


@torch.no_grad()
def cache_sizes(teacher: PreTrainedModel, student: PreTrainedModel, length: int = 128) -> dict[str, Any]:
    """Cache bytes of one sequence in both models, after `length` and after twice as many tokens.

    Returns:
        bytes at both lengths, the student's growth per token (0 when every layer is converted), and the number of
        tokens from which the student needs less memory.
    """
    sizes: dict[str, list[int]] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        cache, body = DynamicCache(config=model.config), model.get_decoder()
        ids = torch.full((1, length), 5, device=model.device)
        for _ in range(2):
            body(input_ids=ids, **with_cache(body, cache))
            sizes.setdefault(name, []).append(cache_bytes(cache))
    per_token = {name: (late - early) / length for name, (early, late) in sizes.items()}
    fixed = sizes["student"][0] - per_token["student"] * length
    saved = per_token["teacher"] - per_token["student"]
    return {
        "length": length,
        "teacher_cache_bytes": sizes["teacher"],
        "student_cache_bytes": sizes["student"],
        "teacher_bytes_per_token": per_token["teacher"],
        "student_bytes_per_token": per_token["student"],
        "student_fixed_bytes": fixed,
        "break_even_tokens": fixed / saved if saved > 0 else None,
    }
