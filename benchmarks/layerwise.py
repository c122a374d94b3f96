"""How fast the layer-wise stages run on a real teacher, and how far from the floor.

    python benchmarks/layerwise.py                      # embedded teacher, T = 512, Gated DeltaNet in all layers
    python benchmarks/layerwise.py --mixer gla --batch 1 --target block

Prints tokens/s of the teacher's body alone, of calibration and of stages 1 and 2, the floor that the floating-point
operations set at the speed of a matrix product measured in the same run, and the peak of resident memory.
"""

import argparse
import contextlib
import statistics
import time

import torch

import limbeck
from limbeck.core.system import get_peak_memory
from limbeck.data.packing import Batch, PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.models import find_attention_sites, loading
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.calibration import NormalEquations
from limbeck.training.plan import measure_matmul_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--target", default="attention", choices=["attention", "block"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stages", default="body,calibrate,hidden,matrix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    store = build_token_store("embedded", tokenizer, length=args.length, max_tokens=200_000, held_out=0.05)
    data = PackedDataset(store.train, args.length)
    sites = find_attention_sites(teacher)
    student = limbeck.convert(teacher, args.mixer, share_weights=True).requires_grad_(False)
    pair = DistillationPair(teacher, student, sites, contextlib.nullcontext)

    head = teacher.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in teacher.parameters()) - head
    attention = sum(p.numel() for s in sites for p in student.get_submodule(s.module).parameters())
    block = sum(p.numel() for s in sites for p in student.get_submodule(s.block).parameters())
    through = attention if args.target == "attention" else block
    floors = {
        "body": 2 * body,
        "calibrate": 2 * body + 2 * attention,
        "hidden": 2 * body + 4 * through + 2 * attention,
        "matrix": 2 * body + 6 * attention,
    }
    work = {
        "body": lambda batch: run_backbone(teacher, batch),
        "calibrate": NormalEquations(pair).add,
        "hidden": _trained(HiddenStage(pair, target=args.target)),
        "matrix": _trained(MatrixStage(pair), micro_batch=1),  # as the recipes have it
    }
    speed = measure_matmul_flops(torch.device("cpu"), sites[0].shape.hidden)
    tokens = args.batch * args.length
    print(f"{args.mixer} in {len(sites)} layers, batch {args.batch} x {args.length}, {args.threads} threads, ")
    print(f"matrix product {speed / 1e9:.0f} GFLOP/s")
    print(f"{'stage':10} {'tokens/s':>9} {'min':>6} {'max':>6} {'floor':>7} {'of floor':>9}")
    for name in args.stages.split(","):
        rates = []
        for step in range(args.steps + 1):
            batch = data.batch(step * args.batch, args.batch)
            began = time.perf_counter()
            with torch.set_grad_enabled(name in ("hidden", "matrix")):
                work[name](batch)
            rates.append(tokens / (time.perf_counter() - began))
        rates = rates[1:]  # the first one warms up
        floor = speed / floors[name]
        median = statistics.median(rates)
        print(f"{name:10} {median:9.0f} {min(rates):6.0f} {max(rates):6.0f} {floor:7.0f} {median / floor:9.0%}")
    print(f"peak resident memory {(get_peak_memory() or 0) / 1e9:.2f} GB")


def _trained(stage: HiddenStage | MatrixStage, micro_batch: int | None = None):
    """A whole training step of a stage, optimiser included."""
    parameters = list(stage.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(batch) -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        counts = stage.count(batch)
        size = micro_batch or len(batch.input_ids)
        tensors = (batch.input_ids, batch.position_ids, batch.targets)
        for parts in zip(*(x.split(size) for x in tensors)):
            stage.backward(Batch(*parts), counts)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
