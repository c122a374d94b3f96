"""Base class of all mixers: what a student architecture defines, and everything that architectures share.

    mixer = build("gated_deltanet", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))
    y, state = mixer(q, k, v, x)                       # [B, T, H, V] and a dict of state tensors
    y, state = mixer(q1, k1, v1, x1, state=state)      # one more token

A mixer replaces softmax attention. It receives what the teacher's own attention module computed (q, k, v with their
biases, norms and RoPE) and the hidden states, and returns what goes into the teacher's own output projection.
A subclass writes `inputs`: how q, k, v, decay and write strength come about. Masks, packed documents, the short
convolution, the normalizer, chunked and recurrent forms, the mixing matrix, the state, head norm and output gate are
here.

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
from limbeck.mixers.types import HeadShape, Inputs, State, Tokens
from limbeck.ops import short_conv
from limbeck.ops.common import repeat_kv
from limbeck.ops.matrix_rows import gather_rows, matrix_rows


class ByInput(nn.ParameterDict):
    """Parameters for q, k and v, read by calling the module."""

    # By calling, because accelerate's hooks load offloaded weights for the duration of a call only.
    __call__ = nn.Module.__call__

    def forward(self, name: str) -> Tensor:
        return self[name]


class Mixer(nn.Module):
    """Base of all mixers. A subclass sets the attributes, writes `inputs` and initializes its parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""  # paper and equation
    # a module of limbeck.ops; None where the mixer overrides attend and attend_matrix
    operator: ModuleType | None = None
    grows: bool = False  # the state grows with every token; see `state_grows`
    normalized: bool = False  # divide the output by the operator's output for a column of ones
    options_class: type[Options] = Options
    # Options by preset: changes to the dataclass's defaults; those of the authors; those that make all mixers alike.
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # mixers in files beside students of 0.1 spell it so; without this they would be computed without a normalizer
        if "normalised" in vars(cls):
            cls.normalized = vars(cls)["normalised"]

    def __init__(self, teacher_shape: HeadShape, options: Options):
        super().__init__()
        self.teacher_shape, self.options = teacher_shape, options
        self.grows = self.state_grows(options)
        self.shape = shape = self._inner_shape()  # what the operator sees
        if options.output_norm != "none":
            self.norm_weight = nn.Parameter(torch.ones(shape.heads, shape.value_width))
            if options.norm_bias:
                self.norm_bias = nn.Parameter(torch.zeros(shape.heads, shape.value_width))
        if options.output_gate == "inner" and not options.gate_rank:
            raise LimbeckError(
                f"option 'output_gate' of mixer '{self.name}' is inner, but gate_rank is 0",
                expected="gate_rank of 1 or more",
            )
        if options.output_gate != "none":
            bias = options.output_gate != "inner" and options.gate_bias
            self.gate = nn.Linear(
                options.gate_rank or teacher_shape.hidden, teacher_shape.heads * teacher_shape.value_width, bias=bias
            )
            if options.gate_rank:
                self.gate_down = nn.Linear(teacher_shape.hidden, options.gate_rank, bias=False)
        if options.conv:
            widths = {
                "q": (teacher_shape.heads, teacher_shape.key_width),
                "k": (teacher_shape.kv_heads, teacher_shape.key_width),
                "v": (teacher_shape.kv_heads, teacher_shape.value_width),
            }
            self.conv = ByInput({n: nn.Parameter(torch.empty(options.conv, *w)) for n, w in widths.items()})
        if shape.key_width != self._head_width("key"):
            sizes = {"q": shape.heads, "k": shape.kv_heads}
            maps = {n: torch.empty(h, self._head_width("key"), shape.key_width) for n, h in sizes.items()}
            self.resize = ByInput({n: nn.Parameter(m) for n, m in maps.items()})
        self.build()
        self.reset_parameters()

    @property
    def site(self) -> HeadShape:
        """Return `teacher_shape` under the name that mixers of 0.1 know."""
        return self.teacher_shape

    def build(self) -> None:
        """Create the mixer's own parameters."""

    @classmethod
    def for_length(cls, options: Any, length: int) -> Any:
        """Return the options for training on sequences of `length` tokens, for mixers that depend on it."""
        return options

    @classmethod
    def state_grows(cls, options: Any) -> bool:
        """Return whether the state grows with every token, for mixers of which the options decide."""
        return cls.grows

    @classmethod
    def list_inner_mixers(cls, options: Any) -> list[str]:
        """List the mixers by name that this one consists of."""
        return []

    def reset_parameters(self) -> None:
        """Initialize every parameter as documented: close to linear attention over the teacher's q, k, v."""
        if self.options.conv:
            for weight in self.conv.values():
                nn.init.zeros_(weight)
                nn.init.ones_(weight[0])
        if hasattr(self, "resize"):
            # One map with orthonormal rows (or columns) for q and k of all heads, which preserves their products.
            start = nn.init.orthogonal_(torch.empty_like(self.resize["q"][0], dtype=torch.float32))
            with torch.no_grad():
                for weight in self.resize.values():
                    weight.copy_(start)
        if self.options.output_norm != "none":
            nn.init.ones_(self.norm_weight)
            if self.options.norm_bias:
                nn.init.zeros_(self.norm_bias)
        if self.options.output_gate == "inner":
            # The gate is 1: weights sum to 2 over σ(0) = 1/2; they differ so that channels learn differently.
            nn.init.zeros_(self.gate_down.weight)
            nn.init.normal_(self.gate.weight, std=self.options.gate_rank**-0.5)
            with torch.no_grad():
                self.gate.weight.add_((2 - self.gate.weight.sum(1, keepdim=True)) / self.options.gate_rank)
        elif self.options.output_gate != "none":
            if self.options.gate_rank:
                nn.init.normal_(self.gate_down.weight, std=self.teacher_shape.hidden**-0.5)
            if self.options.gate_bias:
                nn.init.zeros_(self.gate.weight)
                # silu(1.27846) = 1; a sigmoid gate starts at σ(4) = 0.98.
                nn.init.constant_(self.gate.bias, 1.2784645 if self.options.output_gate == "silu" else 4.0)
            else:
                # Zeros would close a silu gate, and no gradient would pass it.
                nn.init.normal_(self.gate.weight, std=self.gate.in_features**-0.5)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        """Compute the operator's arguments.

        Args:
            q: [B, T, H, K], not yet scaled by `shape.scale`.
            k: [B, T, G, K].
            v: [B, T, G, V].
            x: [B, T, D] the layer's input.
            tokens: padding and documents; the caller masks padded keys, decays and write strengths.
            state: with the `Inputs.carry` of the call before; empty at the start.
        """
        raise NotImplementedError

    def qk_width(self, rows: int) -> int:
        """Return the width of q and k for a state of that many rows per head; 0 rows leave it to the mixer."""
        return rows or self._head_width("key")

    def feature_width(self) -> int:
        """Return the rows of the state per head, for q and k of width `shape.key_width`."""
        return self.shape.key_width

    def before_norm(self, o: Tensor, q: Tensor, inputs: Inputs) -> Tensor:
        """Change the operator's output o [B, T, H, V] before the head norm; the result may have any precision.

        Args:
            q: [B, T, H, K] as `inputs` got it.
            inputs: what it returned, with padding masked. In mixers that override `attend` this is not called.
        """
        return o

    def after_norm(self, o: Tensor, q: Tensor, inputs: Inputs) -> Tensor:
        """Change the output o [B, T, H, V] between head norm and output gate; arguments as of `before_norm`."""
        return o

    # ------------------------------------------------------------------ what every mixer gets

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix the values; return them and the state after the last token.

        Args:
            q: [B, T, H, K].
            k: [B, T, G, K].
            v: [B, T, G, V].
            x: [B, T, D] the layer's input.
            tokens: padding and document numbers; None when there is neither.
            state: as the call for the tokens before returned it; None at the start of a sequence.

        Returns:
            y [B, T, H, V] in the dtype of v, and the new state.
        """
        tokens, state = tokens or Tokens(), state or {}
        carried: State = {}
        q, k, v = self._prepare(q, k, v, tokens, state, carried)
        arguments = None
        if type(self).attend is Mixer.attend:
            # Not in `attend`, because what is around the head norm needs them again.
            arguments = self.compute_masked_inputs(q, k, v, x, tokens, state)
            o, memory = self._operate(arguments, tokens, state)
        else:
            o, memory = self.attend(q, k, v, x, tokens, state)
        return self._readout(o, q, x, arguments), {**memory, **carried}

    def forward_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute y [B, T, H, V] by the mixing matrix, and return that matrix [B, H, T, T] too.

        The matrix multiplies v after convolution and activation. Head norm, output gate and what a mixer adds outside
        its recurrence come after it and are not part of it.
        """
        tokens = tokens or Tokens()
        q, k, v = self._prepare(q, k, v, tokens, {}, {})
        arguments = None
        if type(self).attend_matrix is Mixer.attend_matrix:
            arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
            matrix = self._operate_matrix(arguments, tokens)
        else:
            matrix = self.attend_matrix(q, k, v, x, tokens)
        o = torch.einsum("bhij,bjhv->bihv", matrix.to(v.dtype), repeat_kv(v, self.shape.heads))
        return self._readout(o, q, x, arguments), repeat_kv(matrix, self.teacher_shape.heads, 1)

    def forward_rows(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rows: Tensor | None, *, tokens: Tokens | None = None
    ) -> Tensor:
        """Compute rows [B, R] of the mixing matrix of `forward_matrix`, and nothing behind them: [B, H, R, T].

        Args:
            rows: None for all of them.
        """
        tokens = tokens or Tokens()
        if type(self).forward_matrix is not Mixer.forward_matrix:
            matrix = self.forward_matrix(q, k, v, x, tokens=tokens)[1]
            return matrix if rows is None else gather_rows(matrix, rows, 2)
        q, k, v = self._prepare(q, k, v, tokens, {}, {})
        if rows is None:
            matrix = self.attend_matrix(q, k, v, x, tokens)
        else:
            matrix = self.attend_rows(q, k, v, x, tokens, rows)
        return repeat_kv(matrix, self.teacher_shape.heads, 1)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, rows: Tensor) -> Tensor:
        """Compute rows [B, R] of `attend_matrix`: [B, H, R, T]; all of it in mixers that override that."""
        if type(self).attend_matrix is not Mixer.attend_matrix:
            return gather_rows(self.attend_matrix(q, k, v, x, tokens), rows, 2)
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
        assert self.operator is not None
        m = matrix_rows(self.operator, arguments.q, arguments.k, arguments.gates, rows, tokens.segments)
        if self.normalized:
            floor = arguments.floor if arguments.floor is None else gather_rows(arguments.floor, rows, 1)
            total = m.sum(-1).transpose(1, 2).unsqueeze(-1)
            denominator = self._denominator(total, replace(arguments, floor=floor))
            m = m / denominator.squeeze(-1).transpose(1, 2).unsqueeze(-1)
        if arguments.diagonal is None:
            return m
        own = gather_rows(arguments.diagonal, rows, 1).transpose(1, 2).unsqueeze(-1).to(m.dtype)
        return m.scatter_add(3, rows[:, None, :, None].expand_as(own), own)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        """Run the operator on `inputs` and normalize: o [B, T, H, V] and the new state."""
        return self._operate(self.compute_masked_inputs(q, k, v, x, tokens, state), tokens, state)

    def _operate(self, arguments: Inputs, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        value = arguments.v
        if self.normalized:
            value = torch.cat([value, value.new_ones(*value.shape[:-1], 1)], -1)
        assert self.operator is not None
        run = self.operator.recurrent if value.shape[1] == 1 else self.operator.chunked
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
        return arguments.add_diagonal_to_output(o), {"memory": memory, **arguments.carry}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        """Build the matrix [B, H, T, T] that `attend` multiplies v by."""
        return self._operate_matrix(self.compute_masked_inputs(q, k, v, x, tokens, {}), tokens)

    def _operate_matrix(self, arguments: Inputs, tokens: Tokens) -> Tensor:
        assert self.operator is not None
        m = self.operator.matrix(arguments.q, arguments.k, *arguments.gates, segments=tokens.segments)
        if self.normalized:
            total = m.sum(-1).transpose(1, 2).unsqueeze(-1)
            m = m / self._denominator(total, arguments).squeeze(-1).transpose(1, 2).unsqueeze(-1)
        return arguments.add_diagonal_to_matrix(m)

    def compute_masked_inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        """Run `inputs` and turn padding into no-ops: it writes nothing, and nothing decays."""
        arguments = self.inputs(q, k, v, x, tokens, state)
        return arguments if tokens.valid is None else arguments.mask_padding(tokens.valid)

    def state_numel(self) -> int:
        """Count the numbers in the state of one sequence, whatever its length."""
        s = self.teacher_shape
        channels = s.heads * s.key_width + s.kv_heads * (s.key_width + s.value_width)
        return self.memory_numel() + max(self.options.conv - 1, 0) * channels

    def memory_numel(self) -> int:
        """Count the numbers in the state without the convolution's."""
        return self.shape.heads * self.feature_width() * (self.shape.value_width + self.normalized)

    def _head_width(self, of: str) -> int:
        """Return the key or value width of a head after merging heads."""
        width = self.teacher_shape.key_width if of == "key" else self.teacher_shape.value_width
        return width * self.teacher_shape.heads // (self.options.heads or self.teacher_shape.heads)

    def _inner_shape(self) -> HeadShape:
        """Return the shape of the operator's inputs: the teacher's after merging heads and resizing q and k."""
        teacher_shape, heads = self.teacher_shape, self.options.heads or self.teacher_shape.heads
        if teacher_shape.heads % heads:
            raise LimbeckError(
                f"option 'heads' of mixer '{self.name}' is {heads}, but the teacher has {teacher_shape.heads} heads",
                expected=f"a divisor of {teacher_shape.heads}, or 0",
            )
        groups = teacher_shape.kv_heads if heads == teacher_shape.heads else heads
        rows = round(self.options.state * teacher_shape.key_width)
        if self.options.state and not rows:
            raise LimbeckError(
                f"option 'state' of mixer '{self.name}' is {self.options.state}, less than one row",
                expected=f"{1 / teacher_shape.key_width:.3g} or more, or 0",
            )
        width = self.qk_width(rows)
        return replace(
            teacher_shape, heads=heads, kv_heads=groups, key_width=width, value_width=self._head_width("value")
        )

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State, carried: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve, activate, merge into fewer heads and resize q, k, v; put the convolutions' state into `carried`."""
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

    def _convolve(self, name: str, z: Tensor, tokens: Tokens, state: State, carried: State) -> Tensor:
        """Convolve q, k or v [B, T, heads, width]; put the state for the next call into `carried`."""
        key = f"conv_{name}"
        past = {"state": state.get(key), "segments": tokens.segments}
        if tokens.valid is None:
            z, carried[key] = short_conv.causal(z, self.conv(name), **past)
        else:
            z, carried[key] = short_conv.causal_masked(z, self.conv(name), tokens.valid, **past)
        return z

    def _readout(self, o: Tensor, q: Tensor, x: Tensor, arguments: Inputs | None) -> Tensor:
        """Apply head norm and output gate, and return to the teacher's heads: [B, T, H, V]."""
        dtype, gate_first = o.dtype, self.options.norm_over == "gated"
        o = o if arguments is None else self.before_norm(o, q, arguments)
        o = self._apply_gate(o, x) if gate_first else o
        if self.options.output_norm != "none":
            o = self._apply_norm(o.float() if o.dtype in (torch.float16, torch.bfloat16) else o)
        o = o if o.dtype == dtype else o.to(dtype)
        o = o if arguments is None else self.after_norm(o, q, arguments)
        if self.shape.heads != self.teacher_shape.heads:
            o = o.reshape(*o.shape[:2], self.teacher_shape.heads, self.teacher_shape.value_width)
        return o if gate_first else self._apply_gate(o, x)

    def _apply_norm(self, o: Tensor) -> Tensor:
        width = 1 if self.options.norm_over == "head" else 2
        if self.options.output_norm == "layer":
            o = F.layer_norm(o, o.shape[-width:], eps=self.options.norm_eps)
        else:
            over = tuple(range(-width, 0))
            o = o * torch.rsqrt(o.square().mean(over, keepdim=True) + self.options.norm_eps)
        o = o * self.norm_weight
        return o + self.norm_bias if self.options.norm_bias else o

    def _apply_gate(self, o: Tensor, x: Tensor) -> Tensor:
        kind = self.options.output_gate
        if kind == "none":
            return o
        x = self.gate_down(x) if self.options.gate_rank else x
        if kind == "inner":
            return o * self.gate(torch.sigmoid(x)).view(o.shape)
        return o * (F.silu if kind == "silu" else torch.sigmoid)(self.gate(x)).view(o.shape)

    def _denominator(self, total: Tensor, arguments: Inputs) -> Tensor:
        if arguments.floor is not None:
            return torch.maximum(total.abs(), arguments.floor.unsqueeze(-1).to(total.dtype))
        return total.clamp_min(1e-6)

    @property
    def operator_name(self) -> str:
        """Return the name of the operator, for tables."""
        return self.operator.__name__.rsplit(".", 1)[1].replace("_", " ") if self.operator else "softmax"

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self.options, f.name)}" for f in fields(self.options))
