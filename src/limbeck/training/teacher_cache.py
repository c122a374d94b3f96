"""Stage 3 without the teacher: its most likely tokens are written to the cache once and read from there.

    data, facts = attach_teacher_logits(teacher, data, store.key, 0, 400, top_k=64, autocast=nullcontext)

The teacher is asked only for what is missing. Other runs, other students and other stages on the same text read the
same files.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root
from limbeck.data.packing import Batch, PackedDataset, SequenceDataset
from limbeck.data.teacher_logits import TeacherLogitsCache, TeacherLogitsDataset, report_teacher_cache
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.fingerprint import fingerprint_model

FORMAT = 1  # raise when the files or what they mean changes


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
    """The sequences `begin` to `end` of `data` with what the teacher says of them.

    Args:
        store: key of the token store.
        top_k: how many of the teacher's most likely tokens to keep.
        chunk_size: tokens whose logits exist at once.

    Returns:
        The data, and facts: bytes a token, tokens that the teacher was asked for, and the seconds that it took.
    """
    began = time.monotonic()
    head, rows = LMHead(teacher), int(teacher.get_output_embeddings().weight.shape[0])
    signals = TeacherLogitsCache(cache_root() / "signals" / _key(teacher, data, store, top_k, autocast), rows, top_k)

    @torch.no_grad()
    def ask(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast():
            hidden = run_backbone(teacher, batch.to(teacher.device))
            found = [top_log_probs(head(part), signals.top_k) for part in hidden.flatten(0, 1).split(chunk_size)]
        return tuple(torch.cat(x).unflatten(0, batch.input_ids.shape) for x in zip(*found))  # type: ignore[return-value]

    asked = signals.fill(data, begin, end, ask)
    seconds = time.monotonic() - began
    report_teacher_cache(signals, (end - begin) * data.length, asked, seconds)
    facts = {"bytes_per_token": signals.bytes_per_token, "asked_tokens": asked, "seconds": seconds}
    return TeacherLogitsDataset(data, signals, begin, end), facts


def require_packed(data: SequenceDataset) -> PackedDataset:
    """The text itself, if its sequences can be named by a position for good."""
    if isinstance(data, PackedDataset):
        return data
    raise LimbeckError(
        "cache_teacher with a mixture or a stream",
        expected="one source that is tokenised first",
        hint="leave out cache_teacher, or data.streaming and data.sources",
    )


def top_log_probs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Index and log probability of the most likely tokens, in order: [n, V] -> [n, top_k] each."""
    logits = logits.float()
    values, index = logits.topk(top_k, dim=-1)
    return index, values - logits.logsumexp(-1, keepdim=True)


def _key(teacher: PreTrainedModel, data: PackedDataset, store: str, top_k: int, autocast: Callable) -> str:
    """What the signals depend on; the positions are in the names of the parts."""
    with autocast():
        mixed: bool | str = torch.is_autocast_enabled(teacher.device.type)
        if mixed and torch.get_autocast_dtype(teacher.device.type) != torch.bfloat16:
            mixed = str(torch.get_autocast_dtype(teacher.device.type))
    facts = {
        "format": FORMAT,
        "teacher": fingerprint_model(teacher),
        "tokens": store,
        "split": data.split.name,
        "length": data.length,
        "seed": data.seed if data.shuffle else None,
        "top": top_k,
        "mixed_precision": mixed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
