"""The next step's batches, made while the step before it runs.

    ahead = BatchPrefetcher(make, torch.device("cuda"))         # make(step) -> batches on the CPU
    ahead.get_batches(0)                                     # batches on the device; step 1's are under way

A thread reads and packs the tokens and puts them into pinned memory, from which a GPU copies without anybody waiting.
Batches are a function of the step alone, so a step that comes in another order is simply made when it is asked for. On
a CPU nothing is made ahead: its cores are busy with the step.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from limbeck.data.packing import Batch

_one_reader = threading.Lock()  # students that learn together read one text


class BatchPrefetcher:
    """See the module's docstring.

    Args:
        make: the batches of a step, on the CPU.
        device: where they go.
        enabled: make batches ahead; None: where the device is not a CPU.
    """

    def __init__(self, make: Callable[[int], list[Batch]], device: torch.device, enabled: bool | None = None):
        self.make, self.device = make, device
        self.enabled = device.type != "cpu" if enabled is None else enabled
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if self.enabled else None
        self.step = -1  # of the batches that are coming
        self.coming: Future[list[Batch]] | None = None

    def get_batches(self, step: int, last: bool = False) -> list[Batch]:
        """The batches of a step on the device; unless it is the last one, the next step's are begun."""
        if self.pool is None:
            return [batch.to(self.device) for batch in self._made(step)]
        here = self.coming if self.coming is not None and self.step == step else self.pool.submit(self._made, step)
        self.coming = None
        batches = [batch.to(self.device) for batch in here.result()]
        if not last:
            self.step, self.coming = step + 1, self.pool.submit(self._made, step + 1)
        return batches

    def close(self) -> None:
        """End the thread."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _made(self, step: int) -> list[Batch]:
        with _one_reader:
            batches = self.make(step)
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
