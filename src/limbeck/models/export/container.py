"""Keys and tensors of a GGUF file before they are written, and the mapping of grouped heads.

    container = Container("arwkv7", keys={"block_count": 30})
    container.add("blk.0.ffn_up.weight", tensor)                 # may be quantized
    container.add("blk.0.attn_norm.weight", tensor, exact=True)  # stays in float32

Nothing is copied until a tensor is written, except where the format wants other numbers than the student has.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Container:
    """Content of a GGUF file: architecture, keys (without its name in front), tensors."""

    layout: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)  # names of tensors that are not quantized

    def add(self, name: str, tensor: Tensor, *, exact: bool = False) -> None:
        """Add a tensor; vectors always stay exact."""
        self.tensors[name] = tensor.detach()
        if exact or tensor.dim() < 2:
            self.exact.add(name)


def widen(weight: Tensor, kv_heads: int, heads: int) -> Tensor:
    """Repeat the rows of a key or value projection [G·K, ...] for every query head that reads them: [H·K, ...]."""
    if kv_heads == heads:
        return weight
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
