"""Checks of a checkpoint while it is loaded, and settings of past sessions that are taken out of its configs.

transformers initializes missing tensors at random and only warns about it. A student with random gates still produces
text, only worse text, so `from_pretrained` of every student calls

    check_loading_info(path, loading_info)        # no tensor is missing, left over or of another shape
    check_plan_unchanged(path, config.limbeck)    # the mixers are those in the folder's config.json
    check_no_adapter(path)                        # no adapter beside the weights, which would be applied silently

Teachers are held to the same (`limbeck.models.loading`), except that left-over tensors are only reported.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from limbeck.core.errors import LimbeckError, format_python_command
from limbeck.models.folders import ADAPTER_CONFIG_NAME, build_adapter_error, read_json
from limbeck.models.temporary import iterate_configs

MAX_NAMES = 3  # names of tensors in a message
# prefixes that DDP, FSDP, torch.compile and PEFT add to the names of tensors
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.", "module.")
# settings that a session changes, and their values in a config that nobody changed
DEFAULT_SETTINGS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
    "torchscript": False,
    "gradient_checkpointing": False,
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_loading_info(
    path: Any, info: dict[str, Any], ignore_mismatched_sizes: bool = False, student: bool = False
) -> None:
    """Refuse a model with a missing tensor or one of another shape, and a student with one left over.

    Args:
        path: the model's folder or name, for the message.
        info: what `from_pretrained` returns beside the model with `output_loading_info=True`.
        ignore_mismatched_sizes: as passed to `from_pretrained`; if True, shapes may differ outside the mixers.
        student: the model is a student.
    """
    missing, left_over = set(info["missing_keys"]), set(info["unexpected_keys"])
    mismatched = [key for key in info["mismatched_keys"] if not ignore_mismatched_sizes or ".mixer." in key[0]]
    problems = [
        _list_names(missing, "missing"),
        _list_names(left_over, "left over") if student or missing or mismatched else "",
        _list_names(
            (f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in mismatched), "of another shape"
        ),
    ]
    if missing and (wrapper := _find_wrapper(missing, left_over)):
        raise LimbeckError(
            f"{len(left_over)} tensors of {path} have '{wrapper}' in their names, from a wrapper (DDP, torch.compile)",
            expected=f"names such as {min(missing)}",
            hint=_unwrap_hint(path, wrapper),
        )
    if any(problems):
        raise LimbeckError(
            f"the weights of {path} do not fit its {'mixers' if student else 'config'}: "
            f"{'; '.join(problem for problem in problems if problem)}",
            expected=f"every tensor of the {'student and no other' if student else 'model'}, as save_pretrained wrote "
            "them",
            hint="export or download the folder again; a changed plan needs limbeck.convert and training"
            if student
            else "download the folder again, or save the model again with save_pretrained",
        )


def _find_wrapper(missing: set[str], left_over: set[str]) -> str | None:
    """Return the prefix without which the left-over tensors would be the missing ones, or None."""
    for prefix in WRAPPERS:
        if {name.replace(prefix, "") for name in left_over} & missing:
            return prefix
    # an unknown prefix; several names are tried because a tied tensor need not be in the file
    samples = sorted(missing)[:MAX_NAMES]
    prefixes = {name.removesuffix(sample) for sample in samples for name in left_over if name.endswith(f".{sample}")}
    return next((p for p in sorted(prefixes) if all(name.startswith(p) for name in left_over)), None)


def _unwrap_hint(path: Any, wrapper: str) -> str:
    file = Path(str(path)) / "model.safetensors"
    if not file.is_file():
        return "save it again from the model inside the wrapper (model.module, model._orig_mod)"
    code = (
        f"from safetensors.torch import load_file, save_file; f = {str(file)!r}; "
        f"save_file({{k.replace({wrapper!r}, ''): v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})"
    )
    return format_python_command(code)


def reset_session_settings(config: PreTrainedConfig) -> PreTrainedConfig:
    """Reset in place what a past session set in a config: outputs, caching, attention kernels, checkpointing.

    These are choices of a run. Left in, they change what the teacher computes or make students that cannot be saved.
    """
    config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None
    for part in iterate_configs(config):
        for key, value in DEFAULT_SETTINGS.items():
            if hasattr(part, key):
                setattr(part, key, value)
    return config


def reset_session_entries(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config, as a mapping, that `reset_session_settings` would reset, with the new values."""
    return {key: value for key, value in DEFAULT_SETTINGS.items() if key in raw}


