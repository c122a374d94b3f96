"""Stage 3 without the teacher: its most likely tokens are computed once and read from the cache after that.

    data, facts = attach_teacher_logits(teacher, data, store.key, 0, 400, top_k=64, autocast=nullcontext)

Only what is missing is computed. Other runs, students and stages on the same text read the same files.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root
from limbeck.data.packing import Batch, PackedDataset, SequenceDataset
from limbeck.data.teacher_logits import TeacherLogitsCache, TeacherLogitsDataset, report_teacher_cache
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.fingerprint import fingerprint_model

FORMAT_VERSION = 1  # to be raised when the files or their meaning change


def attach_teacher_logits(
    teacher: PreTrainedModel,
    data: PackedDataset,
    store: str,
    begin: int,
    end: int,
    top_k: int,
    autocast: Callable,
    chunk_size: int = 128,
) -> tuple[TeacherLogitsDataset, dict[str, Any]]:
    """Return the sequences `begin` to `end` of `data` with the teacher's most likely tokens, computing missing ones.

    Args:
        store: key of the token store.
        top_k: number of the teacher's most likely tokens to store.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The data, and facts: bytes per token, tokens that the teacher computed now, and the seconds that took.
    """
    began = time.monotonic()
    head, vocab_size = LMHead(teacher), int(teacher.get_output_embeddings().weight.shape[0])
    folder = cache_root() / "signals" / _cache_key(teacher, data, store, top_k, autocast)
    cache = TeacherLogitsCache(folder, vocab_size, top_k)

    @torch.no_grad()
    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast():
            hidden = run_backbone(teacher, batch.to(teacher.device))
            chunks = [top_log_probs(head(chunk), cache.top_k) for chunk in hidden.flatten(0, 1).split(chunk_size)]
        index, log_q = (torch.cat(x).unflatten(0, batch.input_ids.shape) for x in zip(*chunks))
        return index, log_q

    computed = cache.fill(data, begin, end, compute)
    seconds = time.monotonic() - began
    report_teacher_cache(cache, (end - begin) * data.length, computed, seconds)
    facts = {"bytes_per_token": cache.bytes_per_token, "asked_tokens": computed, "seconds": seconds}
    return TeacherLogitsDataset(data, cache, begin, end), facts


def require_packed(data: SequenceDataset) -> PackedDataset:
    """Return the data itself if a position always names the same sequence, as cached logits need.

    Raises:
        LimbeckError: it is anything but packed text of one source.
    """
    if isinstance(data, PackedDataset):
        return data
    raise LimbeckError(
        "cache_teacher does not work with a mixture of sources, generated rows, whole documents or streaming",
        expected="packed text of one source that is tokenized before training",
        hint="remove cache_teacher, or data.streaming, data.sources and data.documents",
    )


def top_log_probs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return index and log probability of the most likely tokens in descending order, [n, V] -> [n, top_k] each."""
    logits = logits.float()
    values, index = logits.topk(top_k, dim=-1)
    return index, values - logits.logsumexp(-1, keepdim=True)


def _cache_key(teacher: PreTrainedModel, data: PackedDataset, store: str, top_k: int, autocast: Callable) -> str:
    """Hash all that the logits depend on but the positions, which are in the names of the parts."""
    with autocast():
        mixed: bool | str = torch.is_autocast_enabled(teacher.device.type)
        if mixed and torch.get_autocast_dtype(teacher.device.type) != torch.bfloat16:
            mixed = str(torch.get_autocast_dtype(teacher.device.type))
    facts = {
        "format": FORMAT_VERSION,
        "teacher": fingerprint_model(teacher),
        "tokens": store,
        "split": data.split.name,
        "length": data.length,
        "seed": data.seed if data.shuffle else None,
        "top": top_k,
        "mixed_precision": mixed,
        **({"rows": "shuffled"} if data.shuffle_rows else {}),
    }
    return digest_facts(facts, 24)
