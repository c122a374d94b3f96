"""Stage 3 on long sequences: its memory and its largest tensor grow in proportion to the length, and no faster."""

import weakref
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import limbeck
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.hooks import DistillationPair
from limbeck.testing import make_tiny_model
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.stage_protocol import accumulate_gradients

FIRST, LAST = 512, 2048


class Watched(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still there, at most; and of the largest one."""

    live = peak = largest = 0

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def watched(stage: LogitsStage, length: int) -> Watched:
    """A step on one sequence."""
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (1, length))
    batch = Batch(ids, torch.arange(length)[None], ids)
    with Watched() as seen:
        accumulate_gradients(stage, [batch])
    return seen


def test_stage_three_is_linear_in_the_length():
    teacher = make_tiny_model("llama").eval().requires_grad_(False)
    teacher.config.max_position_embeddings = LAST
    student = limbeck.convert(teacher, "gated_deltanet").requires_grad_(False)
    stage = LogitsStage(
        DistillationPair(teacher, student, find_attention_sites(teacher), nullcontext),
        ObjectiveWeights(),
        chunk_size=64,
        checkpoint_activations=True,
    )
    for parameter in stage.parameters().values():
        parameter.requires_grad_(True)
    watched(stage, 64)  # what is tried once per model
    short, long = (watched(stage, length) for length in (FIRST, LAST))
    assert long.peak > 2 * short.peak, "what grows with the length is not seen"
    assert long.peak < 1.1 * LAST / FIRST * short.peak
    assert long.largest < 1.1 * LAST / FIRST * short.largest
    assert long.largest < LAST * LAST, "a boolean mask would be as large"
