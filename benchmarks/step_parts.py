"""The parts of benchmarks/steps.py: what each runs in a round, and what work it cannot do without.

    works = make_works(args)        # options of steps.py
    works["decode"].run()

Nothing heavy is imported before a part is made: the parent of the children that run them only lists names.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("calibrate", "matrix", "hidden", "logits", "mixer", "prefill", "decode", "compiled", "family")
DECODED = 8  # tokens of each sequence in a round: a single one varies with what else is in the caches
# Arguments of `convert` beside a mixer's name. The groups of heads are those of recipe limbeck with SmolLM2-135M.
HEADS = "18.2,20.2,7.2,8.0,23.0,19.1,23.2"
STUDENTS: dict[str, dict[str, Any]] = {
    "limbeck": {"mixer": "sliding_window", "options": {"window": 96}, "softmax_heads": HEADS, "softmax_window": 1024},
}
WEIGHTS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes; float16 as `limbeck generate --fp16` has it
PEER_STUDENT = "gated_deltanet"  # in the layout that llama.cpp knows
QUERY_KEY = ("q_proj", "k_proj")  # projections that stage 1 trains through
CONTEXTS: list[Any] = []  # of compiled decoding, never left: the process ends in them


@dataclass(frozen=True)
class Work:
    """A part of the benchmark: what runs in a round, for how many tokens, and what it cannot do without.

    operations: floating-point operations of its products with weights.
    read_bytes: of the weights, as often as they are read.
    """

    run: Callable[[], Any]
    tokens: int
    operations: float
    read_bytes: float


def make_works(args: argparse.Namespace) -> dict[str, Work]:
    """Load the models and make what is asked for, and the two parts that give the floors."""
    import torch

    import limbeck
    from limbeck.models import find_attention_sites

    torch.set_num_threads(1)
    teacher = load_teacher(args.teacher)
    sites = find_attention_sites(teacher)
    settings = {"mixer": args.student, **STUDENTS.get(args.student, {})}
    settings["options"] = {**settings.get("options", {}), **args.options}

    def make_student(**more: Any) -> Any:
        if args.student == "teacher":
            return teacher
        return limbeck.convert(teacher, **settings, **more).eval().requires_grad_(False)

    table, head = teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight
    body = sum(p.numel() for p in teacher.parameters()) - head.numel() - (0 if table is head else table.numel())
    works = {"operations": make_products(teacher, sites[0].block, args.length), "bytes": make_read(teacher)}
    student = make_student(share_weights=True)
    for part in args.parts:
        if part == "logits":  # the only one that changes weights outside the attention
            works[part] = make_training(part, teacher, make_student(), sites, args.length, body, head.numel())
        elif part in ("calibrate", "matrix", "hidden"):
            works[part] = make_training(part, teacher, student, sites, args.length, body, head.numel())
    if "mixer" in args.parts:
        works["mixer"] = make_mixer(student, sites[0], args.length)
    decoder = student if args.weights == "float32" else narrow(student, args.weights)
    if "compiled" in args.parts:
        works["compiled"] = make_compiled(make_student(share_weights=True), args, body + head.numel())
    for part in args.parts:
        if part == "prefill":
            works[part] = make_prefill(decoder, args.prompt, body, head.numel(), WEIGHTS[args.weights])
        elif part == "decode":
            works[part] = make_decoding(decoder, args, body + head.numel(), WEIGHTS[args.weights])
        elif part == "family":
            model = teacher if args.weights == "float32" else narrow(teacher, args.weights)
            works[part] = make_family(model, args.sequences, body + head.numel(), WEIGHTS[args.weights])
    if args.peer:
        works |= make_peer(teacher, args, body + head.numel())
    return works


def narrow(model: Any, weights: str) -> Any:
    """Copy a model with weights of so few bits."""
    import torch

    if weights == "bfloat16":
        return copy.deepcopy(model).to(torch.bfloat16)
    from limbeck.models.quantization import pack_float16

    return pack_float16(model)


def load_teacher(name: str) -> Any:
    """Load a teacher by name, or make the tiny one."""
    if name == "tiny":
        from limbeck.testing.tiny_models import make_tiny_model

        return make_tiny_model("llama").eval().requires_grad_(False)
    import torch

    from limbeck.models import loading

    return loading.load_teacher(loading.resolve_teacher(name), torch.device("cpu"))[0].eval().requires_grad_(False)


def make_products(teacher: Any, block: str, length: int) -> Work:
    """Make the products of one block's linear layers on so many tokens, which give the speed of operations."""
    import torch

    layers = [m for m in teacher.get_submodule(block).modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(length, m.in_features) for m in layers}

    @torch.no_grad()
    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return Work(run, length, 2.0 * length * sum(m.weight.numel() for m in layers), 0)


