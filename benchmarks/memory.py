"""What a step of a stage takes in memory, each measurement in a process of its own.

    python benchmarks/memory.py depth         # stages 1 and 2 at 2, 8 and 30 layers: flat
    python benchmarks/memory.py rows          # stage 1 on all rows and on 64, at 512, 2,048 and 4,096 tokens
    python benchmarks/memory.py checkpoint    # stage 3 with and without checkpoint_activations
    python benchmarks/memory.py loss          # stage 3's loss alone against all logits at once, with its speed

The models have SmolLM2-135M's shape and random weights. "step" is the peak of resident memory over what was resident
before the step, gradients included in the latter. Linux only: the peak is set back before the step.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["depth", "rows", "checkpoint", "loss", "one"])
    parser.add_argument("--mixers", default="gated_deltanet,retnet")
    parser.add_argument("--lengths", default="512,2048,4096")
    parser.add_argument("--layers", default="2,8,30")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="of the loss alone")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch has it")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", default="{}")
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(_one(**json.loads(args.case))))
        return
    common = {"threads": args.threads, "steps": args.steps, "vocabulary": args.vocabulary}
    layers, first = [int(n) for n in args.layers.split(",")], args.mixers.split(",")[0]
    if args.what == "depth":
        shared = {**common, "length": args.length, "mixer": first}
        cases = [{"stage": stage, "layers": n, **shared} for stage in ("matrix", "hidden") for n in layers]
    elif args.what == "rows":
        cases = [
            {"stage": "matrix", "layers": 1, "length": int(n), "mixer": mixer, "rows": rows, **common}
            for mixer in args.mixers.split(",")
            for n in args.lengths.split(",")
            for rows in (None, args.rows)
        ]
    elif args.what == "checkpoint":
        shared = {**common, "length": args.length, "mixer": first, "layers": layers[-1]}
        cases = [{"stage": "logits", "checkpoint": again, **shared} for again in (False, True)]
    else:
        cases = [{"stage": "loss", "naive": naive, "length": args.tokens, **common} for naive in (True, False)]
    found = []
    for case in cases:
        seen = measured(case)
        found.append(seen)
        told = ", ".join(f"{name} {value}" for name, value in case.items() if name not in common)
        print(f"{told:70} step {seen['step_bytes'] / 1e6:8.1f} MB  {seen['seconds']:7.2f} s", flush=True)
    if args.what == "loss":
        naive, ours = found
        print(
            f"memory 1/{naive['step_bytes'] / max(ours['step_bytes'], 1):.1f} of all logits at once, "
            f"speed {naive['seconds'] / ours['seconds']:.2f} of it"
        )


def measured(case: dict) -> dict:
    """A case in a process of its own: step_bytes and the median of its seconds."""
    command = [sys.executable, str(Path(__file__)), "one", "--case", json.dumps(case)]
    # what is freed goes back at once; but where speed counts, blocks are used again as in a run
    environment = os.environ if case["stage"] == "loss" else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _one(stage: str, length: int, threads: int = 0, steps: int = 3, **case) -> dict:
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    step = _loss(length=length, **case) if stage == "loss" else _stage(stage, length, **case)
    # the first, smaller step makes what stays: gradients, threads, buffers of the libraries
    step(max(16, length // 8))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak back
    seconds, peak = [], 0
    for _ in range(steps):
        began = time.perf_counter()
        step(length)
        seconds.append(time.perf_counter() - began)
        peak = peak or resident("VmHWM")
    return {"step_bytes": peak - before, "seconds": sorted(seconds)[len(seconds) // 2]}


def resident(what: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at most."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(what))
    return 1024 * int(line.split()[1])


def _stage(stage, length, layers, mixer, vocabulary, rows=None, checkpoint=False):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import limbeck
    from limbeck.data.packing import Batch
    from limbeck.models import find_attention_sites
    from limbeck.models.hooks import DistillationPair
    from limbeck.training.alignment import HiddenStage, MatrixStage
    from limbeck.training.logit_distillation import LogitsStage
    from limbeck.training.losses import ObjectiveWeights

    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    config.max_position_embeddings = max(2048, length)
    teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
    student = limbeck.convert(teacher, mixer, share_weights=stage != "logits").requires_grad_(False)
    pair = DistillationPair(teacher, student, find_attention_sites(teacher), nullcontext)
    if stage == "logits":
        made = LogitsStage(pair, ObjectiveWeights(), checkpoint_activations=checkpoint)
    else:
        made = HiddenStage(pair) if stage == "hidden" else MatrixStage(pair, sampled_queries=rows)
    for parameter in made.parameters().values():
        parameter.requires_grad_(True)

    def step(tokens: int) -> None:
        ids = torch.randint(0, vocabulary, (1, tokens))
        batch = Batch(ids, torch.arange(tokens)[None], ids)
        made.backward(batch, made.count(batch))

    return step


def _loss(length, vocabulary, naive, width=576):
    import torch
    from torch.nn import functional as F

    from limbeck.training.chunked_losses import TeacherLogitsFromHidden, logit_losses
    from limbeck.training.losses import ObjectiveWeights

    ours, theirs = (torch.nn.Linear(width, vocabulary, bias=False) for _ in range(2))
    theirs.requires_grad_(False)

    def step(tokens: int) -> None:
        h, t = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
        targets = torch.randint(0, vocabulary, (1, tokens))
        if not naive:
            logit_losses(
                ours, h, TeacherLogitsFromHidden(theirs, t), targets, ObjectiveWeights(ce=0.5, kl=0.5), scale=1 / tokens
            )
            return
        s, q = ours(h)[0], theirs(t)[0]
        ce = F.cross_entropy(s, targets[0])
        kl = F.kl_div(s.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="batchmean")
        (0.5 * ce + 0.5 * kl).backward()

    return step


if __name__ == "__main__":
    main()
