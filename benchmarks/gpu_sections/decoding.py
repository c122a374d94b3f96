"""The next token: milliseconds, tokens a second and cache bytes over context length and batch, student and teacher.

The teacher has a static cache and SDPA (FlashAttention where PyTorch picks it); weights and caches are bf16 on a GPU.
"compiled" steps go through torch.compile with CUDA graphs, on static caches. The break-even length is where a student
becomes cheaper than the teacher that runs in the same way.
"""

from typing import Any

import torch

from gpu_sections.bench import Bench
from limbeck.evaluation.timing import TimedModel, find_break_even, time_decoding

FAST = ", compiled"


class Compiled:
    """A model whose steps go through torch.compile; all else is the model's."""

    def __init__(self, model: Any, dry: bool):
        self.model = model
        how: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "reduce-overhead"}
        self.step = torch.compile(model.__call__, dynamic=False, **how)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def run(bench: Bench) -> None:
    lengths = [32, 64] if bench.dry else [n for n in (2048, 8192, 32768, 131072) if n <= bench.options.longest * 2]
    for shape in bench.shapes:
        teacher = bench.teacher(shape, max(lengths) + 64)
        models = {"teacher": teacher, **{mixer: bench.student(teacher, mixer) for mixer in bench.mixers}}
        if bench.device.type == "cuda":
            models = {name: model.to(torch.bfloat16) for name, model in models.items()}
        racers = [TimedModel(name, model, static=name == "teacher") for name, model in models.items()]
        racers += [TimedModel(name + FAST, Compiled(model, bench.dry), static=True) for name, model in models.items()]
        for batch in (1,) if bench.dry else (1, 16, 64):
            _race(bench, {"model": shape, "B": batch}, racers, lengths)


def _race(bench: Bench, label: dict[str, Any], racers: list[TimedModel], lengths: list[int]) -> None:
    """All lengths of one batch size, and the break-even lengths."""
    steps, seen = 2 if bench.dry else 24, {racer.name: {} for racer in racers}
    for length in lengths:
        for racer in racers:
            torch._dynamo.reset()  # a compiled step is made for one length of static cache

            def one(racer: TimedModel = racer, length: int = length) -> dict[str, Any]:
                [point] = time_decoding([racer], length, steps, batch=label["B"])
                seen[racer.name][length] = point.milliseconds
                rate = round(1000 * point.batch / point.milliseconds)
                return {
                    "ms": round(point.milliseconds, 3),
                    "tokens_per_s": rate,
                    "cache_mb": round(point.bytes / 1e6, 3),
                }

            bench.case({**label, "T": length, "decoder": racer.name}, one)
    for racer in racers:
        rival = "teacher" + (FAST if racer.name.endswith(FAST) else "")
        both = [n for n in lengths if n in seen[rival] and n in seen[racer.name]]
        if racer.name != rival and len(both) > 1:
            where = find_break_even(both, [seen[rival][n] for n in both], [seen[racer.name][n] for n in both])
            told = "never" if where is None else round(where)
            bench.rows.append({**label, "decoder": racer.name, "break_even": told})
