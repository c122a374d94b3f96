"""What tests/training/test_processes.py runs in each of two processes: torchrun process_scenarios.py FOLDER.

FOLDER holds a recipe NAME.yaml for each scenario; what came of it is written to NAME.RANK.json.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch

from limbeck import LimbeckError
from limbeck.core import collectives
from limbeck.core.collectives import all_reduce_gradients
from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, process_group
from limbeck.core.recipe import Recipe
from limbeck.training import pipeline, trainer
from limbeck.training.alignment import HiddenStage

RANK = get_process_info().rank


def nan_on_one():
    """The second step's gradient is not finite in process 1."""
    original, calls = HiddenStage.backward, []

    def backward(self, batch, counts):
        calls.append(1)
        sums = original(self, batch, counts)
        if RANK == 1 and len(calls) == 2:
            next(iter(self.parameters().values())).grad.fill_(float("nan"))
        return sums

    return mock.patch.object(HiddenStage, "backward", backward)


def at_step(step, act, rank=1):
    """`act()` in one process, before it does that step."""
    original = trainer.Trainer.train_step

    def patched(self):
        if rank == RANK and self.state["step"] == step:
            act()
        return original(self)

    return mock.patch.object(trainer.Trainer, "train_step", patched)


def refuse():
    raise LimbeckError("the dog ate it", hint="a cat")


PATCHES = {
    "nan": nan_on_one,
    "stop": lambda: at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "sharded_stop": lambda: at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "error": lambda: at_step(3, refuse),
}


def gradients() -> dict:
    """Sums of gradients that not every process has, in buckets of one or two."""
    a, b, c, d = (torch.nn.Parameter(torch.zeros(2)) for _ in range(4))
    a.grad = torch.full((2,), 1.0 + RANK)
    b.grad = torch.full((2,), 5.0) if RANK else None
    d.grad = torch.full((2,), 10.0 + RANK)
    with process_group(), mock.patch.object(collectives, "BUCKET_BYTES", 16):
        all_reduce_gradients([a, b, c, d])
    return {"sums": [None if p.grad is None else p.grad.tolist() for p in (a, b, c, d)]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / f"gradients.{RANK}.json").write_text(json.dumps(gradients()), encoding="utf-8")
    for path in sorted(folder.glob("*.yaml")):
        name = path.stem
        ends = False
        try:
            with PATCHES.get(name.split("-")[0], mock.MagicMock)():
                result = pipeline.distill(Recipe.load(path))
            found = {"held_out": result["held_out"], "stages": result["stages"]}
        except LimbeckError as error:
            found = {"error": str(error), "exit_code": error.exit_code, "quiet": console.quiet}
            ends = "dog" in str(error)
        except Exception as error:
            found = {"failed": traceback.format_exc() + str(error)}
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
        if ends:  # as the command line does; the other process hears of it
            sys.exit(found["exit_code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
