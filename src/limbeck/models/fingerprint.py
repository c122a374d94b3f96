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

from limbeck import mixers
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.storage import compute_sha256, digest_once
from limbeck.data.tokenization import hash_tokenizer_rules
from limbeck.mixers import registry
from limbeck.models import loading
from limbeck.models.hub import split_revision

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


def fingerprint_checkpoint(folder: Path) -> str:
    """Fingerprint of a model's folder: its config, all tensors, and code that lies beside them."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        try:
            digest.update(_plain(_settings(json.loads(config.read_text(encoding="utf-8")))))
        except (ValueError, AttributeError):  # whoever loads it says what is wrong with it
            digest.update(config.read_bytes())
    files = _matching(folder, WEIGHTS)
    digest.update(_plain(sorted(line for file in files for line in digest_once(file, _tensors_of).splitlines())))
    digest.update(_plain([[file.name, compute_sha256(file)] for file in _matching(folder, ("*.py",))]))
    return digest.hexdigest()


def fingerprint_model(model: PreTrainedModel) -> str:
    """Fingerprint of a model in memory: its class, config and tensors; about half a second for a gigabyte."""
    digest = hashlib.sha256(_plain([type(model).__name__, _settings(model.config.to_dict())]))
    digest.update(fingerprint_tensors(model).encode())
    return digest.hexdigest()


def fingerprint_tensors(model: PreTrainedModel) -> str:
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


def fingerprint_tokenizer_files(folder: Path) -> str:
    """Fingerprint of the files of a tokenizer."""
    files = _matching(folder, TOKENIZER)
    return hashlib.sha256(_plain([[file.name, compute_sha256(file)] for file in files])).hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of a tokenizer in memory: how it splits, its special tokens and its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    facts = [hash_tokenizer_rules(tokenizer), str(tokenizer.special_tokens_map), template]
    return hashlib.sha256(_plain(facts)).hexdigest()


def fingerprint_checkpoint_with_tokenizer(folder: Path) -> str:
    """Fingerprint of a model and its tokenizer together, for what is measured with both."""
    return hashlib.sha256(
        f"{fingerprint_checkpoint(folder)} {fingerprint_tokenizer_files(folder)}".encode()
    ).hexdigest()[:16]


def fingerprint_folder(folder: str | None) -> str | None:
    """Fingerprint of all files of a folder, in it and below, by name and content; None for no folder."""
    if folder is None:
        return None
    root = Path(folder).expanduser()
    files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return hashlib.sha256(_plain([[str(file.relative_to(root)), compute_sha256(file)] for file in files])).hexdigest()


def find_model_folder(name: str) -> Path | None:
    """Where the files of a model lie on this machine, by its name in a recipe; nothing is made or downloaded for it."""
    if name == EMBEDDED or name in TeacherRecipe.names():
        return loading.find_cached_teacher(name)
    if (path := Path(name).expanduser()).is_dir():
        return path
    repository, revision = split_revision(name)
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _files(folder: Path) -> dict[str, str]:
    return {"weights": fingerprint_checkpoint(folder), "tokenizer": fingerprint_tokenizer_files(folder)}


def _code(mixer: str) -> str | None:
    """What says which code a mixer of others is: the hash of its file, or its package and version."""
    origin = registry.get_origin(mixer)
    if origin is None:
        return None
    if (text := mixers.registry.get_source_code(mixer)) is not None:
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
    return f"{file.name} {compute_sha256(file)}"


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
