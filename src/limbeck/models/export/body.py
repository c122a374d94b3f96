"""What surrounds the attention of a student: whether it is the body that engines know, found by running it.

    reasons = check_body(student)                 # [] for RMS norms, SwiGLU and plain residual sums, else why not
    body = read_body(student)                     # sizes, the norms' epsilon, tied or not
    mixers = list_mixers_by_layer(student)        # a mixer or None (softmax) for each layer

Formats have one place for each tensor and fix the arithmetic around it. No family is asked for by its name: the tensors
that are there, and one pass over a few tokens in which every norm, every MLP and every sum is computed a second time,
decide. So a family with a multiplier, another activation or a further norm is found out whatever it is called.

Shapes: T tokens, D model width, H heads, K key width.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers import Mixer
from limbeck.models.export import Reason
from limbeck.models.layers import format_ranges
from limbeck.models.quantization import is_quantized

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QK_NORMS = ("q_norm", "k_norm")
TOLERANCE = 1e-4  # of a value computed twice in float32, relative to its largest entry


@dataclass(frozen=True)
class Body:
    """Sizes of a body that `check_body` accepts."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    tied: bool  # the head shares the embeddings' tensor
    has_qk_norms: bool
    max_positions: int


def list_mixers_by_layer(student: Any) -> list[Mixer | None]:
    """Return the mixer of every layer; None for one that keeps softmax."""
    plan = student.config.limbeck
    mixers: list[Mixer | None] = [None] * plan["shapes"][0]["layers"]
    for entry in plan["layers"]:
        mixers[entry["layer"]] = student.get_submodule(entry["module"]).mixer
    return mixers


def format_layers(layers: list[int], count: int) -> str:
    """Word layer numbers: "all layers", "layer 3", "layers 0, 2-5"."""
    if len(layers) == count:
        return "all layers"
    return f"layer{'s' if len(layers) > 1 else ''} {format_ranges(layers)}"


def read_body(student: Any) -> Body:
    """Read the sizes of a body; for students that `check_body` accepts."""
    config, base = student.config, student.base_model
    block = base.layers[0]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Body(
        hidden=config.hidden_size,
        intermediate=block.mlp.gate_proj.out_features,
        layers=len(base.layers),
        vocabulary=base.embed_tokens.num_embeddings,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=width,
        norm_eps=config.rms_norm_eps,
        tied=student.get_output_embeddings().weight is base.embed_tokens.weight,
        has_qk_norms=hasattr(block.self_attn, "q_norm"),
        max_positions=getattr(config, "max_position_embeddings", None) or 0,
    )


def check_body(student: Any) -> list[Reason]:
    """Return why the student's body is not that of Llama, Mistral, Qwen3 and SmolLM; an empty list if it is."""
    if is_quantized(student.config):
        return [Reason("the weights are quantized already, and the formats round them on their own")]
    reasons = check_structure(student)
    return reasons or _check_arithmetic(student)


def check_structure(model: Any) -> list[Reason]:
    """Return what modules a model lacks and which tensors are too many; teachers too, on any device."""
    reason = _check_modules(model)
    return [reason] if reason else _check_tensors(model)


def _check_modules(student: Any) -> Reason | None:
    base = student.base_model
    name = type(student).__name__.removeprefix("Limbeck")
    for part in ("embed_tokens", "layers", "norm"):
        if not hasattr(base, part):
            return Reason(f"the body of {name} has no {part}, so it is built in another way than Llama's")
    for index, block in enumerate(base.layers):
        wanted = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}" for n in PROJECTIONS)]
        wanted += [f"mlp.{n}" for n in MLP_PROJECTIONS]
        modules = dict(block.named_modules())
        if missing := next((n for n in wanted if n not in modules), None):
            return Reason(f"layer {index} of {name} has no {missing}, so it is built in another way than Llama's")
    if not isinstance(getattr(student.config, "rms_norm_eps", None), float):
        return Reason(f"the config of {name} has no rms_norm_eps, so its norms are no RMS norms")
    return None


