"""The directory of a run: recipe, progress, checkpoints, logs and results; the process may be killed at any time.

    with open_run(path, recipe) as run:
        run.save_checkpoint(index, step, tensors, optimizer, facts)
        run.save_stage_result(index, tensors, facts)

    recipe.yaml       the complete recipe
    manifest.json     versions, hardware, seeds, data, teacher and stages
    metrics.jsonl     one line per step; tensorboard/ has the same, if that is installed
    stages/1-hidden/  step-000040/ (the newest checkpoints of a stage), done/ (its result)
    student/          the exported Hugging Face folder
    eval.json, summary.md

Folders are written under a temporary name, flushed and renamed, so they are complete or absent. Opening a directory
with the same recipe resumes the run; with another recipe it is refused and the differences are listed.
"""

import functools
import json
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.collectives import run_on_main_with_tensors
from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, run_on_main
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import AnyRecipe
from limbeck.core.storage import (
    atomic_write_text,
    check_link,
    convert_write_errors,
    get_staging_folder,
    lock_folder,
    read_manifest,
)
from limbeck.core.version import __version__
from limbeck.ops import fla
from limbeck.training.trackers import Trackers, resolve_trackers, steps_before

# Keys that may differ when a run is resumed: they change neither finished stages nor any number to come.
FREE_TO_CHANGE = {"out", "name", "device", "evaluation", "checkpoint_seconds", "save_total_limit", "trackers"}
MAX_DIFFERENCES = 12  # that an error lists
MAX_VALUE_CHARS = 120  # of a value in an error

Method = TypeVar("Method", bound=Callable[..., Any])


