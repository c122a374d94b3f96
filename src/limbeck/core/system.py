"""The machine: how much memory is free, the most that something takes, whether others are at work while it is timed.

get_free_memory(device)                                   # bytes, or None where the system does not tell
get_peak_memory()                                         # bytes that this process has had at most
measure_peak_memory(lambda: model(ids), device)                # bytes at most on top of what was there before
describe_cpu_contention(threads=2)                                    # a sentence where other programs are at work
"""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PROCESS = Path("/proc/self")
GROUP = Path("/sys/fs/cgroup")


def get_free_memory(device: torch.device) -> int | None:
    """Bytes that can be had without another program losing any; on an accelerator those of its own memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        return None
    try:  # a container may have less than the machine
        limit = int((GROUP / "memory.max").read_text(encoding="utf-8")) - int(
            (GROUP / "memory.current").read_text(encoding="utf-8")
        )
        return min(free, max(limit, 0))
    except (OSError, ValueError):  # no container, or no limit
        return free


def get_peak_memory() -> int | None:
    """Most resident memory that this process has had, in bytes; None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that `work` has at one time, on top of what the process had before; None where nobody counts.

    On a CPU that is resident memory, on Linux: the system's high-water mark is set back before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    try:
        (PROCESS / "clear_refs").write_text(
            "5", encoding="utf-8"
        )  # "5" sets the high-water mark back to what is resident now
        resident = _kilobytes(PROCESS / "status", "VmRSS")
    except OSError:
        resident = None
    work()
    peak = _kilobytes(PROCESS / "status", "VmHWM") if resident is not None else None
    return max(peak - resident, 0) if peak is not None and resident is not None else None


def describe_cpu_contention(threads: int) -> str | None:
    """A sentence where the load of other programs leaves no core for some of our threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load + threads <= cores + 0.5:
        return None
    return f"other programs are at work: a load of {load:.1f} on {cores} cores before {threads} threads of ours"


def time_reference_matmul(device: torch.device) -> float:
    """Milliseconds of a fixed matrix product now: what changes in it is the machine, not the models."""
    x = torch.ones(512, 1024, device=device)
    w = torch.ones(1024, 2048, device=device)
    times = []
    for _ in range(15):
        synchronize_device(device)
        began = time.perf_counter()
        x @ w
        synchronize_device(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def synchronize_device(device: torch.device) -> None:
    """Until an accelerator has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back() -> None:
    """Hand freed memory back to the system, where the allocator can: it would hide what is taken next."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another allocator than glibc's
        return


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes from a line such as "VmRSS:  2000 kB"."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Take denormal numbers for zero on a CPU, for what is inside; afterwards as before.

    A student that is still far off has many probabilities too small to matter, which slow products down tenfold.
    """
    before = not (torch.full((1,), 1e-40) * 1.0).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
