"""The run directory: what a run is, how far it got, and everything it leaves; safe to kill at any moment.

    recipe.yaml       the complete recipe
    manifest.json     versions, hardware, seeds, data and teacher, the table of stages
    metrics.jsonl     one line a step; tensorboard/ the same, where that is installed
    stages/1-hidden/  step-000040/ (the newest checkpoints while it runs), done/ (what it taught, when it is finished)
    student/          the exported Hugging Face folder
    eval.json, summary.md

Folders appear whole or not at all: they are written aside, flushed and renamed. Opening a directory again with the same
recipe goes on where it stopped; with another recipe it is refused with the difference.
"""

import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, run_on_main, run_on_main_with_tensors
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import AnyRecipe
from limbeck.core.storage import atomic_write_text, check_link, convert_write_errors, get_staging_folder, read_manifest
from limbeck.core.version import __version__
from limbeck.ops import fla
from limbeck.training.trackers import Trackers, resolve_trackers, steps_before

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# what may change when a run goes on: it changes nothing that is finished, and no number that is to come
FREE_TO_CHANGE = {"out", "name", "device", "evaluation", "checkpoint_seconds", "save_total_limit", "trackers"}
SHOWN = 12  # differences that are named
WIDE = 120  # characters of a value that is shown


class RunDirectory:
    """A run on disk. Use `open_run`."""

    def __init__(self, path: Path, recipe: AnyRecipe):
        self.path, self.recipe = path, recipe
        self.metrics_path = path / "metrics.jsonl"
        self.trackers = Trackers(resolve_trackers(recipe.trackers), path, recipe)

    # ------------------------------------------------------------------ stages

    def stage_folder(self, index: int) -> Path:
        """Folder of the stage at that place in the recipe."""
        return self.path / "stages" / f"{index}-{self.recipe.stages[index].stage}"

    def is_finished(self, index: int, *, verify: bool = False) -> bool:
        """Is that stage done, with its result whole on disk?

        Args:
            verify: compare checksums as well as sizes, and say where they differ; for whoever takes the result.
        """
        done = self.stage_folder(index) / "done"
        whole = load_valid_manifest(done, verify=verify) is not None
        if verify and not whole and done.exists():
            console.print(f"{done} is damaged, not what was written there: the stage is done again", markup=False)
        return whole

    def save_stage_result(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep what a stage taught and drop its checkpoints; note what computed it."""
        folder = self.stage_folder(index)
        self.update_manifest(backends=self._backends())
        self._publish(folder / "done", tensors, None, facts)
        for old in self._checkpoints(index):
            shutil.rmtree(old, ignore_errors=True)
        if any(self.is_finished(later) for later in range(index + 1, len(self.recipe.stages))):
            self._sort_log()  # a damaged stage was done again: its lines belong before those of later stages

    def load_stage_result(self, index: int) -> dict[str, Tensor]:
        """What a finished stage taught, by parameter name."""
        return load_file(self.stage_folder(index) / "done" / "model.safetensors")

    def load_stage_metrics(self, index: int) -> dict[str, Any]:
        """A finished stage's tokens, seconds, losses and data position."""
        return _facts(self.stage_folder(index) / "done")

    def save_checkpoint(
        self, index: int, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Keep the state after `step` optimiser steps; of older checkpoints so many as the recipe has."""
        self._publish(self.stage_folder(index) / f"step-{step:06d}", tensors, optimizer, facts)
        for old in self._checkpoints(index)[: -self.recipe.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)

    def load_last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        """Tensors, optimiser state and facts of the newest checkpoint that is whole."""
        for folder in reversed(self._checkpoints(index)):
            if load_valid_manifest(folder, verify=True):
                return self._load(folder)
            console.print(f"{folder} is damaged: the checkpoint before it is taken, if there is one", markup=False)
        return None

    # ------------------------------------------------------------------ logs

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.trackers.log(line)

    def truncate_log(self, index: int, step: int) -> None:
        """Drop the log lines of steps that a resumed stage will do again, and begin to log."""
        last = self._truncate_log(index, step) if self.metrics_path.exists() else 0
        self.trackers.start(steps_before(self.recipe, index) + step + 1, last)

    def _truncate_log(self, index: int, step: int) -> int:
        """Drop lines; the last step of the dropped ones, counted over all stages."""
        kept, last = [], 0
        for text in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the line that a kill cut short
                continue
            at = line["stage_index"]
            last = steps_before(self.recipe, at) + line["step"]
            if at < index or (at == index and line["step"] <= step) or (at > index and self.is_finished(at)):
                kept.append(text)
        self.write_file("metrics.jsonl", "".join(f"{text}\n" for text in kept))
        return last

    def _sort_log(self) -> None:
        """Put the log's lines into the order of stages and steps."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        places = [json.loads(text) for text in lines]
        order = sorted(range(len(lines)), key=lambda i: (places[i]["stage_index"], places[i]["step"]))
        self.write_file(self.metrics_path.name, "".join(f"{lines[i]}\n" for i in order))

    def write_file(self, name: str, text: str) -> None:
        """Write a small file at once."""
        atomic_write_text(self.path / name, text)

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        self.write_file(
            "manifest.json", json.dumps({**read_manifest(self.path), **facts}, indent=1, default=str) + "\n"
        )

    # ------------------------------------------------------------------ inside

    def _backends(self) -> list[dict[str, Any]]:
        """Which backend computed which operator, in this process and those before it."""
        known = read_manifest(self.path).get("backends", [])
        return [*known, *(one for one in fla.summarize_dispatch() if one not in known)]

    def _checkpoints(self, index: int) -> list[Path]:
        """The oldest first: by number, because step-1000100 comes before step-999999 as text."""
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

        need = sum(t.numel() * t.element_size() for t in tensors.values()) * (3 if optimizer is not None else 1)
        ensure_cached_folder(
            folder,
            fill,
            what=f"{'result' if optimizer is None else 'checkpoint'} {folder}",
            required_bytes=need,
            verify=True,
        )

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        optimizer = folder / "optimizer.pt"
        state = torch.load(optimizer, weights_only=True, map_location="cpu") if optimizer.exists() else {}
        return load_file(folder / "model.safetensors"), state, _facts(folder)


class DistributedRunDirectory(RunDirectory):
    """A run of several processes: process 0 alone reads and writes, and tells the others what they ask for.

    So a run needs no file system that all machines see.
    """

    def is_finished(self, index: int, *, verify: bool = False) -> bool:
        return run_on_main(lambda: RunDirectory.is_finished(self, index, verify=verify))

    def load_stage_result(self, index: int) -> dict[str, Tensor]:
        return run_on_main_with_tensors(lambda: RunDirectory.load_stage_result(self, index))

    def load_stage_metrics(self, index: int) -> dict[str, Any]:
        return run_on_main(lambda: RunDirectory.load_stage_metrics(self, index))

    def load_last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        return run_on_main_with_tensors(lambda: RunDirectory.load_last_checkpoint(self, index))

    def save_stage_result(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if get_process_info().is_main:
            super().save_stage_result(index, tensors, facts)

    def save_checkpoint(
        self, index: int, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        if get_process_info().is_main:
            super().save_checkpoint(index, step, tensors, optimizer, facts)

    def log(self, line: dict[str, Any]) -> None:
        if get_process_info().is_main:
            super().log(line)

    def truncate_log(self, index: int, step: int) -> None:
        if get_process_info().is_main:
            super().truncate_log(index, step)

    def write_file(self, name: str, text: str) -> None:
        if get_process_info().is_main:
            super().write_file(name, text)

    def update_manifest(self, **facts: Any) -> None:
        if get_process_info().is_main:
            super().update_manifest(**facts)


@contextmanager
def open_run(path: Path, recipe: AnyRecipe) -> Iterator[RunDirectory]:
    """The run directory at `path`, new or gone on with, held against other processes meanwhile.

    Raises:
        LimbeckError: the folder holds another run (with the difference), something else, or is in use.
    """
    if not get_process_info().is_main:
        yield DistributedRunDirectory(path, recipe)
        return
    check_run(path, recipe)
    with convert_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with lock_folder(path):
            for old in path.glob(".*.tmp"):  # of a process that was killed while it wrote
                if old.is_file():
                    old.unlink()
            run = (RunDirectory if get_process_info().world_size == 1 else DistributedRunDirectory)(path, recipe)
            run.write_file("recipe.yaml", recipe.to_yaml())
            try:
                yield run
            finally:
                run.trackers.close()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, where the system has file locks; the kernel lets go of it with its holder.

    Raises:
        LimbeckError: another process holds it.
    """
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LimbeckError(
                    f"another process is working on {folder}", hint="wait for it, or give another --out"
                ) from error
        yield


def remove_stale_export(path: Path) -> None:
    """Remove what a killed process left of an export, unless a living one is at work here."""
    stale = get_staging_folder(path / "student")
    if stale.exists():
        with suppress(LimbeckError, OSError), lock_folder(path):
            shutil.rmtree(stale, ignore_errors=True)


def check_run(path: Path, recipe: AnyRecipe) -> None:
    """Raises LimbeckError where `path` cannot become or go on being the directory of this run; writes nothing."""
    for folder in (path, path / "student"):
        check_link(folder)
    if path.exists() and not path.is_dir():
        raise LimbeckError(f"{path} is a file", expected="a folder for the run", hint="--out runs/another-name")
    old = path / "recipe.yaml"
    if not old.exists():
        if path.is_dir() and any(p.name != ".lock" and not p.name.startswith(".recipe") for p in path.iterdir()):
            raise LimbeckError(
                f"{path} holds files that are not a run",
                expected="a new or empty folder",
                hint="--out runs/another-name",
            )
        return
    before, now = _what_counts(type(recipe).load(old, stored=True)), _what_counts(recipe)
    changed = [line for key in now for line in describe_differences(key, before.get(key), now[key])]
    raise_if_changed(f"{path} holds another run", path, changed, "the same recipe, to go on with it")


def raise_if_changed(found: str, path: Path, changed: list[str], expected: str, hint: str = "") -> None:
    """Raises LimbeckError with the first of the differences where there are any; `hint` goes before a new --out."""
    if changed:
        more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise LimbeckError(
            f"{found}:\n  " + "\n  ".join([*changed[:SHOWN], *more]),
            expected=expected,
            hint=f"{hint}--out {path}-2   (a new run), or delete the folder",
        )


def _what_counts(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe without what may change when a run goes on."""
    raw = recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    for data in (raw["data"], *(stage["data"] or {} for stage in raw["stages"])):
        data.pop("cache_gb", None)  # room for tokens on disk, which are made again
    return raw


def collect_environment() -> dict[str, Any]:
    """Versions and hardware, for the manifest."""
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


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"]


def describe_differences(key: str, before: Any, now: Any) -> list[str]:
    """A line for each place where two plain values differ."""
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
        if any(isinstance(one, dict | list) for one in (*before, *now)):
            return [f"{key}: {_counted(before)} there, {_counted(now)} asked for"]
    return [f"{key}: {_short(before)} there, {_short(now)} asked for"]


def _counted(values: list[Any]) -> str:
    """How many entries a list has, and which stages they are."""
    names = [one["stage"] for one in values if isinstance(one, dict) and "stage" in one]
    return f"{len(values)} ({', '.join(names)})" if names else f"{len(values)}"


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= WIDE else f"{text[: WIDE - 4]} ..."