class RunDirectory:
    """Read and write the files of a run. Created by `open_run`, which locks the folder."""

    def __init__(self, path: Path, recipe: AnyRecipe):
        self.path, self.recipe = path, recipe
        self.metrics_path = path / "metrics.jsonl"
        self.trackers = Trackers(resolve_trackers(recipe.trackers), path, recipe)

    # ------------------------------------------------------------------ stages

    def stage_folder(self, index: int) -> Path:
        """Return the folder of the stage with this index in the recipe."""
        return self.path / "stages" / f"{index}-{self.recipe.stages[index].stage}"

    def is_finished(self, index: int, *, verify: bool = False) -> bool:
        """Return whether a stage is done and its result complete on disk.

        Args:
            verify: compare checksums as well as sizes, and report a damaged result; before the result is loaded.
        """
        done = self.stage_folder(index) / "done"
        is_valid = load_valid_manifest(done, verify=verify) is not None
        if verify and not is_valid and done.exists():
            console.print(f"{done} is damaged; the stage will be repeated.", markup=False)
        return is_valid

    def save_stage_result(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save the trained parameters of a stage and the backends that computed them; delete its checkpoints."""
        folder = self.stage_folder(index)
        self.update_manifest(backends=self._backends())
        self._publish(folder / "done", tensors, None, facts)
        for old in self._checkpoints(index):
            shutil.rmtree(old, ignore_errors=True)
        # Process 0 is alone in here, so it must not ask the others to take part (DistributedRunDirectory.is_finished).
        if any(RunDirectory.is_finished(self, later) for later in range(index + 1, len(self.recipe.stages))):
            self._sort_log()  # a damaged stage was repeated: its lines belong before those of later stages

    def load_stage_result(self, index: int) -> dict[str, Tensor]:
        """Load the trained parameters of a finished stage, by name."""
        return load_file(self.stage_folder(index) / "done" / "model.safetensors")

    def load_stage_metrics(self, index: int) -> dict[str, Any]:
        """Load tokens, seconds, losses and data position of a finished stage."""
        return _load_facts(self.stage_folder(index) / "done")

    def save_checkpoint(
        self, index: int, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Save the state after `step` optimizer steps, and delete checkpoints beyond the recipe's save_total_limit."""
        self._publish(self.stage_folder(index) / f"step-{step:06d}", tensors, optimizer, facts)
        for old in self._checkpoints(index)[: -self.recipe.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)

    def load_last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        """Load tensors, optimizer state and facts of the newest valid checkpoint, or return None."""
        for folder in reversed(self._checkpoints(index)):
            if load_valid_manifest(folder, verify=True):
                return self._load(folder)
            console.print(f"{folder} is damaged; falling back to the previous checkpoint.", markup=False)
        return None

    # ------------------------------------------------------------------ logs

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and send it to the trackers."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.trackers.log(line)

    def truncate_log(self, index: int, step: int) -> None:
        """Drop the lines of steps that a resumed stage will repeat, and start the trackers."""
        last = self._truncate_log(index, step) if self.metrics_path.exists() else 0
        self.trackers.start(steps_before(self.recipe, index) + step + 1, last)

    def _truncate_log(self, index: int, step: int) -> int:
        """Drop those lines; returns the last step that had been logged, counted over all stages."""
        kept, last = [], 0
        for text in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a line that was truncated when the process was killed
                continue
            stage = line["stage_index"]
            last = steps_before(self.recipe, stage) + line["step"]
            is_before = (stage, line["step"]) <= (index, step)
            if is_before or (stage > index and RunDirectory.is_finished(self, stage)):
                kept.append(text)
        self.write_file("metrics.jsonl", "".join(f"{text}\n" for text in kept))
        return last

    def _sort_log(self) -> None:
        """Sort the lines of the log by stage and step."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        lines.sort(key=lambda text: ((line := json.loads(text))["stage_index"], line["step"]))
        self.write_file(self.metrics_path.name, "".join(f"{text}\n" for text in lines))

    def write_file(self, name: str, text: str) -> None:
        """Write a small file of the run, whole or not at all."""
        atomic_write_text(self.path / name, text)

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        self.write_file(
            "manifest.json", json.dumps({**read_manifest(self.path), **facts}, indent=1, default=str) + "\n"
        )

    # ------------------------------------------------------------------ inside

    def _backends(self) -> list[dict[str, Any]]:
        """List which backend computed which operator, in this process and in earlier ones of the run."""
        earlier = read_manifest(self.path).get("backends", [])
        return [*earlier, *(entry for entry in fla.summarize_dispatch() if entry not in earlier)]

    def _checkpoints(self, index: int) -> list[Path]:
        """List a stage's checkpoints, the oldest first."""
        # by number: as text step-1000100 comes before step-999999
        steps = {p: p.name.removeprefix("step-") for p in self.stage_folder(index).glob("step-*")}
        return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))

    def _publish(
        self, folder: Path, tensors: dict[str, Tensor], optimizer: dict[str, Any] | None, facts: dict[str, Any]
    ) -> None:
        def fill(temporary: Path) -> dict[str, Any]:
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary / "model.safetensors"
            )
            if optimizer is not None:
                torch.save(optimizer, temporary / "optimizer.pt")
            return {"facts": facts}

        # AdamW has two more values of each parameter
        size = sum(t.numel() * t.element_size() for t in tensors.values()) * (3 if optimizer is not None else 1)
        ensure_cached_folder(
            folder,
            fill,
            what=f"{'result' if optimizer is None else 'checkpoint'} {folder}",
            required_bytes=size,
            verify=True,
        )

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        optimizer = folder / "optimizer.pt"
        state = torch.load(optimizer, weights_only=True, map_location="cpu") if optimizer.exists() else {}
        return load_file(folder / "model.safetensors"), state, _load_facts(folder)


def _by_main(method: Method, run: Callable[[Callable[[], Any]], Any] = run_on_main) -> Method:
    """Let process 0 call a method and every process get its result."""

    @functools.wraps(method)
    def call(self: RunDirectory, *args: Any, **kwargs: Any) -> Any:
        return run(lambda: method(self, *args, **kwargs))

    return cast(Method, call)


def _only_main(method: Method) -> Method:
    """Let process 0 call a method, and no other process."""

    @functools.wraps(method)
    def call(self: RunDirectory, *args: Any, **kwargs: Any) -> None:
        if get_process_info().is_main:
            method(self, *args, **kwargs)

    return cast(Method, call)


class DistributedRunDirectory(RunDirectory):
    """A run of several processes: process 0 alone reads and writes, so the others need not see its disk."""

    is_finished = _by_main(RunDirectory.is_finished)
    load_stage_metrics = _by_main(RunDirectory.load_stage_metrics)
    load_stage_result = _by_main(RunDirectory.load_stage_result, run_on_main_with_tensors)
    load_last_checkpoint = _by_main(RunDirectory.load_last_checkpoint, run_on_main_with_tensors)
    save_stage_result = _only_main(RunDirectory.save_stage_result)
    save_checkpoint = _only_main(RunDirectory.save_checkpoint)
    log = _only_main(RunDirectory.log)
    truncate_log = _only_main(RunDirectory.truncate_log)
    write_file = _only_main(RunDirectory.write_file)
    update_manifest = _only_main(RunDirectory.update_manifest)


