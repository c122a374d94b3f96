"""Stage 3's loss alone: memory and time without the logits, with them, and by liger-kernel where it is installed.

The step is the loss, the gradient at the hidden states and that of the head. liger-kernel joins cross-entropy with the
Jensen-Shannon divergence, so it stands beside ours of these two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gpu_sections.bench import Bench
from limbeck.training.chunked_losses import TeacherLogitsFromHidden, choose_logit_chunk_size, logit_losses
from limbeck.training.losses import ObjectiveWeights

KL = ObjectiveWeights(ce=0.5, kl=0.5)


class _Head(nn.Linear):
    """A head alone, which knows itself for `choose_logit_chunk_size`."""

    def get_output_embeddings(self) -> nn.Linear:
        return self


def run(bench: Bench) -> None:
    sizes = [(256, 32)] if bench.dry else [(49152, 960), (151936, 1024)]
    tokens = 64 if bench.dry else 16384
    for vocabulary, width in sizes:
        for name, make in CONTESTANTS.items():
            bench.case(
                {"V": vocabulary, "D": width, "tokens": tokens, "loss": name},
                lambda v=vocabulary, d=width, make=make: _row(bench, v, d, tokens, make),
            )


def _row(bench: Bench, vocabulary: int, width: int, tokens: int, make: Callable) -> dict[str, Any]:
    torch.manual_seed(0)
    ours, theirs = (_Head(width, vocabulary, bias=False, device=bench.device) for _ in range(2))
    theirs.requires_grad_(False)
    h = torch.randn(1, tokens, width, device=bench.device)
    t = torch.randn(1, tokens, width, device=bench.device)
    targets = torch.randint(0, vocabulary, (1, tokens), device=bench.device)
    work, autocast = make(ours, theirs, h, t, targets), bench.autocast()

    def step() -> None:
        with autocast():
            work()

    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    row = bench.timed_step(step, tokens)
    return {**row, "step_gb": row["peak_gb"] and round(row["peak_gb"] - before / 1e9, 2)}


def _ours(compiled: bool, weights: ObjectiveWeights) -> Callable:
    def make(head: _Head, teacher: _Head, h, t, targets) -> Callable[[], Any]:
        rows = torch.arange(targets.numel(), device=h.device)
        more = {"chunk_size": choose_logit_chunk_size(head), "rows": rows, "compiled": compiled}
        return lambda: logit_losses(
            head, h, TeacherLogitsFromHidden(teacher, t), targets, weights, 1 / targets.numel(), **more
        )

    return make


def _plain(head: _Head, teacher: _Head, h, t, targets) -> Callable[[], Any]:
    h.requires_grad_(True)

    def work() -> None:
        s = head(h)[0].float()
        with torch.no_grad():
            q = teacher(t)[0].float()
        kl = F.kl_div(s.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="batchmean")
        (0.5 * F.cross_entropy(s, targets[0]) + 0.5 * kl).backward()

    return work


def _liger(head: _Head, teacher: _Head, h, t, targets) -> Callable[[], Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5)
    half = torch.bfloat16 if h.device.type == "cuda" else h.dtype
    s, q = h[0].to(half).requires_grad_(True), t[0].to(half)
    own, other = head.weight.detach().to(half).requires_grad_(True), teacher.weight.to(half)
    return lambda: loss(s, own, q, other, targets[0], None, None).backward()


CONTESTANTS: dict[str, Callable] = {
    "CE and KL, ours": _ours(False, KL),
    "CE and KL, ours, compiled": _ours(True, KL),
    "CE and KL, PyTorch, all logits": _plain,
    "CE and JSD, ours, compiled": _ours(True, ObjectiveWeights(ce=0.5, kl=0.0, jsd=0.5)),
    "CE and JSD, liger-kernel": _liger,
}
