"""What a start is worth: published ways to begin a linear student beside stage 0, before any gradient.

    python benchmarks/starts.py                                        # the embedded teacher, 8,192 tokens of stage 0
    python benchmarks/starts.py --students gla --starts copied,scrambled --tokens 8192,32768,131072
    python benchmarks/starts.py --size smoke                           # the same on the smallest teacher, in a minute

Every start is judged on the exam (long held-out articles, which no start has seen), as it is and with stage 0 on top.
A row is kept in --out as soon as it is there, so the same command goes on where it was stopped. The study `real-starts`
asks the same of the starts that a recipe can name (copied, random, calibrated), with seeds.

copied      the teacher's projections; decays as the mixer begins (Gated DeltaNet: half-lives of 14 tokens).
scrambled   the same with the rows of k and v repeated instead of their heads, as in Taylor-Calibrate's public code.
halved      the same with halves of heads repeated, as public code does that takes every head for 32 wide (here 64).
taylor      Taylor-Calibrate (arXiv 2606.16429), its closed part: a head's decay rate is ln 2 over the mean distance
            that the teacher's head attends to, its write strength 0.3 to 0.7 by how sharply (where the mixer has one),
            its values scaled to fit. The gate, and the 300 gradient steps a layer that follow there, are left out.
gate        Priming (arXiv 2605.08301): a gate silu(G x) with G = (W_Oᵀ + W_V) / 2, on the copied start.

The teacher is Llama-shaped. Its grouped keys and values are written out first, one for each head, which changes nothing
that it computes (checked) and lets all starts have the same parameters.
"""

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import limbeck
from limbeck.core.digests import digest_facts
from limbeck.core.storage import atomic_write_text
from limbeck.core.version import __version__
from limbeck.data.documents import fingerprint_source
from limbeck.data.packing import Batch, PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.evaluation.exam import HELD_OUT_TEXT, ExamDocuments, load_exam_documents, run_exam
from limbeck.mixers.options import inverse_softplus
from limbeck.models import Site, find_attention_sites, get_mixers, loading
from limbeck.models.backbone import run_backbone
from limbeck.models.fingerprint import fingerprint_model
from limbeck.models.hooks import DistillationPair, hook_modules
from limbeck.models.temporary import use_attn_implementation
from limbeck.training.calibration import NormalEquations

RATES = (1e-3, 5.0)  # of decay, least and most
SCALES = (0.1, 10.0)  # of values


