"""Which weights, tokenizer and layers a run works with, by content: names say where something is, not what it is.

    weights_of(folder)                     # of a folder: settings, every tensor and code of its own
    weights_in(model)                      # of a model in memory
    job.identity = identity_of(...)        # what manifest.json keeps, and what a resume is compared with
    check_identity(path, job.identity)     # LimbeckError where a run was begun with something else

All are hex sha256. Two folders have the same fingerprint where they hold the same tensors under the same settings,
however these are spread over files; a single byte of a tensor makes another one.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, mixers
from limbeck.console import console
from limbeck.data import sources
from limbeck.data.cache import once_of, sha256_of
from limbeck.data.encode import tokenizer_key
from limbeck.errors import LimbeckError
from limbeck.hub import split_revision
from limbeck.mixers import registry
from limbeck.model.convert import assign
from limbeck.model.layers import as_ranges, converted_layers
from limbeck.recipe import Recipe, Student
from limbeck.stages.run import differences, manifest_of, refuse
from limbeck.teacher_recipe import TeacherRecipe

# of a config: what says how it was loaded or what its last call asked for, not what it computes
NO_MATTER = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "_attn_implementation", "attn_implementation",
}  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip
PIECE = 1 << 24  # bytes that are read at once
EMBEDDED = "embedded"


# ---------------------------------------------------------------------- fingerprints


def weights_of(folder: Path) -> str:
    """Fingerprint of a model's folder: its config, all tensors, and code that lies beside them."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        try:
            digest.update(_plain(_settings(json.loads(config.read_text(encoding="utf-8")))))
        except (ValueError, AttributeError):  # whoever loads it says what is wrong with it
            digest.update(config.read_bytes())
    files = _matching(folder, WEIGHTS)
    digest.update(_plain(sorted(line for file in files for line in once_of(file, _tensors_of).splitlines())))
    digest.update(_plain([[file.name, sha256_of(file)] for file in _matching(folder, ("*.py",))]))
    return digest.hexdigest()


def weights_in(model: PreTrainedModel) -> str:
    """Fingerprint of a model in memory: its class, config and tensors; about half a second for a gigabyte."""
    digest = hashlib.sha256(_plain([type(model).__name__, _settings(model.config.to_dict())]))
    digest.update(tensors_in(model).encode())
    return digest.hexdigest()