def make_read(teacher: Any) -> Work:
    """Make one read of the model's weights, which gives the speed of memory."""
    import torch

    flat = torch.cat([p.detach().flatten() for p in teacher.parameters()])
    return Work(lambda: torch.dot(flat, flat), 1, 0, flat.numel() * flat.element_size())


def make_training(part: str, teacher: Any, student: Any, sites: list, length: int, body: int, head: int) -> Work:
    """Make one step of a stage on a sequence of `length` tokens."""
    import torch

    from limbeck.data.packing import Batch
    from limbeck.evaluation.timing import make_dummy_input_ids
    from limbeck.models.hooks import DistillationPair
    from limbeck.training.alignment import HiddenStage, MatrixStage
    from limbeck.training.calibration import NormalEquations
    from limbeck.training.logit_distillation import LogitsStage
    from limbeck.training.losses import ObjectiveWeights

    ids = make_dummy_input_ids(teacher, length)
    batch = Batch(ids, torch.arange(length)[None], torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1))
    pair = DistillationPair(teacher, student, sites, nullcontext)
    modules = [teacher.get_submodule(site.module) for site in sites]
    attention = sum(m.weight.numel() for a in modules for m in a.modules() if isinstance(m, torch.nn.Linear))
    outputs = sum(a.get_submodule(s.output).weight.numel() for a, s in zip(modules, sites))
    if part == "calibrate":
        equations = NormalEquations(pair)
        # Both sums are products in float64, at half the speed.
        sums = 2 * sum(2 * (s.shape.heads * s.shape.value_width) * (s.shape.heads * s.shape.value_width) for s in sites)
        sums += 2 * 2 * outputs
        run = torch.no_grad()(lambda: equations.add(batch))
        return Work(run, length, length * (2.0 * body + 2 * (attention - outputs) + sums), 4 * body)
    stage: Any
    if part == "matrix":
        from limbeck.core.stage_settings import Matrix

        stage = MatrixStage(pair, sampled_queries=Matrix(stage="matrix", tokens=1).sampled_queries)
        # Values and outputs are behind the matrix; the layer's input takes no gradient.
        operations = 2 * body + 4 * sum(
            a.get_submodule(name).weight.numel() for a in modules for name, m in a.named_children() if name in QUERY_KEY
        )
    elif part == "hidden":
        stage, operations = HiddenStage(pair), 2 * body + 4 * attention + 2 * outputs
    else:
        stage, operations = LogitsStage(pair, ObjectiveWeights()), 2 * (body + head) + 6 * body + 4 * head
    parameters = list(stage.parameters().values())
    # Rates of zero: the weights stay what they are, and so does the work.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        stage.backward(batch, stage.count(batch))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.requires_grad_(False)

    learning = sum(p.numel() for p in parameters)
    return Work(step, length, float(length * operations), 4 * (body + 7 * learning))


def make_mixer(student: Any, site: Any, length: int) -> Work:
    """Make a forward and a backward pass of one layer's mixer."""
    import torch

    mixer = copy.deepcopy(student.get_submodule(site.module).mixer).requires_grad_(True)
    shape = site.shape
    widths = [(shape.heads, shape.key_width), (shape.kv_heads, shape.key_width), (shape.kv_heads, shape.value_width)]
    inputs = [torch.randn(1, length, *width, requires_grad=True) for width in (*widths, (shape.hidden,))]
    leaves = [*inputs, *mixer.parameters()]

    def run() -> None:
        mixed, _ = mixer(*inputs)
        torch.autograd.grad(mixed.sum(), leaves, allow_unused=True)

    numbers = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    return Work(run, length, 6.0 * length * numbers, 4 * sum(p.numel() for p in mixer.parameters()))


