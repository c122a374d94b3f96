"""The measure `mixing`: a student's mixing matrices, compared with its teacher's and with those before training.

    limbeck eval runs/mine embedded --measure mixing --out comparison
    layers = collect_mixing_statistics(teacher, student, untrained, data, sequences=4)
    layers[3].means("student")["overlap"]                                     # [H]

Every layer gets the teacher's input, so a layer's matrix does not suffer from the layers below. The teacher's
attention, the student's matrix and the untrained student's (`fresh`) come from the same pass; the softmax layers of a
hybrid are measured too, but the means in the table are over converted layers. Only the matrices of one layer and one
sequence exist at a time. Definitions: docs/reference/measures.md. Legend: B batch, H heads, T time.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import SequenceDataset
from limbeck.evaluation import mixing_statistics as stats
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
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
HEATMAP_SIZE = 64  # cells on a side of a heat map
RANK_TOKENS = 256  # tokens at the beginning of a document that the rank is computed of: its cost is cubic


class MixingSettings(MeasureSettings):
    """Settings of the measure `mixing`.

    tokens: amount of text.
    length: tokens in a sequence; None for that of the run.
    window: number of tokens that count as local.
    """

    tokens: Annotated[int, Field(gt=0)] = 2048
    length: Annotated[int, Field(ge=16)] | None = None
    window: Annotated[int, Field(ge=1)] = 16


def measure_mixing(subject: Subject, settings: MixingSettings) -> MeasureResult:
    """Compare the mixing matrices of all layers: student, teacher and untrained student."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, data_info = subject.load_held_out(length, settings.tokens)
    teacher = subject.teacher.model
    untrained = build_untrained_student(teacher, subject.model, subject.seed) if subject.is_student else None
    count = max(1, round(settings.tokens / length))
    layers = collect_mixing_statistics(teacher, subject.model, untrained, sequences, count, settings.window)
    converted = [layer for layer in layers if layer.mixer != "softmax"] or layers

    values = {}
    for model, prefix in (("student", ""), ("teacher", "teacher_"), ("fresh", "fresh_")):
        if model not in layers[0].sums or (model == "teacher" and not subject.is_student):
            continue
        for name in STATISTICS:
            if model != "teacher" or name not in ("overlap", "negative"):  # 1 and 0 for every teacher
                heads = torch.cat([layer.means(model)[name].double().flatten() for layer in converted])
                values[prefix + name] = float(heads.mean())

    half_lives = {layer.index: compute_half_life(layer.decays, layer.site.shape.heads) for layer in layers}
    with_decay = [layer for layer in converted if half_lives[layer.index] is not None]
    if with_decay:
        half_life = torch.cat([half_lives[layer.index] for layer in with_decay])  # type: ignore[misc]
        distance = torch.cat([layer.means("teacher")["distance"] for layer in with_decay])
        values["median_half_life"] = float(half_life.median())
        correlation = stats.spearman_correlation(half_life, distance)
        if correlation is not None:
            values["half_life_and_teacher_distance"] = correlation

    document = find_longest_document(sequences.batch(0, 1).position_ids[0])
    shown_layers = sorted({len(layers) // 3, (2 * len(layers)) // 3})
    return MeasureResult(
        values=values,
        data={
            **data_info,
            "sequences": min(count, sequences.n_sequences),
            "length": length,
            "rows": layers[0].rows,
            "rank_of": min(document.stop - document.start, RANK_TOKENS),
        },
        details={
            "layers": [layer.to_json(half_lives[layer.index]) for layer in layers],
            "maps": [
                {"layer": index} | {model: _round(heatmap) for model, heatmap in layers[index].maps.items()}
                for index in shown_layers
            ],
        },
    )


@dataclass
class LayerStatistics:
    """Statistics of one layer, by model: "teacher", "student" and "fresh".

    mixer: "softmax" for a layer that is not converted.
    sums: model -> statistic -> [H], sums over `rows` rows.
    ranks: model -> [H], effective rank on the first sequence.
    maps: model -> heat map of one head on the first sequence.
    decays: recorded decays of the student, one entry per call.
    """

    site: Site
    mixer: str
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: int = 0
    ranks: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    decays: list[Tensor] = field(default_factory=list)

    @property
    def index(self) -> int:
        """Index of the layer in the model."""
        return self.site.shape.layer

    def add(self, matrices: dict[str, Tensor], position: Tensor, window: int) -> None:
        """Add the rows of each matrix [H, T, T] that see more than the window."""
        counted = position >= window
        self.rows += int(counted.sum())
        normalized = {model: stats.normalize_rows(matrix) for model, matrix in matrices.items()}
        for model, matrix in matrices.items():
            p = normalized[model]
            statistics = stats.summarize_rows(p, position, window)
            statistics["overlap"] = stats.row_overlap(p, normalized["teacher"])
            statistics["diversity"] = stats.head_diversity(p)
            statistics["negative"] = stats.negative_mass(matrix)
            sums = self.sums.setdefault(model, {})
            for name, rows in statistics.items():
                total = rows[:, counted].double().sum(1)
                sums[name] = sums[name] + total if name in sums else total

    def add_first_document(self, matrices: dict[str, Tensor], position: Tensor) -> None:
        """Compute ranks and heat maps on the longest document of a sequence."""
        document = find_longest_document(position)
        matrices = {model: matrix[:, document, document] for model, matrix in matrices.items()}
        # The head with the least mass on the first token: an attention sink leaves nothing else to see.
        head = int(stats.normalize_rows(matrices["teacher"])[:, :, 0].mean(1).argmin())
        for model, matrix in matrices.items():
            self.ranks[model] = stats.effective_rank(matrix[:, :RANK_TOKENS, :RANK_TOKENS]).cpu()
            self.maps[model] = downsample_matrix(stats.normalize_rows(matrix[head], signed=True)).cpu()

    def means(self, model: str) -> dict[str, Tensor]:
        """Average over rows: [H] for each statistic."""
        means = {name: total / self.rows for name, total in self.sums[model].items()}
        return means | {"effective_rank": self.ranks[model]}

    def to_json(self, half_life: Tensor | None) -> dict[str, Any]:
        """Convert to plain numbers for `details["layers"]`."""
        by_model = {model: {name: _round(values) for name, values in self.means(model).items()} for model in self.sums}
        layer = {"layer": self.index, "mixer": self.mixer, **by_model}
        return layer if half_life is None else {**layer, "half_life": _round(half_life)}


@torch.no_grad()
def collect_mixing_statistics(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    untrained: PreTrainedModel | None,
    data: SequenceDataset,
    sequences: int,
    window: int = 16,
) -> list[LayerStatistics]:
    """Collect the statistics of all layers on the first sequences of `data`.

    Args:
        student: may be the teacher itself; then there is no untrained student.

    Raises:
        LimbeckError: no document is longer than the window.
    """
    mixers = {layer["layer"]: layer["mixer"] for layer in getattr(student.config, "limbeck", {}).get("layers", [])}
    layers = [LayerStatistics(site, mixers.get(site.shape.layer, "softmax")) for site in find_attention_sites(teacher)]
    models = {"student": student} | ({"fresh": untrained} if untrained is not None else {})
    count = min(sequences, data.n_sequences)

    def make_visit(layer: LayerStatistics, position: Tensor, is_first: bool) -> Callable:
        def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            matrices = {"teacher": output[1][0].float()}
            for name, model in models.items():
                module = model.get_submodule(layer.site.module)
                if model is teacher or (name == "fresh" and not hasattr(module, "mixer")):
                    matrices[name] = matrices["teacher"]
                    continue
                with record_decays(module) as decays:
                    matrices[name] = extract_mixing_matrix(module, args, kwargs)[0].float()
                if name == "student":
                    layer.decays += decays
            layer.add(matrices, position, window)
            if is_first:
                layer.add_first_document(matrices, position)
            advance(1)

        return visit

    with progress("mixing matrices", count * len(layers), "layers") as advance:
        for index in range(count):
            batch = data.batch(index, 1).to(teacher.device)
            visits = {layer.site.module: make_visit(layer, batch.position_ids[0], index == 0) for layer in layers}
            with hook_modules(teacher, visits, eager=True):
                run_backbone(teacher, batch)
    if not layers[0].rows:
        raise LimbeckError(
            f"no document of more than {window} tokens", expected="longer documents or a smaller mixing.window"
        )
    return layers


def extract_mixing_matrix(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """Compute the mixing matrix [B, H, T, T] of an attention module for the arguments of its teacher's eager call."""
    if hasattr(module, "mixer"):
        return module(*args, **kwargs, output_matrix=True)[1]
    # The only implementation that returns the matrix of softmax attention.
    with use_attn_implementation(module, "eager"):
        return module(*args, **kwargs)[1]


def find_longest_document(position: Tensor) -> slice:
    """Find the longest document of a sequence from its position ids [T]."""
    starts = [*(position == 0).nonzero().flatten().tolist(), len(position)]
    if starts[0]:  # the sequence begins within a document
        starts.insert(0, 0)
    begin, end = max(itertools.pairwise(starts), key=lambda pair: pair[1] - pair[0])
    return slice(begin, end)


def downsample_matrix(matrix: Tensor, size: int = HEATMAP_SIZE) -> Tensor:
    """Downsample normalized signed rows [n, n] to `size` × `size` cells: sum over columns, mean over rows of a cell."""
    cell = -(-len(matrix) // size)
    if cell == 1:
        return matrix
    cells = -(-len(matrix) // cell)
    padded = F.pad(matrix, (0, cells * cell - len(matrix), 0, cells * cell - len(matrix)))
    rows = torch.full((cells,), float(cell), device=matrix.device)
    rows[-1] = len(matrix) - (cells - 1) * cell
    return padded.view(cells, cell, cells, cell).sum((1, 3)) / rows[:, None]


def _round(values: Tensor) -> Any:
    """Convert to plain numbers with four significant digits."""
    if values.dim() > 1:
        return [_round(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]


MEASURE = Measure(
    "mixing",
    "mixing matrices beside the teacher's: overlap, where heads attend, how far, rank, half-lives",
    MixingSettings,
    measure_mixing,
)
