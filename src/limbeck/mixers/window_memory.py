"""A window of softmax attention with sinks, and a linear memory of the tokens that have left it, silent at the start.

    y_t = window(q_t; k, v) + R_h memory(q_t; k_j, v_j for j ≤ t − window)

The memory is any mixer with a fixed-size state (`linear`). It never sees what the window sees: a token is written when
it leaves the window, a sink never. So it is no second opinion on near tokens but the only one on far tokens, as the
low-rank state of evicted tokens in LESS (Dong et al. 2024, arXiv 2402.09398) and the compressive memory of
Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143, whose memory takes whole segments and has a gate in place of
R). R [V, V] of each head is the memory's own read-out.

Keys and values wait in the window's cache, so nothing is stored twice. Decay and write strength are computed from the
layer's input of the token that evicts, x_t. For the memory, tokens that evict nothing are padding.

With `code_rank` codes c_j = C x_j of that rank wait beside the window. Then the memory has queries W_q c_t and keys
W_k c_j of its own, which carry no rotary embedding, and its gates see x_t + W_x c_j: how much is written of a token may
depend on that token.

Start: R = 0, so the student is `sliding_window`, bit for bit, and R has a gradient. C random, q·k = c_t·c_j up to a
rank of K, W_x = Cᵀ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.mixers.branches import Branches, BranchesOptions, label_branch_state, select_branch_state
from limbeck.mixers.registry import register
from limbeck.mixers.types import State, Tokens
from limbeck.ops import short_conv, sliding_window
from limbeck.ops.common import repeat_kv
from limbeck.ops.window_state import gather_tokens


@dataclass(frozen=True)
class WindowMemoryOptions(BranchesOptions):
    code_rank: int = 0  # of codes for the memory's own queries, keys and gates; 0 for the teacher's q and k


@register
class WindowMemory(Branches):
    """See the module's docstring. Common options other than `rope` are those of the linear branch."""

    name = "window_memory"
    summary = "a sliding window with sinks, and a linear memory of what has left it that is silent at the start"
    source = "arXiv 2402.09398, 2404.07143"
    options_class = WindowMemoryOptions
    options: WindowMemoryOptions

    def build(self) -> None:
        super().build()
        s, rank = self.teacher_shape, self.options.code_rank
        self.readout = nn.Parameter(torch.empty(s.heads, s.value_width, s.value_width))
        if rank:
            self.code = nn.Linear(s.hidden, rank, bias=False)
            self.own_q = nn.Linear(rank, s.heads * s.key_width, bias=False)
            self.own_k = nn.Linear(rank, s.kv_heads * s.key_width, bias=False)
            self.own_x = nn.Linear(rank, s.hidden, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.readout)
        if self.options.code_rank:
            nn.init.normal_(self.code.weight, std=self.teacher_shape.hidden**-0.5)
            # One map for q and k of all heads, which preserves products of codes.
            rank, width = self.options.code_rank, self.teacher_shape.key_width
            start = nn.init.orthogonal_(torch.empty(width, rank, device=self.own_q.weight.device))
            with torch.no_grad():
                for own in (self.own_q, self.own_k):
                    own.weight.view(-1, width, rank).copy_(start)
                self.own_x.weight.copy_(self.code.weight.T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        near, (old_k, old_v, left), window = sliding_window.evicting(
            q,
            k,
            v,
            **self._settings(),
            state=select_branch_state(state, "window") or None,
            segments=tokens.segments,
            valid=tokens.valid,
        )
        new = label_branch_state(window, "window")
        if self.options.code_rank:
            codes = self.code(x)
            old_codes, new["codes"] = short_conv.delay(codes, self.options.window, tokens.valid, state.get("codes"))
            q, old_k, x = self._read_codes(codes, old_codes, x)
        # Reading values would break a compiled graph, and stall an accelerator.
        may_read = not torch.compiler.is_compiling() and q.device.type == "cpu"
        all_left = may_read and bool(left.all())
        past = Tokens(None if all_left else left, tokens.segments)
        far, memory = self.linear(q, old_k, old_v, x, tokens=past, state=select_branch_state(state, "linear"))
        new.update(label_branch_state(memory, "linear"))
        return self._join(near, far if all_left else far.masked_fill(~left[..., None, None], 0)), new

    def forward_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute y [B, T, H, V] by mixing matrices, and return window + (tr R / V) memory [B, H, T, T].

        R mixes the channels of values, so it is no part of a matrix over tokens: what it shares with the identity is.
        """
        tokens, heads = tokens or Tokens(), self.teacher_shape.heads
        near = sliding_window.matrix(q, k, **self._settings(), segments=tokens.segments, valid=tokens.valid)
        real = torch.ones_like(q[..., 0, 0], dtype=torch.bool) if tokens.valid is None else tokens.valid
        window, sinks = self.options.window, self.options.sinks
        at, left = sliding_window.find_evicted(real, window=window, sinks=sinks, segments=tokens.segments)
        old_k, old_v = (gather_tokens(z, at) for z in (k, v))
        queries = q
        if self.options.code_rank:
            codes = self.code(x)
            queries, old_k, x = self._read_codes(codes, gather_tokens(codes, at), x)
        past = Tokens(left, tokens.segments)
        y_far, far = self.linear.forward_matrix(queries, old_k, old_v, x, tokens=past)
        y_near = torch.einsum("bhij,bjhv->bihv", near.to(v.dtype), repeat_kv(v, heads))
        y = self._join(y_near, y_far.masked_fill(~left[..., None, None], 0))
        # The memory's columns are the tokens that evict; each goes to the token that it evicts.
        far = far * (left[:, None, None] & left[:, None, :, None])
        far = torch.zeros_like(far).scatter_add(3, at[:, None, None].expand_as(far), far)
        share = self.readout.diagonal(dim1=1, dim2=2).mean(-1).to(far.dtype)[:, None, None]
        matrices = {"both": near + share * far, "linear": share * far, "window": near}
        return y, matrices[self.options.branches]

    def memory_numel(self) -> int:
        s, o = self.teacher_shape, self.options
        window = sliding_window.state_numel(s.kv_heads, s.key_width, s.value_width, o.window + 1, o.sinks)
        return window + o.window * o.code_rank + self.linear.state_numel()

    def _settings(self) -> dict[str, Any]:
        return {"window": self.options.window, "sinks": self.options.sinks, "scale": self.teacher_shape.scale}

    def _read_codes(self, codes: Tensor, old_codes: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the memory's queries [B, T, H, K], keys [B, T, G, K] and input [B, T, D].

        Args:
            codes: [B, T, rank] of the tokens.
            old_codes: [B, T, rank] of those that they evict.
            x: [B, T, D] the layer's input.
        """
        s = self.teacher_shape
        q, k = self.own_q(codes), self.own_k(old_codes)
        q, k = q.unflatten(-1, (s.heads, s.key_width)), k.unflatten(-1, (s.kv_heads, s.key_width))
        return q, k, x + self.own_x(old_codes)

    def _join(self, near: Tensor, far: Tensor) -> Tensor:
        """Add what the memory says to the window's output, both [B, T, H, V]."""
        if self.options.branches == "window":
            return near
        said = torch.einsum("bthv,hvw->bthw", far, self.readout).to(near.dtype)
        return said if self.options.branches == "linear" else near + said
