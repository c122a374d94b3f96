"""Rename recipe keys that had another name in earlier versions.

    raw = from_old_keys(read_yaml(stored_recipe, ...))

Recipes and studies that a run stored may have the old names and are translated when they are read. A file that a user
writes has to have the new names; an old one is refused with the new one's name.
"""

from collections.abc import Mapping
from typing import Any

# By part of a recipe or study: old name -> new name. No key that exists today may be on the left of its part.
OLD_KEYS: dict[str, dict[str, str]] = {
    "recipe": {"keep_checkpoints": "save_total_limit", "start": "init", "vocabulary": "vocab_size"},
    "student": {"keep": "softmax_layers"},
    "data": {"length": "seq_len"},
    "stage": {
        "length": "seq_len",
        "batch": "batch_size",
        "micro_batch": "micro_batch_size",
        "warmup": "warmup_ratio",
        "floor": "min_lr_ratio",
        "decay": "lr_scheduler",
        "cooldown": "decay_ratio",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "evaluate_every": "eval_steps",
        "evaluate_sequences": "eval_sequences",
        "rows": "sampled_queries",
        "converged": "layer_early_stopping",
        "lr_rest": "lr_other",
        "top": "top_k",
        "chunk": "chunk_size",
    },
    "lora": {"targets": "target_modules"},
    "study": {"about": "description", "keep": "save_artifacts"},
    "grid": {"keep": "softmax_layers"},
}


def from_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the old keys of a stored recipe, given as plain values, and leave all others."""
    return _rename_keys(raw, OLD_KEYS)


def to_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename a recipe's keys back, in order, because fingerprints were first taken over the old names."""
    return _rename_keys(raw, {part: {new: old for old, new in names.items()} for part, names in OLD_KEYS.items()})


def study_from_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the old keys of a stored study, given as plain values, also in its recipe and settings."""
    study = {OLD_KEYS["study"].get(key, key): value for key, value in raw.items()}
    if isinstance(study.get("base"), dict):
        study["base"] = from_old_keys(study["base"])
    if isinstance(study.get("grid"), dict):
        grid = {OLD_KEYS["grid"].get(key, key): value for key, value in study["grid"].items()}
        study["grid"] = grid | {
            "settings": {
                axis: {
                    label: {_rename_dotted_key(key): value for key, value in one.items()}
                    for label, one in values.items()
                }
                for axis, values in grid.get("settings", {}).items()
            }
        }
    return study


def _rename_dotted_key(key: str) -> str:
    """Rename the parts of a key such as "stages.hidden.rows"."""
    part, parts = "recipe", []
    for name in key.split("."):
        parts.append(name if part == "stages" else OLD_KEYS.get(part, {}).get(name, name))
        part = "stage" if part == "stages" else name
    return ".".join(parts)


def _rename_keys(value: Any, names: Mapping[str, Mapping[str, str]], part: str = "recipe") -> Any:
    """Rename the keys of a part of a recipe and of the parts nested in it."""
    if part == "stages" and isinstance(value, list):
        return [_rename_keys(one, names, "stage") for one in value]
    if not isinstance(value, dict):
        return value
    inner = {"recipe": ("student", "data", "stages"), "stage": ("data", "lora")}.get(part, ())
    return {
        names.get(part, {}).get(key, key): _rename_keys(one, names, key) if key in inner else one
        for key, one in value.items()
    }
