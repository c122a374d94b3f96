"""Decoding on a CPU with each decoder block as one compiled function.

    with compile_decoding(student, notes := CompileLog()):
        student.generate(ids, max_new_tokens=100)       # the prompt runs as before, each token after it compiled
    notes.reasons                                       # why a block ran uncompiled, if one did

Blocks of a kind share their code, so one of each kind is exported, with weights and states as inputs, and compiled by
inductor. torch.compile of a whole step unrolls all layers, and its checks before each call cost as much as they save.

Products with weights become part of the function (`limbeck.models.compiled_functions`), so that a block
is one piece of C++.

No check is made before a call. Instead each layer's first step is computed both ways, and a layer whose results differ
runs uncompiled from then on. Compilations are kept on disk by torch (TORCHINDUCTOR_CACHE_DIR).
"""

import dataclasses
import operator
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
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from limbeck.core.console import console
from limbeck.mixers import Mixer
from limbeck.models.attention import bind_arguments, get_hidden_states, token_mask_from_attention_mask
from limbeck.models.cache import RecurrentLayer, StepCache
from limbeck.models.compilation import CompileLog, list_decoder_blocks
from limbeck.models.compiled_functions import (
    UNROLLED_SEQUENCES,
    compile_function,
    describe_tensors,
    put_together,
    take_apart,
)
from limbeck.models.quantization import HalfLinear
from limbeck.models.temporary import instance_attribute

# compilations of one kind of blocks: numbers of sequences, and inputs that turn out to change with every token
MOST_SHAPES = 6
_LINEAR = (nn.Linear, HalfLinear)
_CACHE, _HIDDEN = object(), object()  # marks in the form of a call
# Attributes that number a layer: they tell blocks of one kind apart without changing what they compute.
_LAYER_NUMBERS = ("layer_idx", "limbeck_layer_idx", "layer")


