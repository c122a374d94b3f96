"""The measure `hidden`: how similar a student's hidden states are to its teacher's, layer by layer.

    limbeck eval runs/mine --measure hidden
    layers = compare_hidden_states(teacher, student, batch)
    layers[3]["cka_block"], layers[3]["cosine_free"]
    linear_cka(x, y)                                # 1.0 for y = x Q + c with any rotation Q and any scale

Teacher-fed, each block of the student gets the input of the teacher's block: the error of the layer itself.
Free-running, the student's own states come from below: the accumulated error. The first token of each document is left
out: a few of its activations are a thousand times larger than all others (arXiv 2402.17762) and would dominate.
Legend: N tokens, D model width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.data.packing import Batch
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject, build_untrained_student
from limbeck.models import Site, find_attention_sites
from limbeck.models.backbone import run_backbone, supports_packed_positions
from limbeck.models.hooks import hook_modules

States = dict[str, Tensor]  # by module name: [N, D]


class HiddenSettings(MeasureSettings):
    """Settings of the measure `hidden`.

    tokens: amount of text; it runs as one batch.
    length: tokens in a sequence; None for that of the run.
    """

    tokens: Annotated[int, Field(gt=0)] = 2048
    length: Annotated[int, Field(ge=16)] | None = None


def measure_hidden(subject: Subject, settings: HiddenSettings) -> MeasureResult:
    """Compare the hidden states of the student, and of an untrained one, with the teacher's."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, data_info = subject.load_held_out(length, settings.tokens)
    count = min(max(1, round(settings.tokens / length)), sequences.n_sequences)
    batch = sequences.batch(0, count).to(subject.device)
    teacher = subject.teacher.model
    models = {"student": subject.model}
    if subject.is_student:
        models["fresh"] = build_untrained_student(teacher, subject.model, subject.seed)
    layers = dict(zip(models, compare_students_states(teacher, list(models.values()), batch)))
    values: dict[str, float] = {}
    for model, rows in layers.items():
        prefix = "" if model == "student" else "fresh_"
        values |= {prefix + name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        values[f"{prefix}cka_free_last_layer"] = rows[-1]["cka_free"]
    tokens = int((batch.position_ids > 0).sum())
    return MeasureResult(
        values, data={**data_info, "sequences": count, "length": length, "tokens": tokens}, details=dict(layers)
    )


def compare_hidden_states(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> list[dict[str, float]]:
    """Compute CKA and cosine of every layer on one packed batch, over all of its tokens.

    Returns:
        a dict per layer: cka_attention and cosine_attention of the attention's output, cka_block and cosine_block of
        the block's output, both teacher-fed; cka_free and cosine_free of the block's output, free-running.
    """
    return compare_students_states(teacher, [student], batch)[0]


@torch.no_grad()
def compare_students_states(
    teacher: PreTrainedModel, students: Sequence[PreTrainedModel], batch: Batch
) -> list[list[dict[str, float]]]:
    """Compare several students with the teacher in one pass of it: see `compare_hidden_states`."""
    sites = find_attention_sites(teacher)
    counted = batch.position_ids.flatten() > 0  # [B * T], all but first tokens of documents
    free_states: list[States] = [{} for _ in students]
    for student, states in zip(students, free_states):
        supports_packed_positions(student)  # tries the student on its first call, which no hook should see
        if student is not teacher:  # whose layers cannot run inside their own hooks
            with _record_outputs(student, [site.block for site in sites], states, counted):
                run_backbone(student, batch)
    layers: list[list[dict[str, float]]] = [[{} for _ in sites] for _ in students]
    teacher_attention: States = {}

    def compare_pair(name: str, x: Tensor, y: Tensor) -> dict[str, float]:
        return {f"cka_{name}": linear_cka(x, y), f"cosine_{name}": mean_cosine(x, y)}

    def after_attention(name: str):
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            teacher_attention[name] = _select_tokens(output, counted)

        return visit

    def after_block(site: Site):
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            target_block, target_attention = _select_tokens(output, counted), teacher_attention.pop(site.module)
            for student, states, rows in zip(students, free_states, layers):
                block, attention = target_block, {site.module: target_attention}
                if student is not teacher:
                    with _record_outputs(student, [site.module], attention, counted):
                        block = _select_tokens(student.get_submodule(site.block)(*args, **kwargs), counted)
                layer = rows[site.shape.layer]
                layer.update(compare_pair("attention", attention[site.module], target_attention))
                layer.update(compare_pair("block", block, target_block))
                layer.update(compare_pair("free", states.pop(site.block, target_block), target_block))
            advance(1)

        return visit

    visits = {site.module: after_attention(site.module) for site in sites}
    visits |= {site.block: after_block(site) for site in sites}
    with progress("hidden states", len(sites), "layers") as advance, hook_modules(teacher, visits):
        run_backbone(teacher, batch)
    return layers


def _record_outputs(model: PreTrainedModel, names: list[str], states: States, counted: Tensor) -> ExitStack:
    """Write the outputs of the named modules to `states` until the returned context is left."""
    stack = ExitStack()
    for name in names:

        def hook(module, args, output, name=name):
            states[name] = _select_tokens(output, counted)

        stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
    return stack


def _select_tokens(output: Tensor | tuple, counted: Tensor) -> Tensor:
    """Select the counted tokens [N, D] of a module's output."""
    states = output[0] if isinstance(output, tuple) else output
    return states.flatten(0, 1)[counted]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute linear centered kernel alignment (CKA) of [N, D] and [N, D'].

    Kornblith et al. 2019 (arXiv 1905.00414, equation 4): ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms of centered
    columns: from 0 to 1, invariant to rotations and to a common scale. Biased upwards unless N is much larger than D.
    """
    # Neither autocast nor TF32 applies to float64.
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    norm = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x).square() / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Average over tokens the cosine between [N, D] and [N, D]; unlike CKA it is not invariant to rotations."""
    return float(F.cosine_similarity(x.float(), y.float(), dim=-1).mean())


MEASURE = Measure(
    "hidden",
    "linear CKA and cosine of hidden states with the teacher's, layer by layer, teacher-fed and free-running",
    HiddenSettings,
    measure_hidden,
)
