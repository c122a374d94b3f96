"""What a mixer is: the contract that every student architecture fills in, and all that they share.

A mixer stands where softmax attention stood. It receives what the teacher's own attention module computed (q, k, v with
their biases, norms and RoPE) and the hidden states, and returns what goes into the teacher's own output projection.
A subclass writes `inputs` (how q, k, v, decay and write strength come about); masks, packed documents, the convolution,
the normaliser, chunked and recurrent forms, the mixing matrix, the state, head norm and output gate live here.

    mixer = build("gated_deltanet", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))
    y, state = mixer(q, k, v, x)                       # [B, T, H, V] and a dict of state tensors
    y, state = mixer(q1, k1, v1, x1, state=state)      # one more token

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, D model width.
"""

import math
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.errors import LimbeckError, closest
from limbeck.ops import convolution

State = dict[str, Tensor]


@dataclass(frozen=True)
class HeadShape:
    """The attention module that a mixer replaces: widths, head counts and where it stands."""

    hidden: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    scale: float = 1.0  # what the teacher multiplies q·k by
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class Tokens:
    """What a mixer knows of its tokens beside their content.

    valid: [B, T] bool, False for padding; None when every token counts.
    segments: [B, T] int, number of the packed document, 0 for the one that the incoming state belongs to; None for one.
    """

    valid: Tensor | None = None
    segments: Tensor | None = None


