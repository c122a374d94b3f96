"""What a step of stage 3 costs with each further objective, as a multiple of the same step with CE + KL alone.

    python benchmarks/objectives.py                          # the small teacher's shape, half a minute
    python benchmarks/objectives.py --teacher embedded --length 1024 --batch 1 --rounds 2

Weights are random but for the embedded teacher's: what a step costs does not depend on them. All stages take turns on
one thread; time is that of the process, ratios are the median over the turns. A step is a forward and backward pass
with the teacher's pass, without optimizer. For `on_policy` it is the mean of a step on text and one on what the student
writes, as its share has it.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

import limbeck
from limbeck.core.objectives import Objectives
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.system import measure_peak_memory
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites, loading
from limbeck.models.hooks import DistillationPair
from limbeck.study import Study
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.stage import ObjectivesStage
from limbeck.training.pretraining import build_teacher_model


def list_chosen() -> dict[str, dict[str, Any]]:
    """List the objectives of the study `objectives` with its settings, CE + KL alone first."""
    settings = Study.load("objectives").grid.settings["objective"]
    prefix = "stages.logits.objectives."
    chosen = [
        {key.removeprefix(prefix): one[key] for key in one if key.startswith(prefix)} for one in settings.values()
    ]
    return {"ce + kl": {}, **{next(iter(one)): one for one in chosen if one}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="small", help="small, tiny or embedded")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objectives", help="joined by commas; all by default")
    args = parser.parse_args()
    chosen = list_chosen()
    if args.objectives:
        chosen = {"ce + kl": {}, **{name: chosen[name] for name in args.objectives.split(",")}}
    torch.set_num_threads(1)
    if args.teacher == "embedded":
        teacher, _ = loading.load_teacher(loading.resolve_teacher("embedded"), torch.device("cpu"))
    else:
        teacher = build_teacher_model(TeacherRecipe.load(args.teacher)).requires_grad_(False)
    student = limbeck.convert(teacher, args.mixer).requires_grad_(False)
    pair = DistillationPair(teacher, student, find_attention_sites(teacher), nullcontext)
    ids = torch.randint(3, teacher.config.vocab_size, (args.batch, args.length))
    batch = Batch(ids, torch.arange(args.length).repeat(args.batch, 1), ids)

    stages: dict[str, ObjectivesStage] = {}
    peaks: dict[str, int] = {}
    for name, settings in chosen.items():
        stage = ObjectivesStage(pair, ObjectiveWeights(ce=1, kl=1), Objectives.model_validate(settings), seed=0)
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)
        stages[name] = stage
        step(stage, batch)  # makes what stays: gradients and the libraries' buffers
        peaks[name] = measure_peak_memory(lambda stage=stage: step(stage, batch), torch.device("cpu")) or 0
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(args.rounds):
        for name, stage in stages.items():
            times[name].append(step(stage, batch))
    print(f"{'objective':20} {'ms a step':>10} {'ratio':>6} {'memory':>9}")
    for name, seconds in times.items():
        ratio = statistics.median(own / plain for own, plain in zip(seconds, times["ce + kl"]))
        milliseconds = 1000 * statistics.median(seconds)
        print(f"{name:20} {milliseconds:10.0f} {ratio:6.2f} {peaks[name] / 1e6:6.0f} MB", flush=True)


def step(stage: ObjectivesStage, batch: Batch) -> float:
    """Do a step of each kind of sequences; returns the processor's seconds, weighted by their shares."""
    seconds = 0.0
    for share, prepare in stage.rehearsal_kinds():
        prepare()
        start = time.process_time()
        stage.backward(batch, stage.count(batch))
        seconds += share * (time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()
