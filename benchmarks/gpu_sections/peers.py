"""Training steps as the peers take them, on the same machine, mixer, kernels, batch and length.

"rebuilt" rows are this benchmark's own code: the structure of a peer's loop, written from its description (what is
computed, what is kept in memory, when numbers are fetched), around Limbeck's student with the same kernels. They differ
from the peer only in its own model files. With --checkout FOLDER (a checkout of HallerPatrick/linearization) the same
rebuilt stage-3 loop also runs with the author's own GLA student out of that folder.

    author     HallerPatrick/linearization at 4dbd152: everything in bf16, batch-mean KL on all logits beside the
               model's own loss; stage 2: all layers on the teacher's hidden states in one graph, a number fetched for
               each layer; stage 1: the same with outputs of the attention, the teacher returning all its matrices
    mohawk     goombalab/mohawk at 658fabd: float32 weights under autocast; stage 1: Frobenius norm of matrices, all of
               the teacher's and one joint graph, a number fetched for each layer; stage 2: norms of the blocks'
               differences; stage 3: cross-entropy against the teacher's softmax, on all logits
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from gpu_sections.bench import Bench
from gpu_sections.steps import step_of
from limbeck.models import find_attention_sites

OURS = {"1 matrix": "matrix", "2 hidden": "hidden, block", "3 logits": "logits, CE and KL"}
SHARED = ("gla", "gated_deltanet", "retnet", "kda", "mamba2")  # mixers that a peer has too


def run(bench: Bench) -> None:
    rows, length = (2, 32) if bench.dry else (bench.options.rows, bench.options.length)
    for shape in bench.shapes:
        teacher = bench.teacher(shape, length)
        for mixer in [m for m in bench.mixers if m in SHARED] or ["gated_deltanet"]:
            for stage, kind in OURS.items():
                # matrices of all layers at once are the peers' limit, so stage 1 has a row of 1,024 tokens
                taken, of = (1, min(length, 1024)) if stage.startswith("1") else (rows, length)
                label = {"model": shape, "mixer": mixer, "stage": stage, "B": taken, "T": of}
                ours = bench.case(
                    {**label, "loop": "limbeck"},
                    lambda t=teacher, m=mixer, k=kind, b=taken, n=of: _ours(bench, t, m, k, b, n),
                )
                for peer in ("author", "mohawk"):
                    row = bench.case(
                        {**label, "loop": f"{peer}, rebuilt"},
                        lambda t=teacher, m=mixer, s=stage, p=peer, b=taken, n=of: _rebuilt(bench, t, m, s, p, b, n),
                    )
                    _compare(ours, row)
        if bench.options.checkout and not bench.dry:
            row = bench.case(
                {"model": shape, "mixer": "gla", "stage": "3 logits", "loop": "author's student, loop rebuilt"},
                lambda t=teacher: _checkout(bench, t, rows, length),
            )


def _compare(ours: dict[str, Any], row: dict[str, Any]) -> None:
    if ours.get("tokens_per_s") and row.get("tokens_per_s"):
        row["ours_times"] = round(ours["tokens_per_s"] / row["tokens_per_s"], 2)


def _ours(bench: Bench, teacher: Any, mixer: str, kind: str, rows: int, length: int) -> dict[str, Any]:
    student = bench.student(teacher, mixer, share=kind == "matrix")
    with step_of(bench, teacher, student, kind, rows, length) as (step, tokens):
        return bench.timed_step(step, tokens)


def _rebuilt(bench: Bench, teacher: Any, mixer: str, stage: str, peer: str, rows: int, length: int) -> dict[str, Any]:
    student = bench.student(teacher, mixer)
    pure = peer == "author" and bench.device.type == "cuda"
    if pure:
        student = student.to(torch.bfloat16)
        teacher = type(teacher)(teacher.config).to(bench.device, torch.bfloat16).eval().requires_grad_(False)
    modules = [site.module if stage.startswith("1") else site.block for site in find_attention_sites(teacher)]
    trained = [student.get_submodule(name) for name in modules] if stage[0] in "12" else [student]
    losses = {"1": _matrices if peer == "mohawk" else _outputs, "2": _blocks}
    if stage.startswith("3"):
        work = _author_logits if peer == "author" else _soft_labels
    else:
        work = losses[stage[0]]
    before = teacher.config._attn_implementation
    try:
        if stage.startswith("1"):
            teacher.config._attn_implementation = "eager"  # both ask for all of the teacher's matrices
        autocast = None if pure else bench.autocast()
        return _loop(bench, trained, lambda ids: work(teacher, student, modules, ids), autocast, teacher, rows, length)
    finally:
        teacher.config._attn_implementation = before


def _loop(
    bench: Bench, trained: list, loss_of: Callable, autocast: Any, teacher: Any, rows: int, length: int
) -> dict[str, Any]:
    """Loss, one backward, clipping, AdamW, numbers fetched, one after the other."""
    parameters = [p.requires_grad_(True) for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> None:
        ids = bench.batch(teacher, rows, length).input_ids.to(bench.device)
        if autocast is None:
            loss, fetched = loss_of(ids)
        else:
            with autocast():
                loss, fetched = loss_of(ids)
        for each in fetched:
            each.item()
        if torch.isnan(loss):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return bench.timed_step(step, rows * length)


def _calls(teacher: Any, modules: list[str], ids: torch.Tensor) -> list[tuple]:
    """Arguments and outputs of the named modules in one pass of the teacher, all kept."""
    seen: list[tuple] = []
    hooks = [
        teacher.get_submodule(name).register_forward_hook(lambda _, a, k, o: seen.append((a, k, o)), with_kwargs=True)
        for name in modules
    ]
    try:
        with torch.no_grad():
            teacher(ids, use_cache=False, output_hidden_states=True)  # the head runs too
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _joint(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor, one: Callable) -> tuple:
    """One loss a layer, summed into one graph."""
    calls = _calls(teacher, modules, ids)
    losses = [one(student.get_submodule(name), *call) for name, call in zip(modules, calls)]
    return torch.stack(losses).sum(), losses


def _outputs(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor) -> tuple:
    def one(module: Any, args: tuple, kwargs: dict, output: Any) -> torch.Tensor:
        return F.mse_loss(_first(module(*args, **kwargs)), _first(output))

    return _joint(teacher, student, modules, ids, one)


def _matrices(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor) -> tuple:
    def one(module: Any, args: tuple, kwargs: dict, output: Any) -> torch.Tensor:
        matrix = module(*args, **kwargs, output_matrix=True)[1]
        return torch.linalg.matrix_norm(matrix - output[1], ord="fro").mean()

    return _joint(teacher, student, modules, ids, one)


def _blocks(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor) -> tuple:
    def one(module: Any, args: tuple, kwargs: dict, output: Any) -> torch.Tensor:
        return torch.norm(_first(module(*args, **kwargs)) - _first(output), p=2, dim=-1).mean()

    return _joint(teacher, student, modules, ids, one)


def _author_logits(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor) -> tuple:
    with torch.no_grad():
        theirs = teacher(ids, use_cache=False).logits
    out = student(ids, labels=ids, use_cache=False)
    kl = F.kl_div(F.log_softmax(out.logits, dim=-1), F.softmax(theirs, dim=-1), reduction="batchmean")
    loss = out.loss + kl
    return loss, [loss]


def _soft_labels(teacher: Any, student: Any, modules: list[str], ids: torch.Tensor) -> tuple:
    with torch.no_grad():
        theirs = teacher(ids, use_cache=False).logits.flatten(0, 1)
    ours = student(ids, use_cache=False).logits.flatten(0, 1)
    loss = F.cross_entropy(ours.float(), theirs.float().softmax(-1))
    return loss, [loss]


def _checkout(bench: Bench, teacher: Any, rows: int, length: int) -> dict[str, Any]:
    """The author's GLA student, made by its own config from the teacher's sizes."""
    sys.path.insert(0, bench.options.checkout)
    try:
        module = importlib.import_module("students.gla.llama_gla")
    finally:
        sys.path.remove(bench.options.checkout)
    known = teacher.config.to_dict()
    sizes = {k: known[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_heads": known["num_attention_heads"], "num_attention_heads": known["num_attention_heads"]}
    config = module.LlamaGLAConfig(**sizes, **heads)
    student = module.GLAForCausalLM(config).to(bench.device, torch.bfloat16)
    theirs = type(teacher)(teacher.config).to(bench.device, torch.bfloat16).eval().requires_grad_(False)
    return _loop(bench, [student], lambda ids: _author_logits(theirs, student, [], ids), None, teacher, rows, length)
