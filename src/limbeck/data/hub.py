"""Datasets of the package `datasets`: a folder on disk, or a name on the Hugging Face Hub.

    dataset = load_hub_dataset("owner/name@train", streaming=True)
    for text in iter_dataset_texts(dataset, "text", extract_text, "owner/name@train"):
        ...

Errors name the dataset as the user wrote it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.cache import raise_if_dry_run
from limbeck.core.errors import LimbeckError
from limbeck.data.records import (
    INSTALL_DATA_HINT,
    TEMPLATE_FIELDS,
    FieldReader,
    convert_read_errors,
    find_column,
    iter_field,
    list_text_fields,
    missing_field_error,
)

HUB_NAME_PATTERN = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
SUPPORTED_SOURCES = (
    "a .txt, .md, .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (all but the last .gz too), a folder of them, "
    "a folder made by datasets.save_to_disk, a Hugging Face dataset 'owner/name', or 'embedded'"
)


@dataclass(frozen=True)
class LoadedDataset:
    """A dataset of the package `datasets` that is open already, or a part of one; `label` is for messages."""

    dataset: Any
    label: str


def iter_dataset_texts(dataset: Any, text_field: str, extract: FieldReader, label: str) -> Iterator[str | None]:
    """Yield the document of each row; see `records.read_file`."""
    if dataset.column_names is not None:  # a streamed dataset may not know them
        names = dataset.column_names
        if (column := find_column(text_field, names)) is None:
            texts = list_text_fields(dataset.features.arrow_schema) if dataset.features else None
            raise missing_field_error(text_field, names, label, texts)
        dataset = dataset.select_columns([name for name in (column, *TEMPLATE_FIELDS) if name in names])
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            for value in iter_field(row, text_field, label):
                yield extract(value, text_field, label, row)


def is_saved_dataset(root: Path) -> bool:
    """Return whether a folder was made by `datasets.save_to_disk`."""
    with convert_read_errors(root):
        return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def load_saved_dataset(root: Path, split: str | None) -> Any:
    """Load a split of a folder made by `datasets.save_to_disk`."""
    datasets = _import_datasets()
    try:
        dataset = datasets.load_from_disk(str(root))
    except Exception as error:  # whatever `datasets` trips over, the folder is what the user can look at
        raise LimbeckError(
            f"datasets cannot load '{root}': {error}", expected="a folder made by datasets.save_to_disk"
        ) from error
    return _select_split(dataset, split, str(root))


def load_hub_dataset(source: str, *, streaming: bool = False) -> Any:
    """Load a split of a dataset by its name on the Hub; with `streaming` nothing is downloaded yet."""
    match = HUB_NAME_PATTERN.fullmatch(source)
    assert match is not None, source
    datasets = _import_datasets()
    if not streaming:
        raise_if_dry_run(f"the dataset '{source}' from the hub")
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], **({"streaming": True} if streaming else {}))
    except Exception as error:  # no network, no such dataset, no access, several configs: `datasets` says which
        raise LimbeckError(
            f"there is no file or folder '{source}', and the Hugging Face dataset of that name cannot be loaded: "
            f"{type(error).__name__}: {error}",
            expected=SUPPORTED_SOURCES,
            hint="check the name and the network, or train on the embedded text: embedded",
        ) from error
    return _select_split(dataset, match["split"], source)


def get_hub_shard_name(dataset: Any, index: int) -> str:
    """Return the file of a streamed dataset's shard, with its version on the Hub, where `datasets` tells."""
    files = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", {}).get("base_files") or []
    return str(files[index]) if len(files) == dataset.num_shards else f"shard-{index}"


def _import_datasets() -> Any:
    try:
        import datasets  # optional dependency
    except ImportError as error:
        raise LimbeckError("this source needs the package 'datasets'", hint=INSTALL_DATA_HINT) from error
    return datasets


def _select_split(dataset: Any, split: str | None, label: str) -> Any:
    """The split that was named, else `train`, else the only one."""
    if not isinstance(dataset, dict):
        if split is not None:
            raise LimbeckError(f"'{label}' has no splits, so no '{split}'", hint=f"leave out '@{split}'")
        return dataset
    chosen = split or ("train" if "train" in dataset else None) or (next(iter(dataset)) if len(dataset) == 1 else None)
    if chosen not in dataset:
        problem = f"no split '{split}'" if split else "several splits and none called train"
        raise LimbeckError(f"'{label}': {problem}, found: {', '.join(dataset)}", hint=f"{label}@{next(iter(dataset))}")
    return dataset[chosen]
