"""Eight students in stages 1 and 2: together on the same passes of the teacher, and one by one.

    python benchmarks/sharing.py --threads 2          # SmolLM2-135M, 20 minutes of two idle threads
    python benchmarks/sharing.py --length 256 --students gla,mlstm --rows 0 --rounds 1

Each student is trained both ways with the same recipe; printed are the seconds of training steps (no loading, no
checkpoints), their ratio, and the largest difference between the weights that the two ways lead to. Of several rounds
the fastest of each student alone and the fastest of all together count.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from limbeck import mixers
from limbeck.core.recipe import Recipe
from limbeck.study.shared_training import train_shared_stages
from limbeck.study.spec import Arm
from limbeck.training.pipeline import start_run
from limbeck.training.run_directory import RunDirectory, open_run
from limbeck.training.setup import build_student, prepare_job
from limbeck.training.stages import run_stages
from limbeck.training.teacher_loading import LoadedTeacher


def recipe_of(mixer: str, out: Path, given: argparse.Namespace) -> Recipe:
    """Stages 1 and 2 of one student."""
    tokens = given.steps * given.batch * given.length
    common = {"tokens": tokens, "batch_size": given.batch, "micro_batch_size": given.batch}
    return Recipe.parse(
        {
            "name": mixer,
            "teacher": given.teacher,
            "student": {"mixer": mixer},
            "data": {"source": given.data, "seq_len": given.length, "max_tokens": 200_000, "held_out": 0.1},
            "stages": [
                {"stage": "matrix", "sampled_queries": given.rows or None, **common},
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
    return [run.load_stage_metrics(index)["seconds"] for index in range(len(recipe.stages))]


def difference(one: Recipe, other: Recipe) -> float:
    """The largest difference between what two runs of a recipe learnt."""
    largest = 0.0
    for index in range(len(one.stages)):
        mine, theirs = (RunDirectory(Path(recipe.out), recipe).load_stage_result(index) for recipe in (one, other))
        largest = max([largest, *(float((mine[name] - theirs[name]).abs().max()) for name in mine)])
    return largest


def one_round(alone: dict[str, Recipe], together: dict[str, Recipe], loaded: LoadedTeacher) -> dict[str, Any]:
    """Seconds of each student's stages, both ways."""
    for recipe in alone.values():
        with ExitStack() as stack:
            mine = prepare_job(recipe, loaded)
            run = stack.enter_context(open_run(mine.path, recipe))
            start_run(mine, run)
            run_stages(mine, run, build_student(mine))
    failures = train_shared_stages([Arm(name, {}, recipe) for name, recipe in together.items()], loaded)
    assert not failures, failures
    return {
        "alone": {name: seconds_of(recipe) for name, recipe in alone.items()},
        "together": {name: seconds_of(recipe) for name, recipe in together.items()},
        "largest_difference": max(difference(alone[name], together[name]) for name in alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--data", default="embedded:quick")
    parser.add_argument("--students", default="paper-v2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="rows of a matrix that are compared; 0: all")
    parser.add_argument("--target", default="attention", help="of stage 2: attention or block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = mixers.select_mixers(given.students)
    loaded, rounds = None, []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            alone = {name: recipe_of(name, Path(folder) / "alone", given) for name in names}
            together = {name: recipe_of(name, Path(folder) / "together", given) for name in names}
            if loaded is None:
                job = prepare_job(alone[names[0]])
                loaded = job.teacher, job.tokenizer
            rounds.append(one_round(alone, together, loaded))
    stages = {}
    for index, name in enumerate(("matrix", "hidden")):
        apart = sum(min(one["alone"][student][index] for one in rounds) for student in names)
        shared = min(sum(seconds[index] for seconds in one["together"].values()) for one in rounds)
        stages[name] = {"alone": apart, "together": shared, "ratio": shared / apart}
    result = {
        "settings": {k: v for k, v in vars(given).items() if k != "json"},
        "stages": stages,
        "ratio": sum(s["together"] for s in stages.values()) / sum(s["alone"] for s in stages.values()),
        "largest_difference": max(one["largest_difference"] for one in rounds),
        "rounds": rounds,
    }
    for name, found in stages.items():
        print(f"{name}: alone {found['alone']:.1f} s, together {found['together']:.1f} s, {100 * found['ratio']:.0f} %")
    print(f"both: {100 * result['ratio']:.0f} %; largest difference of a weight: {result['largest_difference']:g}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
