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
import shlex
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
from limbeck.console import console
from limbeck.data.cache import aside_of, check_link, no_room_is_an_error, publish, read_json, sound, write_text
from limbeck.distributed import on_main, tensors_from_main, world
from limbeck.errors import LimbeckError
from limbeck.stages.trackers import Trackers, chosen, steps_before
from limbeck.teacher_recipe import AnyRecipe

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
        self.metrics = path / "metrics.jsonl"
        self.trackers = Trackers(chosen(recipe.trackers), path, recipe)

    # ------------------------------------------------------------------ stages

    def stage_folder(self, index: int) -> Path:
        """Folder of the stage at that place in the recipe."""
        return self.path / "stages" / f"{index}-{self.recipe.stages[index].stage}"

    def finished(self, index: int, *, verify: bool = False) -> bool:
        """Is that stage done, with its result whole on disk?

        Args:
            verify: compare checksums as well as sizes, and say where they differ; for whoever takes the result.
        """
        done = self.stage_folder(index) / "done"
        whole = sound(done, verify=verify) is not None
        if verify and not whole and done.exists():
            console.print(f"{done} is damaged, not what was written there: the stage is done again", markup=False)
        return whole

    def finish(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep what a stage taught and drop its checkpoints; note what computed it."""
        folder = self.stage_folder(index)
        self.manifest(backends=self._backends())
        self._publish(folder / "done", tensors, None, facts)
        for old in self._checkpoints(index):
            shutil.rmtree(old, ignore_errors=True)
        if any(self.finished(later) for later in range(index + 1, len(self.recipe.stages))):
            self._sort_log()  # a damaged stage was done again: its lines belong before those of later stages

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
        for old in self._checkpoints(index)[: -self.recipe.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)

    def last_checkpoint(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
        """Tensors, optimiser state and facts of the newest checkpoint that is whole."""
        for folder in reversed(self._checkpoints(index)):
            if sound(folder, verify=True):
                return self._load(folder)
            console.print(f"{folder} is damaged: the checkpoint before it is taken, if there is one", markup=False)
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
            at = line["stage_index"]
            last = steps_before(self.recipe, at) + line["step"]
            if at < index or (at == index and line["step"] <= step) or (at > index and self.finished(at)):
                kept.append(text)
        self.write("metrics.jsonl", "".join(f"{text}\n" for text in kept))
        return last

    def _sort_log(self) -> None:
        """Put the log's lines into the order of stages and steps."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        places = [json.loads(text) for text in lines]
        order = sorted(range(len(lines)), key=lambda i: (places[i]["stage_index"], places[i]["step"]))
        self.write(self.metrics.name, "".join(f"{lines[i]}\n" for i in order))

    def write(self, name: str, text: str) -> None:
        """Write a small file at once."""
        write_text(self.path / name, text)

    def manifest(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        self.write("manifest.json", json.dumps({**manifest_of(self.path), **facts}, indent=1, default=str) + "\n")

    # ------------------------------------------------------------------ inside

    def _backends(self) -> list[dict[str, Any]]:
        """Which backend computed which operator, in this process and those before it."""
        known = manifest_of(self.path).get("backends", [])
        return [*known, *(one for one in kernels.report() if one not in known)]

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
        publish(
            folder,
            fill,
            what=f"{'result' if optimizer is None else 'checkpoint'} {folder}",
            need_bytes=need,
            verify=True,
        )

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        optimizer = folder / "optimizer.pt"
        state = torch.load(optimizer, weights_only=True, map_location="cpu") if optimizer.exists() else {}
        return load_file(folder / "model.safetensors"), state, _facts(folder)


class SharedRun(RunDirectory):
    """A run of several processes: process 0 alone reads and writes, and tells the others what they ask for.

    So a run needs no file system that all machines see.
    """

    def finished(self, index: int, *, verify: bool = False) -> bool:
        return on_main(lambda: RunDirectory.finished(self, index, verify=verify))

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
            for old in path.glob(".*.tmp"):  # of a process that was killed while it wrote
                if old.is_file():
                    old.unlink()
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
    before, now = _what_counts(type(recipe).load(old, stored=True)), _what_counts(recipe)
    changed = [line for key in now for line in differences(key, before.get(key), now[key])]
    refuse(f"{path} holds another run", path, changed, "the same recipe, to go on with it")


def refuse(found: str, path: Path, changed: list[str], expected: str, hint: str = "") -> None:
    """Raises LimbeckError with the first of the differences where there are any; `hint` goes before a new --out."""
    if changed:
        more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise LimbeckError(
            f"{found}:\n  " + "\n  ".join([*changed[:SHOWN], *more]),
            expected=expected,
            hint=f"{hint}--out {path}-2   (a new run), or delete the folder",
        )


def manifest_of(path: Path) -> dict[str, Any]:
    """What a run's manifest.json says; nothing where there is none yet.

    Raises:
        LimbeckError: it is damaged.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    return read_json(file, f"rm {shlex.quote(str(file))}   (the run goes on without comparing what it was begun with)")


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


def differences(key: str, before: Any, now: Any) -> list[str]:
    """A line for each place where two plain values differ."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in differences(f"{key}.{k}", before.get(k), now.get(k))]
    if isinstance(before, list) and isinstance(now, list):
        if len(before) == len(now):
            return [line for i, pair in enumerate(zip(before, now)) for line in differences(f"{key}.{i}", *pair)]
        if any(isinstance(one, dict | list) for one in (*before, *now)):
            return [f"{key}: {_counted(before)} there, {_counted(now)} asked for"]
    return [f"{key}: {_short(before)} there, {_short(now)} asked for"]


def _counted(values: list[Any]) -> str:
    """How many entries a list has, and which stages they are."""
    names = [one["stage"] for one in values if isinstance(one, dict) and "stage" in one]
    return f"{len(values)} ({', '.join(names)})" if names else f"{len(values)}"


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= WIDE else f"{text[: WIDE - 4]} ..."
