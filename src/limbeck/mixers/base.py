"""What a mixer is: the contract that every student architecture fills in, and all that they share.

A mixer stands where softmax attention stood. It receives what the teacher's own attention module computed (q, k, v with
their biases, norms and RoPE) and the hidden states, and returns what goes into the teacher's own output projection.
A subclass writes `compute_inputs` (how q, k, v, decay and write strength come about); masks, packed documents, the convolution,
the normaliser, chunked and recurrent forms, the mixing matrix, the state, head norm and output gate live here.

    mixer = build("gated_deltanet", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))
    y, state = mixer(q, k, v, x)                       # [B, T, H, V] and a dict of state tensors
    y, state = mixer(q1, k1, v1, x1, state=state)      # one more token

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, D model width.
"""

from dataclasses import fields, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import LimbeckError
from limbeck.mixers.options import Options
from limbeck.mixers.types import HeadShape, OperatorInputs, State, TokenMask
from limbeck.ops import short_conv
from limbeck.ops.common import repeat_kv
from limbeck.ops.matrix_rows import gather_rows, matrix_rows


class ByInput(nn.ParameterDict):
    """Parameters of q, k and v, got by calling: weights that accelerate keeps elsewhere are there during calls only."""

    __call__ = nn.Module.__call__

    def forward(self, name: str) -> Tensor:
        return self[name]


