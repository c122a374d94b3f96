"""Hidden states of a fixed model on fixed text, kept in the cache by content: a teacher reads it once for all students.

    states = StoredStates({"model": fingerprint, "dtype": "float32"})
    hidden = states.read(batch, lambda: run_backbone(teacher, batch))       # [B, T, D]; from the disk the next time

Perplexity and divergences need the logits of every token, which are V / D times as large as the states before the head;
from these the head computes the same logits again, to the bit. What was not read for longest goes first.
Legend: B batch, T time, D model width, V vocabulary.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.console import console
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root, convert_write_errors, get_unique_sibling
from limbeck.core.version import __version__
from limbeck.data.packing import Batch

MAX_PASS_BYTES = 2**27  # states of one batch above this size are not kept: 8,192 tokens of a width of 4,096 in float32
MAX_KEPT_BYTES = 2**30  # of all that is kept


class StoredStates:
    """Hidden states of one model by batch.

    Args:
        identity: all that determines the states besides the tokens and this machine's libraries, as JSON values: the
            model's fingerprint, its dtype, the precision of the pass. None: nothing is kept.
        again: do not read what is kept, but replace it.
    """

    def __init__(self, identity: Mapping[str, Any] | None, again: bool = False):
        self.identity, self.again = identity, again

    def read(self, batch: Batch, run: Callable[[], Tensor]) -> Tensor:
        """Return the states [B, T, D] of a batch: those that are kept, or else what `run` returns."""
        path = self._get_path(batch)
        if path is None:
            return run()
        if not self.again:
            with suppress(OSError, SafetensorError, KeyError):  # not there, or not whole
                states = load_file(path)["states"].to(batch.input_ids.device)
                os.utime(path)
                return states
        states = run()
        if states.numel() * states.element_size() <= MAX_PASS_BYTES:
            try:
                _store(path, states)
            except LimbeckError as error:  # the states took long, and are right without a cache
                console.print(f"{error.found}: the teacher's states are not kept for the next time", markup=False)
        return states

    def _get_path(self, batch: Batch) -> Path | None:
        if self.identity is None:
            return None
        content = {
            **self.identity,
            "tokens": [_digest(batch.cpu_input_ids), _digest(batch.position_ids.cpu()), list(batch.input_ids.shape)],
            "device": batch.input_ids.device.type,
            "versions": [__version__, str(torch.__version__), transformers.__version__],
        }
        return cache_root() / "states" / f"{digest_facts(content, 32)}.safetensors"


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def _store(path: Path, states: Tensor) -> None:
    """Write the states, whole or not at all, and remove the oldest files where all together are too large."""
    temporary = get_unique_sibling(path)
    with convert_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"states": states.detach().cpu().contiguous()}, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    kept = 0
    with suppress(OSError):  # another process may have removed one meanwhile
        for file in sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True):
            kept += file.stat().st_size
            if kept > MAX_KEPT_BYTES and file != path:
                file.unlink()