def make_prefill(model: Any, length: int, body: int, head: int, size: int) -> Work:
    """Make a prompt of so many tokens, up to the first new one."""
    import torch

    from limbeck.evaluation.timing import generate_first_token, make_dummy_input_ids

    ids = make_dummy_input_ids(model, length)
    run = torch.no_grad()(lambda: generate_first_token(model, ids))
    return Work(run, length, 2.0 * body * length + 2 * head, size * (body + head))


def make_decoding(model: Any, args: argparse.Namespace, weights: int, size: int) -> Work:
    """Make some decoded tokens of each sequence, after a prompt that is read now."""
    import torch

    from limbeck.evaluation.timing import prefill_cache
    from limbeck.models import build_cache_kwargs

    cache = prefill_cache(model, args.context)
    cache.batch_repeat_interleave(args.sequences)
    ids = torch.full((args.sequences, 1), 5)

    @torch.no_grad()
    def run() -> None:
        for _ in range(DECODED):
            model(input_ids=ids, **build_cache_kwargs(model, cache))

    tokens = DECODED * args.sequences
    return Work(run, tokens, 2.0 * weights * tokens, DECODED * size * weights)


def make_compiled(student: Any, args: argparse.Namespace, weights: int) -> Work:
    """Make some decoded tokens through compiled blocks, which are compiled now and stay."""
    from limbeck.models import compile_decoding
    from limbeck.models.compilation import CompileLog

    student = narrow_compiled(student, args.weights)
    CONTEXTS.append(compile_decoding(student, notes := CompileLog()))
    CONTEXTS[-1].__enter__()
    work = make_decoding(student, args, weights, WEIGHTS[args.weights])
    work.run()
    if notes.reasons:
        sys.exit(f"not compiled: {'; '.join(notes.reasons)}")
    return work


def narrow_compiled(student: Any, weights: str) -> Any:
    """Copy a student with weights of so few bits, as compiled blocks read them."""
    from limbeck.models.compiled_decoding import list_compiled_modules
    from limbeck.models.quantization import pack_float16

    if weights == "float16":
        return pack_float16(student, list_compiled_modules(student))
    return student if weights == "float32" else narrow(student, weights)


def make_family(teacher: Any, sequences: int, weights: int, size: int) -> Work:
    """Make some decoded tokens through the family's own modules: queries take the place of attention's output."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from limbeck.models.temporary import use_attn_implementation

    name = "steps_no_attention"
    AttentionInterface.register(name, lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
    AttentionMaskInterface.register(name, sdpa_mask)
    ids = torch.full((sequences, 1), 5)

    @torch.no_grad()
    def run() -> None:
        with use_attn_implementation(teacher, name):
            for _ in range(DECODED):
                teacher(input_ids=ids, use_cache=False)

    tokens = DECODED * sequences
    return Work(run, tokens, 2.0 * weights * tokens, DECODED * size * weights)


def make_peer(teacher: Any, args: argparse.Namespace, weights: int) -> dict[str, Work]:
    """Make some decoded tokens of a student that llama.cpp runs too, here and there, in float32."""
    import torch

    import limbeck
    from limbeck.models import loading
    from limbeck.models.export import get_exporter, write_export
    from limbeck.models.export.gguf_file import file_name
    from limbeck.models.export.llama_cpp import LlamaCpp

    exporter = get_exporter("gguf")
    fit = exporter.fit(teacher.config, PEER_STUDENT)
    student = limbeck.convert(teacher, fit.mixer, options=fit.options, share_weights=True)
    tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))[1]
    folder = tempfile.TemporaryDirectory()
    write_export(exporter, student, tokenizer, Path(folder.name) / "student", "f32")
    engine = LlamaCpp(Path(folder.name) / "student" / file_name("f32"), context=args.context + 4096, threads=1)
    engine.decode([5] * args.context, last_only=True)
    folder.cleanup()
    here = make_decoding(student, argparse.Namespace(context=args.context, sequences=1), weights, 4)

    def run() -> None:
        for _ in range(DECODED):
            engine.decode([5], last_only=True)

    there = Work(run, DECODED, here.operations, here.read_bytes)
    return {"decode, fits llama.cpp": here, "the same in llama.cpp": there}