def tensors_in(model: PreTrainedModel) -> str:
    """Fingerprint of a model's tensors alone, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().data)
        else:  # what some modules keep of their own beside tensors
            digest.update(f"{name} {tensor!r}".encode())
    return digest.hexdigest()


def tokenizer_of(folder: Path) -> str:
    """Fingerprint of the files of a tokenizer."""
    files = _matching(folder, TOKENIZER)
    return hashlib.sha256(_plain([[file.name, sha256_of(file)] for file in files])).hexdigest()


def tokenizer_in(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of a tokenizer in memory: how it splits, its special tokens and its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    facts = [tokenizer_key(tokenizer), str(tokenizer.special_tokens_map), template]
    return hashlib.sha256(_plain(facts)).hexdigest()


def model_of(folder: Path) -> str:
    """Fingerprint of a model and its tokenizer together, for what is measured with both."""
    return hashlib.sha256(f"{weights_of(folder)} {tokenizer_of(folder)}".encode()).hexdigest()[:16]


def files_in(folder: str | None) -> str | None:
    """Fingerprint of all files of a folder, in it and below, by name and content; None for no folder."""
    if folder is None:
        return None
    root = Path(folder).expanduser()
    files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return hashlib.sha256(_plain([[str(file.relative_to(root)), sha256_of(file)] for file in files])).hexdigest()


def folder_of(name: str) -> Path | None:
    """Where the files of a model lie on this machine, by its name in a recipe; nothing is made or downloaded for it."""
    if name == EMBEDDED or name in TeacherRecipe.names():
        return assets.whole_folder(name)
    if (path := Path(name).expanduser()).is_dir():
        return path
    repository, revision = split_revision(name)
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(cached).parent if isinstance(cached, str) else None


# ---------------------------------------------------------------------- runs


def identity_of(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: int
) -> dict[str, Any]:
    """What a run works with, for its manifest.

    Args:
        layers: attention layers of the teacher.
    """
    folder = folder_of(recipe.teacher)
    return {
        "teacher": {
            "name": recipe.teacher,
            "architecture": type(teacher).__name__,
            "layers": layers,
            "commit": folder.name if folder and folder.parent.name == "snapshots" else None,  # in the hub's cache
            # what few-bit weights look like in memory is the business of a library and of a device
            "tensors": tensors_in(teacher) if recipe.teacher_bits is None else None,
            "config": json.loads(_plain(_settings(teacher.config.to_dict()))),
            "tokenizer": tokenizer_in(tokenizer),
            "files": _files(folder) if folder else None,
        },
        "student": student_of(recipe.student, layers, recipe.longest),
    }


def student_of(student: Student, layers: int, length: int) -> list[dict[str, Any]]:
    """Which mixer with which options stands in which layers, of a recipe's student: groups of layers.

    Args:
        layers: attention layers of the teacher.
        length: tokens of the longest sequences that it learns from.
    """
    rules = [rule.model_dump(exclude_none=True) for rule in student.rules]
    chosen = converted_layers(student.layers, student.softmax_layers, layers)
    assigned = assign(chosen, student.mixer, student.options, student.preset, rules, layers, length)
    groups: dict[str, tuple[Any, list[int]]] = {}
    for layer, one in assigned.items():
        groups.setdefault(_plain([one.mixer, one.options]).decode(), (one, []))[1].append(layer)
    return [
        {"layers": as_ranges(numbers), "mixer": one.mixer, "code": _code(one.mixer), "options": one.options}
        for one, numbers in groups.values()
    ]


def check_identity(path: Path, now: dict[str, Any]) -> None:
    """Raises LimbeckError where the run at `path` was begun with another teacher, tokenizer or student.

    What a manifest of an earlier version does not say is not compared.
    """
    begun = manifest_of(path)
    before, after = begun.get("teacher", {}), now["teacher"]
    compared = {"architecture": "class", "tokenizer": "tokenizer", "tensors": "weights"}
    if before.get("tensors") is None or after["tensors"] is None:
        compared["files"] = "files"
    name = after["name"]
    changed = [
        f"the teacher '{name}' has not the {what} that it had then"
        for key, what in compared.items()
        if before.get(key) is not None and before[key] != after[key]
    ]
    settings = before.get("config") or {}
    for key in settings:
        if key in after["config"]:  # what one version of transformers alone knows says nothing of a change
            changed += differences(f"the teacher '{name}', {key}", settings[key], after["config"][key])
    if begun.get("student"):
        changed += differences("the student", begun["student"], now["student"])
    refuse(
        f"the run {path} was begun with something else",
        path,
        changed,
        "the same teacher, tokenizer and mixers, to go on with it",
        "put it back, or ",
    )


def check_teachers(runs: dict[Path, Recipe]) -> None:
    """Raises LimbeckError where runs that are to be compared name one teacher and learnt from several.

    Args:
        runs: by their folders; those that have not begun yet would learn from what the name stands for now.
    """
    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for path, recipe in runs.items():
        files = manifest_of(path).get("teacher", {}).get("files")
        if files is None:
            continue
        first, theirs = seen.setdefault(recipe.teacher, (f"in the run {path.name}", files))
        folder = folder_of(recipe.teacher)
        now = _files(folder) if folder else files
        for where, ours in ((f"in the run {path.name}", files), ("now", now)):
            if ours != theirs:
                what = "tokenizer" if ours["weights"] == theirs["weights"] else "weights"
                raise LimbeckError(
                    f"the teacher '{recipe.teacher}' had other {what} {first} than {where}",
                    expected="one teacher for all runs that stand in one table",
                    hint="put the teacher back, delete the runs that shall be done again, or --out another folder",
                )


def looks_the_same(path: Path, recipe: Recipe) -> bool:
    """Whether a finished run would be the same today, from files alone: no model is loaded.

    What is not on this machine any more is not compared, and told. Where this says no, the run has to be opened to
    know more.
    """
    begun = manifest_of(path)
    teacher, student = begun.get("teacher", {}), begun.get("student")
    gone = []
    if teacher.get("files"):
        folder = folder_of(recipe.teacher)
        if folder is None:
            gone.append(f"teacher '{recipe.teacher}'")
        elif _files(folder) != teacher["files"]:
            return False
    for name, text in begun.get("texts", {}).items():
        data = json.loads(name)
        for source, content in zip(data["sources"] or [data], text.get("contents", [])):
            try:
                if content is not None and sources.fingerprint(source["source"]) != content:
                    return False
            except LimbeckError:
                gone.append(f"text '{source['source']}'")
    try:
        if student and student != json.loads(_plain(student_of(recipe.student, teacher["layers"], recipe.longest))):
            return False
    except LimbeckError as error:
        gone.append(f"student ({error.found})")
    if gone:
        console.print(f"not compared with what it was begun with: {', '.join(gone)}; not to be read here", markup=False)
    return True


# ---------------------------------------------------------------------- inside


def _files(folder: Path) -> dict[str, str]:
    return {"weights": weights_of(folder), "tokenizer": tokenizer_of(folder)}


def _code(mixer: str) -> str | None:
    """What says which code a mixer of others is: the hash of its file, or its package and version."""
    origin = registry.origin(mixer)
    if origin is None:
        return None
    if (text := mixers.registry.source(mixer)) is not None:
        return hashlib.sha256(text.encode()).hexdigest()
    return f"{origin.package} {importlib.metadata.version(origin.package)}" if origin.package else origin.module


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _tensors_of(file: Path) -> str:
    """A line for each tensor of a file: name, dtype, shape and sha256; for a file of another kind, or a damaged one, a
    line for all of it.
    """
    if file.suffix == ".safetensors":
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # whoever loads it says what is wrong with it
            return "\n".join(_safetensors(file))
    return f"{file.name} {sha256_of(file)}"


def _safetensors(file: Path) -> Iterator[str]:
    with open(file, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        end = file.stat().st_size - start
        if end < 0:
            raise ValueError
        for name, one in json.loads(handle.read(start - 8)).items():
            if name == "__metadata__":
                continue
            first, last = one["data_offsets"]
            if not 0 <= first <= last <= end:
                raise ValueError
            handle.seek(start + first)
            digest = hashlib.sha256()
            for piece in _pieces(handle, last - first):
                digest.update(piece)
            yield f"{name} {one['dtype']} {one['shape']} {digest.hexdigest()}"


def _pieces(handle: Any, count: int) -> Iterator[bytes]:
    while count > 0 and (piece := handle.read(min(PIECE, count))):
        count -= len(piece)
        yield piece


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in NO_MATTER}


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
