"""Who this process is among all of them, and what is its own: rows of a step, a device.

    me = world()
    first, count = share(settings.batch_size)          # this process's rows of a step

The launcher says who is who by the environment (RANK, WORLD_SIZE, LOCAL_RANK); nothing is communicated here.
"""

import os
from dataclasses import dataclass

import torch

from limbeck.console import console, output
from limbeck.errors import LimbeckError

# where launchers say which process of how many this is, and which on its machine
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int  # on this machine

    @property
    def main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """Who this process is; alone it is process 0 of 1.

    Raises:
        LimbeckError: the launcher's variables are no numbers, or do not fit together.
    """
    names = next((names for names in LAUNCHERS if names[1] in os.environ), LAUNCHERS[0])
    given = [os.environ.get(name) for name in names]
    try:
        rank, size, local = (int(text or default) for text, default in zip(given, ("0", "1", "0")))
    except ValueError as error:
        raise LimbeckError(f"{', '.join(names)} in the environment: {error}", expected="numbers") from error
    if (size > 1 and given[0] is None) or not 0 <= rank < max(size, 1):
        raise LimbeckError(
            f"process {names[0]}={given[0]} of {names[1]}={size}",
            expected="a launcher that sets both, or none",
            hint="torchrun --nproc-per-node 2 -m limbeck distill ...",
        )
    return World(rank, size, local)


def share(rows: int) -> tuple[int, int]:
    """First row and number of rows of this process, of a step's `rows`: contiguous, and as even as can be."""
    me = world()
    first = rows * me.rank // me.size
    return first, rows * (me.rank + 1) // me.size - first


def local_device(name: str) -> torch.device:
    """The device of this process: "auto", "cpu" or "cuda", one GPU for each process of a machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise LimbeckError("no CUDA device here", expected="device: auto or cpu", hint="limbeck doctor")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    me = world()
    if me.size == 1:
        return torch.device("cuda")
    if me.local_rank >= torch.cuda.device_count():
        raise LimbeckError(
            f"process {me.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            expected="as many processes as GPUs",
            hint=f"torchrun --nproc-per-node {torch.cuda.device_count()} -m limbeck distill ...",
        )
    torch.cuda.set_device(me.local_rank)
    return torch.device("cuda", me.local_rank)


def one_voice() -> None:
    """Messages and progress bars come from process 0 alone."""
    console.quiet = output.quiet = not world().main
