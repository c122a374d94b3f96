"""How a run computes: autocast over float32 weights, TF32, the same bits again, and by which kernels.

    autocast = resolve_autocast("auto", device)
    with numerics_context(recipe), autocast():
        ...

States, decays, losses and optimiser state are float32 whatever is chosen here: the operators and the losses see to it.
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
    """What a pass runs under: nothing for fp32, else autocast.

    Args:
        precision: "fp32", "bf16", "fp16", or "auto" (on a GPU bf16 where it has that, else fp16; on a CPU fp32).

    Raises:
        LimbeckError: the device has no bf16.
    """
    modern = device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if modern else "fp16"
    if precision == "bf16" and not modern:
        raise LimbeckError(
            f"precision is bf16, which {torch.cuda.get_device_name(device)} has not",
            expected="a GPU of compute capability 8.0 or more, or another precision",
            hint="--set precision=fp16",
        )
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=DTYPES[precision])


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raises LimbeckError where the device has not what the recipe asks for."""
    resolve_autocast(recipe.precision, device)
    if recipe.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE):
        name = "a CPU" if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise LimbeckError(
            f"tf32 is asked for, and {name} has not got it",
            expected="an NVIDIA GPU of compute capability 8.0 or more",
            hint="--set tf32=false",
        )


@contextmanager
def numerics_context(recipe: Recipe) -> Iterator[None]:
    """TF32, determinism and the operators' backend as the recipe has them, for what is inside; afterwards as before.

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
        which = str(error).strip().partition(", but you set")[0].partition(". ")[0]
        raise LimbeckError(
            f"deterministic is asked for, and this device cannot: {which}",
            expected="operations that give the same bits each time",
            hint="--set deterministic=false, another mixer, or device=cpu",
        ) from error
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
