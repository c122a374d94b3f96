"""What a start is worth: published ways to begin a Gated DeltaNet student beside stage 0, before any gradient.

    python benchmarks/starts.py                                        # the embedded teacher, 8,192 tokens of stage 0
    python benchmarks/starts.py --tokens 8192,32768,131072 --starts copied,scrambled

Every start is measured as it is and with stage 0 on top of it, on held-out text that no start has seen:

copied      the teacher's projections, half-lives of 14 tokens.
scrambled   the same with the rows of k and v repeated instead of their heads, as some public code does.
taylor      Taylor-Calibrate (arXiv 2606.16429), its closed part: a head's decay rate is ln 2 over the mean distance
            that the teacher's head attends to, its write strength 0.3 to 0.7 by how sharply, its values scaled to fit.
            The gate, and the 300 gradient steps a layer that follow there, are left out: here nothing is trained.
gate        Priming (arXiv 2605.08301): a gate silu(G x) with G = (W_Oᵀ + W_V) / 2, on the copied start.

The teacher is Llama-shaped. Its grouped keys and values are written out first, one for each head, which changes nothing
that it computes (checked) and lets all starts have the same parameters.
"""

import argparse
import contextlib
import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import limbeck
from limbeck.data.packing import Batch, PackedDataset
from limbeck.data.token_store import build_token_store
from limbeck.mixers.options import inverse_softplus
from limbeck.models import Site, find_attention_sites, get_mixers, loading
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import DistillationPair, hook_modules
from limbeck.models.temporary import use_attn_implementation
from limbeck.training.calibration import NormalEquations
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights

RATES = (1e-3, 5.0)  # of decay, least and most
SCALES = (0.1, 10.0)  # of values


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", default=",".join(STARTS), help="joined by commas")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--tokens", default="8192", help="of stage 0, one or several numbers")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", type=int, default=8, help="held-out sequences")
    parser.add_argument("--ridge", type=float, default=0.01)
    args = parser.parse_args(arguments)

    grouped, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    store = build_token_store(args.data, tokenizer, length=args.length, max_tokens=1_000_000, held_out=0.05)
    data, held_out = PackedDataset(store.train, args.length), PackedDataset(store.held_out, args.length, shuffle=False)
    judged, budgets = held_out.batch(0, args.judged), sorted(map(int, args.tokens.split(",")))
    teacher = write_out_groups(grouped)
    check_same_function(grouped, teacher, judged)
    print(f"| start | as it is | {' | '.join(f'stage 0, {tokens:,} tokens' for tokens in budgets)} | seconds |")
    print("|---" * (len(budgets) + 3) + "|")
    for name in args.starts.split(","):
        began = time.monotonic()
        student = STARTS[name](grouped, teacher, data.batch(0, max(1, 1024 // args.length)))
        pair = DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext)
        judge = LogitsStage(pair, ObjectiveWeights())
        found = [judge.evaluate(judged)]
        sums, read = NormalEquations(pair), 0
        for budget in budgets:
            for position in range(read, budget // args.length):
                sums.add(data.batch(position, 1))
            read = budget // args.length
            sums.solve(args.ridge)
            found.append(judge.evaluate(judged))
        cells = [f"{math.exp(min(float(one['ce']), 700)):,.4g}" for one in found]
        print(f"| {name} | {' | '.join(cells)} | {time.monotonic() - began:.0f} |", flush=True)
    print(
        f"\nteacher {math.exp(float(found[0]['teacher_ce'])):.4g}, perplexity on {judged.n_targets:,} held-out tokens"
    )


def write_out_groups(teacher: PreTrainedModel, scrambled: bool = False) -> PreTrainedModel:
    """Copy a model with one key and value head for each query head.

    Args:
        scrambled: repeat rows instead of heads: head h gets the rows from h · D // group on, each `group` times.
    """
    config = copy.deepcopy(teacher.config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    config.num_key_value_heads = heads
    states = dict(teacher.state_dict())
    for name, weight in states.items():
        if ".k_proj." in name or ".v_proj." in name:
            blocks = weight if scrambled else weight.unflatten(0, (groups, -1))
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


def start_copied(grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, **options) -> PreTrainedModel:
    """Convert the teacher; nothing else."""
    return limbeck.convert(teacher, "gated_deltanet", options=options).eval().requires_grad_(False)


def start_scrambled(grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Convert the teacher with its rows of k and v repeated instead of its heads."""
    return start_copied(grouped, write_out_groups(grouped, scrambled=True), batch)


@torch.no_grad()
def start_taylor(grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Set decay, write strength and the size of values from the teacher's attention and outputs on one batch."""
    student = start_copied(grouped, teacher, batch)
    mixers, sites = get_mixers(student), find_attention_sites(teacher)
    with use_attn_implementation(teacher, "eager"):
        layers = teacher(input_ids=batch.input_ids, output_attentions=True, use_cache=False).attentions
    positions = torch.arange(batch.input_ids.shape[1])
    distances = (positions[:, None] - positions).abs()
    for site, weights in zip(sites, layers):  # [B, H, T, T]
        mixer = mixers[site.module]
        distance = (weights * distances).sum(-1).mean((0, 2)).clamp(min=0.5)
        mixer.decay.bias.copy_(inverse_softplus((math.log(2) / distance).clamp(*RATES)))
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean((0, 2))
        sharpness = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min()).clamp(min=1e-12)
        mixer.strength.bias.copy_((0.3 + 0.4 * sharpness).logit())
    for site, (own, target) in zip(sites, read_contexts(teacher, student, sites, batch)):
        by_head = [context.unflatten(-1, (site.shape.heads, -1)).double() for context in (own, target)]
        scale = (by_head[0] * by_head[1]).sum((0, 2)) / by_head[0].square().sum((0, 2)).clamp(min=1e-30)
        values = student.get_submodule(site.module).v_proj.weight.unflatten(0, (site.shape.heads, -1))
        values.mul_(scale.clamp(*SCALES).to(values)[:, None, None])
    return student


def start_gate(grouped: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """Give the student a gate that begins between the value and the output projection."""
    student = start_copied(grouped, teacher, batch, output_gate="silu", gate_bias=False)
    for name, mixer in get_mixers(student).items():
        module = student.get_submodule(name)
        mixer.gate.weight.data = (module.o_proj.weight.T + module.v_proj.weight) / 2
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


STARTS = {"copied": start_copied, "scrambled": start_scrambled, "taylor": start_taylor, "gate": start_gate}


if __name__ == "__main__":
    main()
