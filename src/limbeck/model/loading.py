"""What is refused when a student is loaded: weights that do not fit the plan, and plans that are not the folder's.

transformers draws missing tensors at random and says so in a warning. A student with random gates still talks, only
worse, so `from_pretrained` of every student calls

    check_tensors(path, loading_info)     # nothing missing, nothing left over, no other shape
    check_plan(path, config.limbeck)      # the mixers are those that the folder's config.json says
    check_alone(path)                     # no adapter beside them that would be put on top
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from limbeck.errors import LimbeckError

ADAPTER = "adapter_config.json"
SHOWN = 3  # names of tensors in a message
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_tensors(path: Any, info: dict[str, Any], other_sizes: bool = False) -> None:
    """Refuse a student of which a tensor was missing, left over or of another shape.

    Args:
        path: the student's folder or name, for the message.
        info: what `from_pretrained` returns beside the model with `output_loading_info=True`.
        other_sizes: the caller passed `ignore_mismatched_sizes=True`; then shapes may differ outside the mixers.
    """
    sizes = [key for key in info["mismatched_keys"] if not other_sizes or ".mixer." in key[0]]
    wrong = [
        _several(info["missing_keys"], "missing"),
        _several(info["unexpected_keys"], "left over"),
        _several((f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in sizes), "of another shape"),
    ]
    if any(wrong):
        raise LimbeckError(
            f"the weights of {path} do not fit its mixers: {'; '.join(w for w in wrong if w)}",
            expected="every tensor of the student and no other, as save_pretrained wrote them",
            hint="export or download the folder again; a changed plan needs limbeck.convert and training",
        )


def check_plan(path: Any, plan: dict[str, Any], **kwargs) -> None:
    """Refuse to load a student's weights into other mixers, or mixers with other options, than it was saved with.

    Args:
        path: the student's folder or name; None where the weights come as a state dict.
        plan: `config.limbeck` of the config that the caller handed over.
        kwargs: those of `from_pretrained`; what says where the files are is used.
    """
    if path is None:
        return
    saved, _ = PreTrainedConfig.get_config_dict(path, **where(kwargs))
    theirs = saved.get("limbeck", plan)
    changed = sorted(key for key in {*theirs, *plan} if _plain(theirs.get(key)) != _plain(plan.get(key)))
    if changed:
        pairs = zip(_plain(theirs.get("layers")) or [], _plain(plan.get("layers")) or [])
        layer = next((f" (the first: {b['module']})" for a, b in pairs if a != b), "")
        raise LimbeckError(
            f"the config differs from the plan that {path} was trained with, in: {', '.join(changed)}{layer}",
            expected="config.limbeck as it stands in the folder's config.json",
            hint="load without config=..., or leave its plan alone; other mixers need limbeck.convert and training",
        )


def check_alone(path: Any) -> None:
    """Refuse a student's folder in which an adapter lies as well: transformers would put it on top without a word.

    Args:
        path: the student's folder; names on the hub are left to transformers.
    """
    if path is None or not all(Path(path, name).is_file() for name in ("config.json", ADAPTER)):
        return
    raise LimbeckError(
        f"{path} holds a student and an adapter ({ADAPTER}), which would be applied on top of it",
        expected="a student alone; one into which the adapter was merged has it already",
        hint=f"remove {ADAPTER} and adapter_model.safetensors; an adapter to be used goes into its own folder, for "
        "PeftModel.from_pretrained(student, folder)",
    )


def where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the keyword arguments of `from_pretrained` those that say where the files are."""
    return {name: kwargs[name] for name in HUB if name in kwargs}


def _several(names: Iterable[str], what: str) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{what}: {', '.join(listed[:SHOWN])}{more}" if listed else ""


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))
