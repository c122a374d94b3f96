"""How well a small teacher and students of it write and remember.

    python benchmarks/small_teacher.py small runs/laptop-gated_deltanet runs/laptop-retnet     # a minute each

Perplexity is on the held-out part of the embedded text, beside that of bigrams counted on the training part (Witten and
Bell's smoothing). Recall is the share of words that are the likeliest next token where the text alone tells them:
values of N pairs, each asked once, and the second half of a list of 16 words that comes again after so many tokens.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck  # noqa: F401  registers students
from limbeck.core.console import output, progress
from limbeck.data.offline.embedded import load_training_texts
from limbeck.data.offline.recall import REPEAT_MARKER, find_common_words
from limbeck.data.packing import IGNORE_INDEX, PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.models.generation import generate_continuation
from limbeck.models.loading import resolve_teacher
from limbeck.training.pretraining import NextTokenStage

LENGTH = 512
PAIRS = (4, 16, 64, 128)
DISTANCES = (0, 128, 384, 1024, 1792)
LIST = 16  # words


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "models", nargs="+", help="'small', 'tiny', folders, run directories; the first one is the teacher"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--sequences", type=int, default=8, help="recall sequences of each kind")
    parser.add_argument("--out", type=Path, help="keep the numbers there as JSON")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    folders = {name: _folder(name) for name in args.models}
    tokenizer = AutoTokenizer.from_pretrained(folders[args.models[0]])
    store = build_token_store("embedded:quick", tokenizer, length=LENGTH)
    held_out = PackedDataset(store.held_out, LENGTH, shuffle=False)
    batches = [held_out.batch(at, 1) for at in range(min(held_out.n_sequences, args.tokens // LENGTH))]
    tasks = recall_tasks(tokenizer, args.sequences)
    found = {"bigram": {"perplexity": bigram_perplexity(store.train, batches, len(tokenizer))}}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[name] = measure(name, model, batches, tasks)
        found[name]["sample"] = generate_continuation(model, tokenizer, "The history of science is", 48)
    for name, values in found.items():
        output.print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "sample"), markup=False)
        output.print(f"  {values.get('sample', '')!r}", markup=False)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(name: str, model, batches, tasks) -> dict:
    """Perplexity on the batches and accuracy in each task."""
    stage, total, count = NextTokenStage(model), 0.0, 0
    values = {}
    with progress(name, len(batches) + len(tasks), "parts") as advance:
        for batch in batches:
            total, count = total + float(stage.evaluate(batch)["loss"]) * batch.n_targets, count + batch.n_targets
            advance(1)
        values["perplexity"] = math.exp(total / count)
        for task, sequences in tasks.items():
            right = asked = 0
            for ids, places in sequences:
                best = model(input_ids=ids[None], use_cache=False).logits[0, places - 1].argmax(-1)
                right, asked = right + int((best == ids[places]).sum()), asked + len(places)
            values[task] = right / asked
            advance(1)
    return values


def recall_tasks(tokenizer, sequences: int) -> dict[str, list]:
    """By name: token ids [T] and the places that memory alone tells, in sequences that no training text holds."""
    words = [
        ids[0] for word in find_common_words(load_training_texts()) if len(ids := tokenizer(f" {word}").input_ids) == 1
    ]
    newline, again = (tokenizer(text).input_ids for text in ("\n", REPEAT_MARKER))
    filler = tokenizer("\n\n".join(load_training_texts()[:200])).input_ids
    tasks: dict[str, list] = {}
    for count in PAIRS:
        for number in range(sequences):
            rng = random.Random(f"held out {count} {number}")
            drawn = rng.sample(words, 2 * count)
            known = list(zip(drawn[:count], drawn[count:]))
            ids: list[int] = []
            places = []
            for key, value in known + rng.sample(known, count):
                ids += [key, value, *newline]
                places.append(len(ids) - 1 - len(newline))
            tasks.setdefault(f"{count} pairs", []).append((torch.tensor(ids), torch.tensor(places[count:])))
    for distance in DISTANCES:
        for number in range(sequences):
            rng = random.Random(f"held out list {distance} {number}")
            listed = rng.sample(words, LIST)
            begin = rng.randrange(len(filler) - distance)
            ids = [*listed, *newline, *filler[begin : begin + distance], *again, *listed]
            places = torch.arange(len(ids) - LIST // 2, len(ids))
            tasks.setdefault(f"list, {distance} tokens on", []).append((torch.tensor(ids), places))
    return tasks


def bigram_perplexity(train, batches, size: int) -> float:
    """Of p(w | v) = (n(v, w) + T(v) p(w)) / (n(v) + T(v)), where T(v) counts the different tokens behind v."""
    tokens = np.asarray(train.tokens, np.int64)
    follows = np.ones(len(tokens) - 1, bool)
    follows[train.offsets[1:-1] - 1] = False  # the next token is another document's
    counts = np.bincount(tokens[:-1][follows] * size + tokens[1:][follows], minlength=size * size).reshape(size, size)
    single = (counts.sum(0) + 1.0) / (counts.sum() + size)
    behind, kinds = counts.sum(1), (counts > 0).sum(1)
    total, count = 0.0, 0
    for batch in batches:
        valid = (batch.targets != IGNORE_INDEX).numpy()
        v, w = batch.input_ids.numpy()[valid], batch.targets.numpy()[valid]
        weight = np.maximum(kinds[v], 1)
        total -= np.log((counts[v, w] + weight * single[w]) / (behind[v] + weight)).sum()
        count += len(v)
    return math.exp(total / count)


def _folder(name: str) -> str:
    student = Path(name) / "student"
    return str(student) if student.is_dir() else resolve_teacher(name)


if __name__ == "__main__":
    main()