class Mixer(nn.Module):
    """Base of all mixers. A subclass sets the class attributes, writes `compute_inputs` and starts its own parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""  # paper and equation
    # one of limbeck.ops; None where the mixer overrides attend and attend_matrix
    operator: ModuleType | None = None
    has_growing_state: ClassVar[bool] = False  # its state holds more with every token
    normalized: bool = False  # divide by the same read-out of a column of ones
    options_class: type[Options] = Options
    # options by preset: changes to the dataclass's defaults, what the authors have, what makes all mixers alike
    defaults: ClassVar[dict[str, Any]] = {}
    published: ClassVar[dict[str, Any]] = {}
    controlled: ClassVar[dict[str, Any]] = {
        "rope": True,
        "conv": 0,
        "conv_activation": "none",
        "output_norm": "rms",
        "norm_over": "head",
        "norm_bias": False,
        "output_gate": "none",
        "heads": 0,
        "state": 1.0,
    }

    def __init__(self, teacher_shape: HeadShape, options: Options):
        super().__init__()
        self.teacher_shape, self.options = teacher_shape, options
        self.shape = shape = self._inner_shape()  # what the operator sees
        if options.output_norm != "none":
            self.norm_weight = nn.Parameter(torch.ones(shape.heads, shape.value_width))
            if options.norm_bias:
                self.norm_bias = nn.Parameter(torch.zeros(shape.heads, shape.value_width))
        if options.output_gate == "inner" and not options.gate_rank:
            raise LimbeckError(
                f"option 'output_gate' of mixer '{self.name}' is inner, and gate_rank is 0",
                expected="gate_rank of 1 or more",
            )
        if options.output_gate != "none":
            bias = options.output_gate != "inner"
            self.gate = nn.Linear(
                options.gate_rank or teacher_shape.hidden, teacher_shape.heads * teacher_shape.value_width, bias=bias
            )
            if options.gate_rank:
                self.gate_down = nn.Linear(teacher_shape.hidden, options.gate_rank, bias=False)
        if options.conv:
            widths = {
                "q": (teacher_shape.heads, teacher_shape.key_width),
                "k": (teacher_shape.kv_heads, teacher_shape.key_width),
            }
            widths["v"] = (teacher_shape.kv_heads, teacher_shape.value_width)
            self.conv = ByInput({n: nn.Parameter(torch.empty(options.conv, *w)) for n, w in widths.items()})
        if shape.key_width != self._head_width("key"):
            sizes = {"q": shape.heads, "k": shape.kv_heads}
            maps = {n: torch.empty(h, self._head_width("key"), shape.key_width) for n, h in sizes.items()}
            self.resize = ByInput({n: nn.Parameter(m) for n, m in maps.items()})
        self.build()
        self.reset_parameters()

    def build(self) -> None:
        """Make the mixer's own parameters."""

    @classmethod
    def adapt_to_seq_len(cls, options: Any, length: int) -> Any:
        """The options of a student that learns from texts of so many tokens, for mixers that depend on it."""
        return options

    def reset_parameters(self) -> None:
        """Set every parameter to its documented start: close to linear attention over the teacher's q, k, v."""
        if self.options.conv:
            for weight in self.conv.values():
                nn.init.zeros_(weight)
                nn.init.ones_(weight[0])
        if hasattr(self, "resize"):
            # one map with orthonormal rows (or columns) for q and k of all heads: it keeps their products as they are
            start = nn.init.orthogonal_(torch.empty_like(self.resize["q"][0], dtype=torch.float32))
            with torch.no_grad():
                for weight in self.resize.values():
                    weight.copy_(start)
        if self.options.output_norm != "none":
            nn.init.ones_(self.norm_weight)
            if self.options.norm_bias:
                nn.init.zeros_(self.norm_bias)
        if self.options.output_gate == "inner":
            # one: halves of σ(0), weighed by different numbers so that no two channels learn alike
            nn.init.zeros_(self.gate_down.weight)
            nn.init.normal_(self.gate.weight, std=self.options.gate_rank**-0.5)
            with torch.no_grad():
                self.gate.weight.add_((2 - self.gate.weight.sum(1, keepdim=True)) / self.options.gate_rank)
        elif self.options.output_gate != "none":
            if self.options.gate_rank:
                nn.init.normal_(self.gate_down.weight, std=self.teacher_shape.hidden**-0.5)
            nn.init.zeros_(self.gate.weight)
            # silu(1.27846) = 1; a sigmoid gate starts at 0.98
            nn.init.constant_(self.gate.bias, 1.2784645 if self.options.output_gate == "silu" else 4.0)

    def compute_inputs(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: TokenMask, state: State
    ) -> OperatorInputs:
        """The operator's arguments.

        Args:
            q: [B, T, H, K], not yet scaled (`shape.scale`); k: [B, T, G, K]; v: [B, T, G, V]; x: [B, T, D].
            tokens: padding and documents. Padded keys, decays and write strengths are blanked by the caller.
            state: what this mixer put into `Inputs.carry` last time, empty at the start.
        """
        raise NotImplementedError

    def qk_width(self, rows: int) -> int:
        """Width of q and k that the mixer wants for a state of so many rows a head; 0 rows: the mixer's own choice."""
        return rows or self._head_width("key")

    def feature_width(self) -> int:
        """Rows of the state, for q and k of width `shape.key_width`."""
        return self.shape.key_width

    def before_norm(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """What a token adds of its own to the operator's output o [B, T, H, V], ahead of the head norm, which works in
        float32: so in any precision."""
        return o

    def after_norm(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The same between head norm and output gate."""
        return o

    # ------------------------------------------------------------------ what every mixer gets

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: TokenMask | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mixed values and the state after the last token.

        Args:
            q: [B, T, H, K]; k: [B, T, G, K]; v: [B, T, G, V]; x: [B, T, D] the layer's input.
            tokens: padding and document numbers; None when there is neither.
            state: what an earlier call returned, to go on from there; None at the start of a sequence.

        Returns:
            y [B, T, H, V] in the dtype of v, and the new state.
        """
        tokens, state = tokens or TokenMask(), state or {}
        carried: State = {}
        q, k, v = self._prepare(q, k, v, tokens, state, carried)
        o, memory = self.attend(q, k, v, x, tokens, state)
        return self._readout(o, q, k, v, x), {**memory, **carried}

    def forward_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: TokenMask | None = None
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, H, V] by way of the mixing matrix, and that matrix [B, H, T, T].

        What it multiplies is v after convolution and activation; head norm, output gate and what a mixer adds outside
        its recurrence come after it and are no part of it.
        """
        tokens = tokens or TokenMask()
        q, k, v = self._prepare(q, k, v, tokens, {}, {})
        matrix = self.attend_matrix(q, k, v, x, tokens)
        o = torch.einsum("bhij,bjhv->bihv", matrix.to(v.dtype), repeat_kv(v, self.shape.heads))
        return self._readout(o, q, k, v, x), repeat_kv(matrix, self.teacher_shape.heads, 1)

    def forward_rows(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rows: Tensor, *, tokens: TokenMask | None = None
    ) -> Tensor:
        """Rows [B, R] of the mixing matrix of `forward_matrix`: [B, H, R, T]."""
        tokens = tokens or TokenMask()
        if type(self).forward_matrix is not Mixer.forward_matrix:
            return gather_rows(self.forward_matrix(q, k, v, x, tokens=tokens)[1], rows, 2)
        q, k, v = self._prepare(q, k, v, tokens, {}, {})
        return repeat_kv(self.attend_rows(q, k, v, x, tokens, rows), self.teacher_shape.heads, 1)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: TokenMask, rows: Tensor) -> Tensor:
        """Rows [B, R] of what `attend` multiplies v by: [B, H, R, T]. Mixers with a matrix of their own make all."""
        if type(self).attend_matrix is not Mixer.attend_matrix:
            return gather_rows(self.attend_matrix(q, k, v, x, tokens), rows, 2)
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
        assert self.operator is not None
        m = matrix_rows(self.operator, arguments.q, arguments.k, arguments.gates, rows, tokens.segments)
        if self.normalized:
            floor = (
                arguments.denominator_floor
                if arguments.denominator_floor is None
                else gather_rows(arguments.denominator_floor, rows, 1)
            )
            total = m.sum(-1).transpose(1, 2).unsqueeze(-1)
            denominator = self._denominator(total, replace(arguments, denominator_floor=floor))
            m = m / denominator.squeeze(-1).transpose(1, 2).unsqueeze(-1)
        if arguments.diagonal is None:
            return m
        own = gather_rows(arguments.diagonal, rows, 1).transpose(1, 2).unsqueeze(-1).to(m.dtype)
        return m.scatter_add(3, rows[:, None, :, None].expand_as(own), own)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: TokenMask, state: State
    ) -> tuple[Tensor, State]:
        """The operator over `compute_inputs`, normalised: o [B, T, H, V] and the new state."""
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, state)
        value = arguments.v
        if self.normalized:
            value = torch.cat([value, value.new_ones(*value.shape[:-1], 1)], -1)
        assert self.operator is not None
        run = self.operator.recurrent if q.shape[1] == 1 else self.operator.chunked
        o, memory = run(
            arguments.q,
            arguments.k,
            value,
            *arguments.gates,
            state=state.get("memory"),
            segments=tokens.segments,
        )
        if self.normalized:
            o, total = o[..., :-1], o[..., -1:]
            o = o / self._denominator(total, arguments)
        return arguments.add_diagonal_to_output(o), {"memory": memory, **arguments.carried_state}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: TokenMask) -> Tensor:
        """What `attend` multiplies v by, [B, H, T, T]."""
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
        assert self.operator is not None
        m = self.operator.matrix(arguments.q, arguments.k, *arguments.gates, segments=tokens.segments)
        if self.normalized:
            total = m.sum(-1).transpose(1, 2).unsqueeze(-1)
            m = m / self._denominator(total, arguments).squeeze(-1).transpose(1, 2).unsqueeze(-1)
        return arguments.add_diagonal_to_matrix(m)

    def compute_masked_inputs(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: TokenMask, state: State
    ) -> OperatorInputs:
        """`compute_inputs` with padding blanked: a masked token writes nothing and nothing decays."""
        arguments = self.compute_inputs(q, k, v, x, tokens, state)
        return arguments if tokens.valid is None else arguments.mask_padding(tokens.valid)

    def state_numel(self) -> int:
        """Numbers that the state of one sequence holds, whatever its length."""
        s = self.teacher_shape
        channels = s.heads * s.key_width + s.kv_heads * (s.key_width + s.value_width)
        return self.memory_numel() + max(self.options.conv - 1, 0) * channels

    def memory_numel(self) -> int:
        """The same without the convolution's."""
        return self.shape.heads * self.feature_width() * (self.shape.value_width + self.normalized)

    def _head_width(self, of: str) -> int:
        """Key or value width of a head after merging."""
        width = self.teacher_shape.key_width if of == "key" else self.teacher_shape.value_width
        return width * self.teacher_shape.heads // (self.options.heads or self.teacher_shape.heads)

    def _inner_shape(self) -> HeadShape:
        teacher_shape, heads = self.teacher_shape, self.options.heads or self.teacher_shape.heads
        if teacher_shape.heads % heads:
            raise LimbeckError(
                f"option 'heads' of mixer '{self.name}' is {heads}, the teacher's attention has {teacher_shape.heads}",
                expected=f"a divisor of {teacher_shape.heads}, or 0",
            )
        groups = teacher_shape.kv_heads if heads == teacher_shape.heads else heads
        rows = round(self.options.state * teacher_shape.key_width)
        if self.options.state and not rows:
            raise LimbeckError(
                f"option 'state' of mixer '{self.name}' is {self.options.state}", expected="a row or more"
            )
        width = self.qk_width(rows)
        return replace(
            teacher_shape, heads=heads, kv_heads=groups, key_width=width, value_width=self._head_width("value")
        )

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: TokenMask, state: State, carried: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v convolved, activated, merged into fewer heads and resized; fills `carried`."""
        if self.options.conv:
            q, k, v = (self._convolve(name, z, tokens, state, carried) for name, z in zip("qkv", (q, k, v)))
        if self.options.conv_activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if self.shape.heads != self.teacher_shape.heads:
            merged = (*q.shape[:2], self.shape.heads, -1)
            q, k, v = q.reshape(merged), *(repeat_kv(z, self.teacher_shape.heads).reshape(merged) for z in (k, v))
        if hasattr(self, "resize"):
            q, k = (torch.einsum("bthk,hkj->bthj", z, self.resize(n)) for n, z in (("q", q), ("k", k)))
        return q, k, v

    def _convolve(self, name: str, z: Tensor, tokens: TokenMask, state: State, carried: State) -> Tensor:
        """q, k or v [B, T, heads, width] convolved; puts what the next call needs into `carried`."""
        key = f"conv_{name}"
        past = {"state": state.get(key), "segments": tokens.segments}
        if tokens.valid is None:
            z, carried[key] = short_conv.causal(z, self.conv(name), **past)
        else:
            z, carried[key] = short_conv.causal_masked(z, self.conv(name), tokens.valid, **past)
        return z

    def _readout(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Head norm and output gate, and the teacher's heads again: [B, T, H, V]."""
        dtype, gated = o.dtype, self.options.norm_over == "gated"
        o = self.before_norm(o, q, k, v, x)
        o = self._gated(o, x) if gated else o
        if self.options.output_norm != "none":
            o = self._normed(o.float() if o.dtype in (torch.float16, torch.bfloat16) else o)
        o = self.after_norm(o.to(dtype), q, k, v, x)
        o = o.reshape(*o.shape[:2], self.teacher_shape.heads, self.teacher_shape.value_width)
        return o if gated else self._gated(o, x)

    def _normed(self, o: Tensor) -> Tensor:
        over = -1 if self.options.norm_over == "head" else (-2, -1)
        if self.options.output_norm == "layer":
            o = o - o.mean(over, keepdim=True)
        o = o * torch.rsqrt(o.square().mean(over, keepdim=True) + 1e-6) * self.norm_weight
        return o + self.norm_bias if self.options.norm_bias else o

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        kind = self.options.output_gate
        if kind == "none":
            return o
        x = self.gate_down(x) if self.options.gate_rank else x
        if kind == "inner":
            return o * self.gate(torch.sigmoid(x)).view(o.shape)
        return o * (F.silu if kind == "silu" else torch.sigmoid)(self.gate(x)).view(o.shape)

    def _denominator(self, total: Tensor, arguments: OperatorInputs) -> Tensor:
        if arguments.denominator_floor is not None:
            return torch.maximum(total.abs(), arguments.denominator_floor.unsqueeze(-1).to(total.dtype))
        return total.clamp_min(1e-6)

    @property
    def operator_name(self) -> str:
        """Name of the operator that it runs on."""
        return self.operator.__name__.rsplit(".", 1)[1].replace("_", " ") if self.operator else "softmax"

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self.options, f.name)}" for f in fields(self.options))
