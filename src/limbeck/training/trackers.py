"""Log a run to TensorBoard, Weights & Biases, MLflow or trackio, through the trackers of accelerate.

    trackers = Trackers(resolve_trackers(recipe.trackers), path, recipe)
    trackers.start(first_step=41, last_logged_step=60)         # resumed after step 40, had logged up to step 60
    trackers.log({"stage": "hidden", "stage_index": 1, "step": 41, "loss": 0.3, ...})
    trackers.close()

A tracker that fails after it has started is disabled, because metrics.jsonl has all numbers anyway. Steps are counted
over all stages. A resumed run repeats steps: TensorBoard drops them (`purge_step`); the other trackers cannot, so these
steps, whose numbers are the same, are not sent to them again.
"""

import importlib.util
import json
import threading
import uuid
from collections.abc import Callable, Sequence
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
    """Resolve the trackers of a recipe; "auto" means TensorBoard if it is installed."""
    if names == "auto":
        return [] if _missing("tensorboard") else ["tensorboard"]
    return list(dict.fromkeys(names))


def check_trackers(names: Sequence[str] | str) -> None:
    """Raise LimbeckError if a tracker cannot be imported."""
    for name in resolve_trackers(names):
        if missing := _missing(name):
            raise LimbeckError(
                f"trackers: {name} requires {' and '.join(missing)}, which is not installed",
                expected="trackers that are installed, or trackers: []",
                hint="pip install 'limbeck[track]'" + ("" if name == "tensorboard" else f" {name}"),
            )


def steps_before(recipe: AnyRecipe, index: int) -> int:
    """Count the optimizer steps planned before a stage; if a stage ends early, the numbers have a gap."""
    trained = [stage for stage in recipe.stages[:index] if stage.stage != "calibrate"]
    return sum(count_training_steps(stage, recipe.text_of(stage).seq_len) for stage in trained)  # type: ignore[arg-type]


class Trackers:
    """All trackers of a run; used by process 0 only."""

    def __init__(self, names: Sequence[str], path: Path, recipe: AnyRecipe):
        self.names, self.path, self.recipe = names, path, recipe
        self.active: dict[str, Any] | None = None  # None: not started
        self.last_logged_step = 0

    def start(self, first_step: int, last_logged_step: int) -> None:
        """Start the trackers, once.

        Args:
            first_step: the next step.
            last_logged_step: the last step that was logged before the run was resumed.

        Raises:
            LimbeckError: a tracker that the recipe names does not start.
        """
        if self.active is not None:
            return
        self.active, self.last_logged_step = {}, last_logged_step
        self._excepthook, threading.excepthook = threading.excepthook, _print_unkept_errors(threading.excepthook)
        for name in self.names:
            try:
                self.active[name] = self._start(name, first_step)
            except Exception as error:
                if self.recipe.trackers == "auto":  # the default
                    console.print(f"{name} could not be started and is not used: {error}", markup=False)
                    continue
                raise LimbeckError(
                    f"trackers: {name} could not be started: {str(error).strip() or type(error).__name__}",
                    hint="--set trackers=[]   (metrics.jsonl has the same numbers)",
                ) from error

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl and the peak memory to all trackers."""
        if not self.active:
            return
        step = steps_before(self.recipe, line["stage_index"]) + line["step"]
        prefix = f"{line['stage_index']}-{line['stage']}"
        values = {f"{prefix}/{name}": line[name] for name in SCALARS if name in line}
        values |= {f"{prefix}/losses/{part}": value for part, value in line["losses"].items()}
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else get_peak_memory()
        if memory is not None:
            values[f"{prefix}/peak_memory_gb"] = memory / 1e9
        for name in list(self.active):
            if name != "tensorboard" and step <= self.last_logged_step:
                continue
            self._call(name, lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Close all trackers."""
        for name in list(self.active or {}):
            self._call(name, lambda tracker: tracker.finish())
        if self.active is not None:
            threading.excepthook = self._excepthook
        self.active = None

    def _call(self, name: str, act: Callable[[Any], Any]) -> None:
        """Call a tracker, and disable it if that fails."""
        assert self.active is not None
        try:
            act(self.active[name])
        except Exception as error:
            console.print(f"{name} failed and is disabled for the rest of this run: {error}", markup=False)
            del self.active[name]

    def _start(self, name: str, first_step: int) -> Any:
        """Create one tracker; it continues the logs of an earlier process of this run."""
        # optional dependency
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        threads = torch.get_num_threads()
        PartialState()  # required by the trackers' log messages; it reuses an existing process group
        torch.set_num_threads(threads)  # PartialState may change it
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        ids = self._load_ids()
        title = self.recipe.name
        if name == "tensorboard":
            # the run directory itself: TensorBoard finds the folder below it
            tracker = tracker_class("tensorboard", logging_dir=self.path, purge_step=first_step)
        elif name == "wandb":
            run_id = ids.setdefault(name, uuid.uuid4().hex[:12])
            tracker = tracker_class(PROJECT, id=run_id, resume="allow", name=title, dir=str(self.path))
        elif name == "mlflow":
            tracker = tracker_class(PROJECT, run_id=ids.get(name), run_name=title)
        else:
            run_id = ids.setdefault(name, f"{title}-{uuid.uuid4().hex[:6]}")
            tracker = tracker_class(PROJECT, name=run_id, resume="allow")
        tracker.main_process_only = False  # only process 0 comes here
        tracker.start()
        if name == "mlflow":
            ids[name] = tracker.tracker.info.run_id
        if name not in ("tensorboard", *self._load_ids()):
            flat = {"recipe": self.recipe.to_yaml()} if name == "mlflow" else self.recipe.model_dump(mode="json")
            tracker.store_init_configuration(flat)
        if name != "tensorboard":
            atomic_write_text(self.path / "trackers.json", json.dumps(ids) + "\n")
        return tracker

    def _load_ids(self) -> dict[str, str]:
        """Load the id of this run in each tracker that has been started before."""
        path = self.path / "trackers.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def _missing(name: str) -> list[str]:
    """List the packages that a tracker needs and that are not installed."""
    return [module for module in ("accelerate", name) if importlib.util.find_spec(module) is None]


def _print_unkept_errors(excepthook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap threading.excepthook so that it leaves out an error that its thread keeps for the next call.

    TensorBoard's writer does so: the next call raises it, and `_call` says it in one line, without a traceback before.
    """

    def hook(args: Any) -> None:
        if args.exc_value is None or getattr(args.thread, "exception", None) is not args.exc_value:
            excepthook(args)

    return hook
