"""Datasets of the package `datasets`: a folder on disk, or a name on the Hugging Face hub.

    rows = LoadedDataset(load_hub_dataset("owner/name@train", streaming=True), "owner/name@train")
    for text in iter_dataset_texts(rows.dataset, "text", check, rows.label):
        ...

Errors name the dataset as the user wrote it.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.cache import raise_if_dry_run
from limbeck.core.errors import LimbeckError

HUB_NAME_PATTERN = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
SUPPORTED_SOURCES = (
    "a .txt, .md, .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (all but the last .gz too), a folder of them, "
    "a folder made by datasets.save_to_disk, a Hugging Face dataset 'owner/name', or 'embedded'"
)
LIKELY = ("text", "content", "body", "document", "article", "output", "response", "completion")  # fields of text
INSTALL_DATA_HINT = "pip install 'limbeck[data]'"

TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")  # fields beside the messages that a chat template is given
FieldReader = Callable[[Any, str, str, dict[str, Any]], str | None]  # value, field, place, the row: the document


@dataclass(frozen=True)
class LoadedDataset:
    """A dataset of the package `datasets` that is open already, or a part of one; `label` is for messages."""

    dataset: Any
    label: str


def missing_field_error(text_field: str, fields: Any, place: str) -> LimbeckError:
    """The error where a record has no such field."""
    names = ", ".join(map(str, fields)) or "none"
    likely = "text" if "messages" in fields else next((name for name in LIKELY if name in fields), None)
    if likely is None and isinstance(fields, dict):
        likely = max(fields, key=lambda name: len(fields[name]) if isinstance(fields[name], str) else 0)
    chosen = likely or next(iter(fields), "text")
    return LimbeckError(
        f"{place}: no field '{text_field}', only: {names}",
        expected="the name of the field that holds the text",
        hint=f"--set {shlex.quote(f'data.text_field={chosen}')}",
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise LimbeckError("this source needs the package 'datasets'", hint=INSTALL_DATA_HINT) from error
    return datasets


def load_saved_dataset(root: Path, split: str | None) -> Any:
    """A split of a folder made by datasets.save_to_disk."""
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(root))
    except Exception as error:  # whatever `datasets` trips over, the folder is what the user can look at
        raise LimbeckError(
            f"datasets cannot load '{root}': {error}", expected="a folder made by datasets.save_to_disk"
        ) from error
    return _one_split(dataset, split, str(root))


def load_hub_dataset(source: str, *, streaming: bool = False) -> Any:
    """A split of a dataset by its name on the hub; streamed, nothing is downloaded yet."""
    match = HUB_NAME_PATTERN.fullmatch(source)
    assert match is not None, source
    datasets = _datasets()
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
    return _one_split(dataset, match["split"], source)


def _one_split(dataset: Any, split: str | None, place: str) -> Any:
    """The dataset of one split: the one that was named, else `train`, else the only one."""
    if not isinstance(dataset, dict):
        if split is not None:
            raise LimbeckError(f"'{place}' has no splits, '{split}' was asked for", hint=f"leave out '@{split}'")
        return dataset
    chosen = split or ("train" if "train" in dataset else None) or (next(iter(dataset)) if len(dataset) == 1 else None)
    if chosen not in dataset:
        asked = f"no split '{split}'" if split else "several splits and none called train"
        raise LimbeckError(f"'{place}': {asked}, found: {', '.join(dataset)}", hint=f"{place}@{next(iter(dataset))}")
    return dataset[chosen]


def iter_dataset_texts(dataset: Any, text_field: str, value_of: FieldReader, place: str) -> Iterator[str | None]:
    """The documents of a dataset."""
    if dataset.column_names is not None:  # a streamed dataset may not know them
        if text_field not in dataset.column_names:
            raise missing_field_error(text_field, dataset.column_names, place)
        dataset = dataset.select_columns(
            [name for name in (text_field, *TEMPLATE_FIELDS) if name in dataset.column_names]
        )
    for batch in dataset.iter(batch_size=1000):
        if text_field not in batch:
            raise missing_field_error(text_field, batch, place)
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            yield value_of(row[text_field], text_field, place, row)