@contextmanager
def session_settings_reset(config: PreTrainedConfig) -> Iterator[None]:
    """Apply `reset_session_settings` for a while, except for the attention; afterwards the config is as it was."""
    parts = list(iterate_configs(config))
    before = [(part, key, getattr(part, key)) for part in parts for key in DEFAULT_SETTINGS if hasattr(part, key)]
    for part, key, _ in before:
        setattr(part, key, DEFAULT_SETTINGS[key])
    try:
        yield
    finally:
        for part, key, value in before:
            setattr(part, key, value)


def make_generation_config_savable(model: Any) -> bool:
    """Make `generate` return token ids, and drop generation settings that transformers loads but refuses to save.

    Returns:
        False if the settings contradicted each other, so that only the special tokens were kept.
    """
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        return True
    defaults = GenerationConfig()
    for key in ("return_dict_in_generate", "use_cache", *settings.extra_output_flags):
        setattr(settings, key, getattr(defaults, key, None))
    if _can_be_saved(settings):
        return True
    unused = SAMPLING if not settings.do_sample else ()
    unused = (*unused, "early_stopping", "length_penalty") if settings.num_beams in (None, 1) else unused
    for key in unused:  # settings without effect, which transformers nevertheless refuses to save
        setattr(settings, key, getattr(defaults, key, None))
    if _can_be_saved(settings):
        return True
    tokens = {key: getattr(settings, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return False


def _can_be_saved(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def check_plan_unchanged(path: Any, plan: dict[str, Any], **kwargs) -> None:
    """Refuse to load a student's weights into other mixers, or mixers with other options, than it was saved with.

    Args:
        path: the student's folder or name; None if the weights come as a state dict.
        plan: `config.limbeck` of the config that the caller passes.
        kwargs: those of `from_pretrained`, of which the ones that locate the files are used.
    """
    if path is None:
        return
    saved, _ = PreTrainedConfig.get_config_dict(path, **select_hub_kwargs(kwargs))
    saved_plan = saved.get("limbeck", plan)
    keys = {*saved_plan, *plan}
    changed = sorted(key for key in keys if _through_json(saved_plan.get(key)) != _through_json(plan.get(key)))
    if changed:
        pairs = zip(_through_json(saved_plan.get("layers")) or [], _through_json(plan.get("layers")) or [])
        layer = next((f" (first difference: {b['module']})" for a, b in pairs if a != b), "")
        raise LimbeckError(
            f"the config differs from the plan that {path} was trained with, in: {', '.join(changed)}{layer}",
            expected="config.limbeck as in the folder's config.json",
            hint="load without config=..., or leave its plan unchanged; other mixers need limbeck.convert and training",
        )


def check_no_adapter(path: Any) -> None:
    """Refuse a student's folder that also contains an adapter, which transformers would apply silently.

    Args:
        path: the student's folder; names on the hub are left to transformers.
    """
    if path is None or not all(Path(path, name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME)):
        return
    raise build_adapter_error(str(path), read_json(Path(path, ADAPTER_CONFIG_NAME)), has_model=True)


def select_hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the keyword arguments of `from_pretrained` that locate the files."""
    return {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}


def format_names(names: Iterable[str]) -> str:
    """Join the first names in alphabetical order: "a, b, c and 12 more"."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return ", ".join(ordered[:MAX_NAMES]) + more


def _list_names(names: Iterable[str], problem: str) -> str:
    text = format_names(names)
    return f"{problem}: {text}" if text else ""


def _through_json(value: Any) -> Any:
    """Convert a value as saving does: tuples to lists, keys to strings."""
    return json.loads(json.dumps(value))
