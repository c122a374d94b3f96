"""How fast stage 3 distils beside plain language-model training of the same student.

    python benchmarks/distillation.py                       # SmolLM2-135M, Gated DeltaNet, T = 512, batch 1
    python benchmarks/distillation.py --steps 2 --length 128 --threads 1

Tokens/s of whole training steps, optimiser included, of the same parameters:

    plain      student(input_ids, labels).loss.backward(), as transformers trains
    ce         stage 3 with the cross-entropy alone
    kd         stage 3 with the teacher's pass: KL on all of its logits
    pass       the teacher's pass alone: its body, and its head on every token
    top-k      stage 3 with the teacher's 64 most likely tokens read from disk (the pass that wrote them is told apart)

beside the floor that the floating-point operations set at the speed of a matrix product, measured in the same run. The
steps take turns, so that other work on the machine meets all alike. The loss alone is in benchmarks/memory.py.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import limbeck
from limbeck.data.packing import Batch, PackedDataset
from limbeck.data.teacher_logits import TeacherLogitsCache, TeacherLogitsDataset
from limbeck.data.token_store import build_token_store
from limbeck.models import find_attention_sites, loading
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.plan import measure_matmul_flops
from limbeck.training.teacher_cache import top_log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--train", default="body", choices=["attention", "body", "all"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    store = build_token_store("embedded", tokenizer, length=args.length, max_tokens=200_000, held_out=0.05)
    data, sites = PackedDataset(store.train, args.length), find_attention_sites(teacher)
    student = limbeck.convert(teacher, args.mixer).requires_grad_(False)
    pair = DistillationPair(teacher, student, sites, nullcontext)
    stages = {
        "ce": Alone(pair, ObjectiveWeights(ce=1, kl=0), train=args.train),
        "kd": LogitsStage(pair, ObjectiveWeights(), train=args.train),
        "top-k": LogitsStage(pair, ObjectiveWeights(kl=0, top_kl=1, top_k=args.top), train=args.train),
    }
    parameters = list(stages["kd"].parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    teacher_head, tokens = LMHead(teacher), args.batch * args.length

    def ask(batch: Batch):
        hidden = run_backbone(teacher, batch).flatten(0, 1)
        found = [top_log_probs(teacher_head(part), args.top) for part in hidden.split(128)]
        return tuple(torch.cat(x).unflatten(0, batch.input_ids.shape) for x in zip(*found))

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = int(teacher.get_output_embeddings().weight.shape[0])
        signals = TeacherLogitsCache(Path(folder) / "signals", vocabulary, args.top)
        end = (args.steps + 1) * args.batch
        began = time.perf_counter()
        with torch.no_grad():
            signals.fill(data, 0, end, ask)
        filled = end * args.length / (time.perf_counter() - began)
        read = TeacherLogitsDataset(data, signals, 0, end)

        def plain(at: int) -> None:
            batch = data.batch(at, args.batch)
            labels = batch.input_ids
            student(batch.input_ids, position_ids=batch.position_ids, labels=labels, use_cache=False).loss.backward()

        def staged(name: str):
            def run(at: int) -> None:
                batch = (read if name == "top-k" else data).batch(at, args.batch)
                stages[name].backward(batch, stages[name].count(batch))

            return run

        @torch.no_grad()
        def teacher_pass(at: int) -> None:
            for part in run_backbone(teacher, data.batch(at, args.batch)).flatten(0, 1).split(128):
                teacher_head(part)

        work = {"plain": plain, "ce": staged("ce"), "kd": staged("kd"), "pass": teacher_pass, "top-k": staged("top-k")}
        rates: dict[str, list[float]] = {name: [] for name in work}
        for step in range(args.steps + 1):
            for name, run in work.items():
                began = time.perf_counter()
                run(step * args.batch)
                if name != "pass":
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                rates[name].append(tokens / (time.perf_counter() - began))
    median = {name: statistics.median(found[1:]) for name, found in rates.items()}  # the first one warms up

    head = teacher.get_output_embeddings().weight.numel()
    all_of = sum(p.numel() for p in student.parameters())
    body = all_of - (0 if student.get_input_embeddings().weight is student.get_output_embeddings().weight else head)
    learn = 4 * body + 2 * sum(p.numel() for p in parameters)
    forward = 2 * sum(p.numel() for p in teacher.parameters())
    floors = {"plain": learn, "ce": learn, "kd": learn + forward, "pass": forward, "top-k": learn}
    speed = measure_matmul_flops(torch.device("cpu"), sites[0].shape.hidden)
    print(f"{args.mixer}, batch {args.batch} x {args.length}, {args.threads} threads, {args.train} trains, ")
    print(f"matrix product {speed / 1e9:.0f} GFLOP/s")
    print(f"{'':8} {'tokens/s':>9} {'min':>6} {'max':>6} {'of plain':>9} {'floor':>7} {'of floor':>9}")
    for name, rate in median.items():
        low, high, floor = min(rates[name][1:]), max(rates[name][1:]), speed / floors[name]
        share = rate / median["plain"]
        print(f"{name:8} {rate:9.1f} {low:6.1f} {high:6.1f} {share:9.0%} {floor:7.0f} {rate / floor:9.0%}")
    without = 1 / (1 / median["kd"] - 1 / median["pass"])
    print(f"kd, the teacher's pass excluded: {without:.1f} tokens/s, {without / median['plain']:.0%} of plain")
    print(
        f"kd, the teacher's pass included: {median['kd']:.1f} tokens/s, {median['kd'] / median['plain']:.0%} of plain"
    )
    print(f"by operations alone, included: {floors['plain'] / floors['kd']:.0%}")
    print(
        f"top-k: {signals.bytes_per_token} bytes a token, written at {filled:.0f} tokens/s; "
        f"{median['top-k'] / median['kd']:.2f} times as fast as kd"
    )


class Alone(LogitsStage):
    """Stage 3 with no teacher at all: its signal is one token of no weight."""

    def _signal(self, batch: Batch):
        from limbeck.training.chunked_losses import TeacherLogitsFromCache

        nothing = torch.zeros(*batch.input_ids.shape, 1)
        return TeacherLogitsFromCache(nothing.long(), nothing)


if __name__ == "__main__":
    main()