SIZES = {
    "cpu": {},
    "smoke": {"teacher": "tiny", "tokens": "1024", "length": 128, "exam_documents": 1, "exam_tokens": 512},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default="gated_deltanet,gla", help="joined by commas")
    parser.add_argument("--starts", default=",".join(STARTS), help="joined by commas")
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="defaults of the options below")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--data", default="embedded", help="what stage 0 and the starts read")
    parser.add_argument("--tokens", default="8192", help="of stage 0, one or several numbers")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--exam-text", default=HELD_OUT_TEXT)
    parser.add_argument("--exam-documents", type=int, default=2)
    parser.add_argument("--exam-tokens", type=int, default=1024)
    parser.add_argument("--ridge", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("runs/starts"), help="folder of finished rows")
    parser.set_defaults(**SIZES[parser.parse_args(arguments).size])
    args = parser.parse_args(arguments)

    grouped, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    store = build_token_store(args.data, tokenizer, length=args.length, max_tokens=1_000_000, held_out=0.05)
    data, budgets = PackedDataset(store.train, args.length), sorted(map(int, args.tokens.split(",")))
    documents = load_exam_documents(args.exam_text, tokenizer, args.exam_documents, args.exam_tokens)
    teacher = write_out_groups(grouped)
    first = data.batch(0, max(1, 1024 // args.length))
    check_same_function(grouped, teacher, first)

    def measure_start(mixer: str, name: str) -> list[float]:
        student = STARTS[name](mixer, grouped, teacher, first)
        pair = DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext)
        found = [examine(student, documents)]
        sums, read = NormalEquations(pair), 0
        for budget in budgets:
            for position in range(read, budget // args.length):
                sums.add(data.batch(position, 1))
            read = budget // args.length
            sums.solve(args.ridge)
            found.append(examine(student, documents))
        return found

    # Rows of another teacher, text, budget or version are other rows.
    asked = {key: str(value) for key, value in vars(args).items() if key not in ("students", "starts", "size", "out")}
    texts = [fingerprint_source(source) for source in (args.data, args.exam_text)]
    same = [__version__, fingerprint_model(grouped), texts, asked]
    print(
        f"| student | start | as it is | {' | '.join(f'stage 0, {tokens:,} tokens' for tokens in budgets)} | seconds |"
    )
    print("|---" * (len(budgets) + 4) + "|")
    for mixer in args.students.split(","):
        for name in args.starts.split(","):
            row = load_or_measure(args.out, [*same, mixer, name], partial(measure_start, mixer, name))
            cells = [f"{perplexity:,.4g}" for perplexity in row["perplexities"]]
            print(f"| {mixer} | {name} | {' | '.join(cells)} | {row['seconds']:.0f} |", flush=True)
    row = load_or_measure(args.out, [*same, "teacher"], lambda: [examine(grouped, documents)])
    count = f"{sum(map(len, documents.tokens)):,} tokens of {len(documents.tokens)} documents"
    print(f"\nteacher {row['perplexities'][0]:.4g}, perplexity on {count}")


def load_or_measure(folder: Path, key: list, measure: Callable[[], list[float]]) -> dict:
    """Load a finished row, its perplexities and seconds, or measure and keep it."""
    path = folder / f"{digest_facts(key, 16)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    began = time.monotonic()
    row = {"of": key, "perplexities": measure(), "seconds": time.monotonic() - began}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(row))
    return row


def examine(model: PreTrainedModel, documents: ExamDocuments) -> float:
    """Compute a model's perplexity of the exam's documents."""
    result = run_exam(model, documents, max(map(len, documents.tokens)), gaps=())
    return result.summarize()[0]["perplexity"]


def write_out_groups(teacher: PreTrainedModel, block: int | None = None) -> PreTrainedModel:
    """Copy a model with one key and value head for each query head.

    Args:
        block: rows of k and v that are repeated together; by default those of a head, which is what the teacher does.
    """
    config = copy.deepcopy(teacher.config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    config.num_key_value_heads = heads
    states = dict(teacher.state_dict())
    for name, weight in states.items():
        if ".k_proj." in name or ".v_proj." in name:
            blocks = weight.unflatten(0, (-1, block or len(weight) // groups))
            states[name] = blocks.repeat_interleave(heads // groups, 0).reshape(-1, *weight.shape[1:])
    model = type(teacher)(config).to(teacher.dtype)
    model.load_state_dict(states)
    model.tie_weights()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def check_same_function(first: PreTrainedModel, second: PreTrainedModel, batch: Batch) -> None:
    """Raise an error if two models differ."""
    one, other = (run_backbone(model, batch) for model in (first, second))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def start_copied(
    mixer: str, grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, **options
) -> PreTrainedModel:
    """Convert the teacher; nothing else."""
    return limbeck.convert(teacher, mixer, options=options).eval().requires_grad_(False)


def start_scrambled(mixer: str, grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Convert the teacher with its rows of k and v repeated instead of its heads."""
    return start_copied(mixer, grouped, write_out_groups(grouped, block=1), batch)


def start_halved(mixer: str, grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Convert the teacher with halves of its heads of k and v repeated instead of whole heads."""
    width = grouped.config.hidden_size // grouped.config.num_attention_heads
    return start_copied(mixer, grouped, write_out_groups(grouped, block=width // 2), batch)


@torch.no_grad()
def start_taylor(mixer: str, grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Set decay, write strength and the size of values from the teacher's attention and outputs on one batch."""
    student = start_copied(mixer, grouped, teacher, batch)
    mixers, sites = get_mixers(student), find_attention_sites(teacher)
    with use_attn_implementation(teacher, "eager"):
        layers = teacher(input_ids=batch.input_ids, output_attentions=True, use_cache=False).attentions
    positions = torch.arange(batch.input_ids.shape[1])
    distances = (positions[:, None] - positions).abs()
    for site, weights in zip(sites, layers):  # [B, H, T, T]
        module = mixers[site.module]
        distance = (weights * distances).sum(-1).mean((0, 2)).clamp(min=0.5)
        set_decay(module, (math.log(2) / distance).clamp(*RATES))
        if not hasattr(module, "strength"):
            continue
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean((0, 2))
        sharpness = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min()).clamp(min=1e-12)
        module.strength.bias.copy_((0.3 + 0.4 * sharpness).logit())
    for site, (own, target) in zip(sites, read_contexts(teacher, student, sites, batch)):
        by_head = [context.unflatten(-1, (site.shape.heads, -1)).double() for context in (own, target)]
        scale = (by_head[0] * by_head[1]).sum((0, 2)) / by_head[0].square().sum((0, 2)).clamp(min=1e-30)
        values = student.get_submodule(site.module).v_proj.weight.unflatten(0, (site.shape.heads, -1))
        values.mul_(scale.clamp(*SCALES).to(values)[:, None, None])
    return student


def set_decay(module: torch.nn.Module, rates: Tensor) -> None:
    """Set the decay of every head, [H], whatever the token: log a = −rate."""
    if hasattr(module, "decay"):  # Gated DeltaNet: log a = −softplus(bias)
        module.decay.bias.copy_(inverse_softplus(rates))
    else:  # gated linear attention: log a = log σ(bias) / temperature, in each channel
        scaled = rates.double() * module.options.temperature
        bias = -scaled - torch.log(-torch.expm1(-scaled))
        module.decay_up.bias.copy_(bias.repeat_interleave(module.shape.key_width))


def start_gate(mixer: str, grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Give the student a gate that begins between the value and the output projection."""
    student = start_copied(mixer, grouped, teacher, batch, output_gate="silu", gate_bias=False)
    for name, module in get_mixers(student).items():
        attention = student.get_submodule(name)
        module.gate.weight.data = (attention.o_proj.weight.T + attention.v_proj.weight) / 2
    return student


def read_contexts(
    teacher: PreTrainedModel, student: PreTrainedModel, sites: list[Site], batch: Batch
) -> list[tuple[Tensor, Tensor]]:
    """Read what goes into both output projections of each layer, [N, H·V], on the teacher's inputs of the layer."""
    inputs: dict[tuple[str, str], Tensor] = {}
    with contextlib.ExitStack() as stack:
        for site in sites:
            for side, model in (("teacher", teacher), ("student", student)):
                projection = model.get_submodule(f"{site.module}.{site.output}")

                def keep(_, args, key=(side, site.module)):
                    inputs[key] = args[0].flatten(0, -2)

                stack.callback(projection.register_forward_pre_hook(keep).remove)

        def run_student(name: str) -> Callable:
            return lambda args, kwargs, output: student.get_submodule(name)(*args, **kwargs)

        stack.enter_context(hook_modules(teacher, {site.module: run_student(site.module) for site in sites}))
        run_backbone(teacher, batch)
    return [(inputs["student", site.module], inputs["teacher", site.module]) for site in sites]


STARTS: dict[str, Callable[[str, PreTrainedModel, PreTrainedModel, Batch], PreTrainedModel]] = {
    "copied": start_copied,
    "scrambled": start_scrambled,
    "halved": start_halved,
    "taylor": start_taylor,
    "gate": start_gate,
}


if __name__ == "__main__":
    main()
