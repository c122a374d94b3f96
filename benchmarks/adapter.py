"""Does an adapter survive? A LoRA that was trained on a teacher, put on the teacher's students.

    python benchmarks/adapter.py                                       # the small teacher, Gated DeltaNet and a window
    python benchmarks/adapter.py --teacher embedded --students gated_deltanet --tokens 16384

The task is one that no teacher here knows: some words, a colon, and the words backwards; its loss is that of the words
after the colon, in nats. The adapter (rank 8, every linear layer of the body) learns it on the teacher. Then, by
student:

start           converted, not trained
distilled       trained on plain text, which has nothing of the task, to answer as the teacher
of the adapted  the same, to answer as the teacher with its adapter merged in, from whose weights it begins

"+ adapter" is the teacher's adapter put on the student as it is: their layers have the same names and widths.
"survives" is the part of what the adapter gains on the teacher: for the student with the adapter against the same
student without it, for the student of the adapted teacher against that of the plain one.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import limbeck
from limbeck.core.extras import require
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.models import find_attention_sites, loading
from limbeck.training.lora import resolve_lora_targets

VOCABULARY = 256  # words of the task
EVALUATED = 128  # sequences


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="small")
    parser.add_argument("--students", default="gated_deltanet,sliding_window", help="joined by commas")
    parser.add_argument("--recipe", default="quickstart", help="of the distillation")
    parser.add_argument("--data", help="text of the distillation; by default the recipe's")
    parser.add_argument("--tokens", type=int, default=32768, help="of each distillation")
    parser.add_argument("--words", type=int, default=4, help="of the task")
    parser.add_argument("--steps", type=int, default=200, help="of the adapter, 16 sequences each")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe")
    args = parser.parse_args(arguments)
    require("peft", "adapters")

    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    task = ReversedWords(tokenizer, args.words)
    overrides = {"seed": args.seed, "evaluation.exam_documents": 0, **dict(one.split("=", 1) for one in args.set)}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        adapted = train_adapter(teacher, task, adapter, args.steps, args.lr, args.seed)
        plain, gained = task.evaluate(teacher), task.evaluate(teacher) - task.evaluate(adapted)
        print("| model | loss of the task | + adapter | survives | perplexity of text |\n|---|---|---|---|---|")
        print(f"| teacher | {plain:.3f} | {plain - gained:.3f} | | |", flush=True)
        for mixer in args.students.split(","):

            def distill(source: PreTrainedModel, name: str, mixer: str = mixer) -> tuple[PreTrainedModel, float]:
                summary = limbeck.distill(
                    args.recipe,
                    teacher=(source, tokenizer),
                    student=mixer,
                    tokens=args.tokens,
                    data=args.data,
                    out=Path(folder) / f"{mixer}-{name}",
                    overrides=overrides,
                    measure_times=False,
                    plot_curves=False,
                )
                return limbeck.load(summary.student_folder)[0], summary["held_out"]["student_perplexity"]

            own, perplexity = distill(teacher, "plain")
            of_adapted, adapted_perplexity = distill(adapted, "adapted")
            without = task.evaluate(own)
            for name, student, text in (
                ("start", limbeck.convert(teacher, mixer), ""),
                ("distilled", own, f"{perplexity:.4g}"),
            ):
                before, after = task.evaluate(student), task.evaluate(put_on(student, adapter))
                share = f"{(before - after) / gained:.0%}"
                print(f"| {mixer}, {name} | {before:.3f} | {after:.3f} | {share} | {text} |", flush=True)
            loss = task.evaluate(of_adapted)
            share = f"{(without - loss) / gained:.0%}"
            print(f"| {mixer}, of the adapted | {loss:.3f} | | {share} | {adapted_perplexity:.4g} |", flush=True)


class ReversedWords:
    """Sequences " a b c: c b a" as tokens; the words are the first of the vocabulary that are one token each.

    Args:
        words: of a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: int):
        names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        texts = [(tokenizer.convert_tokens_to_string([name]), number) for name, number in names]
        known = [number for text, number in texts if text[:1] == " " and text[1:].isalpha() and text.islower()]
        self.vocabulary, self.words = torch.tensor(known[:VOCABULARY]), words
        self.prefix = torch.tensor(find_special_token_ids(tokenizer).prefix_ids, dtype=torch.long)
        self.colon = torch.tensor(tokenizer.encode(":", add_special_tokens=False)[:1])

    def draw(self, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw token ids and labels [B, T]; only the words after the colon are labels."""
        words = self.vocabulary[torch.randint(len(self.vocabulary), (sequences, self.words), generator=generator)]
        fixed = (part.expand(sequences, -1) for part in (self.prefix, self.colon))
        ids = torch.cat([next(fixed), words, next(fixed), words.flip(1)], dim=1)
        labels = ids.clone()
        labels[:, : -self.words] = -100
        return ids, labels

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel) -> float:
        """Compute the mean loss of held-out sequences, the same ones for every model."""
        ids, labels = self.draw(EVALUATED, torch.Generator().manual_seed(10**6))
        return float(model(input_ids=ids, labels=labels, use_cache=False).loss)


def train_adapter(
    teacher: PreTrainedModel, task: ReversedWords, folder: Path, steps: int, lr: float, seed: int
) -> PreTrainedModel:
    """Train an adapter on a copy of the teacher, save it, and return the copy with the adapter merged in."""
    # late: an optional dependency
    from peft import LoraConfig, get_peft_model

    names = resolve_lora_targets(teacher, find_attention_sites(teacher), "all-linear")
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(teacher), LoraConfig(r=8, lora_alpha=16, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids, labels = task.draw(16, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return model.merge_and_unload().eval().requires_grad_(False)


def put_on(student: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a saved adapter into a copy of a student."""
    # late: an optional dependency
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(student), folder).merge_and_unload().eval()


if __name__ == "__main__":
    main()
