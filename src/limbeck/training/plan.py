"""What a run will cost, before it starts: floating-point operations, time, memory, disk, parameters.

    plan = make_plan(recipe, teacher, sites)
    plan.seconds, plan.disk_bytes, plan.stages

    plan = plan.with_measured_times(rehearsal)         # one step of each stage was run (limbeck.training.rehearsal)

Without a rehearsal the operations are counted from the models' weights, and the speed is that of a matrix product of
the models' own size, measured now, times the share of it that the stages reach.
"""

import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck import mixers
from limbeck.core import recipe as recipes
from limbeck.core.recipe import Recipe
from limbeck.models import Site
from limbeck.models.layers import parse_layers
from limbeck.models.quantization import count_unquantized_parameters
from limbeck.training.lora import count_lora_parameters, resolve_lora_targets
from limbeck.training.optim import count_training_steps
from limbeck.training.rehearsal import StageTimes

REACHED = 0.7  # of the matrix product's speed, as measured on the quickstart (benchmarks/README.md)


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan."""

    stage: str
    tokens: int
    steps: int
    trained_parameters: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The whole plan. Bytes, seconds, floating-point operations a second."""

    stages: list[StagePlan]
    seconds: float
    disk_bytes: int
    memory_bytes: int
    flops_per_second: float
    unshared_bytes: int = 0  # of the student's weights that it gets to itself in the run
    eval_tokens: int = 0  # tokens
    is_measured: bool = False

    def with_measured_times(self, seen: StageTimes) -> "Plan":
        """The plan with what a rehearsal measured in the place of what was counted."""
        rows = [replace(row, seconds=seen.seconds.get(i, row.seconds)) for i, row in enumerate(self.stages)]
        seconds = sum(row.seconds for row in rows) + self.eval_tokens * seen.eval_seconds_per_token
        memory = self.memory_bytes if seen.peak_memory_bytes is None else seen.peak_memory_bytes + self.unshared_bytes
        return replace(self, stages=rows, seconds=seconds, memory_bytes=memory, is_measured=True)

    def to_dict(self) -> dict[str, Any]:
        """What is kept of it, to be compared with what happens."""
        stages = [{"stage": row.stage, "seconds": row.seconds} for row in self.stages]
        return {
            "stages": stages,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "rehearsed": self.is_measured,
        }


def make_plan(recipe: Recipe, teacher: PreTrainedModel, sites: list[Site]) -> Plan:
    """Cost of a recipe's stages and final evaluation on this machine."""
    head = teacher.get_output_embeddings().weight.numel()
    table = teacher.get_input_embeddings().weight
    tied = teacher.get_output_embeddings().weight is table
    total = count_unquantized_parameters(teacher)
    body = total - head - (0 if tied else table.numel())
    attention = sum(count_unquantized_parameters(teacher.get_submodule(s.module)) for s in sites)
    block = sum(count_unquantized_parameters(teacher.get_submodule(s.block)) for s in sites)
    outputs = sum(count_unquantized_parameters(teacher.get_submodule(f"{s.module}.{s.output}")) for s in sites)
    added = _mixer_numel(recipe, sites)
    rows: list[StagePlan] = []
    kept, own = 0, recipe.teacher_bits is not None  # own: the student shares no weight with the teacher
    copies = attention  # weights that the student has to itself
    speed = measure_matmul_flops(teacher.device, sites[0].shape.hidden)
    largest = 0
    for settings in recipe.stages:
        steps, trained, tokens = 0, outputs, settings.tokens
        if isinstance(settings, recipes.Calibrate):
            each = 2 * body + 2 * attention + 4 * sum((s.shape.heads * s.shape.value_width) ** 2 for s in sites)
        elif isinstance(settings, recipes.Logits):
            kinds = {"attention": attention, "body": body, "all": total}
            weights = kinds.get(settings.train, 0)
            if settings.lora is not None:
                names = resolve_lora_targets(teacher, sites, settings.lora.target_modules)
                weights = count_lora_parameters(teacher, names, settings.lora.rank)
                merged = sum(count_unquantized_parameters(teacher.get_submodule(name)) for name in names)
                copies = max(copies, attention + merged)
                kept += merged - weights  # a stage keeps what it changed, not the adapters
            trained = weights + added
            each = 2 * (body + head) + 4 * (body + head) + 2 * trained
        else:
            block_target = isinstance(settings, recipes.Hidden) and settings.target == "block"
            through = block if block_target else attention
            whole = isinstance(settings, recipes.Hidden) and settings.train == "block"
            alone = isinstance(settings, recipes.Hidden) and settings.train == "mixer"
            trained = (0 if alone else block if whole else attention) + added
            each = 2 * body + 4 * through + 2 * trained
        if not isinstance(settings, recipes.Calibrate):
            length = recipe.text_of(settings).seq_len
            steps = count_training_steps(settings, length)
            tokens = steps * settings.batch_size * length
            largest = max(largest, trained)
        own = own or getattr(settings, "train", "attention") not in ("mixer", "attention", "lora")
        kept += trained
        rows.append(StagePlan(settings.stage, tokens, steps, trained, tokens * each / (speed * REACHED)))
    evaluation = recipe.evaluation.tokens * 4 * (body + head) / (speed * REACHED)
    student = 4 * total
    given = sum(p.numel() * p.element_size() for p in teacher.parameters())
    return Plan(
        stages=rows,
        seconds=sum(row.seconds for row in rows) + evaluation,
        disk_bytes=student + 4 * kept + recipe.save_total_limit * 12 * largest,
        memory_bytes=given + 4 * (total if own else min(copies, total)) + 12 * largest + 800_000_000,
        flops_per_second=speed,
        unshared_bytes=4 * max(total - attention, 0) if own else 0,
        eval_tokens=recipe.evaluation.tokens,
    )


def _mixer_numel(recipe: Recipe, sites: list[Site]) -> int:
    """Parameters of all mixers of the recipe's student."""
    student = recipe.student
    of_layer = dict.fromkeys((s.shape.layer for s in sites), (student.mixer, student.options, student.preset))
    for rule in student.rules:
        chosen = rule.mixer or student.mixer, rule.options, rule.preset or student.preset
        of_layer.update(dict.fromkeys(parse_layers(rule.layers, sites[0].shape.layers), chosen))
    sizes: dict[str, int] = {}
    total = 0
    for site in sites:
        name, options, preset = of_layer[site.shape.layer]
        key = f"{name} {options} {preset} {replace(site.shape, layer=0)}"
        if key not in sizes:
            sizes[key] = count_unquantized_parameters(mixers.build(name, site.shape, options, preset))
        total += sizes[key]
    return total


@cache
@torch.no_grad()
def measure_matmul_flops(device: torch.device, width: int) -> float:
    """Floating-point operations a second of a linear map of that width on 2,048 tokens."""
    layer = nn.Linear(width, 4 * width, bias=False, device=device)
    x = torch.randn(2048, width, device=device)
    best = float("inf")
    for _ in range(25):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * 4 * width / best