@dataclass
class Inputs:
    """The operator's arguments for one call, and what the mixer carries on beside the operator's state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    floor: Tensor | None = None  # [B, T, H] least size of the normaliser's denominator
    carry: State = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Switches common to all mixers; each mixer sets its own defaults and adds its own."""

    rope: bool = True  # hand over q and k with the teacher's rotary position embedding
    conv: int = 0  # width of a causal convolution over q, k and v; 0 for none; starts as the identity
    output_norm: Literal["none", "rms", "layer"] = "none"  # per head, before the output gate
    output_gate: Literal["none", "silu", "sigmoid"] = "none"  # full-width gate from the hidden states, starts open

    @classmethod
    def parse(cls, given: dict[str, Any], mixer: str) -> "Options":
        """Options from plain values (YAML, the command line); unknown names and values raise LimbeckError."""
        known = {f.name: f for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise LimbeckError(
                    f"mixer '{mixer}' has no option '{name}'{closest(name, known)}", expected=", ".join(known)
                )
            kind = known[name].type
            choices = getattr(kind, "__args__", None) if "Literal" in str(kind) else None
            ok = value in choices if choices else _is_a(value, kind)
            if not ok:
                expected = " | ".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
                raise LimbeckError(f"option '{name}' of mixer '{mixer}' is {value!r}", expected=expected)
        if given.get("conv", 0) < 0 or given.get("conv", 0) == 1:
            raise LimbeckError(f"option 'conv' of mixer '{mixer}' is {given['conv']}", expected="0, or 2 and more")
        return cls(**given)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


class Mixer(nn.Module):
    """Base of all mixers. A subclass sets the class attributes, writes `inputs` and starts its own parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    # one of limbeck.ops; None where the mixer overrides attend and attend_matrix
    operator: ModuleType | None = None
    normalised: bool = False  # divide by the same read-out of a column of ones
    options_class: type[Options] = Options

    def __init__(self, shape: HeadShape, options: Options):
        super().__init__()
        self.shape, self.options = shape, options
        width = shape.heads * shape.value_width
        if options.output_norm != "none":
            self.norm_weight = nn.Parameter(torch.ones(shape.heads, shape.value_width))
        if options.output_gate != "none":
            self.gate = nn.Linear(shape.hidden, width)
        if options.conv:
            widths = {"q": (shape.heads, shape.key_width), "k": (shape.kv_heads, shape.key_width)}
            widths["v"] = (shape.kv_heads, shape.value_width)
            self.conv = nn.ParameterDict({n: nn.Parameter(torch.empty(options.conv, *w)) for n, w in widths.items()})
        self.build()
        self.reset_parameters()

    def build(self) -> None:
        """Make the mixer's own parameters."""

    def reset_parameters(self) -> None:
        """Set every parameter to its documented start: close to linear attention over the teacher's q, k, v."""
        if self.options.conv:
            for weight in self.conv.values():
                nn.init.zeros_(weight)
                nn.init.ones_(weight[0])
        if self.options.output_norm != "none":
            nn.init.ones_(self.norm_weight)
        if self.options.output_gate != "none":
            nn.init.zeros_(self.gate.weight)
            # silu(1.27846) = 1; a sigmoid gate starts at 0.98
            nn.init.constant_(self.gate.bias, 1.2784645 if self.options.output_gate == "silu" else 4.0)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        """The operator's arguments.

        Args:
            q: [B, T, H, K], not yet scaled (`shape.scale`); k: [B, T, G, K]; v: [B, T, G, V]; x: [B, T, D].
            tokens: padding and documents. Padded keys, decays and write strengths are blanked by the caller.
            state: what this mixer put into `Inputs.carry` last time, empty at the start.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ what every mixer gets

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mixed values and the state after the last token.

        Args:
            q: [B, T, H, K]; k: [B, T, G, K]; v: [B, T, G, V]; x: [B, T, D] the layer's input.
            tokens: padding and document numbers; None when there is neither.
            state: what an earlier call returned, to go on from there; None at the start of a sequence.

        Returns:
            y [B, T, H, V] in the dtype of v, and the new state.
        """
        tokens, state = tokens or Tokens(), state or {}
        carried: State = {}
        if self.options.conv:
            q, k, v = (self._convolve(name, z, tokens, state, carried) for name, z in zip("qkv", (q, k, v)))
        o, memory = self.attend(q, k, v, x, tokens, state)
        return self.readout(o, x), {**memory, **carried}

    def matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """The mixing matrix [B, H, T, T]: before head norm and gate, `forward` is this matrix times the convolved v."""
        tokens = tokens or Tokens()
        if self.options.conv:
            q, k, v = (self._convolve(name, z, tokens, {}, {}) for name, z in zip("qkv", (q, k, v)))
        return self.attend_matrix(q, k, v, x, tokens)

    def mix(self, matrix: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """The mixer's output from its mixing matrix [B, H, T, T] and v [B, T, G, V]: y [B, T, H, V]."""
        if self.options.conv:
            v = self._convolve("v", v, tokens or Tokens(), {}, {})
        v = v.repeat_interleave(self.shape.heads // v.shape[2], dim=2)
        return self.readout(torch.einsum("bhij,bjhv->bihv", matrix.to(v.dtype), v), x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        """The operator over `inputs`, normalised: o [B, T, H, V] and the new state."""
        arguments = self._operands(q, k, v, x, tokens, state)
        assert self.operator is not None
        run = self.operator.recurrent if q.shape[1] == 1 else self.operator.chunked
        value = arguments.v
        if self.normalised:
            value = torch.cat([value, value.new_ones(*value.shape[:-1], 1)], -1)
        o, memory = run(
            arguments.q,
            arguments.k,
            value,
            *self._gates(arguments),
            state=state.get("memory"),
            segments=tokens.segments,
        )
        if self.normalised:
            o, total = o[..., :-1], o[..., -1:]
            o = o / self._denominator(total, arguments)
        return o, {"memory": memory, **arguments.carry}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        """What `attend` multiplies v by, [B, H, T, T]."""
        arguments = self._operands(q, k, v, x, tokens, {})
        assert self.operator is not None
        m = self.operator.matrix(arguments.q, arguments.k, *self._gates(arguments), segments=tokens.segments)
        if self.normalised:
            total = m.sum(-1).transpose(1, 2).unsqueeze(-1)
            m = m / self._denominator(total, arguments).squeeze(-1).transpose(1, 2).unsqueeze(-1)
        return m

    def readout(self, o: Tensor, x: Tensor) -> Tensor:
        """Head norm and output gate. o: [B, T, H, V], x: [B, T, D] -> [B, T, H, V]."""
        if self.options.output_norm != "none":
            wide = o.float() if o.dtype in (torch.float16, torch.bfloat16) else o
            if self.options.output_norm == "layer":
                wide = wide - wide.mean(-1, keepdim=True)
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            o = (wide * self.norm_weight).to(o.dtype)
        if self.options.output_gate != "none":
            activate = F.silu if self.options.output_gate == "silu" else torch.sigmoid
            o = o * activate(self.gate(x)).view(o.shape)
        return o

    def state_numel(self) -> int:
        """Numbers that the state of one sequence holds, whatever its length."""
        s = self.shape
        memory = s.heads * self.feature_width() * (s.value_width + self.normalised)
        channels = s.heads * s.key_width + s.kv_heads * (s.key_width + s.value_width)
        return memory + max(self.options.conv - 1, 0) * channels

    def feature_width(self) -> int:
        """Key width that the operator sees."""
        return self.shape.key_width

    def _convolve(self, name: str, z: Tensor, tokens: Tokens, state: State, carried: State) -> Tensor:
        """q, k or v [B, T, heads, width] convolved; puts what the next call needs into `carried`."""
        if tokens.valid is not None:
            z = z.masked_fill(~tokens.valid[..., None, None], 0)
        key = f"conv_{name}"
        z, carried[key] = convolution.causal(z, self.conv[name], state=state.get(key), segments=tokens.segments)
        return z

    def _operands(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        arguments = self.inputs(q, k, v, x, tokens, state)
        if tokens.valid is not None:  # a masked token is a no-op: it writes nothing and nothing decays
            blank = ~tokens.valid[..., None]
            arguments.k = arguments.k.masked_fill(blank[..., None], 0)
            arguments.v = arguments.v.masked_fill(blank[..., None], 0)
            if arguments.beta is not None:
                arguments.beta = arguments.beta.masked_fill(blank, 0)
            decay = arguments.log_decay
            if decay is not None:
                decay = decay.expand(*q.shape[:2], -1) if decay.dim() == 1 else decay
                arguments.log_decay = decay.masked_fill(blank if decay.dim() == 3 else blank[..., None], 0)
        return arguments

    def _gates(self, arguments: Inputs) -> tuple[Tensor | None, ...]:
        if arguments.beta is not None:
            return arguments.beta, arguments.log_decay
        return (arguments.log_decay,)

    def _denominator(self, total: Tensor, arguments: Inputs) -> Tensor:
        if arguments.floor is not None:
            return torch.maximum(total.abs(), arguments.floor.unsqueeze(-1).to(total.dtype))
        return total.clamp_min(1e-6)

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self.options, f.name)}" for f in fields(self.options))


def spread_half_lives(heads: int, shortest: float, longest: float) -> Tensor:
    """Log decay per token [H] (negative) under which a write fades to one half in `shortest` tokens in the first head,
    `longest` in the last and geometrically in between."""
    steps = torch.linspace(0, 1, heads, dtype=torch.float64) if heads > 1 else torch.zeros(1, dtype=torch.float64)
    return (-math.log(2.0) / (shortest * (longest / shortest) ** steps)).float()


_REGISTRY: dict[str, type[Mixer]] = {}


def register(cls: type[Mixer]) -> type[Mixer]:
    """Class decorator: makes the mixer known by its `name` to conversion, recipes and the contract tests."""
    _REGISTRY[cls.name] = cls
    return cls


def names() -> list[str]:
    """All registered mixers."""
    return list(_REGISTRY)


def get(name: str) -> type[Mixer]:
    """The mixer class of that name; LimbeckError with the nearest name if there is none."""
    if name not in _REGISTRY:
        raise LimbeckError(
            f"unknown mixer '{name}'{closest(name, _REGISTRY)}",
            expected=", ".join(_REGISTRY),
            hint="limbeck students   (lists them with what each one is)",
        )
    return _REGISTRY[name]


def build(name: str, shape: HeadShape, options: dict[str, Any] | None = None) -> Mixer:
    """A mixer of that name for an attention of that shape; options as plain values."""
    cls = get(name)
    return cls(shape, cls.options_class.parse(options or {}, name))
