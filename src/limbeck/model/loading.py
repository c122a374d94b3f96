"""What is refused when a student is loaded: weights that do not fit the plan, and plans that are not the folder's.

transformers draws missing tensors at random and says so in a warning. A student with random gates still talks, only
worse, so `from_pretrained` of every student calls

    check_tensors(path, loading_info)     # nothing missing, nothing left over, no other shape
    check_plan(path, config.limbeck)      # the mixers are those that the folder's config.json says

Teachers are held to the same (`limbeck.model.opening`), but for tensors left over, of which they are told.
"""

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from limbeck.errors import LimbeckError

SHOWN = 3  # names of tensors in a message
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.", "module.")
NEUTRAL = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
    "torchscript": False,
    "gradient_checkpointing": False,
}
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_tensors(path: Any, info: dict[str, Any], other_sizes: bool = False, student: bool = False) -> None:
    """Refuse a model of which a tensor was missing or of another shape, and a student with one left over.

    Args:
        path: the model's folder or name, for the message.
        info: what `from_pretrained` returns beside the model with `output_loading_info=True`.
        other_sizes: the caller passed `ignore_mismatched_sizes=True`; then shapes may differ outside the mixers.
        student: whether it is one of ours.
    """
    missing, left = set(info["missing_keys"]), set(info["unexpected_keys"])
    sizes = [key for key in info["mismatched_keys"] if not other_sizes or ".mixer." in key[0]]
    wrong = [
        _several(missing, "missing"),
        _several(left, "left over") if student or missing or sizes else "",
        _several((f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in sizes), "of another shape"),
    ]
    if missing and (wrapper := _wrapper(missing, left)):
        raise LimbeckError(
            f"no tensor of {path} fits: names in the file have '{wrapper}' in them, which is left from a wrapper",
            expected=f"names such as {min(missing)}",
            hint=_unwrapping(path, wrapper),
        )
    if any(wrong):
        raise LimbeckError(
            f"the weights of {path} do not fit its {'mixers' if student else 'config'}: "
            f"{'; '.join(w for w in wrong if w)}",
            expected=f"every tensor of the {'student and no other' if student else 'model'}, as save_pretrained wrote "
            "them",
            hint="export or download the folder again; a changed plan needs limbeck.convert and training"
            if student
            else "download the folder again, or save the model again with save_pretrained",
        )


def _wrapper(missing: set[str], left: set[str]) -> str | None:
    """What stands in the names of left-over tensors that would else be the missing ones; None where that is not all."""
    for mark in WRAPPERS:
        if {name.replace(mark, "") for name in left} & missing:
            return mark
    first = min(missing)
    fronts = {name.removesuffix(first) for name in left if name.endswith(f".{first}")}
    return next((front for front in sorted(fronts) if all(name.startswith(front) for name in left)), None)


def _unwrapping(path: Any, wrapper: str) -> str:
    file = Path(str(path)) / "model.safetensors"
    if not file.is_file():
        return "save it again from the model inside the wrapper (model.module, model._orig_mod)"
    code = (
        f"from safetensors.torch import load_file, save_file; f = {str(file)!r}; "
        f"save_file({{k.replace({wrapper!r}, ''): v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})"
    )
    return f"python -c {shlex.quote(code)}"


def neutral(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config without what somebody's last session set: outputs, caching, attention kernels, recomputation.

    These are choices of a run. Left in, they make the teacher compute something else, or a student that cannot be saved.
    """
    config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None
    for part in _parts(config):
        for key, value in NEUTRAL.items():
            if hasattr(part, key):
                setattr(part, key, value)
    return config


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            yield from _parts(getattr(config, name))


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
