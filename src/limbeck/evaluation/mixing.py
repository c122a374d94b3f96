"""The measure `mixing`: what a student's mixing matrices do, beside the teacher's and beside those it began with.

    limbeck eval runs/mine embedded --measure mixing --out comparison

Every layer is fed with what the teacher feeds it, so a layer's matrix is no victim of the layers below. The teacher's
attention, the student's matrix and an untrained student's (`fresh`) come from the same pass; layers of a hybrid that
stayed softmax are measured too, but the means in the table are over converted layers. Matrices are of one layer and one
sequence at a time. What each number is: docs/analysis.md. Legend: H heads, T time.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch, SequenceDataset
from limbeck.evaluation import mixing_statistics as stats
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.mixing_statistics import compute_half_life, record_decays
from limbeck.evaluation.subject import Subject, build_untrained_student
from limbeck.models import Site, find_attention_sites
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import hook_modules
from limbeck.models.temporary import use_attn_implementation

STATISTICS = (
    "overlap",
    "diversity",
    "first_token",
    "window",
    "diagonal",
    "entropy",
    "distance",
    "effective_rank",
    "negative",
)
HEATMAP_SIZE = 64  # pixels on a side of a heat map
RANK_TOKENS = 256  # tokens at the beginning of a document whose matrix the rank is taken of: its cost is their cube


@dataclass
class LayerStatistics:
    """What is known of one layer: sums over rows by whose matrix it is, and what is taken of the first sequence."""

    site: Site
    mixer: str  # "softmax" where the student kept it
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # whose -> statistic -> [H]
    rows: int = 0
    ranks: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    decays: list[Tensor] = field(default_factory=list)

    def add(self, matrices: dict[str, Tensor], position: Tensor, window: int) -> None:
        """Count the rows of each matrix [H, T, T] that see more than the window."""
        counted = position >= window
        self.rows += int(counted.sum())
        p = {whose: stats.normalize_rows(matrix) for whose, matrix in matrices.items()}
        for whose, matrix in matrices.items():
            found = stats.summarize_rows(p[whose], position, window)
            found["overlap"] = stats.row_overlap(p[whose], p["teacher"])
            found["diversity"] = stats.head_diversity(p[whose])
            found["negative"] = stats.negative_mass(matrix)
            sums = self.sums.setdefault(whose, {})
            for name, rows in found.items():
                total = rows[:, counted].double().sum(1)
                sums[name] = sums[name] + total if name in sums else total

    def means(self, whose: str) -> dict[str, Tensor]:
        """Means over rows, [H] each."""
        return {name: total / self.rows for name, total in self.sums[whose].items()} | {
            "effective_rank": self.ranks[whose]
        }


@torch.no_grad()
def collect_mixing_statistics(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    fresh: PreTrainedModel | None,
    data: SequenceDataset,
    sequences: int,
    window: int = 16,
) -> list[LayerStatistics]:
    """All layers on the first sequences of `data`. `student` may be the teacher itself, then there is no `fresh`.

    Raises:
        LimbeckError: no document is longer than the window.
    """
    mixers = {one["layer"]: one["mixer"] for one in getattr(student.config, "limbeck", {}).get("layers", [])}
    layers = [LayerStatistics(site, mixers.get(site.shape.layer, "softmax")) for site in find_attention_sites(teacher)]
    models = {"student": student} | ({"fresh": fresh} if fresh is not None else {})
    count = min(sequences, data.n_sequences)
    with progress("mixing matrices", count * len(layers), "layers") as advance:
        for index in range(count):
            batch = data.batch(index, 1).to(teacher.device)
            visits = {
                layer.site.module: _visitor(layer, teacher, models, batch, window, index == 0, advance)
                for layer in layers
            }
            with hook_modules(teacher, visits, eager=True):
                run_backbone(teacher, batch)
    if not layers[0].rows:
        raise LimbeckError(
            f"no document of more than {window} tokens", expected="longer documents or a smaller mixing.window"
        )
    return layers


def extract_mixing_matrix(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """The mixing matrix [B, H, T, T] of an attention module on the arguments of its teacher's eager call."""
    if hasattr(module, "mixer"):
        return module(*args, **kwargs, output_matrix=True)[1]
    with use_attn_implementation(module, "eager"):  # the only one that gives softmax's matrix
        return module(*args, **kwargs)[1]


def find_longest_document(position: Tensor) -> slice:
    """Where the longest document of a sequence lies, from its position ids [T]."""
    starts = [*(position == 0).nonzero().flatten().tolist(), len(position)]
    if starts[0]:
        starts.insert(0, 0)
    begin, end = max(itertools.pairwise(starts), key=lambda pair: pair[1] - pair[0])
    return slice(begin, end)


