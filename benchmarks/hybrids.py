"""Finished runs side by side: perplexity, and what a passage costs that stood in the context before.

    limbeck select --num-softmax-layers 7 --by kl --out softmax_layers.json
    limbeck distill --softmax-layers softmax_layers.json --out runs/kl
    limbeck distill --softmax-layers "uniform 7" --out runs/uniform
    python benchmarks/hybrids.py runs/kl runs/uniform

Perplexity and agreement are the runs' own (eval.json). The second column of losses is measured here: held-out text as
A B A, loss on the second A, where a model that can look back pays nearly nothing.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from limbeck.core.recipe import Recipe
from limbeck.data.packing import PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.models import format_ranges, loading
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.training.chunked_losses import TeacherLogitsFromHidden, logit_losses
from limbeck.training.layer_selection import make_repeated_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sequences", type=int, default=8, help="of held-out text, for the repeated passages")
    args = parser.parse_args()
    recipe = Recipe.load(args.runs[0] / "recipe.yaml", stored=True)
    data = recipe.data
    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(recipe.teacher), torch.device("cpu"))
    limits = {"max_tokens": data.max_tokens, "held_out": data.held_out, "text_field": data.text_field}
    store = build_token_store(data.source, tokenizer, length=data.seq_len, **limits)
    exam = make_repeated_batch(PackedDataset(store.held_out, data.seq_len, shuffle=False).batch(0, args.sequences))
    names = f"{'perplexity':>10} {'KL':>7} {'same top':>9} {'loss on the repeat':>19} {'bytes a token':>14}"
    print(f"{'softmax layers':32} {names}")
    print(f"{'all: the teacher':32} {'':10} {'':7} {'':9} {_loss(teacher, exam):19.3f}")
    for run in args.runs:
        result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        student = AutoModelForCausalLM.from_pretrained(run / "student").eval()
        held, kept = result["held_out"], _kept(student)
        growth = result["memory"]["student_bytes_per_token"]
        print(
            f"{format_ranges(kept) or 'none':32} {held['student_perplexity']:10.2f} {held['kl']:7.3f} "
            f"{100 * held['top1_agreement']:7.1f} % {_loss(student, exam):19.3f} {growth:14,.0f}"
        )


def _kept(student) -> list[int]:
    converted = {entry["layer"] for entry in student.config.limbeck["layers"]}
    return [i for i in range(student.config.get_text_config().num_hidden_layers) if i not in converted]


@torch.no_grad()
def _loss(model, exam) -> float:
    head = LMHead(model)
    hidden = run_backbone(model, exam)
    sums, _ = logit_losses(head, hidden, TeacherLogitsFromHidden(head, hidden), exam.targets)
    return float(sums["ce"] / sums["count"])


if __name__ == "__main__":
    main()
