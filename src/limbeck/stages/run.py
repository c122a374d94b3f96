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
import os
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

from limbeck import __version__, kernels
from limbeck.data.cache import aside_of, check_link, no_room_is_an_error, publish, sound
from limbeck.distributed import on_main, tensors_from_main, world
from limbeck.errors import LimbeckError
from limbeck.stages.trackers import Trackers, chosen, steps_before
from limbeck.teacher_recipe import AnyRecipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# what may change when a run goes on: it changes nothing that is finished, and no number that is to come
FREE_TO_CHANGE = {"out", "name", "device", "evaluation", "checkpoint_seconds", "keep_checkpoints", "trackers"}


class RunDirectory:
    """A run on disk. Use `open_run`."""

    def __init__(self, path: Path, recipe: AnyRecipe):
        self.path, self.recipe = path, recipe
        self.metrics = path / "metrics.jsonl"
        self.trackers = Trackers(chosen(recipe.trackers), path, recipe)

    # ------------------------------------------------------------------ stages

    def stage_folder(self, index: int) -> Path:
        """Folder of the stage at that place in the recipe."""
        return self.path / "stages" / f"{index}-{self.recipe.stages[index].stage}"

    def finished(self, index: int) -> bool:
        """Is that stage done, with its result whole on disk?"""
        return sound(self.stage_folder(index) / "done") is not None

    def finish(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep what a stage taught and drop its checkpoints; note what computed it."""
        folder = self.stage_folder(index)
        self.manifest(backends=self._backends())
        self._publish(folder / "done", tensors, None, facts)
        for old in self._checkpoints(index):
            shutil.rmtree(old, ignore_errors=True)

    def result(self, index: int) -> dict[str, Tensor]:
        """What a finished stage taught, by parameter name."""
        return load_file(self.stage_folder(index) / "done" / "model.safetensors")

    def facts(self, index: int) -> dict[str, Any]:
        """A finished stage's tokens, seconds, losses and data position."""
        return _facts(self.stage_folder(index) / "done")

    def checkpoint(
        self, index: int, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Keep the state after `step` optimiser steps; of older checkpoints so many as the recipe has."""
        self._publish(self.stage_folder(index) / f"step-{step:06d}", tensors, optimizer, facts)
        for old in self._checkpoints(index)[: -self.recipe.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    def last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        """Tensors, optimiser state and facts of the newest checkpoint that is whole."""
        for folder in reversed(self._checkpoints(index)):
            if sound(folder, verify=True):
                return self._load(folder)
        return None

    # ------------------------------------------------------------------ logs

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.trackers.log(line)

    def forget(self, index: int, step: int) -> None:
        """Drop the log lines of steps that a resumed stage will do again, and begin to log."""
        last = self._forget(index, step) if self.metrics.exists() else 0
        self.trackers.begin(steps_before(self.recipe, index) + step + 1, last)

    def _forget(self, index: int, step: int) -> int:
        """Drop lines; the last step of the dropped ones, counted over all stages."""
        kept, last = [], 0
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the line that a kill cut short
                continue
            last = steps_before(self.recipe, line["stage_index"]) + line["step"]
            if line.get("stage_index", -1) < index or (line.get("stage_index") == index and line["step"] <= step):
                kept.append(text)
        self.write("metrics.jsonl", "".join(f"{text}\n" for text in kept))
        return last

    def write(self, name: str, text: str) -> None:
        """Write a small file at once."""
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def manifest(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        path = self.path / "manifest.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.write("manifest.json", json.dumps({**known, **facts}, indent=1, default=str) + "\n")

    # ------------------------------------------------------------------ inside

    def _backends(self) -> list[dict[str, Any]]:
        """Which backend computed which operator, in this process and those before it."""
        path = self.path / "manifest.json"
        known = json.loads(path.read_text(encoding="utf-8")).get("backends", []) if path.exists() else []
        return [*known, *(one for one in kernels.report() if one not in known)]

    def _checkpoints(self, index: int) -> list[Path]:
        return sorted(self.stage_folder(index).glob("step-*"))

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
        publish(folder, fill, what=f"checkpoint {folder.name}", need_bytes=need)

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        optimizer = folder / "optimizer.pt"
        state = torch.load(optimizer, weights_only=True, map_location="cpu") if optimizer.exists() else {}
        return load_file(folder / "model.safetensors"), state, _facts(folder)


class SharedRun(RunDirectory):
    """A run of several processes: process 0 alone reads and writes, and tells the others what they ask for.

    So a run needs no file system that all machines see.
    """

    def finished(self, index: int) -> bool:
        return on_main(lambda: RunDirectory.finished(self, index))

    def result(self, index: int) -> dict[str, Tensor]:
        return tensors_from_main(lambda: RunDirectory.result(self, index))

    def facts(self, index: int) -> dict[str, Any]:
        return on_main(lambda: RunDirectory.facts(self, index))

    def last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        return tensors_from_main(lambda: RunDirectory.last_checkpoint(self, index))

    def finish(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if world().main:
            super().finish(index, tensors, facts)

    def checkpoint(
        self, index: int, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        if world().main:
            super().checkpoint(index, step, tensors, optimizer, facts)

    def log(self, line: dict[str, Any]) -> None:
        if world().main:
            super().log(line)

    def forget(self, index: int, step: int) -> None:
        if world().main:
            super().forget(index, step)

    def write(self, name: str, text: str) -> None:
        if world().main:
            super().write(name, text)

    def manifest(self, **facts: Any) -> None:
        if world().main:
            super().manifest(**facts)


@contextmanager
def open_run(path: Path, recipe: AnyRecipe) -> Iterator[RunDirectory]:
    """The run directory at `path`, new or gone on with, held against other processes meanwhile.

    Raises:
        LimbeckError: the folder holds another run (with the difference), something else, or is in use.
    """
    if not world().main:
        yield SharedRun(path, recipe)
        return
    check_run(path, recipe)
    with no_room_is_an_error(path):
        path.mkdir(parents=True, exist_ok=True)
        with held(path):
            run = (RunDirectory if world().size == 1 else SharedRun)(path, recipe)
            run.write("recipe.yaml", recipe.to_yaml())
            try:
                yield run
            finally:
                run.trackers.end()


@contextmanager
def held(folder: Path) -> Iterator[None]:
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


def sweep(path: Path) -> None:
    """Remove what a killed process left of an export, unless a living one is at work here."""
    stale = aside_of(path / "student")
    if stale.exists():
        with suppress(LimbeckError, OSError), held(path):
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
    before, now = _what_counts(type(recipe).load(old)), _what_counts(recipe)
    changed = [line for key in now for line in _difference(key, before.get(key), now[key])]
    if changed:
        raise LimbeckError(
            f"{path} holds another run:\n  " + "\n  ".join(changed),
            expected="the same recipe, to go on with it",
            hint=f"--out {path}-2   (a new run), or delete the folder",
        )


def _what_counts(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe without what may change when a run goes on."""
    raw = recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    for data in (raw["data"], *(stage["data"] or {} for stage in raw["stages"])):
        data.pop("cache_gb", None)  # room for tokens on disk, which are made again
    return raw


def environment() -> dict[str, Any]:
    """Versions and hardware, for the manifest."""
    return {
        "limbeck": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": world().size,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "opened": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"]


def _difference(key: str, before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in _difference(f"{key}.{k}", before.get(k), now.get(k))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for i, pair in enumerate(zip(before, now)) for line in _difference(f"{key}.{i}", *pair)]
    return [f"{key}: {before!r} there, {now!r} asked for"]
