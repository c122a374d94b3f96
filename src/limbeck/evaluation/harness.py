"""lm-evaluation-harness' tasks by name, over the hub's data or a pack's.

    catalog = TaskCatalog()                                  # 15,000 names; read once, then from the cache
    names = catalog.resolve_names(["paper", "ai2_arc"])           # LimbeckError with near matches for an unknown one
    catalog.find_data_sources("mmlu", "auto", num_fewshot=5)            # task -> "pack benchmarks" or "hub"
    task = catalog.load_task("arc_easy", "auto", num_fewshot=None)

A task keeps the harness' definition; over a pack only the place of its data is another (`limbeck.data.offline.packs`). The module
needs the extra `eval` and is imported late.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError, suggest_closest, summarize_error
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.data.offline import packs

DatasetSource = Literal["auto", "pack", "hub"]
TASK_SETS = {"paper": ("lambada_openai", "winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag")}
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@contextmanager
def silence_harness() -> Iterator[None]:
    """Neither advice of the harness nor bars of datasets for what is inside; afterwards as before."""
    logger, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


class TaskCatalog:
    """All tasks, groups and tags that there are.

    Args:
        include: a folder of further task definitions.
        defaults: whether the harness' own tasks belong to it.
    """

    @silence_harness()
    def __init__(self, include: str | None = None, defaults: bool = True):
        if include is not None and not Path(include).is_dir():
            raise LimbeckError(f"{include} is no folder", expected="a folder of the harness' task definitions (YAML)")
        folders = packs.list_task_folders() + ([include] if include else [])
        self.manager = TaskManager(include_defaults=False, include_path=list(folders))
        if defaults:
            own = dict(self.manager.task_index)
            self.manager.task_index.update(_harness_entries() | own)

    def resolve_names(self, names: list[str]) -> list[str]:
        """Tasks and groups for names of tasks, groups, tags and of `TASK_SETS`; each once, in order.

        Raises:
            LimbeckError: a name that there is not, with near ones, or the command that brings its pack.
        """
        found: list[str] = []
        for name in names:
            entry = self.manager.task_index.get(name)
            if name in TASK_SETS:
                found += TASK_SETS[name]
            elif entry is None:
                raise self._unknown(name)
            elif entry.kind is Kind.TAG or (
                entry.kind is Kind.GROUP and "aggregate_metric_list" not in _definition(entry)
            ):
                found += self._leaves(name)
            else:
                found.append(name)
        return list(dict.fromkeys(found))

    def find_data_sources(self, name: str, source: DatasetSource, num_fewshot: int | None) -> dict[str, str]:
        """Where the data of a task, or of each task of a group, come from: "hub" or "pack ...". Nothing is loaded.

        Args:
            source: "pack", "hub", or "auto": a pack that has all that the task needs, else the hub.
            num_fewshot: as in `simple_evaluate`; says whether examples are needed.

        Raises:
            LimbeckError: a pack is asked for, and none has it.
        """
        places = {leaf: self._place(leaf, source, num_fewshot) for leaf in self._leaves(name)}
        return {leaf: place[1] if place else "hub" for leaf, place in places.items()}

    @silence_harness()
    def load_task(self, name: str, source: DatasetSource, num_fewshot: int | None) -> Task | Group:
        """A task or group with its data; see `find_data_sources`.

        Raises:
            LimbeckError: no data: what to do.
        """
        index = self.manager.task_index
        before = {leaf: index[leaf] for leaf in self._leaves(name)}
        places = {leaf: self._place(leaf, source, num_fewshot) for leaf in before}
        index.update({leaf: place[0] for leaf, place in places.items() if place})
        try:
            built = self.manager.load([name])
        except ImportError as error:
            raise LimbeckError(f"task {name} needs {error.name or error}", hint=f"pip install {error.name}") from error
        except Exception as error:  # datasets, the hub and the harness each have their own
            first = next((leaf for leaf, place in places.items() if place is None), name)
            raise _no_data(first, before.get(first, index[name]), summarize_error(error)) from error
        finally:
            index.update(before)
        groups = built.get("groups") or {}
        return groups[name] if name in groups else built["tasks"][name]

    def _place(self, leaf: str, source: DatasetSource, num_fewshot: int | None) -> tuple[Entry, str] | None:
        """A task over a pack's files, and which pack; None where it is the hub's."""
        entry = self.manager.task_index[leaf]
        served = None if source == "hub" else _over_a_pack(entry, num_fewshot)
        if source == "pack" and served is None:
            raise _no_data(leaf, entry, "no pack has what it needs" + (" for examples" if num_fewshot else ""))
        return served

    def _leaves(self, name: str) -> list[str]:
        """Names of the tasks below a task or group."""
        entry = self.manager.task_index.get(name)
        if entry is None:
            return []  # an inline definition inside a group
        if entry.kind is Kind.TAG:
            return [leaf for one in sorted(entry.tags) for leaf in self._leaves(one)]
        if entry.kind is not Kind.GROUP:
            return [name]
        children = _definition(entry).get("task") or []
        names = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in children]
        return [leaf for one in names if isinstance(one, str) for leaf in self._leaves(one)]

    def _unknown(self, name: str) -> LimbeckError:
        if pack := packs.find_pack_of_task(name):
            return LimbeckError(f"task '{name}' comes with the pack {pack.name}, which is not here", hint=pack.command)
        known = [*TASK_SETS, *self.manager.task_index]
        return LimbeckError(
            f"unknown task '{name}'{suggest_closest(name, known)}",
            expected=f"a task, group or tag of lm-evaluation-harness {lm_eval.__version__}, or the set 'paper'",
            hint="lm-eval ls tasks",
        )


def _definition(entry: Entry) -> dict[str, Any]:
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {}


def _over_a_pack(entry: Entry, num_fewshot: int | None) -> tuple[Entry, str] | None:
    """The same task over a pack's files, and the pack; None where no pack has all that it needs."""
    config = _definition(entry)
    served = packs.find_local_dataset(config.get("dataset_path", ""), config.get("dataset_name"))
    if served is None or "class" in config:
        return None
    shots = config.get("num_fewshot")
    shots = num_fewshot if num_fewshot is not None and shots != 0 else shots
    needed = [config.get("test_split") or config.get("validation_split")]
    examples = config.get("fewshot_config") or {}
    if shots and not examples.get("samples"):
        order = (examples.get("split"), config.get("fewshot_split"), config.get("training_split"))
        needed.append(next((one for one in order if one), config.get("validation_split") or needed[0]))
    if not all(split in served.data_files for split in needed):
        return None
    full = load_yaml(entry.yaml_path) if entry.yaml_path else dict(config)
    full |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": served.data_files}}
    full |= {key: None for key in SPLIT_KEYS if full.get(key) not in served.data_files}
    return replace(entry, yaml_path=None, cfg=full), f"pack {served.pack}"