def _check_tensors(student: Any) -> list[Reason]:
    """Name tensors for which the formats have no place; each kind once, with its layers."""
    known = {f"self_attn.{n}.weight" for n in (*PROJECTIONS, *QK_NORMS)} | {f"mlp.{n}.weight" for n in MLP_PROJECTIONS}
    known |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    count = len(student.base_model.layers)
    unknown: dict[str, list[int]] = {}
    for index, block in enumerate(student.base_model.layers):
        for name, _ in block.named_parameters():
            if name not in known and not name.startswith("self_attn.mixer."):
                unknown.setdefault(name, []).append(index)
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, layers in unknown.items():
        kinds.setdefault(tuple(layers), []).append(name)
    reasons = [
        Reason(f"the teacher has {', '.join(names)}, for which there is no place ({format_layers(list(at), count)})")
        for at, names in kinds.items()
    ]
    outside = re.compile(r"^((\w+\.)?layers\.\d+\..*|(\w+\.)?(embed_tokens|norm)\.weight|lm_head\.weight)$")
    rest = [name for name, _ in student.named_parameters() if not outside.match(name)]
    return reasons + [Reason(f"the teacher has {name}, for which there is no place") for name in rest]


def _check_arithmetic(student: Any) -> list[Reason]:
    """Run a few tokens and compute every norm, MLP and sum a second time."""
    base, eps = student.base_model, student.config.rms_norm_eps
    recorded: dict[nn.Module, tuple[tuple, Tensor]] = {}  # positional arguments, and output

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args or (kwargs["hidden_states"],)
        recorded[module] = (given, output[0] if isinstance(output, tuple) else output)

    watched = [m for b in base.layers for m in (b, b.self_attn, b.post_attention_layernorm, b.mlp)]
    watched += [mixer for mixer in list_mixers_by_layer(student) if mixer is not None]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in watched]
    try:
        ids = torch.arange(6, device=student.device)[None] % base.embed_tokens.num_embeddings
        with torch.no_grad():
            logits = student(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()

    found: dict[str, list[int]] = {}

    def expect(what: str, layer: int, actual: Tensor, wanted: Tensor) -> None:
        if not _is_close(actual, wanted):
            found.setdefault(what, []).append(layer)

    with torch.no_grad():
        stream = F.embedding(ids, base.embed_tokens.weight)
        for i, block in enumerate(base.layers):
            (given, *_), result = recorded[block]
            before = "the embeddings go into the first layer changed" if i == 0 else "something stands between blocks"
            expect(before, i, given, stream)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                expect("the norms are not w · x / rms(x)", i, *_norm_twice(norm, eps))
            attended = recorded[block.self_attn][1]
            for problem, actual, wanted in _mixer_twice(block, recorded):
                expect(problem, i, actual, wanted)
            expect(
                "the attention is not added to the residual stream as it is",
                i,
                recorded[block.post_attention_layernorm][0][0],
                given + attended,
            )
            (x, *_), y = recorded[block.mlp]
            mlp = block.mlp
            expect("the MLP is not W₃(silu(W₁x) · W₂x)", i, y, mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
            expect("the MLP is not added to the residual stream as it is", i, result, given + attended + y)
            stream = result
        last = len(base.layers) - 1
        expect("the last norm is not w · x / rms(x)", last, *_norm_twice(base.norm, eps))
        head = student.get_output_embeddings().weight
        expect("the logits are not the head's product with the last norm", last, logits, base.norm(stream) @ head.T)
    count = len(base.layers)
    return [Reason(f"{what} ({format_layers(layers, count)})") for what, layers in found.items()]


def _mixer_twice(block: nn.Module, recorded: dict[nn.Module, tuple[tuple, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
    """Return what goes into and comes out of a mixer, beside the projections alone: problem, actual, wanted."""
    attention: Any = block.self_attn
    mixer = getattr(attention, "mixer", None)
    if mixer is None or mixer.options.rope or (mixer.options.qk_norm and hasattr(attention, "q_norm")):
        return []
    (q, k, v, x, *_), y = recorded[mixer]
    inputs = ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj))
    pairs = [("q, k and v reach the mixer changed", z.flatten(2), projection(x)) for z, projection in inputs]
    wanted = attention.o_proj(y.flatten(2))
    return [*pairs, ("the output projection is not all behind the mixer", recorded[attention][1], wanted)]


def _norm_twice(norm: nn.Module, eps: float) -> tuple[Tensor, Tensor]:
    """Return a norm's output on vectors of three sizes, small ones to see its epsilon, and what w · x / rms(x) is."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.linspace(-1, 1, len(weight), device=weight.device)[None] * torch.tensor([[1e-3], [0.1], [10.0]]).to(
        weight
    )
    return norm(x), weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _is_close(actual: Tensor, wanted: Tensor) -> bool:
    return actual.shape == wanted.shape and bool((actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