@contextmanager
def open_run(path: Path, recipe: AnyRecipe) -> Iterator[RunDirectory]:
    """Create or resume the run directory at `path`, and lock it meanwhile.

    Raises:
        LimbeckError: the folder has another run (with the differences) or other files, or is in use.
    """
    if not get_process_info().is_main:
        yield DistributedRunDirectory(path, recipe)
        return
    check_run(path, recipe)
    with convert_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with lock_folder(path):
            for old in path.glob(".*.tmp"):  # left by a process that was killed while writing
                if old.is_file():
                    old.unlink()
            is_alone = get_process_info().world_size == 1
            run = RunDirectory(path, recipe) if is_alone else DistributedRunDirectory(path, recipe)
            run.write_file("recipe.yaml", recipe.to_yaml())
            try:
                yield run
            finally:
                run.trackers.close()


def remove_stale_export(path: Path) -> None:
    """Remove the incomplete export of a killed process, unless another process is working on this run."""
    stale = get_staging_folder(path / "student")
    if stale.exists():
        with suppress(LimbeckError, OSError), lock_folder(path):
            shutil.rmtree(stale, ignore_errors=True)


def check_run(path: Path, recipe: AnyRecipe) -> None:
    """Raise LimbeckError if `path` can be neither a new directory nor the existing one of this run; writes nothing."""
    for folder in (path, path / "student"):
        check_link(folder)
    if path.exists() and not path.is_dir():
        raise LimbeckError(f"{path} is a file", expected="a folder for the run", hint="--out runs/another-name")
    old = path / "recipe.yaml"
    if not old.exists():
        if path.is_dir() and any(p.name != ".lock" and not p.name.startswith(".recipe") for p in path.iterdir()):
            raise LimbeckError(
                f"{path} contains files that do not belong to a run",
                expected="a new or empty folder",
                hint="--out runs/another-name",
            )
        return
    before, now = _comparable_settings(type(recipe).load(old, stored=True)), _comparable_settings(recipe)
    changed = [line for key in now for line in describe_differences(key, before.get(key), now[key])]
    raise_if_changed(f"{path} contains another run", path, changed, "the same recipe, to resume the run")


def raise_if_changed(problem: str, path: Path, changed: list[str], expected: str, hint: str = "") -> None:
    """Raise LimbeckError with the first differences if there are any.

    Args:
        problem: what is wrong, before the list.
        changed: the differences, a line each.
        hint: what to try before another --out.
    """
    if changed:
        more = [f"and {len(changed) - MAX_DIFFERENCES} more"] if len(changed) > MAX_DIFFERENCES else []
        raise LimbeckError(
            f"{problem}:\n  " + "\n  ".join([*changed[:MAX_DIFFERENCES], *more]),
            expected=expected,
            hint=f"{hint}--out {shlex.quote(f'{path}-2')}   (a new run), or delete the folder",
        )


def _comparable_settings(recipe: AnyRecipe) -> dict[str, Any]:
    """Return the settings that have to be the same when a run is resumed."""
    raw = recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    for data in (raw["data"], *(stage["data"] or {} for stage in raw["stages"])):
        data.pop("cache_gb", None)  # disk space for tokens, which are recreated
    return raw


def collect_environment() -> dict[str, Any]:
    """Collect versions and hardware, for the manifest."""
    return {
        "limbeck": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": get_process_info().world_size,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "opened": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _load_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"]


def describe_differences(key: str, before: Any, now: Any) -> list[str]:
    """List the differences of two nested plain values, a line each."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in describe_differences(f"{key}.{k}", before.get(k), now.get(k))]
    if isinstance(before, list) and isinstance(now, list):
        if len(before) == len(now):
            return [
                line for i, pair in enumerate(zip(before, now)) for line in describe_differences(f"{key}.{i}", *pair)
            ]
        if any(isinstance(item, dict | list) for item in (*before, *now)):
            return [f"{key}: was {_format_count(before)}, now {_format_count(now)}"]
    return [f"{key}: was {_format_value(before)}, now {_format_value(now)}"]


def _format_count(values: list[Any]) -> str:
    """Format the length of a list, and the names of stages in it: "2 (calibrate, hidden)"."""
    names = [item["stage"] for item in values if isinstance(item, dict) and "stage" in item]
    return f"{len(values)} ({', '.join(names)})" if names else f"{len(values)}"


def _format_value(value: Any) -> str:
    return text if len(text := repr(value)) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 4]} ..."
