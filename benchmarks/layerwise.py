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
from limbeck import assets
from limbeck.data.packing import Batch, Packed
from limbeck.data.shards import prepare
from limbeck.machine import peak_memory
from limbeck.model import attention_sites
from limbeck.model.body import run_body
from limbeck.plan import matmul_speed
from limbeck.stages.calibrate import NormalEquations
from limbeck.stages.layerwise import Hidden, Matrix
from limbeck.stages.teacher import Pair, load_teacher


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

    teacher, tokenizer = load_teacher(assets.resolve_teacher(args.teacher), torch.device("cpu"))
    store = prepare("embedded", tokenizer, length=args.length, max_tokens=200_000, held_out=0.05)
    data = Packed(store.train, args.length)
    sites = attention_sites(teacher)
    student = limbeck.convert(teacher, args.mixer, share=True).requires_grad_(False)
    pair = Pair(teacher, student, sites, contextlib.nullcontext)

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
        "body": lambda batch: run_body(teacher, batch),
        "calibrate": NormalEquations(pair).add,
        "hidden": _trained(Hidden(pair, target=args.target)),
        "matrix": _trained(Matrix(pair), micro_batch=1),  # as the recipes have it
    }
    speed = matmul_speed(torch.device("cpu"), sites[0].shape.hidden)
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
    print(f"peak resident memory {(peak_memory() or 0) / 1e9:.2f} GB")


def _trained(stage: Hidden | Matrix, micro_batch: int | None = None):
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
