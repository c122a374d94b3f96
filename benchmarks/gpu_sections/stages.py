"""Tokens a second and memory of the stages, and what distilling costs beside plain training of the same student.

"plain" is `student(input_ids, labels=input_ids).loss.backward()` as transformers trains; "CE alone" is stage 3 without
a teacher. "of plain" sets stage 3 beside the former.
"""

from typing import Any

import torch

from gpu_sections.bench import Bench
from gpu_sections.steps import KINDS, step_of
from limbeck.training.optim import clip_gradients


def run(bench: Bench) -> None:
    rows, length = (2, 32) if bench.dry else (bench.options.rows, bench.options.length)
    teachers = {shape: bench.teacher(shape, length) for shape in bench.shapes}
    for place, mixer in enumerate(bench.mixers):  # every model before the next mixer: the budget may end first
        for shape, teacher in teachers.items():
            _stages(bench, teacher, shape, mixer, rows, length)
            if place == 0:
                _variants(bench, teacher, shape, mixer, rows, length)


def _stages(bench: Bench, teacher: Any, shape: str, mixer: str, rows: int, length: int) -> None:
    plain = bench.case(
        {"model": shape, "mixer": mixer, "step": "plain", "B": rows, "T": length},
        lambda: _plain(bench, teacher, mixer, rows, length),
    )
    for kind in KINDS:
        # whole matrices [B, H, T, T] of one row at a time, as the recipes have it
        taken, of = (1, min(length, 2048)) if kind.startswith("matrix") else (rows, length)
        row = bench.case(
            {"model": shape, "mixer": mixer, "step": kind, "B": taken, "T": of},
            lambda kind=kind, taken=taken, of=of: _stage(bench, teacher, mixer, kind, taken, of),
        )
        if kind.startswith("logits") and row.get("tokens_per_s") and plain.get("tokens_per_s"):
            row["of_plain"] = f"{row['tokens_per_s'] / plain['tokens_per_s']:.0%}"


def _variants(bench: Bench, teacher: Any, shape: str, mixer: str, rows: int, length: int) -> None:
    """What each part of the fast route is worth, on stage 3 of the first mixer, and longer sequences."""
    label = {"model": shape, "mixer": mixer}
    cases: dict[str, dict[str, Any]] = {
        "logits, KL, not compiled": {"compile": False},
        "logits, KL, packed documents": {"document": max(8, length // 5)},
        "logits, KL, checkpoint_activations": {"checkpoint": True},
    }
    for name, more in cases.items():
        bench.case(
            {**label, "step": name, "B": rows, "T": length},
            lambda m=more: _stage(bench, teacher, mixer, "logits, KL", rows, length, **m),
        )
    for long in () if bench.dry else (n for n in (16384, 32768, 65536) if n <= bench.options.longest):
        bench.case(
            {**label, "step": "logits, KL, checkpoint_activations", "B": 1, "T": long},
            lambda n=long: _stage(bench, bench.teacher(shape, n), mixer, "logits, KL", 1, n, checkpoint=True),
        )


def _stage(bench: Bench, teacher: Any, mixer: str, kind: str, rows: int, length: int, **more: Any) -> dict[str, Any]:
    student = bench.student(teacher, mixer, share=not kind.startswith("logits") and "block" not in kind)
    with step_of(bench, teacher, student, kind, rows, length, **more) as (step, tokens):
        return bench.timed_step(step, tokens)


def _plain(bench: Bench, teacher: Any, mixer: str, rows: int, length: int) -> dict[str, Any]:
    student = bench.student(teacher, mixer).requires_grad_(True)
    for table in (student.get_input_embeddings(), student.get_output_embeddings()):
        table.requires_grad_(False)  # as in stage 3
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-6, fused=True)
    autocast = bench.autocast()

    def step() -> None:
        ids = bench.batch(teacher, rows, length).input_ids.to(bench.device)
        with autocast():
            loss = student(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_gradients(named, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return bench.timed_step(step, rows * length)
