"""A function of tensors as one piece of C++, compiled by inductor for the shapes that they have.

    step = compile_function(lambda x, weight: F.linear(x, weight).relu(), [x, weight])
    y = step(x, weight)                                 # for tensors of these shapes, strides and dtypes: not checked

A product of a matrix with one token is a sum that reads the matrix once and computes little, so it is written out as
such: what is before and behind it are loops of the same code, where a call of the library costs more than it helps.
Up to `UNROLLED_SEQUENCES` sequences are handled so, each row of weights being read once for all; more are left to the
library.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

TENSOR = object()  # marks a tensor in the form of a value
# Sequences whose products are written out as sums. Measured: benchmarks/steps.py --parts decode,compiled --sequences N
UNROLLED_SEQUENCES = 8
_INDUCTOR = {
    # a sum of products in one instruction each
    "cpp.enable_floating_point_contract_flag": "fast",
    # weights in float16 are widened where they are read, however often that is, and never stored widened
    "realize_reads_threshold": 64,
    # shapes and strides are part of what a compilation is chosen by
    "size_asserts": False,
    "alignment_asserts": False,
}


class _Exported(nn.Module):
    """A function of tensors as a module, which is what torch.export takes."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> Any:
        with _WriteAsSums():
            return self.function(*tensors)


class _WriteAsSums(TorchFunctionMode):
    """Replaces calls of the library by sums while a function is exported."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            func = _linear_as_sums
        elif func is F.scaled_dot_product_attention:
            func = _attention_as_sums
        return func(*args, **(kwargs or {}))


def compile_function(function: Callable, tensors: list[Tensor], backend: str) -> Callable:
    """Export a function of tensors for their shapes and compile it."""
    with torch.no_grad():
        program = torch.export.export(_Exported(function), (tensors,), strict=False)
        specification = program.call_spec.out_spec
        assert specification is not None
        # constants that were made on the way come first; they are the same in all blocks of a kind
        constants = [
            program.constants[s.target]
            for s in program.graph_signature.input_specs
            if s.kind is torch.export.graph_signature.InputKind.CONSTANT_TENSOR and s.target is not None
        ]
        graph: Any = program.graph_module
        if backend == "inductor":
            with torch._inductor.config.patch(_INDUCTOR):
                graph = torch._inductor.standalone_compile(
                    program.graph_module, [*constants, *tensors], dynamic_shapes="from_graph"
                )

    form = take_apart(pytree.tree_unflatten([TENSOR] * specification.num_leaves, specification), [])

    def run(*given: Tensor) -> Any:
        return put_together(form, iter(graph(*constants, *given)), {})

    return run


def _linear_as_sums(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write x Wᵀ + b [..., outputs] as sums over a row of W each, all sequences of a row beside each other."""
    x = input
    rows = x.numel() // x.shape[-1]
    if rows > UNROLLED_SEQUENCES:
        y = x @ weight.T
    else:
        given = _store(x).reshape(rows, -1)
        y = torch.stack([(row * weight).sum(-1) for row in given]).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _attention_as_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Write softmax attention of few queries as sums: a call of the library costs more than it computes."""
    if is_causal or dropout_p:
        raise NotImplementedError("attention of one token takes neither is_causal nor dropout")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    query = _store(query * (query.shape[-1] ** -0.5 if scale is None else scale))
    scores = (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = _store(scores.softmax(-1))
    return (weights.unsqueeze(-1) * value.unsqueeze(-3)).sum(-2)


def _store(x: Tensor) -> Tensor:
    """Return x such that inductor stores it: what is only read in a sum would be computed again for each row."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def take_apart(value: Any, tensors: list[Tensor], marks: dict[type, Any] | None = None) -> Any:
    """Append the tensors in a value to a list; returns its form, with marks for tensors and for other classes."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return TENSOR
    for kind, mark in (marks or {}).items():
        if isinstance(value, kind):
            return mark
    if isinstance(value, dict):
        return (dict, *((name, take_apart(x, tensors, marks)) for name, x in value.items()))
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple, *(take_apart(x, tensors, marks) for x in value))
    # what has no plain value is compared by its identity
    return value


def put_together(form: Any, tensors: Iterator[Any], marked: dict[Any, Any]) -> Any:
    """Make a value of this form with the next tensors, and with what is given for other marks."""
    if form is TENSOR:
        return next(tensors)
    if isinstance(form, tuple):
        if form[0] is dict:
            return {name: put_together(x, tensors, marked) for name, x in form[1:]}
        return form[0](put_together(x, tensors, marked) for x in form[1:])
    return marked.get(form, form) if type(form) is object else form


def describe_tensors(tensors: list[Tensor]) -> tuple:
    """Return what a compilation depends on of its tensors."""
    return tuple((x.dtype, x.shape, x.stride()) for x in tensors)
