"""Speed of the operators: through Limbeck's adapters, by flash-linear-attention's own functions, and in PyTorch.

Forward, and forward with backward, at a constant number of tokens. "of fla" is what remains of the speed of fla's own
function on the same tensors: the adapter's cost.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from gpu_sections.bench import Bench
from limbeck.ops import fla

TOKENS = 32768


def run(bench: Bench) -> None:
    adapters = [a for a in fla.KERNEL_ADAPTERS if a.form == "chunked"]
    lengths = [64] if bench.dry else [n for n in (2048, 8192, 32768) if n <= bench.options.longest]
    for length in lengths:
        for adapter in adapters:
            for backward in (False, True):
                label = {"operator": adapter.name, "T": length, "pass": "both" if backward else "forward"}
                bench.case(label, lambda a=adapter, n=length, b=backward: _row(bench, a, n, b))


def _row(bench: Bench, adapter: Any, length: int, backward: bool) -> dict[str, Any]:
    rows, heads, width = (1, 2, 16) if bench.dry else (TOKENS // length, 16, 64)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    size = {"batch": rows, "time": length, "heads": heads, "key": width, "value": width}
    call = fla.make_sample_call(adapter, **size, dtype=dtype, device=str(bench.device), seed=0)
    call = call.as_leaves() if backward else call
    row: dict[str, Any] = {"B": rows}
    declined = fla.unavailable_reason() or fla.unsupported_reason(call)
    if declined:
        row["told"] = f"declined: {declined}"
    else:
        row["ours_ms"] = _time(bench, call, lambda: fla.run_call(call, "fla")[0], backward)
        row["fla_ms"] = _time(bench, call, _theirs(adapter, call), backward)
        row["of_fla"] = f"{row['fla_ms'] / row['ours_ms']:.0%}"
    if length <= 2048:  # PyTorch's form is only a yardstick
        row["torch_ms"] = _time(bench, call, lambda: fla.run_call(call, "torch")[0], backward, repeats=3)
    return row


def _theirs(adapter: Any, call: Any) -> Callable[[], torch.Tensor]:
    """fla's own function on the same tensors."""
    module, _, name = adapter.kernel.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    given = {
        theirs: call.tensors[ours]
        for ours, theirs in adapter.argument_names.items()
        if call.tensors.get(ours) is not None
    }
    return lambda: function(**given, scale=1.0, **adapter.options)[0]


def _time(
    bench: Bench, call: Any, work: Callable[[], torch.Tensor], backward: bool, repeats: int | None = None
) -> float:
    leaves = [t for t in call.tensors.values() if t is not None and t.requires_grad]

    def both() -> None:
        o = work()
        torch.autograd.grad(o, leaves, torch.ones_like(o), allow_unused=True)

    with torch.set_grad_enabled(backward):
        return round(bench.milliseconds(both if backward else work, repeats), 3)
