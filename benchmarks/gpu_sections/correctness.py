"""Are the kernels right on this GPU? Outputs and gradients against PyTorch in float32, with bounds.

Each adapter of `limbeck.ops.fla`, attention by documents, and a whole step of stage 3 by the fast route against the
plain one.
"""

from contextlib import nullcontext
from typing import Any

import torch

from gpu_sections.bench import Bench
from gpu_sections.steps import Alone
from limbeck.data.packing import DocumentBoundaries
from limbeck.models import find_attention_sites
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.compilation import compile_blocks
from limbeck.models.hooks import DistillationPair
from limbeck.models.packed import force_attention_masks
from limbeck.models.varlen import probe_flash_varlen, supports_flash_varlen, varlen_attention
from limbeck.ops import fla
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.stage_protocol import accumulate_gradients

BOUND = 2e-2  # relative Frobenius error of attention in bf16 against float32
OF_A_STEP = 1e-1  # the same of all gradients of a model, through all of its layers


def run(bench: Bench) -> None:
    _adapters(bench)
    bench.case({"what": "attention by documents", "dtype": "bfloat16"}, lambda: _documents(bench))
    for mixer in bench.mixers:
        bench.case({"what": f"stage 3, CE, {mixer}", "dtype": "autocast"}, lambda mixer=mixer: _step(bench, mixer))


def _adapters(bench: Bench) -> None:
    reason = fla.unavailable_reason()
    if reason:
        bench.notes.append(f"adapters are tried, and decline: {reason}")
    sizes = [(2, 16)] if bench.dry else [(16, 64), (8, 128)]
    lengths = [32] if bench.dry else [256, 1000]
    for adapter in fla.KERNEL_ADAPTERS:
        step = adapter.form == "recurrent"
        for heads, width in sizes:
            for time in [1] if step else lengths:
                for more in ({"state": True},) if step else ({}, {"state": True}, {"documents": 3}):
                    for dtype in (torch.bfloat16, torch.float32):
                        label = {"what": adapter.name, "dtype": str(dtype).removeprefix("torch.")}
                        label |= {"T": time, "H": heads, "K": width, **more}
                        size = {"batch": 1, "time": time, "heads": heads, "key": width, "value": width}
                        bench.case(label, lambda a=adapter, s=size, d=dtype, m=more: _check(bench, a, s, d, m))


def _check(bench: Bench, adapter: Any, size: dict[str, int], dtype: torch.dtype, more: dict[str, Any]) -> dict:
    call = fla.make_sample_call(adapter, **size, dtype=dtype, device=str(bench.device), seed=0, **more)
    declined = fla.unavailable_reason() or fla.unsupported_reason(call)
    if declined:
        return {"told": f"declined: {declined}"}
    verdict = fla.verify_call(call)
    worst = max(verdict.errors, key=lambda n: verdict.errors[n] / verdict.bounds[n], default=None)
    row: dict[str, Any] = {"ok": verdict.ok}
    if worst is not None:
        row |= {"worst": worst, "error": f"{verdict.errors[worst]:.1e}", "bound": f"{verdict.bounds[worst]:.1e}"}
    return row if verdict.ok else {**row, "told": verdict.reason}


def _documents(bench: Bench) -> dict[str, Any]:
    torch.manual_seed(0)
    length = 32 if bench.dry else 1024
    half = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(2, h, length, 64, device=bench.device, dtype=half) for h in (6, 2, 2))
    probe_flash_varlen(q.device)
    if not supports_flash_varlen(q, v):
        return {"told": "declined: FlashAttention over documents of varying length needs CUDA and half precision"}
    positions = (torch.arange(length) % 300).repeat(2, 1)
    documents = DocumentBoundaries.from_position_ids(positions).to(bench.device)
    assert documents.segments is not None
    assert documents.cu_seqlens is not None
    same = documents.segments[:, None, :, None] == documents.segments[:, None, None, :]
    upstream = torch.randn(2, length, 6, 64, device=bench.device)
    found = []
    for wide in (False, True):
        given = [x.detach().float() if wide else x.detach() for x in (q, k, v)]
        leaves = [x.requires_grad_(True) for x in given]
        if wide:
            y = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=same.tril(), enable_gqa=True)
            y = y.transpose(1, 2)
        else:
            y = varlen_attention(*leaves, documents.cu_seqlens, None)
        y.backward(upstream.to(y.dtype))
        found.append([y, *(x.grad for x in leaves)])
    return _compared(dict(zip(("o", "dq", "dk", "dv"), zip(*found))), BOUND)


def _step(bench: Bench, mixer: str) -> dict[str, Any]:
    """Gradients of a step with kernels, autocast, compiled blocks and no mask, against float32 PyTorch with masks."""
    length = 32 if bench.dry else 1024
    shape = bench.shapes[0]
    teacher = bench.teacher(shape, length)
    batch = bench.batch(teacher, 2, length, document=length // 2 - 3)
    found = []
    for fast in (True, False):
        student = bench.student(teacher, mixer)
        force_attention_masks(student, not fast)
        autocast = bench.autocast() if fast else nullcontext
        pair = DistillationPair(teacher, student, find_attention_sites(teacher), autocast)
        stage = Alone(pair, ObjectiveWeights(ce=1.0, kl=0.0), compiled=False)
        blocks = [site.block for site in stage.sites] if fast and bench.device.type == "cuda" else []
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)
        supports_packed_positions(student)
        with fla.use_backend("auto" if fast else "torch"), compile_blocks(student, blocks):
            accumulate_gradients(stage, [batch.to(bench.device)])
        found.append({name: p.grad for name, p in stage.parameters().items() if p.grad is not None})
    fast_flat, plain_flat = (torch.cat([g.flatten().float() for g in grads.values()]) for grads in found)
    return _compared({"all gradients": (fast_flat, plain_flat)}, OF_A_STEP)


def _compared(pairs: dict[str, tuple], bound: float) -> dict[str, Any]:
    errors = {
        n: float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)) for n, (a, b) in pairs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return {"ok": errors[worst] < bound, "worst": worst, "error": f"{errors[worst]:.1e}", "bound": f"{bound:.0e}"}
