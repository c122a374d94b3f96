"""Decoding on a CPU with each decoder block as one compiled function.

    with compile_decoding(student, notes := CompileLog()):
        student.generate(ids, max_new_tokens=100)       # the prompt runs as before, each token after it compiled
    notes.reasons                                       # why a block ran uncompiled, if one did

Blocks of a kind share their code, so one of each kind is exported, with weights and states as inputs, and compiled by
inductor. torch.compile of a whole step unrolls all layers, and its checks before each call cost as much as they save.

A product of a matrix with one token is a sum that reads the matrix once, so it becomes part of the function: what is
before it and behind it are loops of the same piece of C++. Up to `UNROLLED_SEQUENCES` sequences are handled so, each
row of weights being read once for all; more are left to the library.

No check is made before a call. Instead each layer's first step is computed both ways, and a layer whose results differ
runs uncompiled from then on. Compilations are kept on disk by torch (TORCHINDUCTOR_CACHE_DIR).
"""

import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from limbeck.core.console import console
from limbeck.mixers import Mixer
from limbeck.models.attention import token_mask_from_attention_mask
from limbeck.models.cache import RecurrentLayer, StepCache
from limbeck.models.compilation import CompileLog
from limbeck.models.quantization import HalfLinear
from limbeck.models.temporary import instance_attribute

# Sequences whose products are written out as sums. Measured: benchmarks/steps.py --parts decode,compiled --sequences N
UNROLLED_SEQUENCES = 8
# Attributes that number a layer: they tell blocks of one kind apart without changing what they compute.
_LAYER_NUMBERS = ("layer_idx", "limbeck_layer_idx", "layer")
_INDUCTOR = {
    # a sum of products in one instruction each
    "cpp.enable_floating_point_contract_flag": "fast",
    # weights in float16 are widened where they are read, however often that is, and never stored widened
    "realize_reads_threshold": 64,
    # shapes and strides are part of what a compilation is chosen by
    "size_asserts": False,
    "alignment_asserts": False,
}


