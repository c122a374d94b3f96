"""What calibration alone makes of a real teacher: mixers and their starts side by side.

    python benchmarks/calibration.py                                         # every mixer with its defaults
    python benchmarks/calibration.py gated_deltanet gated_deltanet:write=0.5 gated_deltanet:rope=true

No gradient step is taken: the output projections of all layers are solved on the same tokens, for each ridge, and the
student is measured on held-out text. The ridge that is best there is shown (a comparison of starts, not a result).
"""

import argparse
import contextlib
import time

import torch

import limbeck
from limbeck import mixers
from limbeck.core.config import parse_value
from limbeck.data.packing import PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.models import find_attention_sites, loading
from limbeck.models.hooks import DistillationPair
from limbeck.training.calibration import NormalEquations
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    linear = [name for name in mixers.list_mixers() if name != "softmax"]
    parser.add_argument("students", nargs="*", default=linear, help="mixer or mixer:option=value,option=value")
    parser.add_argument("--preset", default="default", help="default, published or controlled")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ridges", default="1e-4,1e-2,1")
    args = parser.parse_args()

    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    store = build_token_store("embedded", tokenizer, length=args.length, max_tokens=1_000_000, held_out=0.05)
    data, held_out = PackedDataset(store.train, args.length), PackedDataset(store.held_out, args.length, shuffle=False)
    judged = held_out.batch(0, 4)
    sites = find_attention_sites(teacher)
    print(f"{'student':44} {'copied':>9} {'solved':>9} {'ridge':>7} {'unexplained':>12} {'seconds':>8}")
    for spec in args.students:
        name, _, text = spec.partition(":")
        pairs = [part.split("=") for part in text.split(",") if part]
        options = {key: parse_value(value) for key, value in pairs}
        student = limbeck.convert(
            teacher, name, options=options, preset=args.preset, share_weights=True
        ).requires_grad_(False)
        judge = LogitsStage(DistillationPair(teacher, student, sites, contextlib.nullcontext), ObjectiveWeights())
        before = judge.evaluate(judged)
        began = time.monotonic()
        fits = NormalEquations(DistillationPair(teacher, student, sites, contextlib.nullcontext))
        for at in range(0, args.tokens // args.length, 4):
            fits.add(data.batch(at, 4))
        seconds = time.monotonic() - began
        tried = []
        for ridge in map(float, args.ridges.split(",")):
            unexplained = fits.solve(ridge)
            tried.append((float(judge.evaluate(judged)["ce"].exp()), ridge, unexplained))
        best, ridge, unexplained = min(tried)
        copied = float(before["ce"].exp())
        print(f"{spec:44} {copied:9.4g} {best:9.4g} {ridge:7.0e} {unexplained:12.3f} {seconds:8.0f}", flush=True)
    print(f"teacher {float(before['teacher_ce'].exp()):.4g}, perplexity on {judged.n_targets:,} held-out tokens")


if __name__ == "__main__":
    main()
