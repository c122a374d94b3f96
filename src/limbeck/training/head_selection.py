"""Select the groups of heads that keep softmax attention, by what each is worth together with the others.

    content = choose_heads(teacher, sites, batch, 9)                  # what `student.softmax_heads` reads from a file
    model = GatedTeacher(teacher, sites, window=64)                   # softmax or window in every group, by a gate
    texts = prepare_texts(data.batch(0, 2), teacher.device)
    chosen = select_by_path(model, texts, 9)                          # {(18, 2): 0.95, ...} nats per token, in order
    prices = price_by_swap(model, texts)                              # {(18, 2): 1.57, ...}: each windowed alone

All groups are windowed, as DuoAttention's streaming heads are (arXiv 2410.10819), and a gate g between them and softmax
is the mixture y = window + g (softmax − window). The loss's derivative by the gate,

    dL/dg = Σ_t ⟨dL/dy_t, softmax_t − window_t⟩,

prices all groups in one backward pass. At g = 0 it misses what several heads do together (one copies the token before,
another looks for it), and at g = 1 whatever another head does as well. So it is taken with the gates of all groups that
are still open half open, and along the path from 0 to 1 it sums to the whole loss (integrated gradients, arXiv
1703.01365, equation 1). The dearest groups are fixed at 1, and the next round prices the others beside them.

The loss is the cross-entropy on the second A of A B A, text that was there before the window began.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.system import flush_denormals
from limbeck.data.packing import Batch
from limbeck.mixers import HeadShape, Options, State, Tokens
from limbeck.mixers import build as build_mixer
from limbeck.models import Site, convert
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.training.chunked_losses import logit_losses
from limbeck.training.layer_selection import make_repeated_batch
from limbeck.training.losses import ObjectiveWeights

HeadCriterion = Literal["path", "swap"]
Group = tuple[int, int]  # layer, group; both counted from 0
PATH = (0.25, 0.5, 0.75)  # how far open the gates are where the derivative is taken


class GatedAttention(nn.Module):
    """The attention of one layer, between a window and softmax by a gate per group. It keeps no state."""

    def __init__(self, shape: HeadShape, window: int, sinks: int):
        super().__init__()
        self.options = Options()  # q and k come with RoPE
        self.softmax = build_mixer("softmax", shape)
        self.window = build_mixer("sliding_window", shape, {"window": window, "sinks": sinks})
        self.heads_per_group = shape.heads // shape.kv_heads
        self.gates = nn.Parameter(torch.zeros(shape.kv_heads))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        near, full = (mixer(q, k, v, x, tokens=tokens)[0] for mixer in (self.window, self.softmax))
        gates = self.gates.repeat_interleave(self.heads_per_group).unsqueeze(-1)  # [H, 1]
        return near + gates.to(near.dtype) * (full - near), {}


class GatedTeacher:
    """A teacher with a `GatedAttention` in each layer; it shares all weights but those of the attention modules.

    Args:
        sites: the attention layers whose groups can be chosen.
        window: tokens that a windowed group sees, besides the first `sinks`.
    """

    def __init__(self, teacher: PreTrainedModel, sites: Sequence[Site], window: int = 64, sinks: int = 4):
        self.model = convert(teacher, "softmax", [site.shape.layer for site in sites], share_weights=True)
        self.model.requires_grad_(False).eval()
        self.layers = {site.shape.layer: GatedAttention(site.shape, window, sinks) for site in sites}
        for site in sites:
            gated = self.layers[site.shape.layer].to(teacher.device, teacher.dtype)
            self.model.get_submodule(site.module).mixer = gated
        self.groups: list[Group] = [(site.shape.layer, g) for site in sites for g in range(site.shape.kv_heads)]
        self.head = LMHead(self.model)

    @torch.no_grad()
    def set_gates(self, gates: dict[Group, float], rest: float = 0.0) -> None:
        """Set these gates, and those of all other groups to `rest`."""
        for layer, group in self.groups:
            self.layers[layer].gates[group] = gates.get((layer, group), rest)

    @torch.no_grad()
    def measure_loss(self, texts: list[Batch]) -> float:
        """Return the cross-entropy on the targets, in nats per token."""
        sums = [logit_losses(self.head, run_backbone(self.model, text), None, text.targets)[0] for text in texts]
        return float(sum(s["ce"] for s in sums)) / sum(text.n_targets for text in texts)

    def measure_worth(self, texts: list[Batch]) -> dict[Group, float]:
        """Return −dL/dg of each group at the present gates: nats per token, positive where softmax helps."""
        for layer in self.layers.values():
            layer.gates.grad = None
        count = sum(text.n_targets for text in texts)
        for text in texts:
            hidden = run_backbone(self.model, text)
            _, gradient = logit_losses(self.head, hidden, None, text.targets, ObjectiveWeights(ce=1, kl=0), 1 / count)
            hidden.backward(gradient)
        # every gate is in the graph of the loss, so each has a gradient
        gradients = {layer: gated.gates.grad.tolist() for layer, gated in self.layers.items()}  # type: ignore[union-attr]
        return {(layer, group): -gradients[layer][group] for layer, group in self.groups}


def prepare_texts(text: Batch, device: torch.device) -> list[Batch]:
    """Return A B A (`make_repeated_batch`) of each row of a batch, as a list of rows: a backward pass holds one."""
    repeated = make_repeated_batch(text)
    return [repeated.select_rows(slice(i, i + 1)).to(device) for i in range(len(repeated.input_ids))]


@flush_denormals()
def select_by_path(
    model: GatedTeacher, texts: list[Batch], count: int, rounds: int = 4, path: Sequence[float] = PATH
) -> dict[Group, float]:
    """Return the groups that are worth most together, in the order of their choice, with their worth in its round.

    Args:
        texts: as `prepare_texts` returns them.
        count: how many groups.
        rounds: passes along the path; after each, its share of the groups is fixed at softmax.
        path: gates of the groups that are not fixed yet, where the derivative is taken.
    """
    check_count(count, len(model.groups))
    rounds = min(rounds, count)
    chosen: dict[Group, float] = {}
    with progress("score heads", rounds * len(path), "passes") as advance:
        for number in range(rounds):
            worth = dict.fromkeys(model.groups, 0.0)
            for opening in path:
                model.set_gates(dict.fromkeys(chosen, 1.0), rest=opening)
                for group, value in model.measure_worth(texts).items():
                    worth[group] += value / len(path)
                advance(1)
            left = sorted((group for group in model.groups if group not in chosen), key=worth.__getitem__, reverse=True)
            share = -(-(count - len(chosen)) // (rounds - number))
            chosen |= {group: worth[group] for group in left[:share]}
    return chosen


@flush_denormals()
def price_by_swap(model: GatedTeacher, texts: list[Batch]) -> dict[Group, float]:
    """Return what windowing each group alone costs, in nats per token, all others with softmax; the dearest first."""
    model.set_gates({}, rest=1.0)
    before = model.measure_loss(texts)
    prices: dict[Group, float] = {}
    with progress("window one group", len(model.groups), "groups") as advance:
        for group in model.groups:
            model.set_gates({group: 0.0}, rest=1.0)
            prices[group] = model.measure_loss(texts) - before
            advance(1, f"{format_group(group)}: {prices[group]:.3f}")
    return dict(sorted(prices.items(), key=lambda item: item[1], reverse=True))


def choose_heads(
    teacher: PreTrainedModel,
    sites: Sequence[Site],
    text: Batch,
    count: int,
    by: HeadCriterion = "path",
    window: int = 64,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Choose the groups that keep softmax, by a text; returns the content of the file that names them.

    Args:
        sites: the attention layers whose groups can be chosen.
        text: each of its rows is read as A B A.
        window: tokens that a windowed group sees.
        facts: what else the file says of the choice.

    Raises:
        LimbeckError: see `select_heads`.
    """
    model = GatedTeacher(teacher, sites, window)
    chosen, losses = select_heads(model, prepare_texts(text, teacher.device), count, by)
    return head_selection_to_dict(chosen, losses, **(facts or {}))


