"""mLSTM, the matrix memory of xLSTM: exponential input gate, sigmoid forget gate, normalizer with a floor.

Beck et al. 2024 (arXiv 2405.04517), equations 19 to 27: S_t = f_t S_{t-1} + exp(i_t) k_t v_tᵀ, n_t = f_t n_{t-1} +
exp(i_t) k_t, o_t = S_tᵀ q_t / max(|n_tᵀ q_t|, 1), gates from the hidden states with a soft cap of 15 (arXiv
2503.13427).

It runs on the scalar-decay operator. With F the running sum of log f, the stabiliser is m = F + running max(i - F); the
stabilised state obeys a scalar decay of log f + m_{t-1} - m_t (never positive) with keys scaled by exp(i - m), n is a
column of ones appended to v, and the floor 1 becomes exp(-m). m cancels from the result, so it takes no gradient.

Start: gate weights 0, input gate exp(0) = 1, half-lives spread from `shortest` to `longest` tokens over the heads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, logit, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import scalar_decay
from limbeck.ops.common import repeat_kv


@dataclass(frozen=True)
class MLSTMOptions(Options):
    output_norm: Literal["none", "rms", "layer"] = "layer"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "sigmoid"
    soft_cap: float = 15.0
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class MLSTM(Mixer):
    """See the module's docstring."""

    name = "mlstm"
    summary = "xLSTM's matrix memory: exponential input gate, forget gate, normaliser (Beck 2024)"
    source = "arXiv 2405.04517, eq. 19 to 27"
    operator = scalar_decay
    normalized = True
    options_class = MLSTMOptions
    options: MLSTMOptions
    published = {"rope": False}

    def build(self) -> None:
        self.input_gate = nn.Linear(self.shape.hidden, self.shape.heads)
        self.forget_gate = nn.Linear(self.shape.hidden, self.shape.heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        nn.init.zeros_(self.input_gate.bias)
        decay = log_decays_from_half_lives(self.shape.heads, self.options.shortest, self.options.longest).exp()
        with torch.no_grad():
            cap = self.options.soft_cap
            self.forget_gate.bias.copy_(cap * torch.atanh((logit(decay) / cap).clamp(max=0.99)))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        cap = self.options.soft_cap
        raw_i, raw_f = self.input_gate(x), self.forget_gate(x)
        log_i = cap * torch.tanh(upcast(raw_i) / cap)
        log_f = F.logsigmoid(cap * torch.tanh(upcast(raw_f) / cap))
        if tokens.valid is not None:
            log_i = log_i.masked_fill(~tokens.valid[..., None], -1e9)
            log_f = log_f.masked_fill(~tokens.valid[..., None], 0)
        m, previous = compute_stabilizer(log_i.detach(), log_f.detach(), tokens, state.get("m"))
        k = repeat_kv(k, self.shape.heads) * torch.exp(log_i - m).unsqueeze(-1)
        log_decay = log_f + previous - m
        # Only rounding lifts it above zero; its gradient stays that of the identity.
        log_decay = log_decay - log_decay.detach().clamp(min=0)
        return Inputs(
            q * self.shape.scale,
            k,
            v,
            log_decay,
            floor=torch.exp(-m),
            carry={"m": m[:, -1].clone()},
        )

    def memory_numel(self) -> int:
        return super().memory_numel() + self.shape.heads  # m


def compute_stabilizer(log_i: Tensor, log_f: Tensor, tokens: Tokens, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute m_t = max(log f_t + m_{t-1}, i_t) for all t at once, and m_{t-1}; both [B, T, H].

    m starts at 0 in each document.

    Args:
        log_i, log_f: [B, T, H] log gates.
        start: [B, H] m after the last token of the call before, None at the beginning.
    """
    if log_i.shape[1] == 1:  # the definition itself; decoding spends its time on calls
        previous = torch.zeros_like(log_f) if start is None else start.unsqueeze(1)
        if tokens.segments is not None:
            previous = previous.masked_fill((tokens.segments != 0).unsqueeze(-1), 0)
        return torch.maximum(log_f + previous, log_i), previous
    # One running maximum serves packed rows too: each document is lifted above those before it, in float64.
    f, i = log_f.double().cumsum(1), log_i.double()
    lift = torch.zeros_like(f[..., :1])
    first = torch.zeros_like(f[:, 0]) if start is None else start.double()
    if tokens.segments is not None:
        segments = tokens.segments
        lift = (segments * 1e5).double().unsqueeze(-1)
        before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], 1)
        new = (segments != before).unsqueeze(-1)
        i = torch.where(new, torch.maximum(i, log_f.double()), i)  # m_{t-1} = 0 at a document's first token
    ratio = torch.cat([first.unsqueeze(1), i - f + lift], 1).cummax(1).values[:, 1:] - lift
    m = f + ratio
    previous = torch.cat([first.unsqueeze(1), m[:, :-1]], 1)
    if tokens.segments is not None:
        previous = previous.masked_fill(new, 0)
    return m.to(log_i.dtype), previous.to(log_i.dtype)