@contextmanager
def compile_decoding(
    model: PreTrainedModel, notes: CompileLog | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Decode with compiled blocks for a while: steps of one token on a CPU, without gradients, on a growing cache.

    Everything else runs as it did: prompts, padded tokens, static caches, and layers whose cache grows (softmax).

    Args:
        notes: collects what runs uncompiled and why; each reason is printed once too.
        backend: inductor, or eager to run the exported blocks as they are (for tests).
    """
    notes = CompileLog() if notes is None else notes
    if reason := _find_obstacle(model, backend):
        notes.record_fallback(reason)
        yield
        return
    compiler = _Compiler(notes, backend)
    with ExitStack() as stack:
        for name in list_converted_blocks(model):
            block = model.get_submodule(name)
            step: Any = _CompiledBlock(name, block, compiler)
            stack.enter_context(instance_attribute(block, "forward", step))
        head = model.get_output_embeddings()
        if type(head) in (nn.Linear, HalfLinear):
            step = _CompiledHead(head, compiler)
            stack.enter_context(instance_attribute(head, "forward", step))
        yield


def list_converted_blocks(model: nn.Module) -> list[str]:
    """Return the names of the decoder blocks with a mixer: the modules in a list that contain one."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            names += [f"{name}.{n}" for n, child in module.named_children() if _find_mixer_module(child) is not None]
    # a mixer may have lists of its own
    return [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]


def _find_obstacle(model: PreTrainedModel, backend: str) -> str | None:
    """Say why nothing of a model can be compiled here; None if something can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and decoding is compiled for CPUs alone"
    if not list_converted_blocks(model):
        return "the model has no layers with a mixer, and layers with softmax are not compiled (their cache grows)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and shutil.which(compiler) is None:
        return f"no C++ compiler '{compiler}' found; expected one on the PATH or in CXX; try: apt install g++"
    return None


def _find_mixer_module(block: nn.Module) -> nn.Module | None:
    """Return the attention module of a block whose mixer replaces softmax; None for other modules."""
    return next((m for m in block.modules() if isinstance(getattr(m, "mixer", None), Mixer)), None)


class _Compiler:
    """Compiled functions by what they depend on, shared by all blocks of a model."""

    def __init__(self, notes: CompileLog, backend: str):
        self.notes, self.backend = notes, backend
        self.functions: dict[Any, Callable | None] = {}
        self.lock = threading.Lock()  # compilation is not made for several threads

    def get(self, key: Any, what: str, function: Callable, tensors: list[Tensor]) -> Callable | None:
        """Return the compiled form of a function of tensors, or None if the compiler refuses it."""
        with self.lock:
            if key not in self.functions:
                start = time.monotonic()
                if not self.functions:
                    console.print("compile: a minute or more at first, seconds once torch has it on disk", style="dim")
                try:
                    self.functions[key] = _compile(function, tensors, self.backend)
                    console.print(f"compile: {what}, {time.monotonic() - start:.0f} s", style="dim")
                except Exception as error:  # whatever export, inductor or the C++ compiler raise
                    self.functions[key] = None
                    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                    self.notes.record_fallback(f"{what}: {' '.join(lines[:2]) or type(error).__name__}")
            return self.functions[key]

    def refuse(self, reason: str) -> None:
        """Record why something runs uncompiled."""
        self.notes.record_fallback(reason)


class _CompiledBlock:
    """The forward pass of a decoder block: compiled for one token with states, as it was for everything else."""

    def __init__(self, name: str, block: nn.Module, compiler: _Compiler):
        self.name, self.block, self.original, self.compiler = name, block, block.forward, compiler
        attention = _find_mixer_module(block)
        assert attention is not None
        self.attention: Any = attention
        held = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.names, self.weights = list(held), list(held.values())
        self.kind = _fingerprint(block)
        self.verified: set[Any] = set()
        self.refused = False
        if attention.mixer.grows:  # type: ignore[union-attr]
            self.refused = True
            compiler.refuse("layers whose state grows with every token are not compiled")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = None if self.refused or torch.is_grad_enabled() else self._find_state(args, kwargs)
        if found is None:
            return self.original(*args, **kwargs)
        cache, layer = found
        # the cache and the mask, which says nothing here, are no inputs
        dropped = (Cache, "attention_mask")
        given, states = _strip((args, kwargs), *dropped), layer.states
        leaves, spec = pytree.tree_flatten((given, states))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        constants = tuple(_TENSOR if isinstance(x, Tensor) else x for x in leaves)
        shapes = tuple((x.dtype, x.shape, x.stride()) for x in tensors)
        key = (self.kind, spec, constants, shapes)
        try:
            known = key in self.verified
        except TypeError:  # an argument that cannot be compared
            known = False
            self.refused = True
            self.compiler.refuse(f"{self.name}: an argument that is neither a tensor nor a plain value")
            return self.original(*args, **kwargs)
        step = self.compiler.get(key, self._describe(), self._bind(spec, constants), [*self.weights, *tensors])
        if step is None:
            self.refused = True
            return self.original(*args, **kwargs)
        output, new = step(*self.weights, *tensors)
        if known:
            layer.advance(given_hidden := _first_tensor(given), given_hidden)
            layer.states = new
            return output
        expected = self.original(*args, **kwargs)  # which also moves the state on
        if _agree((output, new), (expected, layer.states)):
            self.verified.add(key)
        else:
            self.refused = True
            self.compiler.refuse(f"{self.name}: its compiled step differs from the uncompiled one")
        return expected

    def _find_state(self, args: tuple, kwargs: dict) -> tuple[Cache, RecurrentLayer] | None:
        """Return the cache and this block's layer of it if the call is a step that can be compiled."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        index = self.attention.limbeck_layer_idx
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] != 1 or torch.compiler.is_compiling():
            return None
        if cache is None or not isinstance(index, int) or not 0 <= index < len(getattr(cache, "layers", ())):
            return None
        layer = cache.layers[index]
        if not isinstance(layer, RecurrentLayer) or layer.static or not layer.states or None in layer.states:
            return None
        layer.claim_for(self.attention)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            offset = layer.length - layer.get_mask_sizes(1)[1]
            tokens = token_mask_from_attention_mask(mask, 1, mask_offset=offset)
            if tokens.valid is not None or tokens.segments is not None:
                return None
        return cache, layer

    def _bind(self, spec: pytree.TreeSpec, constants: tuple) -> Callable:
        """Return the block as a function of its weights and the tensors of a call."""
        holder = _Holder(self.block, self.original)

        def run(*tensors: Tensor) -> Any:
            weights = {f"block.{name}": x for name, x in zip(self.names, tensors)}
            rest = iter(tensors[len(self.names) :])
            leaves = [next(rest) if x is _TENSOR else x for x in constants]
            (args, kwargs), states = pytree.tree_unflatten(leaves, spec)
            cache = StepCache(states)
            args, kwargs = _put_cache(args, cache), {k: _put_cache(x, cache) for k, x in kwargs.items()}
            return functional_call(holder, weights, args, kwargs), cache.layer.states

        return run

    def _describe(self) -> str:
        return f"blocks like {self.name}"