@contextmanager
def compile_decoding(
    model: PreTrainedModel, notes: CompileLog | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Decode with compiled blocks for a while: steps of one token on a CPU, without gradients, on a growing cache.

    Everything else runs as it did: prompts, padded tokens, static caches, and layers whose cache grows (softmax).
    Weights may be written to meanwhile, but neither replaced nor moved.

    Args:
        notes: collects what runs uncompiled and why; each reason is printed once too.
        backend: inductor, or eager to run the exported blocks as they are (for tests).
    """
    notes = CompileLog() if notes is None else notes
    if reason := find_obstacle(model, backend):
        notes.record_fallback(reason)
        yield
        return
    if growing := [name for name, mixer in _find_blocks(model) if mixer is None or mixer.grows]:
        notes.record_fallback(f"the cache of {len(growing)} layers grows with every token (softmax)")
    compiler = _Compiler(notes, backend)
    with ExitStack() as stack:
        for name in list_compiled_modules(model):
            module = model.get_submodule(name)
            if module is model.get_output_embeddings():
                step: Any = _CompiledHead(module, compiler)
            else:
                step = _CompiledBlock(name, module, compiler)
            stack.enter_context(instance_attribute(module, "forward", step))
        yield


def list_compiled_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of what is compiled: the decoder blocks whose state does not grow, and the head."""
    names = [name for name, mixer in _find_blocks(model) if mixer is not None and not mixer.grows]
    head = model.get_output_embeddings()
    plain_head = [name for name, module in model.named_modules() if module is head and type(head) in _LINEAR]
    return names + plain_head


def find_obstacle(model: PreTrainedModel, backend: str = "inductor") -> str | None:
    """Say why nothing of a model can be compiled here; None if something can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and decoding is compiled for CPUs alone"
    if not any(mixer is not None and not mixer.grows for _, mixer in _find_blocks(model)):
        return "the model has no layer with a state of fixed size, and a cache that grows is not compiled"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and shutil.which(compiler) is None:
        return (
            f"found no C++ compiler '{compiler}'; expected: one on the PATH, or its path in CXX; try: apt install g++"
        )
    return None


def _find_blocks(model: PreTrainedModel) -> list[tuple[str, Mixer | None]]:
    """Return the names of the decoder blocks, and the mixer of each; None for those that keep softmax."""
    plan = getattr(getattr(model, "config", None), "limbeck", None)
    if plan is None:
        return []
    # a block is the innermost member of a list on the way to an attention module
    parts = plan["layers"][0]["module"].split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts))]
    lists = [name for name in prefixes if isinstance(model.get_submodule(name), nn.ModuleList)]
    if not lists:
        return []
    names = list_decoder_blocks(model, f"{lists[-1]}.0")
    return [(name, getattr(_find_attention(model.get_submodule(name)), "mixer", None)) for name in names]


def _find_attention(block: nn.Module) -> nn.Module | None:
    """Return the attention module of a block that has a mixer; None where there is none."""
    return next((m for m in block.modules() if isinstance(getattr(m, "mixer", None), Mixer)), None)


class _Compiler:
    """Compiled functions by what they depend on, shared by all blocks of a model."""

    def __init__(self, notes: CompileLog, backend: str):
        self.notes, self.backend = notes, backend
        self.numbers: dict[Any, int] = {}  # of descriptions, which are long
        self.call: _Call | None = None  # the last one
        self.functions: dict[Any, Callable | None] = {}
        self.lock = threading.Lock()  # compilation is not made for several threads

    def number(self, description: Any) -> int:
        """Return a number that stands for a description."""
        return self.numbers.setdefault(description, len(self.numbers))

    def get(self, kind: Any, key: Any, what: str, function: Callable, tensors: list[Tensor]) -> Callable | None:
        """Return the compiled form of a function of tensors, or None if the compiler refuses it."""
        with self.lock:
            if (kind, key) in self.functions:
                return self.functions[kind, key]
            if sum(known == kind for known, _ in self.functions) >= MOST_SHAPES:
                self.notes.record_fallback(f"{what}: more than {MOST_SHAPES} different shapes of its inputs")
                return None
            start = time.monotonic()
            if not self.functions:
                console.print("compile: minutes at first, seconds once torch has it on disk", style="dim")
            try:
                self.functions[kind, key] = compile_function(function, tensors, self.backend)
                console.print(f"compile: {what}, {time.monotonic() - start:.0f} s", style="dim")
            except Exception as error:  # whatever export, inductor and the C++ compiler raise
                self.functions[kind, key] = None
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                self.notes.record_fallback(f"{what}: {' '.join(lines[:2]) or type(error).__name__}")
            return self.functions[kind, key]


class _Call:
    """What a block is called with besides its hidden states: the same for all blocks of a pass, so taken apart once."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict, compiler: _Compiler):
        arguments = bind_arguments(block, args, kwargs)
        self.block_class, self.shared = type(block), _list_shared(args, kwargs)
        self.names = (len(args), *kwargs)
        hidden = get_hidden_states(arguments)
        self.is_step = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] == 1
        self.cache = next((x for x in arguments.values() if isinstance(x, Cache)), None)
        # a mask says nothing about a step, unless some token is padding, and it grows
        self.mask = arguments.pop("attention_mask", None)
        self.offsets: dict[Any, bool] = {}  # whether the mask says nothing, by the column of the token
        self.tensors: list[Tensor] = []
        parts = {
            name: _HIDDEN if x is hidden else take_apart(x, self.tensors, {Cache: _CACHE})
            for name, x in arguments.items()
        }
        self.form = (dict, *parts.items(), ("attention_mask", None))
        try:
            self.number: int | None = compiler.number((self.form, describe_tensors(self.tensors)))
        except TypeError:  # an argument that cannot be compared
            self.number = None

    def is_same(self, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Return whether these are the same objects."""
        if self.block_class is not type(block) or self.names != (len(args), *kwargs):
            return False
        return all(map(operator.is_, self.shared, _list_shared(args, kwargs)))

    def find_layer(self, attention: Any) -> RecurrentLayer | None:
        """Return an attention module's layer of the cache if the call is a step that can be compiled."""
        index, layers = attention.limbeck_layer_idx, getattr(self.cache, "layers", ())
        if not self.is_step or self.number is None or not isinstance(index, int) or not 0 <= index < len(layers):
            return None
        layer = layers[index]
        if not isinstance(layer, RecurrentLayer) or layer.static or not layer.states or None in layer.states:
            return None
        if self.mask is not None:
            offset = layer.length - layer.get_mask_sizes(1)[1]
            if offset not in self.offsets:
                tokens = token_mask_from_attention_mask(self.mask, 1, mask_offset=offset)
                self.offsets[offset] = tokens.valid is None and tokens.segments is None
            if not self.offsets[offset]:
                return None
        layer.claim_for(attention)
        return layer


def _list_shared(args: tuple, kwargs: dict) -> list[Any]:
    """List the arguments that are the same objects for all blocks of a pass."""
    return [*args[1:], *(x for name, x in kwargs.items() if name != "hidden_states")]


class _CompiledBlock:
    """The forward pass of a decoder block: compiled for one token with states, as it was for everything else."""

    def __init__(self, name: str, block: nn.Module, compiler: _Compiler):
        self.name, self.block, self.original, self.compiler = name, block, block.forward, compiler
        self.attention: Any = _find_attention(block)
        held = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.names, self.weights = list(held), list(held.values())
        self.kind = compiler.number(_fingerprint(block))
        self.steps: dict[Any, Callable] = {}  # verified ones by the form of a call and the shapes in it
        self.refused = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refused or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        call = self.compiler.call
        if call is None or not call.is_same(self.block, args, kwargs):
            call = self.compiler.call = _Call(self.block, args, kwargs, self.compiler)
        layer = call.find_layer(self.attention)
        if layer is None:
            return self.original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        names, own = [], [hidden]
        for state in layer.states:
            names.append(tuple(state))  # type: ignore[arg-type]
            own += state.values()  # type: ignore[union-attr]
        key = (call.number, tuple(names), describe_tensors(own))
        step = self.steps.get(key)
        if step is None:
            return self._verify(key, call, own, layer, args, kwargs)
        output, layer.states = step(*self.weights, *own, *call.tensors)
        layer.advance(hidden, hidden)
        return output

    def _verify(
        self, key: Any, call: _Call, own: list[Tensor], layer: RecurrentLayer, args: tuple, kwargs: dict
    ) -> Any:
        """Compute a step both ways and keep the compiled one if they agree; returns the uncompiled one's output."""
        tensors = [*self.weights, *own, *call.tensors]
        step = self.compiler.get(self.kind, key, f"blocks like {self.name}", self._bind(call.form, key[1]), tensors)
        found = None if step is None else step(*tensors)
        expected = self.original(*args, **kwargs)  # which also moves the layer's state on
        if step is not None and _agree(found, (expected, layer.states)):
            self.steps[key] = step
            return expected
        self.refused = True
        if step is not None:
            self.compiler.notes.record_fallback(f"{self.name}: the compiled step differs from the uncompiled one")
        return expected

    def _bind(self, form: Any, state_names: tuple[tuple[str, ...], ...]) -> Callable:
        """Return the block as a function of its weights, hidden states, states and the other tensors of a call."""
        holder = _Holder(self.block, self.original)

        def run(*tensors: Tensor) -> Any:
            weights = {f"block.{name}": x for name, x in zip(self.names, tensors)}
            rest = iter(tensors[len(self.names) :])
            hidden, cache = next(rest), StepCache()
            cache.layer.states = [{name: next(rest) for name in names} for names in state_names]
            arguments = put_together(form, rest, {_CACHE: cache, _HIDDEN: hidden})
            return functional_call(holder, weights, (), arguments), cache.layer.states

        return run


class _CompiledHead:
    """The output projection: compiled for one token of each sequence."""

    def __init__(self, head: Any, compiler: _Compiler):
        self.original, self.compiler = head.forward, compiler
        self.weights: list[Tensor] = [head.weight] if head.bias is None else [head.weight, head.bias]
        self.steps: dict[Any, Callable] = {}
        self.refused = False

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.refused or torch.is_grad_enabled() or torch.compiler.is_compiling() or rows > UNROLLED_SEQUENCES:
            return self.original(x)
        x = x.contiguous()  # a prompt's last token is a slice, which would be a compilation of its own
        key = (x.dtype, x.shape)
        if key in self.steps:
            return self.steps[key](*self.weights, x)

        def run(weight: Tensor, *rest: Tensor) -> Tensor:
            return F.linear(rest[-1], weight.to(rest[-1].dtype), rest[0] if len(rest) > 1 else None)

        expected = self.original(x)
        step = self.compiler.get("head", key, "the head", run, [*self.weights, x])
        if step is not None and _agree(step(*self.weights, x), expected):
            self.steps[key] = step
        else:
            self.refused = True
            if step is not None:
                self.compiler.notes.record_fallback("the head: its compiled form differs from the uncompiled one")
        return expected


class _Holder(nn.Module):
    """Runs a block's own forward pass, past what stands in for it, with weights that `functional_call` puts in."""

    def __init__(self, block: nn.Module, function: Callable):
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


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
    # mixers compute decays and states in float32 in models of more bits too
    tolerance = max(torch.finfo(x).eps for x in (expected.dtype, torch.float32)) ** 0.5
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