def _no_data(name: str, entry: Entry, said: str) -> LimbeckError:
    config = _definition(entry)
    path = config.get("dataset_path", "")
    pack = packs.find_pack_of_dataset(path)
    missing = pack is not None and packs.load_pack_manifest(pack) is None
    return LimbeckError(
        f"no data for task {name} ({path or 'no dataset'}): {said}",
        expected="the pack that has it, or a Hugging Face hub that can be reached",
        hint=pack.command if pack and missing else "a machine that reaches the hub, or another task",
    )


def _harness_entries() -> dict[str, Entry]:
    """The index of the harness' own tasks. Reading its 14,000 files takes 20 s, so names and places are kept."""
    root = Path(lm_eval.__file__).parent / "tasks"
    key = f"{lm_eval.__version__} {root} {root.stat().st_mtime_ns}"
    path = cache_root() / "harness" / "tasks.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return {
                name: Entry(name, Kind[kind], root / place if place else None, None, set(tags))
                for name, (kind, place, tags) in stored["entries"].items()
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or of another version
    console.print("reading the names of lm-evaluation-harness' tasks, once (about 20 s)")
    entries = TaskManager().task_index
    rows: dict[str, Any] = {}
    for name, one in entries.items():
        place = one.yaml_path.relative_to(root).as_posix() if one.yaml_path else None
        rows[name] = [one.kind.name, place, sorted(one.tags)]
    atomic_write_text(path, json.dumps({"key": key, "entries": rows}))
    return entries
