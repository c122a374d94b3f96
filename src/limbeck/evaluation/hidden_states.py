"""The measure `hidden`: how like the teacher's a student's hidden states are, layer by layer.

    limbeck eval runs/mine --measure hidden
    linear_cka(x, y)                                # 1.0 for y = x Q + c with any rotation Q and any scale

Teacher-fed, each block of the student gets what the teacher's block got: what the layer itself does wrong.
Free-running, the student's own states come from below: what has added up. Each document's first token is left out: it
holds a few activations a thousand times the others' size (arXiv 2402.17762), beside which nothing else would count.
Legend: N tokens, D model width.
"""

from contextlib import ExitStack
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.data.packing import Batch
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject, build_untrained_student
from limbeck.models import Site, find_attention_sites
from limbeck.models.backbone import run_backbone, supports_packed_positions
from limbeck.models.hooks import hook_modules

States = dict[str, Tensor]  # by module name: [N, D]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of [N, D] and [N, D'] (Kornblith et al. 2019, arXiv 1905.00414, equation 4).

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms of centred columns: from 0 to 1, blind to rotations and to one scale
    for all. It is biased upwards where N is not much larger than D.
    """
    # neither autocast nor TF32 reaches float64
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    size = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x).square() / size.clamp_min(torch.finfo(size.dtype).tiny))


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean over tokens of the cosine between [N, D] and [N, D]; rotations do count."""
    return float(F.cosine_similarity(x.float(), y.float(), dim=-1).mean())


@torch.no_grad()
def compare_hidden_states(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> list[dict[str, float]]:
    """CKA and cosine of every layer on one packed batch, all tokens of it together.

    Returns:
        a dict a layer: cka_attention and cosine_attention of the attention's output and cka_block, cosine_block of the
        block's, both teacher-fed; cka_free, cosine_free of the block's output with the student running by itself.
    """
    sites = find_attention_sites(teacher)
    counted = batch.position_ids.flatten() > 0
    supports_packed_positions(student)  # tries the student on its first call, which no hook should see
    itself = student is teacher  # whose layers cannot run inside their own taps
    free = {} if itself else _states(student, [site.block for site in sites], batch, counted)
    found: list[dict[str, float]] = [{} for _ in sites]
    attended: States = {}

    def after_attention(name: str):
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            attended[name] = _kept(output, counted)

        return visit

    def after_block(site: Site):
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            target, wanted = _kept(output, counted), attended.pop(site.module)
            block, own = target, {site.module: wanted}
            if not itself:
                with _caught(student, [site.module], own, counted):
                    block = _kept(student.get_submodule(site.block)(*args, **kwargs), counted)
            here = found[site.shape.layer]
            here.update(_both("attention", own[site.module], wanted))
            here.update(_both("block", block, target))
            here.update(_both("free", free.pop(site.block, target), target))
            advance(1)

        return visit

    visits = {site.module: after_attention(site.module) for site in sites}
    visits |= {site.block: after_block(site) for site in sites}
    with progress("hidden states", len(sites), "layers") as advance, hook_modules(teacher, visits):
        run_backbone(teacher, batch)
    return found


def _states(model: PreTrainedModel, names: list[str], batch: Batch, counted: Tensor) -> States:
    """What leaves the named modules while the model runs by itself."""
    states: States = {}
    with _caught(model, names, states, counted):
        run_backbone(model, batch)
    return states


def _caught(model: PreTrainedModel, names: list[str], into: States, counted: Tensor) -> ExitStack:
    """Keep what the named modules return, as long as the context lasts."""
    stack = ExitStack()
    for name in names:

        def hook(module, args, output, name=name):
            into[name] = _kept(output, counted)

        stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
    return stack


def _kept(output: Tensor | tuple, counted: Tensor) -> Tensor:
    """The counted tokens [N, D] of a module's output."""
    states = output[0] if isinstance(output, tuple) else output
    return states.flatten(0, 1)[counted]


def _both(name: str, x: Tensor, y: Tensor) -> dict[str, float]:
    return {f"cka_{name}": linear_cka(x, y), f"cosine_{name}": mean_cosine(x, y)}


class HiddenSettings(MeasureSettings):
    """How much text, in sequences of which length (None: as in the run); all of it is run as one batch."""

    tokens: Annotated[int, Field(gt=0)] = 2048
    length: Annotated[int, Field(ge=16)] | None = None


def measure_hidden(subject: Subject, settings: HiddenSettings) -> MeasureResult:
    """Hidden states of student and fresh student against the teacher's."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, about = subject.load_held_out(length, settings.tokens)
    count = min(max(1, round(settings.tokens / length)), sequences.n_sequences)
    batch = sequences.batch(0, count).to(subject.device)
    teacher = subject.teacher.model
    layers = {"student": compare_hidden_states(teacher, subject.model, batch)}
    if subject.is_student:
        layers["fresh"] = compare_hidden_states(
            teacher, build_untrained_student(teacher, subject.model, subject.seed), batch
        )
    values: dict[str, float] = {}
    for whose, rows in layers.items():
        prefix = "" if whose == "student" else "fresh_"
        values |= {prefix + name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        values[f"{prefix}cka_free_last_layer"] = rows[-1]["cka_free"]
    tokens = int((batch.position_ids > 0).sum())
    return MeasureResult(
        values, data={**about, "sequences": count, "length": length, "tokens": tokens}, details=dict(layers)
    )


def draw_hidden(found: list[Measurement]) -> Any:
    """The measure's figure; pictures stand above measures, so theirs is looked up when one is drawn."""
    from limbeck.report.figures.measures import draw_hidden

    return draw_hidden(found)


MEASURE = Measure(
    "hidden",
    "linear CKA and cosine of hidden states with the teacher's, layer by layer, teacher-fed and free-running",
    HiddenSettings,
    measure_hidden,
    draw_hidden,
)
