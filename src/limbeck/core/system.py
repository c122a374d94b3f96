"""Measure the machine: free and peak memory, load by other programs, its speed at a reference product.

get_free_memory(device)                                  # bytes, or None if the system does not tell
get_peak_memory()                                        # bytes, the peak of this process
measure_peak_memory(lambda: model(ids), device)          # bytes on top of what was in use before
describe_cpu_contention(threads=2)                       # a sentence if other programs need the cores
"""

import ctypes
import gc
import os
import shlex
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
    """Return the bytes that can be allocated without taking memory from other programs; on a GPU, its own memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _read_proc_bytes(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        return None
    try:  # a container may be allowed less than the machine has
        limit = int((GROUP / "memory.max").read_text(encoding="utf-8"))
        in_use = int((GROUP / "memory.current").read_text(encoding="utf-8"))
        return min(free, max(limit - in_use, 0))
    except (OSError, ValueError):  # no container, or no limit
        return free


def get_peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes, or None if the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def get_command_line() -> str:
    """Return the command line of this process, as one types it."""
    program = Path(sys.argv[0]).name
    if program == "ipykernel_launcher.py":  # its arguments say where this session's files are, and nothing else
        return "in a notebook"
    return shlex.join(["limbeck" if program in ("limbeck", "__main__.py") else program, *sys.argv[1:]])


def get_resident_memory() -> int | None:
    """Return the bytes that this process has in memory now; where the system does not tell, its peak."""
    return _read_proc_bytes(PROCESS / "status", "VmRSS") or get_peak_memory()


def get_device_memory() -> int:
    """Return the bytes that this process holds on its GPU, without waiting for it; 0 if it uses none."""
    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0


def measure_peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Run `work` and return its peak memory in bytes, on top of what was in use before.

    On a CPU that is resident memory, on Linux alone: None on other systems.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _release_free_memory()
    try:
        # "5" resets the high-water mark to what is resident now
        (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
        resident = _read_proc_bytes(PROCESS / "status", "VmRSS")
    except OSError:
        resident = None
    work()
    peak = _read_proc_bytes(PROCESS / "status", "VmHWM") if resident is not None else None
    return max(peak - resident, 0) if peak is not None and resident is not None else None


def _release_free_memory() -> None:
    """Return freed memory to the system; what the allocator holds on to would hide later allocations."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # an allocator other than glibc's
        return


def _read_proc_bytes(file: Path, name: str) -> int | None:
    """Read bytes from a line such as "VmRSS:  2000 kB"."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(values[0]) if values else None


def describe_cpu_contention(threads: int) -> str | None:
    """Return a warning if the load of other programs leaves no core for some of our `threads`, else None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    # half a core of tolerance: the system itself is never quite idle
    if load + threads <= cores + 0.5:
        return None
    return f"The machine is busy (load {load:.1f} on {cores} cores); timings may be unreliable."


def time_reference_matmul(device: torch.device) -> float:
    """Time a fixed matrix product, in milliseconds: if it changes between runs, the machine does, not the models."""
    x = torch.ones(512, 1024, device=device)
    w = torch.ones(1024, 2048, device=device)
    times = []
    for _ in range(15):
        synchronize_device(device)
        start = time.perf_counter()
        x @ w
        synchronize_device(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def synchronize_device(device: torch.device) -> None:
    """Wait until an accelerator has finished all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero on a CPU inside this block.

    An untrained student has many probabilities too small to matter, and denormals slow products down tenfold.
    """
    before = not (torch.full((1,), 1e-40) * 1.0).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