class _CompiledHead:
    """The output projection: compiled for one token of each sequence."""

    def __init__(self, head: nn.Module, compiler: _Compiler):
        self.original, self.compiler = head.forward, compiler
        self.weights: list[Any] = [head.weight] if head.bias is None else [head.weight, head.bias]
        self.verified: set[Any] = set()
        self.refused = False

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.refused or torch.is_grad_enabled() or torch.compiler.is_compiling() or rows > UNROLLED_SEQUENCES:
            return self.original(x)
        x = x.contiguous()  # a prompt's last token is a slice, which would be a compilation of its own
        key = ("head", x.dtype, x.shape)

        def run(weight: Tensor, *rest: Tensor) -> Tensor:
            return F.linear(rest[-1], weight.to(rest[-1].dtype), rest[0] if len(rest) > 1 else None)

        step = self.compiler.get(key, "the head", run, [*self.weights, x])
        if step is None:
            self.refused = True
            return self.original(x)
        output = step(*self.weights, x)
        if key in self.verified:
            return output
        expected = self.original(x)
        if _agree(output, expected):
            self.verified.add(key)
        else:
            self.refused = True
            self.compiler.refuse("the head: its compiled form differs from the uncompiled one")
        return expected


class _Holder(nn.Module):
    """Runs a block's own forward pass, past what stands in for it, with weights that `functional_call` puts in."""

    def __init__(self, block: nn.Module, function: Callable):
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


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


class _Sentinel:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


_TENSOR, _CACHE = _Sentinel("<tensor>"), _Sentinel("<cache>")


def _compile(function: Callable, tensors: list[Tensor], backend: str) -> Callable:
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

    def run(*given: Tensor) -> Any:
        return pytree.tree_unflatten(graph(*constants, *given), specification)

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


def _strip(value: Any, kind: type, mask: str) -> Any:
    """Replace caches by a mark and masks by None in arguments."""
    if isinstance(value, kind):
        return _CACHE
    if isinstance(value, dict):
        return {k: None if k == mask else _strip(x, kind, mask) for k, x in value.items()}
    if isinstance(value, tuple):
        return tuple(_strip(x, kind, mask) for x in value)
    return value


def _put_cache(value: Any, cache: Cache) -> Any:
    """Put a cache where `_strip` left a mark."""
    if value is _CACHE:
        return cache
    return tuple(_put_cache(x, cache) for x in value) if isinstance(value, tuple) else value


def _first_tensor(value: Any) -> Tensor:
    return next(x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def _agree(found: Any, expected: Any) -> bool:
    """Return whether two results agree to the rounding of their types, relative to the largest entry of a tensor."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    return all(_tensors_agree(a, b) for a, b in pairs if isinstance(b, Tensor))


def _tensors_agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _fingerprint(block: nn.Module) -> Any:
    """Return what a block's graph depends on besides tensors: modules, their plain attributes, shapes of weights."""
    described = []
    for name, module in block.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("forward", "training")}
        shapes = [
            (n, None if x is None else (x.dtype, tuple(x.shape), x.stride()))
            for held in (module._parameters, module._buffers)
            for n, x in held.items()
        ]
        described.append((name, id(type(module)), _describe_value(own), tuple(shapes)))
    return tuple(described)


def _describe_value(value: Any) -> Any:
    """Return an attribute as something to compare by; what has no plain value by its identity."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, dict):
        return tuple((str(k), _describe_value(x)) for k, x in value.items() if k not in _LAYER_NUMBERS)
    if isinstance(value, list | tuple | set | frozenset):
        return (type(value).__name__, *(_describe_value(x) for x in value))
    if dataclasses.is_dataclass(value):
        return (type(value).__name__, _describe_value(vars(value)))
    return id(value)
