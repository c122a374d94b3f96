"""The packs by name, and which of them has a dataset.

find("benchmarks"), present()
serving("piqa", None)       # the files of a pack that is there, else None
where("piqa")               # the pack that would have it
"""

from importlib import import_module

from limbeck.errors import LimbeckError, closest
from limbeck.packs.pack import TASKS, Dataset, Pack, Served, folder_of, manifest_of

MODULES = {  # name -> module with a PACK
    "benchmarks": "limbeck.packs.benchmarks",
    "long-documents": "limbeck.packs.long_documents",
}


def find(name: str) -> Pack:
    """Raises LimbeckError for a name that there is not."""
    if name not in MODULES:
        raise LimbeckError(f"unknown pack '{name}'{closest(name, MODULES)}", expected=f"one of: {', '.join(MODULES)}")
    return import_module(MODULES[name]).PACK


def present() -> list[Pack]:
    """The packs that are whole in the cache, by size only (fast)."""
    return [pack for pack in map(find, MODULES) if manifest_of(pack) is not None]


def serving(path: str, name: str | None) -> Served | None:
    """The files of a dataset in the first pack that is there and has it."""
    for pack in present():
        manifest = manifest_of(pack) or {"datasets": []}
        for entry in manifest["datasets"]:
            if entry["path"] == path and (entry["name"] or "default") == (name or "default"):
                dataset, folder = Dataset(**entry), folder_of(pack)
                return Served(pack.name, {split: str(folder / dataset.file(split)) for split in dataset.splits})
    return None


def where(path: str) -> Pack | None:
    """The pack that serves a dataset, whether it is there or not."""
    return next((pack for pack in map(find, MODULES) if path in pack.datasets), None)


def own_task(name: str) -> Pack | None:
    """The pack that defines a task itself, whether it is there or not."""
    return next((pack for pack in map(find, MODULES) if name in pack.tasks), None)


def task_folders() -> list[str]:
    """Folders of task definitions in the packs that are there, for the harness' `include_path`."""
    return [str(folder_of(pack) / TASKS) for pack in present() if (folder_of(pack) / TASKS).is_dir()]
