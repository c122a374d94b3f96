"""Estimate what a run costs before it starts: time, memory, disk space, trained parameters.

    plan = make_plan(recipe, teacher, sites)
    plan.seconds, plan.memory_bytes, plan.disk_bytes, plan.stages
    plan = plan.with_measured_times(measure_stage_times(...))          # after limbeck.training.rehearsal

There are two steps. `make_plan` counts floating-point operations from the models' weights and divides by the speed of a
matrix product of the models' width, measured now, times the efficiency that the stages reach. Then a rehearsal runs a
step of each stage on the real models and replaces the counted times and memory. The count remains for stages that are
not rehearsed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck import mixers
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Calibrate, Hidden, Logits
from limbeck.core.system import synchronize_device
from limbeck.models import Site, find_attention_sites
from limbeck.models.quantization import count_unquantized_parameters
from limbeck.training.guard import count_guard_tokens
from limbeck.training.identity import assign_student_mixers
from limbeck.training.lora import count_lora_parameters, resolve_lora_targets
from limbeck.training.optim import count_training_steps
from limbeck.training.rehearsal import StageTimes
from limbeck.training.run_exam import count_evaluation_tokens

EFFICIENCY = 0.7  # speed of the stages / speed of the matrix product, measured on the quickstart (benchmarks/README.md)
PROCESS_BYTES = 800_000_000  # Python, libraries and activations


@dataclass(frozen=True)
class StagePlan:
    """Cost of one stage."""

    stage: str
    tokens: int
    steps: int
    trained_parameters: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Cost of a run."""

    stages: list[StagePlan]
    seconds: float
    disk_bytes: int
    memory_bytes: int
    flops_per_second: float
    unshared_bytes: int = 0  # beyond a rehearsal: weights that are shared with the teacher at first, the guard's copy
    eval_tokens: int = 0  # that teacher and student read
    is_measured: bool = False  # by a rehearsal

    def with_measured_times(self, times: StageTimes) -> "Plan":
        """Return the plan with times and memory as a rehearsal measured them."""
        rows = [replace(row, seconds=times.seconds.get(i, row.seconds)) for i, row in enumerate(self.stages)]
        seconds = sum(row.seconds for row in rows) + self.eval_tokens * times.eval_seconds_per_token
        memory = self.memory_bytes if times.peak_memory_bytes is None else times.peak_memory_bytes + self.unshared_bytes
        return replace(self, stages=rows, seconds=seconds, memory_bytes=memory, is_measured=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of plan.json, which the summary compares with what the run took."""
        stages = [{"stage": row.stage, "seconds": row.seconds} for row in self.stages]
        return {
            "stages": stages,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "rehearsed": self.is_measured,
        }


def make_plan(recipe: Recipe, teacher: PreTrainedModel, sites: list[Site]) -> Plan:
    """Estimate the cost of a recipe's stages and final evaluation on this machine.

    Args:
        teacher: may be a placeholder with random weights.
        sites: attention layers that are converted.
    """
    output_head = teacher.get_output_embeddings().weight
    embeddings = teacher.get_input_embeddings().weight
    head = output_head.numel()
    total = count_unquantized_parameters(teacher)
    body = total - head - (0 if output_head is embeddings else embeddings.numel())
    attention = _count_modules(teacher, [site.module for site in sites])
    blocks = _count_modules(teacher, [site.block for site in sites])
    outputs = _count_modules(teacher, [f"{site.module}.{site.output}" for site in sites])
    mixer_parameters = _count_mixer_parameters(recipe, teacher, sites)

    rows: list[StagePlan] = []
    stored = 0  # parameters that the stages store as their results
    largest = 0  # parameters of the largest stage: AdamW needs 12 more bytes for each
    unshared = attention  # parameters that the student does not share with the teacher
    shares_nothing = recipe.teacher_bits is not None
    speed = measure_matmul_flops(teacher.device, sites[0].shape.hidden)
    for settings in recipe.stages:
        steps, tokens = 0, settings.tokens
        # A linear layer takes 2 operations per parameter and token in the forward pass and 4 in the backward pass, or 2
        # if only activations need gradients.
        if isinstance(settings, Calibrate):
            trained = outputs
            gram_matrices = 4 * sum((s.shape.heads * s.shape.value_width) ** 2 for s in sites)
            flops_per_token = 2 * body + 2 * attention + gram_matrices
        elif isinstance(settings, Logits):
            weights = {"attention": attention, "body": body, "all": total}.get(settings.train, 0)
            if settings.lora is not None:
                names = resolve_lora_targets(teacher, sites, settings.lora.target_modules)
                merged = _count_modules(teacher, names)
                weights = count_lora_parameters(teacher, names, settings.lora.rank)
                unshared = max(unshared, attention + merged)
                stored += merged - weights  # the result is the merged weights, not the adapters
            trained = weights + mixer_parameters
            flops_per_token = 2 * (body + head) + 4 * (body + head) + 2 * trained
        else:
            is_hidden = isinstance(settings, Hidden)
            backward = blocks if is_hidden and settings.target == "block" else attention
            weights = attention
            if is_hidden:
                weights = {"mixer": 0, "attention": attention, "block": blocks}[settings.train]
            trained = weights + mixer_parameters
            flops_per_token = 2 * body + 4 * backward + 2 * trained
        if not isinstance(settings, Calibrate):
            length = recipe.text_of(settings).seq_len
            steps = count_training_steps(settings, length)
            tokens = steps * settings.batch_size * length
            largest = max(largest, trained)
        # a stage that trains weights outside of the attention layers makes a copy of all of them
        trains_others = getattr(settings, "train", "attention") not in ("mixer", "attention", "lora")
        shares_nothing = shares_nothing or trains_others
        stored += trained
        seconds = tokens * flops_per_token / (speed * EFFICIENCY)
        rows.append(StagePlan(settings.stage, tokens, steps, trained, seconds))

    teacher_bytes = sum(p.numel() * p.element_size() for p in teacher.parameters())
    student_bytes = 4 * (total if shares_nothing else min(unshared, total))
    eval_tokens, guard_bytes = count_evaluation_tokens(recipe.evaluation, teacher), 0
    if recipe.keep_better:  # the student alone, before the first stage and after each, and a copy of its weights
        eval_tokens += count_guard_tokens(recipe.longest) * (len(recipe.stages) + 1) // 2
        guard_bytes = student_bytes
    eval_seconds = eval_tokens * 4 * (body + head) / (speed * EFFICIENCY)
    return Plan(
        stages=rows,
        seconds=sum(row.seconds for row in rows) + eval_seconds,
        disk_bytes=4 * total + 4 * stored + recipe.save_total_limit * 12 * largest,
        memory_bytes=teacher_bytes + student_bytes + guard_bytes + 12 * largest + PROCESS_BYTES,
        flops_per_second=speed,
        unshared_bytes=(4 * max(total - attention, 0) if shares_nothing else 0) + guard_bytes,
        eval_tokens=eval_tokens,
    )


def _count_modules(teacher: PreTrainedModel, names: Sequence[str]) -> int:
    """Count the parameters of submodules."""
    return sum(count_unquantized_parameters(teacher.get_submodule(name)) for name in names)


def _count_mixer_parameters(recipe: Recipe, teacher: PreTrainedModel, sites: list[Site]) -> int:
    """Count the parameters of all mixers of a recipe's student."""
    groups = [site.shape.kv_heads for site in find_attention_sites(teacher)]
    student = recipe.student
    if isinstance(student.softmax_heads, int):  # not chosen yet; without them there are a few parameters more
        student = student.model_copy(update={"softmax_heads": "none", "softmax_window": 0})
    assigned = assign_student_mixers(student, groups, recipe.longest)
    sizes: dict[str, int] = {}  # most layers are alike, and building a mixer takes time
    total = 0
    for site in sites:
        chosen = assigned[site.shape.layer]
        key = f"{chosen} {replace(site.shape, layer=0)}"
        if key not in sizes:
            sizes[key] = count_unquantized_parameters(mixers.build(chosen.mixer, site.shape, chosen.options))
        total += sizes[key]
    return total


@cache
@torch.no_grad()
def measure_matmul_flops(device: torch.device, width: int) -> float:
    """Measure the speed of a linear layer of this width on 2,048 tokens, in floating-point operations per second."""
    layer = nn.Linear(width, 4 * width, bias=False, device=device)
    x = torch.randn(2048, width, device=device)
    best = float("inf")
    for _ in range(25):
        synchronize_device(device)
        start = time.perf_counter()
        layer(x)
        synchronize_device(device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * 4 * width / best