def select_heads(
    model: GatedTeacher, texts: list[Batch], count: int, by: HeadCriterion = "path", rounds: int = 4
) -> tuple[dict[Group, float], dict[str, float]]:
    """Choose the groups that keep softmax.

    Returns:
        The chosen groups with their worth in nats per token, and the loss on the repeat, in nats per token, with
        softmax in all groups (`softmax`), in none (`window`) and in the chosen ones (`chosen`).

    Raises:
        LimbeckError: unknown criterion, or as many groups as there are.
    """
    check_criterion(by)
    check_count(count, len(model.groups))
    if by == "path":
        chosen = select_by_path(model, texts, count, rounds)
    else:
        chosen = dict(list(price_by_swap(model, texts).items())[:count])
    losses: dict[str, float] = {}
    fixed = dict.fromkeys(chosen, 1.0)
    settings: list[tuple[str, dict[Group, float], float]] = [
        ("softmax", {}, 1.0),
        ("window", {}, 0.0),
        ("chosen", fixed, 0.0),
    ]
    for name, gates, rest in settings:
        model.set_gates(gates, rest)
        losses[name] = model.measure_loss(texts)
    return chosen, losses


def check_criterion(by: str) -> None:
    """Raise LimbeckError unless groups of heads can be selected by that criterion."""
    if by not in get_args(HeadCriterion):
        raise LimbeckError(
            f"unknown criterion '{by}' for groups of heads{suggest_closest(by, get_args(HeadCriterion))}",
            expected=", ".join(get_args(HeadCriterion)),
        )


def check_count(count: int, groups: int) -> None:
    """Raise LimbeckError unless `count` of so many groups can be chosen."""
    if not 0 < count < groups:
        raise LimbeckError(
            f"cannot keep {count} of the teacher's {groups} groups of heads",
            expected=f"1 to {groups - 1}" if groups > 1 else "a teacher with several groups",
            hint=f"--set student.softmax_heads={max(1, groups // 12)}, or limbeck distill quickstart, which keeps none",
        )


def head_selection_to_dict(chosen: dict[Group, float], losses: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Return the content of the file that `limbeck select --heads` writes and `student.softmax_heads` reads."""
    worth = {format_group(group): round(value, 6) for group, value in chosen.items()}
    return {"softmax_heads": list(worth), **facts, "loss_on_repeat": losses, "worth": worth}


def format_group(group: Group) -> str:
    """Format a group as "layer.group"."""
    return f"{group[0]}.{group[1]}"
