"""Tasks of lm-evaluation-harness by name, with data of the Hub or of an offline pack.

    catalog = TaskCatalog()                                             # 15,000 names; the index is cached
    names = catalog.resolve_names(["paper", "ai2_arc"])                 # suggests similar names for an unknown one
    catalog.find_data_sources("mmlu", "auto", num_fewshot=5)            # task -> "pack benchmarks" or "hub"
    task = catalog.load_task("arc_easy", "auto", num_fewshot=None)

A task keeps the harness' definition; with a pack only the location of its data changes (`limbeck.data.offline.packs`).

Needs the extra `eval`; import it late.
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
    """Silence the harness' warnings and the progress bars of datasets; restores both."""
    logger, had_bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


class TaskCatalog:
    """All available tasks, groups and tags.

    Args:
        include: a folder of further task definitions.
        defaults: whether the harness' own tasks are available.
    """

    @silence_harness()
    def __init__(self, include: str | None = None, defaults: bool = True):
        if include is not None and not Path(include).is_dir():
            raise LimbeckError(f"{include} is not a folder", expected="a folder of task definitions (YAML)")
        folders = packs.list_task_folders() + ([include] if include else [])
        self.manager = TaskManager(include_defaults=False, include_path=list(folders))
        if defaults:
            # Definitions of packs and of `include` take precedence over the harness' own.
            self.manager.task_index.update(_load_harness_index() | dict(self.manager.task_index))

    def resolve_names(self, names: list[str]) -> list[str]:
        """Resolve names of tasks, groups, tags and `TASK_SETS` to tasks and groups; each once, in order.

        Raises:
            LimbeckError: an unknown name; suggests similar names, or the command that installs its pack.
        """
        resolved: list[str] = []
        for name in names:
            entry = self.manager.task_index.get(name)
            if name in TASK_SETS:
                resolved += TASK_SETS[name]
            elif entry is None:
                raise self._make_unknown_task_error(name)
            elif entry.kind is Kind.TAG:
                resolved += self._list_leaves(name)
            elif entry.kind is Kind.GROUP and "aggregate_metric_list" not in _load_definition(entry):
                # A group without a score of its own is only a list of tasks.
                resolved += self._list_leaves(name)
            else:
                resolved.append(name)
        return list(dict.fromkeys(resolved))

    def find_data_sources(self, name: str, source: DatasetSource, num_fewshot: int | None) -> dict[str, str]:
        """Find where the data of a task, or of each task of a group, come from: "hub" or "pack ...". Loads nothing.

        Args:
            source: "pack", "hub", or "auto": a pack that has everything the task needs, else the Hub.
            num_fewshot: as in `simple_evaluate`; determines whether examples are needed.

        Raises:
            LimbeckError: `source` is "pack", and no pack has the data.
        """
        entries = {leaf: self._find_pack_entry(leaf, source, num_fewshot) for leaf in self._list_leaves(name)}
        return {leaf: entry[1] if entry else "hub" for leaf, entry in entries.items()}

    @silence_harness()
    def load_task(self, name: str, source: DatasetSource, num_fewshot: int | None) -> Task | Group:
        """Load a task or group with its data; see `find_data_sources`.

        Raises:
            LimbeckError: the data are not available; says what to do.
        """
        index = self.manager.task_index
        original_entries = {leaf: index[leaf] for leaf in self._list_leaves(name)}
        pack_entries = {leaf: self._find_pack_entry(leaf, source, num_fewshot) for leaf in original_entries}
        index.update({leaf: entry[0] for leaf, entry in pack_entries.items() if entry})
        try:
            loaded = self.manager.load([name])
        except ImportError as error:
            raise LimbeckError(f"task {name} needs {error.name or error}", hint=f"pip install {error.name}") from error
        except Exception as error:  # datasets, the Hub and the harness raise errors of many types
            leaf = next((leaf for leaf, entry in pack_entries.items() if entry is None), name)
            raise _make_no_data_error(leaf, original_entries.get(leaf, index[name]), summarize_error(error)) from error
        finally:
            index.update(original_entries)
        groups = loaded.get("groups") or {}
        return groups[name] if name in groups else loaded["tasks"][name]

    def _find_pack_entry(self, leaf: str, source: DatasetSource, num_fewshot: int | None) -> tuple[Entry, str] | None:
        """Find a task's definition with the data of a pack, and the pack; None if its data are the Hub's."""
        entry = self.manager.task_index[leaf]
        pack_entry = None if source == "hub" else _redirect_to_pack(entry, num_fewshot)
        if source == "pack" and pack_entry is None:
            needs = "the data and the few-shot examples" if num_fewshot else "the data"
            raise _make_no_data_error(leaf, entry, f"no pack has {needs} it needs")
        return pack_entry

    def _list_leaves(self, name: str) -> list[str]:
        """List the tasks of a task, group or tag."""
        entry = self.manager.task_index.get(name)
        if entry is None:
            return []  # an inline definition inside a group
        if entry.kind is Kind.TAG:
            return [leaf for child in sorted(entry.tags) for leaf in self._list_leaves(child)]
        if entry.kind is not Kind.GROUP:
            return [name]
        children = _load_definition(entry).get("task") or []
        names = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
        return [leaf for child in names if isinstance(child, str) for leaf in self._list_leaves(child)]

    def _make_unknown_task_error(self, name: str) -> LimbeckError:
        if pack := packs.find_pack_of_task(name):
            return LimbeckError(f"task '{name}' is part of the pack {pack.name}, which is missing", hint=pack.command)
        names = [*TASK_SETS, *self.manager.task_index]
        return LimbeckError(
            f"unknown task '{name}'{suggest_closest(name, names)}",
            expected=f"a task, group or tag of lm-evaluation-harness {lm_eval.__version__}, or the set 'paper'",
            hint="lm-eval ls tasks",
        )


