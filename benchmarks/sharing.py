"""Eight students in stages 1 and 2: together on the same passes of the teacher, and one by one.

    python benchmarks/sharing.py                      # SmolLM2-135M, half an hour on one idle thread
    python benchmarks/sharing.py --length 256 --steps 2 --students gla,mlstm --rows 0

Each student is trained both ways with the same recipe; printed are the seconds of training steps (no loading, no
checkpoints), their ratio, and the largest difference between the weights that the two ways lead to.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from limbeck import mixers
from limbeck.job import begin
from limbeck.prepare import new_student, prepare_job
from limbeck.recipe import Recipe
from limbeck.stages.run import RunDirectory, open_run
from limbeck.study.grid import Arm
from limbeck.study.team import learn_together
from limbeck.teach import run_stages


def recipe_of(mixer: str, out: Path, given: argparse.Namespace) -> Recipe:
    """Stages 1 and 2 of one student."""
    tokens = given.steps * given.batch * given.length
    common = {"tokens": tokens, "batch": given.batch, "micro_batch": given.batch}
    return Recipe.parse(
        {
            "name": mixer,
            "teacher": given.teacher,
            "student": {"mixer": mixer},
            "data": {"source": given.data, "length": given.length, "max_tokens": 200_000, "held_out": 0.1},
            "stages": [
                {"stage": "matrix", "rows": given.rows or None, **common},
                {"stage": "hidden", "target": given.target, **common},
            ],
            "evaluation": {"tokens": given.length, "prompt": None, "new_tokens": 0},
            "checkpoint_seconds": 1e9,
            "out": str(out / mixer),
        }
    )


def seconds_of(recipe: Recipe) -> list[float]:
    """Seconds of the steps of each stage."""
    run = RunDirectory(Path(recipe.out), recipe)
    return [run.facts(index)["seconds"] for index in range(len(recipe.stages))]


def difference(one: Recipe, other: Recipe) -> float:
    """The largest difference between what two runs of a recipe learnt."""
    largest = 0.0
    for index in range(len(one.stages)):
        mine, theirs = (RunDirectory(Path(recipe.out), recipe).result(index) for recipe in (one, other))
        largest = max([largest, *(float((mine[name] - theirs[name]).abs().max()) for name in mine)])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--data", default="embedded:quick")
    parser.add_argument("--students", default="paper-v2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="rows of a matrix that are compared; 0: all")
    parser.add_argument("--target", default="attention", help="of stage 2: attention or block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = mixers.selection(given.students)
    with tempfile.TemporaryDirectory() as folder:
        alone = {name: recipe_of(name, Path(folder) / "alone", given) for name in names}
        together = {name: recipe_of(name, Path(folder) / "together", given) for name in names}
        job = prepare_job(alone[names[0]])
        loaded = job.teacher, job.tokenizer
        began = time.monotonic()
        for recipe in alone.values():
            with ExitStack() as stack:
                mine = prepare_job(recipe, loaded)
                run = stack.enter_context(open_run(mine.path, recipe))
                begin(mine, run)
                run_stages(mine, run, new_student(mine))
        one_by_one = time.monotonic() - began
        began = time.monotonic()
        failures = learn_together([Arm(name, {}, recipe) for name, recipe in together.items()], loaded)
        assert not failures, failures
        at_once = time.monotonic() - began
        stages = {}
        for index, name in enumerate(("matrix", "hidden")):
            apart, shared = (sum(seconds_of(r)[index] for r in way.values()) for way in (alone, together))
            stages[name] = {"alone": apart, "together": shared, "ratio": shared / apart}
        result = {
            "students": names,
            "settings": {k: v for k, v in vars(given).items() if k != "json"},
            "stages": stages,
            "ratio": sum(s["together"] for s in stages.values()) / sum(s["alone"] for s in stages.values()),
            "whole_seconds": {"alone": one_by_one, "together": at_once},
            "largest_difference": max(difference(alone[name], together[name]) for name in names),
            "by_student": {name: [seconds_of(alone[name]), seconds_of(together[name])] for name in names},
        }
    for name, found in stages.items():
        print(f"{name}: alone {found['alone']:.1f} s, together {found['together']:.1f} s, {100 * found['ratio']:.0f} %")
    print(f"both: {100 * result['ratio']:.0f} %; largest difference of a weight: {result['largest_difference']:g}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
