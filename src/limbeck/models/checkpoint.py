"""What is refused when a student is loaded: weights that do not fit the plan, and plans that are not the folder's.

transformers draws missing tensors at random and says so in a warning. A student with random gates still talks, only
worse, so `from_pretrained` of every student calls

    check_loading_info(path, loading_info)     # nothing missing, nothing left over, no other shape
    check_plan_unchanged(path, config.limbeck)      # the mixers are those that the folder's config.json says
    check_no_adapter(path)                     # no adapter beside them that would be put on top

Teachers are held to the same (`limbeck.models.loading`), but for tensors left over, of which they are told.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from limbeck.core.errors import LimbeckError, format_python_command
from limbeck.models.folders import ADAPTER_CONFIG_NAME, build_adapter_error, read_json

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
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_loading_info(
    path: Any, info: dict[str, Any], ignore_mismatched_sizes: bool = False, student: bool = False
) -> None:
    """Refuse a model of which a tensor was missing or of another shape, and a student with one left over.

    Args:
        path: the model's folder or name, for the message.
        info: what `from_pretrained` returns beside the model with `output_loading_info=True`.
        ignore_mismatched_sizes: the caller passed `ignore_mismatched_sizes=True`; then shapes may differ outside the mixers.
        student: whether it is one of ours.
    """
    missing, left = set(info["missing_keys"]), set(info["unexpected_keys"])
    sizes = [key for key in info["mismatched_keys"] if not ignore_mismatched_sizes or ".mixer." in key[0]]
    wrong = [
        _several(missing, "missing"),
        _several(left, "left over") if student or missing or sizes else "",
        _several((f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in sizes), "of another shape"),
    ]
    if missing and (wrapper := _wrapper(missing, left)):
        raise LimbeckError(
            f"{len(left)} tensors of {path} have '{wrapper}' in their names, as wrappers (DDP, torch.compile) leave it",
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
    some = sorted(missing)[:SHOWN]  # not the first alone: one that is tied need not be in the file
    fronts = {name.removesuffix(one) for one in some for name in left if name.endswith(f".{one}")}
    return next((front for front in sorted(fronts) if all(name.startswith(front) for name in left)), None)


def _unwrapping(path: Any, wrapper: str) -> str:
    file = Path(str(path)) / "model.safetensors"
    if not file.is_file():
        return "save it again from the model inside the wrapper (model.module, model._orig_mod)"
    code = (
        f"from safetensors.torch import load_file, save_file; f = {str(file)!r}; "
        f"save_file({{k.replace({wrapper!r}, ''): v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})"
    )
    return format_python_command(code)


def reset_session_settings(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config without what somebody's last session set: outputs, caching, attention kernels, recomputation.

    These are choices of a run. Left in, they make the teacher compute something else, or students that cannot be saved.
    """
    config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None
    for part in _parts(config):
        for key, value in NEUTRAL.items():
            if hasattr(part, key):
                setattr(part, key, value)
    return config


def reset_session_entries(raw: dict[str, Any]) -> dict[str, Any]:
    """Of a config as a mapping the entries that `reset_session_settings` would change, as it leaves them."""
    return {key: value for key, value in NEUTRAL.items() if key in raw}


@contextmanager
def session_settings_reset(config: PreTrainedConfig) -> Iterator[None]:
    """`reset_session_settings` for a while, but for the attention: a model that the user has loaded stays as it was."""
    before = [(part, key, getattr(part, key)) for part in _parts(config) for key in NEUTRAL if hasattr(part, key)]
    for part, key, _ in before:
        setattr(part, key, NEUTRAL[key])
    try:
        yield
    finally:
        for part, key, value in before:
            setattr(part, key, value)


def make_generation_config_savable(model: Any) -> bool:
    """Let `generate` return token ids, and let the settings be saved: transformers loads some that it then refuses.

    Returns:
        False where the settings contradicted each other and only their tokens are left.
    """
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        return True
    plain = GenerationConfig()
    for key in ("return_dict_in_generate", "use_cache", *settings.extra_output_flags):
        setattr(settings, key, getattr(plain, key, None))
    if _savable(settings):
        return True
    unused = SAMPLING if not settings.do_sample else ()
    unused = (*unused, "early_stopping", "length_penalty") if settings.num_beams in (None, 1) else unused
    for key in unused:  # what does nothing as it is
        setattr(settings, key, getattr(plain, key, None))
    if _savable(settings):
        return True
    tokens = {key: getattr(settings, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return False


def _savable(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def check_plan_schema(plan: Any) -> None:
    """Refuse a plan (`config.limbeck`) that is not of the form in which `convert` writes it; says where it is not.

    Raises:
        LimbeckError: an entry is missing, of another type, or points at nothing.
    """
    _check_entries("limbeck", plan, {"base_model_type": str, "base_architecture": str, "shapes": list, "layers": list})
    if not isinstance(plan.get("format", 0), int):
        raise _malformed(f"limbeck.format is {plan['format']!r}"[:80], "int")
    numbers = {"hidden": int, "heads": int, "kv_heads": int, "key_width": int, "value_width": int}
    for i, shape in enumerate(plan["shapes"]):
        _check_entries(f"limbeck.shapes.{i}", shape, numbers)
    entries = {"module": str, "layer": int, "mixer": str, "options": dict, "shape": int}
    for i, layer in enumerate(plan["layers"]):
        _check_entries(f"limbeck.layers.{i}", layer, entries)
        if not 0 <= layer["shape"] < len(plan["shapes"]):
            raise _malformed(f"limbeck.layers.{i}.shape is {layer['shape']}", f"0 to {len(plan['shapes']) - 1}")


def _check_entries(where: str, given: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(given, dict):
        raise _malformed(f"{where} is {given!r}"[:80], "a mapping")
    for key, kind in kinds.items():
        if key not in given:
            raise _malformed(f"{where} has no entry '{key}'", kind.__name__)
        if not isinstance(given[key], kind) or isinstance(given[key], bool):
            raise _malformed(f"{where}.{key} is {given[key]!r}"[:80], kind.__name__)


def _malformed(found: str, expected: str) -> LimbeckError:
    return LimbeckError(
        f"the student's plan in config.json is damaged: {found}",
        expected=expected,
        hint="export or download the folder again",
    )


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            yield from _parts(getattr(config, name))


def check_plan_unchanged(path: Any, plan: dict[str, Any], **kwargs) -> None:
    """Refuse to load a student's weights into other mixers, or mixers with other options, than it was saved with.

    Args:
        path: the student's folder or name; None where the weights come as a state dict.
        plan: `config.limbeck` of the config that the caller handed over.
        kwargs: those of `from_pretrained`; what says where the files are is used.
    """
    if path is None:
        return
    saved, _ = PreTrainedConfig.get_config_dict(path, **select_hub_kwargs(kwargs))
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


def check_no_adapter(path: Any) -> None:
    """Refuse a student's folder in which an adapter lies as well: transformers would put it on top without a word.

    Args:
        path: the student's folder; names on the hub are left to transformers.
    """
    if path is None or not all(Path(path, name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME)):
        return
    raise build_adapter_error(str(path), read_json(Path(path, ADAPTER_CONFIG_NAME)), has_model=True)


def select_hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the keyword arguments of `from_pretrained` those that say where the files are."""
    return {name: kwargs[name] for name in HUB if name in kwargs}


def _several(names: Iterable[str], what: str) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{what}: {', '.join(listed[:SHOWN])}{more}" if listed else ""


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))