def _load_definition(entry: Entry) -> dict[str, Any]:
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {}


def _redirect_to_pack(entry: Entry, num_fewshot: int | None) -> tuple[Entry, str] | None:
    """Redirect a task to a pack's files, and name the pack; None if no pack has everything it needs."""
    config = _load_definition(entry)
    dataset = packs.find_local_dataset(config.get("dataset_path", ""), config.get("dataset_name"))
    if dataset is None or "class" in config:
        return None
    splits = [config.get("test_split") or config.get("validation_split")]
    own_shots = config.get("num_fewshot")
    shots = num_fewshot if num_fewshot is not None and own_shots != 0 else own_shots
    fewshot_config = config.get("fewshot_config") or {}
    if shots and not fewshot_config.get("samples"):
        # The harness takes examples from the first of these splits that a task has.
        order = (fewshot_config.get("split"), config.get("fewshot_split"), config.get("training_split"))
        splits.append(next((split for split in order if split), config.get("validation_split") or splits[0]))
    if not all(split in dataset.data_files for split in splits):
        return None
    full = load_yaml(entry.yaml_path) if entry.yaml_path else dict(config)
    full |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": dataset.data_files}}
    full |= {key: None for key in SPLIT_KEYS if full.get(key) not in dataset.data_files}
    return replace(entry, yaml_path=None, cfg=full), f"pack {dataset.pack}"


def _make_no_data_error(name: str, entry: Entry, reason: str) -> LimbeckError:
    path = _load_definition(entry).get("dataset_path", "")
    pack = packs.find_pack_of_dataset(path)
    is_missing = pack is not None and packs.load_pack_manifest(pack) is None
    return LimbeckError(
        f"no data for task {name} ({path or 'no dataset'}): {reason}",
        expected="an offline pack with the data, or access to the Hugging Face Hub",
        hint=pack.command if pack and is_missing else "use a machine with access to the Hub, or another task",
    )


def _load_harness_index() -> dict[str, Entry]:
    """Load the index of the harness' own tasks, from the cache if possible: reading its 14,000 files takes 20 s."""
    root = Path(lm_eval.__file__).parent / "tasks"
    key = f"{lm_eval.__version__} {root} {root.stat().st_mtime_ns}"
    path = cache_root() / "harness" / "tasks.json"
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["key"] == key:
            return {
                name: Entry(name, Kind[kind], root / yaml_path if yaml_path else None, None, set(tags))
                for name, (kind, yaml_path, tags) in cached["entries"].items()
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, or of another version
    console.print("indexing the tasks of lm-evaluation-harness; this takes about 20 s, once")
    entries = TaskManager().task_index
    rows: dict[str, Any] = {}
    for name, entry in entries.items():
        yaml_path = entry.yaml_path.relative_to(root).as_posix() if entry.yaml_path else None
        rows[name] = [entry.kind.name, yaml_path, sorted(entry.tags)]
    atomic_write_text(path, json.dumps({"key": key, "entries": rows}))
    return entries