def downsample_matrix(matrix: Tensor, size: int = HEATMAP_SIZE) -> Tensor:
    """A matrix of signed shares [n, n] as `size` × `size` cells: summed over a cell's columns, mean over its rows."""
    cell = -(-len(matrix) // size)
    if cell == 1:
        return matrix
    cells = -(-len(matrix) // cell)
    padded = F.pad(matrix, (0, cells * cell - len(matrix), 0, cells * cell - len(matrix)))
    rows = torch.full((cells,), float(cell), device=matrix.device)
    rows[-1] = len(matrix) - (cells - 1) * cell
    return padded.view(cells, cell, cells, cell).sum((1, 3)) / rows[:, None]


def _visitor(
    layer: LayerStatistics, teacher: Any, models: dict[str, Any], batch: Batch, window: int, first: bool, advance: Any
):
    """What happens behind one attention module of the teacher."""
    position = batch.position_ids[0]

    def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        matrices = {"teacher": output[1][0].float()}
        for whose, model in models.items():
            module = model.get_submodule(layer.site.module)
            if model is teacher or (whose == "fresh" and not hasattr(module, "mixer")):
                matrices[whose] = matrices["teacher"]
                continue
            with record_decays(module) as found:
                matrices[whose] = extract_mixing_matrix(module, args, kwargs)[0].float()
            if whose == "student":
                layer.decays += found
        layer.add(matrices, position, window)
        if first:
            part = find_longest_document(position)
            cut = {whose: matrix[:, part, part] for whose, matrix in matrices.items()}
            corner = {whose: matrix[:, :RANK_TOKENS, :RANK_TOKENS] for whose, matrix in cut.items()}
            layer.ranks = {whose: stats.effective_rank(matrix).cpu() for whose, matrix in corner.items()}
            sunk = stats.normalize_rows(cut["teacher"])[:, :, 0].mean(1)
            layer.maps = {whose: _map(matrix, int(sunk.argmin())) for whose, matrix in cut.items()}
        advance(1)

    return visit


def _map(matrix: Tensor, head: int) -> Tensor:
    return downsample_matrix(stats.normalize_rows(matrix[head], signed=True)).cpu()


class MixingSettings(MeasureSettings):
    """How much text, in sequences of which length (None: as in the run), and how many tokens count as local."""

    tokens: Annotated[int, Field(gt=0)] = 2048
    length: Annotated[int, Field(ge=16)] | None = None
    window: Annotated[int, Field(ge=1)] = 16


def measure_mixing(subject: Subject, settings: MixingSettings) -> MeasureResult:
    """Mixing matrices of all layers, student beside teacher beside fresh student."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, about = subject.load_held_out(length, settings.tokens)
    teacher = subject.teacher.model
    fresh = build_untrained_student(teacher, subject.model, subject.seed) if subject.is_student else None
    count = max(1, round(settings.tokens / length))
    layers = collect_mixing_statistics(teacher, subject.model, fresh, sequences, count, settings.window)
    converted = [layer for layer in layers if layer.mixer != "softmax"] or layers
    values = {}
    for whose, prefix in (("student", ""), ("teacher", "teacher_"), ("fresh", "fresh_")):
        if whose not in layers[0].sums or (whose == "teacher" and not subject.is_student):
            continue
        for name in STATISTICS:
            if whose != "teacher" or name not in ("overlap", "negative"):
                values[prefix + name] = _mean(layer.means(whose)[name] for layer in converted)
    lives = {id(layer): compute_half_life(layer.decays, layer.site.shape.heads) for layer in layers}
    pairs = [(lives[id(layer)], layer.means("teacher")["distance"]) for layer in converted]
    known = [(life, distance) for life, distance in pairs if life is not None]
    if known:
        life, distance = (torch.cat(list(parts)) for parts in zip(*known))
        values["median_half_life"] = float(life.median())
        correlation = stats.spearman_correlation(life, distance)
        if correlation is not None:
            values["half_life_and_teacher_distance"] = correlation
    shown = sorted({len(layers) // 3, (2 * len(layers)) // 3})
    document = find_longest_document(sequences.batch(0, 1).position_ids[0])
    return MeasureResult(
        values=values,
        data={
            **about,
            "sequences": min(count, sequences.n_sequences),
            "length": length,
            "rows": layers[0].rows,
            "rank_of": min(document.stop - document.start, RANK_TOKENS),
        },
        details={
            "layers": [_plain(layer, lives[id(layer)]) for layer in layers],
            "maps": [{"layer": i} | {whose: _rounded(m) for whose, m in layers[i].maps.items()} for i in shown],
        },
    )


def _plain(layer: LayerStatistics, life: Tensor | None) -> dict[str, Any]:
    """A layer as JSON has it."""
    found = {whose: {name: _rounded(v) for name, v in layer.means(whose).items()} for whose in layer.sums}
    return {
        "layer": layer.site.shape.layer,
        "mixer": layer.mixer,
        **found,
        **({} if life is None else {"half_life": _rounded(life)}),
    }


def _rounded(values: Tensor) -> Any:
    """Plain numbers with four digits that count."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat([part.double().flatten() for part in parts]).mean())


def draw_mixing(found: list[Measurement]) -> Any:
    """The measure's figure; pictures stand above measures, so theirs is looked up when one is drawn."""
    from limbeck.report.figures.measures import draw_mixing

    return draw_mixing(found)


MEASURE = Measure(
    "mixing",
    "mixing matrices beside the teacher's: overlap, where heads look, how far, rank, half-lives",
    MixingSettings,
    measure_mixing,
    draw_mixing,
)
