"""Fingerprints of models and tokenizers, on disk or in memory, by which results of equal inputs are found again.

    fingerprint_checkpoint(Path("runs/quickstart/student"))      # hexadecimal sha256 of config, tensors and code

Saving a model again under another file layout does not change its fingerprint; training it for one step does.
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

from limbeck.core.digests import canonical_json, compute_sha256, digest_facts, digest_once
from limbeck.core.recipe import TeacherRecipe
from limbeck.data.tokenization import hash_tokenizer_rules
from limbeck.mixers import registry
from limbeck.models import loading
from limbeck.models.hub import split_revision

# entries of a config that describe how it was loaded or last called, not what it computes
IGNORED_SETTINGS = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "_attn_implementation", "attn_implementation",
}  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip
CHUNK = 1 << 24  # bytes read at once


def fingerprint_checkpoint(folder: Path) -> str:
    """Fingerprint a model's folder: its config, all tensors, and Python files beside them."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        try:
            digest.update(canonical_json(select_computing_settings(json.loads(config.read_text(encoding="utf-8")))))
        except (ValueError, AttributeError):  # damaged; loading it reports that
            digest.update(config.read_bytes())
    files = _matching(folder, WEIGHTS)
    digest.update(
        canonical_json(sorted(line for file in files for line in digest_once(file, _digest_tensors).splitlines()))
    )
    digest.update(canonical_json([[file.name, compute_sha256(file)] for file in _matching(folder, ("*.py",))]))
    return digest.hexdigest()


def fingerprint_model(model: PreTrainedModel) -> str:
    """Fingerprint a model in memory: its class, config and tensors; about half a second per gigabyte."""
    digest = hashlib.sha256(canonical_json([type(model).__name__, select_computing_settings(model.config.to_dict())]))
    digest.update(fingerprint_tensors(model).encode())
    return digest.hexdigest()


def fingerprint_tensors(model: PreTrainedModel) -> str:
    """Fingerprint a model's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().data)
        else:  # extra state of some modules
            digest.update(f"{name} {tensor!r}".encode())
    return digest.hexdigest()


def fingerprint_tokenizer_files(folder: Path) -> str:
    """Fingerprint the files of a tokenizer."""
    files = _matching(folder, TOKENIZER)
    return digest_facts([[file.name, compute_sha256(file)] for file in files])


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint a tokenizer in memory: its rules, special tokens and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    facts = [hash_tokenizer_rules(tokenizer), str(tokenizer.special_tokens_map), template]
    return digest_facts(facts)


def fingerprint_checkpoint_with_tokenizer(folder: Path) -> str:
    """Fingerprint a model's folder together with its tokenizer, for measurements that depend on both."""
    return hashlib.sha256(
        f"{fingerprint_checkpoint(folder)} {fingerprint_tokenizer_files(folder)}".encode()
    ).hexdigest()[:16]


def fingerprint_folder(folder: str | None) -> str | None:
    """Fingerprint all files in and below a folder, by name and content; None for no folder."""
    if folder is None:
        return None
    root = Path(folder).expanduser()
    files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return digest_facts([[str(file.relative_to(root)), compute_sha256(file)] for file in files])


def find_model_folder(name: str) -> Path | None:
    """Return the local folder of a model by its name in a recipe, or None; nothing is created or downloaded."""
    if name == "embedded" or name in TeacherRecipe.names():
        return loading.find_cached_teacher(name)
    if (path := Path(name).expanduser()).is_dir():
        return path
    repository, revision = split_revision(name)
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # not a repository name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fingerprint_model_files(folder: Path) -> dict[str, str]:
    return {"weights": fingerprint_checkpoint(folder), "tokenizer": fingerprint_tokenizer_files(folder)}


def identify_mixer_code(mixer: str) -> str | None:
    """Identify the code of a custom mixer: the hash of its file, or its package and version; None for Limbeck's own."""
    origin = registry.get_origin(mixer)
    if origin is None:
        return None
    if (text := registry.get_source_code(mixer)) is not None:
        return hashlib.sha256(text.encode()).hexdigest()
    return f"{origin.package} {importlib.metadata.version(origin.package)}" if origin.package else origin.module


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _digest_tensors(file: Path) -> str:
    """Return a line for each tensor of a safetensors file: name, dtype, shape, sha256; else one line for the file."""
    if file.suffix == ".safetensors":
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged; loading it reports that
            return "\n".join(_digest_safetensors(file))
    return f"{file.name} {compute_sha256(file)}"


def _digest_safetensors(file: Path) -> Iterator[str]:
    with open(file, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        end = file.stat().st_size - start
        if end < 0:
            raise ValueError
        for name, entry in json.loads(handle.read(start - 8)).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= end:
                raise ValueError
            handle.seek(start + first)
            digest = hashlib.sha256()
            remaining = last - first
            while remaining > 0 and (chunk := handle.read(min(CHUNK, remaining))):
                remaining -= len(chunk)
                digest.update(chunk)
            yield f"{name} {entry['dtype']} {entry['shape']} {digest.hexdigest()}"


def select_computing_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in IGNORED_SETTINGS}
