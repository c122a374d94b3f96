"""Model FLOPs utilisation of stage 3, against the speed of a matrix product measured in the same run.

Operations are counted from weights alone (`steps.operations`), so what is told is a lower bound.
"""

from typing import Any

import torch

from gpu_sections.bench import Bench
from gpu_sections.steps import operations, step_of


def run(bench: Bench) -> None:
    ceiling = _ceiling(bench)
    rows, length = (2, 32) if bench.dry else (bench.options.rows, bench.options.length)
    for shape in bench.shapes:
        teacher = bench.teacher(shape, length)
        for mixer in bench.mixers:
            for kind in ("logits, KL", "logits, CE alone"):
                for more in (1,) if bench.dry else (1, 2, 4):
                    bench.case(
                        {"model": shape, "mixer": mixer, "step": kind, "B": rows * more, "T": length},
                        lambda t=teacher, m=mixer, k=kind, b=rows * more: _row(bench, t, m, k, b, length, ceiling),
                    )


def _row(bench: Bench, teacher: Any, mixer: str, kind: str, rows: int, length: int, ceiling: float) -> dict[str, Any]:
    student = bench.student(teacher, mixer)
    with step_of(bench, teacher, student, kind, rows, length) as (step, tokens):
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        row = bench.timed_step(step, tokens)
        done = operations(teacher, student, trained, tokens, with_teacher="alone" not in kind)
    reached = done / (row["ms"] / 1000)
    return {**row, "tflops": round(reached / 1e12, 3), "mfu": f"{reached / ceiling:.1%}"}


def _ceiling(bench: Bench) -> float:
    """Operations a second of the fastest of some square products in bf16 (float32 on a CPU)."""
    best = 0.0
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for size in (256,) if bench.dry else (4096, 8192, 16384):

        def product(size: int = size) -> dict[str, Any]:
            a = torch.randn(size, size, device=bench.device, dtype=dtype)
            spent = bench.milliseconds(lambda: a @ a)
            return {"ms": round(spent, 3), "tflops": round(2 * size**3 / spent / 1e9, 3)}

        row = bench.case({"step": "matrix product", "size": size}, product)
        best = max(best, 1e12 * row.get("tflops", 0.0))
    return best or 1.0
