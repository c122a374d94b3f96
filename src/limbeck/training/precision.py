"""Set the numerics of a run: autocast over float32 weights, TF32, determinism, kernel backend.

    autocast = resolve_autocast("auto", device)
    with numerics_context(recipe), autocast():
        ...

States, decays, losses and optimizer state are float32 in every setting; operators and losses take care of that.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.system import flush_denormals
from limbeck.ops.fla import use_backend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMPERE = (8, 0)  # the first compute capability with bf16 and TF32


def resolve_autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    """Return the context of a forward pass: autocast, or none for fp32.

    Args:
        precision: "fp32", "bf16", "fp16", or "auto" (bf16 on a GPU that supports it, else fp16; fp32 on a CPU).

    Raises:
        LimbeckError: the device does not support bf16.
    """
    modern = device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if modern else "fp16"
    if precision == "bf16" and not modern:
        raise LimbeckError(
            f"{torch.cuda.get_device_name(device)} does not support bf16",
            expected="a GPU of compute capability 8.0 or higher, or another precision",
            hint="--set precision=fp16",
        )
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=DTYPES[precision])


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raise LimbeckError if the device does not support a recipe's precision."""
    resolve_autocast(recipe.precision, device)
    if recipe.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE):
        name = "a CPU" if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise LimbeckError(
            f"tf32=true requires an Ampere or newer GPU; this device is {name}",
            expected="an NVIDIA GPU of compute capability 8.0 or higher",
            hint="--set tf32=false",
        )


@contextmanager
def numerics_context(recipe: Recipe) -> Iterator[None]:
    """Apply a recipe's TF32, determinism and backend inside this block, and restore the previous settings.

    Raises:
        LimbeckError: with `deterministic`, an operation that has no deterministic implementation on this device.
    """
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_float32_matmul_precision("high" if recipe.tf32 else before[0])
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a GPU
            torch.use_deterministic_algorithms(True)
        with use_backend(recipe.backend), flush_denormals():
            yield
    except RuntimeError as error:
        if not recipe.deterministic or "deterministic" not in str(error):
            raise
        operation = str(error).strip().partition(", but you set")[0].partition(". ")[0]
        raise LimbeckError(
            f"deterministic=true is not possible on this device: {operation}",
            expected="operations with a deterministic implementation",
            hint="--set deterministic=false, another mixer, or device=cpu",
        ) from error
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
