"""A run watched by TensorBoard, Weights & Biases, MLflow or trackio while it learns, through accelerate's trackers.

    trackers = Trackers(resolve_trackers(recipe.trackers), path, recipe)
    trackers.start(first_step=41, last_logged_step=60)            # a run that goes on after step 40, and had come to 60
    trackers.log({"stage": "hidden", "stage_index": 1, "step": 41, "loss": 0.3, ...})
    trackers.close()

metrics.jsonl is what counts: a tracker that fails once it has started is left out. Steps are counted over all stages.
After a resume TensorBoard is told to forget the steps that are done again (`purge_step`); the others cannot forget, so
those steps, whose numbers are the same, are not sent to them a second time.
"""

import importlib.util
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import AnyRecipe
from limbeck.core.storage import atomic_write_text
from limbeck.core.system import get_peak_memory
from limbeck.training.optim import count_training_steps

PROJECT = "limbeck"
SCALARS = ("loss", "held_out_loss", "lr", "grad_norm", "skipped", "loss_scale", "tokens_per_second")


def resolve_trackers(names: Sequence[str] | str) -> list[str]:
    """The trackers of a recipe; "auto" is TensorBoard where it is installed."""
    if names == "auto":
        return [] if _missing("tensorboard") else ["tensorboard"]
    return list(dict.fromkeys(names))


def check_trackers(names: Sequence[str] | str) -> None:
    """Raises LimbeckError where one that is named cannot be imported."""
    for name in resolve_trackers(names):
        if missing := _missing(name):
            raise LimbeckError(
                f"trackers: {name} needs {' and '.join(missing)}, not installed here",
                expected="trackers that are installed, or trackers: []",
                hint="pip install 'limbeck[track]'" + ("" if name == "tensorboard" else f" {name}"),
            )


def steps_before(recipe: AnyRecipe, index: int) -> int:
    """Optimiser steps planned for the stages before this one; where one of them ends early, numbers are left out."""
    trained = [stage for stage in recipe.stages[:index] if stage.stage != "calibrate"]
    return sum(count_training_steps(stage, recipe.text_of(stage).seq_len) for stage in trained)  # type: ignore[arg-type]


class Trackers:
    """All trackers of a run; process 0 alone has one."""

    def __init__(self, names: Sequence[str], path: Path, recipe: AnyRecipe):
        self.names, self.path, self.recipe = names, path, recipe
        self.active: dict[str, Any] | None = None  # None: not begun
        self.last_logged_step = 0

    def start(self, first_step: int, last_logged_step: int) -> None:
        """Start them, once.

        Args:
            first_step: the step that comes next.
            last_logged_step: the last step that was logged before; those up to it were sent already.

        Raises:
            LimbeckError: a tracker that the recipe names does not start.
        """
        if self.active is not None:
            return
        self.active, self.last_logged_step = {}, last_logged_step
        for name in self.names:
            try:
                self.active[name] = self._start(name, first_step)
            except Exception as error:
                if self.recipe.trackers == "auto":  # nobody asked for it
                    console.print(f"no {name}: {error}", markup=False)
                    continue
                raise LimbeckError(
                    f"trackers: {name} does not start: {str(error).strip() or type(error).__name__}",
                    hint="--set trackers=[]   (the run's numbers are in metrics.jsonl as well)",
                ) from error

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl, and the memory in use."""
        if not self.active:
            return
        step = steps_before(self.recipe, line["stage_index"]) + line["step"]
        place = f"{line['stage_index']}-{line['stage']}"
        values = {f"{place}/{name}": line[name] for name in SCALARS if name in line}
        values |= {f"{place}/losses/{part}": value for part, value in line["losses"].items()}
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else get_peak_memory()
        if memory is not None:
            values[f"{place}/peak_memory_gb"] = memory / 1e9
        for name in list(self.active):
            if name != "tensorboard" and step <= self.last_logged_step:
                continue
            self._safely(name, lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Close them."""
        for name in list(self.active or {}):
            self._safely(name, lambda tracker: tracker.finish())
        self.active = None

    def _safely(self, name: str, act: Any) -> None:
        assert self.active is not None
        try:
            act(self.active[name])
        except Exception as error:
            console.print(f"{name} is left out from here on: {error}", markup=False)
            del self.active[name]

    def _start(self, name: str, first_step: int) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        threads = torch.get_num_threads()
        PartialState()  # its trackers' messages ask for it; it joins the processes that are joined already
        torch.set_num_threads(threads)  # which it may change
        made = LOGGER_TYPE_TO_CLASS[name]
        known = self._ids()
        title = self.recipe.name
        if name == "tensorboard":
            # the folder itself, as TensorBoard finds it below the run directory
            tracker = made("tensorboard", logging_dir=self.path, purge_step=first_step)
        elif name == "wandb":
            again = known.setdefault(name, uuid.uuid4().hex[:12])
            tracker = made(PROJECT, id=again, resume="allow", name=title, dir=str(self.path))
        elif name == "mlflow":
            tracker = made(PROJECT, run_id=known.get(name), run_name=title)
        else:
            again = known.setdefault(name, f"{title}-{uuid.uuid4().hex[:6]}")
            tracker = made(PROJECT, name=again, resume="allow")
        tracker.main_process_only = False  # only process 0 comes here
        tracker.start()
        if name == "mlflow":
            known[name] = tracker.tracker.info.run_id
        if name not in ("tensorboard", *self._ids()):
            flat = {"recipe": self.recipe.to_yaml()} if name == "mlflow" else self.recipe.model_dump(mode="json")
            tracker.store_init_configuration(flat)
        if name != "tensorboard":
            atomic_write_text(self.path / "trackers.json", json.dumps(known) + "\n")
        return tracker

    def _ids(self) -> dict[str, str]:
        """By what name each tracker knows this run, once it does."""
        path = self.path / "trackers.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def _missing(name: str) -> list[str]:
    return [module for module in ("accelerate", name) if importlib.util.find_spec(module) is None]
