"""Conversion of a softmax model into a student.

    student = limbeck.convert(model, mixer="gated_deltanet", layers="all")
    student = limbeck.convert("Qwen/Qwen3-0.6B")           # loads the teacher first

The student keeps the teacher's class, projections (grouped keys and values stay grouped), norms and head; only the
attention function of the converted layers is replaced. Its config gets the plan (`config.limbeck`) by which it can be
loaded again. The given model is not changed.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck import mixers
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.mixers import registry
from limbeck.models import attention
from limbeck.models.assignment import MixerAssignment, assign_mixers
from limbeck.models.checkpoint import make_generation_config_savable, reset_session_entries, reset_session_settings
from limbeck.models.config import FORMAT_VERSION
from limbeck.models.folders import check_not_wrapped
from limbeck.models.loading import load_teacher, resolve_teacher
from limbeck.models.modeling import UNSAVED_NAME, get_mixers, get_student_classes, install_mixers
from limbeck.models.probe import Site, find_attention_sites, find_kv_sharing
from limbeck.models.quantization import check_not_quantized
from limbeck.models.temporary import quiet_transformers


def convert(
    model: PreTrainedModel | str | Path,
    mixer: str = "gated_deltanet",
    layers: str | list[int] = "all",
    options: dict[str, Any] | None = None,
    *,
    preset: str = "default",
    softmax_layers: str | list[int] = "none",
    softmax_heads: int | str | list[str] = "none",
    softmax_window: int = 0,
    rules: Sequence[dict[str, Any]] = (),
    copy_projections: bool = True,
    share_weights: bool = False,
    seq_len: int | None = None,
) -> PreTrainedModel:
    """Convert `model` into a student with `mixer` in place of softmax attention.

    The student is an untrained model of the teacher's class: `limbeck.distill` trains one.

    Example:
        >>> student = limbeck.convert("my-teacher", mixer="gla")
        >>> student.config.model_type
        'limbeck'

    Args:
        model: a causal language model of transformers whose family uses its attention interface; or the folder or Hub
            name of one, or "embedded", which is loaded in float32.
        mixer: name of the mixer (`limbeck students` lists them), or a file with one: "mine.py", "mine.py:ClassName".
        layers: "all", a list of layer numbers, or text such as "0,2,5-9"; the others keep softmax.
        options: the mixer's options; those not given are the preset's.
        preset: the options to start from: "default", "published" (as in the mixer's paper) or "controlled" (all mixers
            alike except for the recurrence).
        softmax_layers: of `layers`, those that keep softmax: numbers, "every 4", "uniform 7", or a file written by
            `limbeck select`.
        softmax_heads: groups of heads that keep softmax in converted layers: "18.2,20.2" or a list of such names, layer
            and key/value head counted from 0, or a file written by `limbeck select --heads`.
        softmax_window: tokens that those groups see, besides the first four, so that their memory does not grow; 0 for
            all.
        rules: other mixers for some of the layers; later rules override earlier ones: dicts with `layers` and any of
            `mixer`, `preset`, `options`.
        copy_projections: copy the teacher's q, k, v and output projections; False initializes them at random.
        share_weights: use the teacher's own tensors outside the converted attention modules, which saves memory while
            only the mixers are trained; False copies all.
        seq_len: length in tokens of the longest training sequences, for mixers that depend on it (`cosformer`); None
            for the teacher's maximum.

    Returns:
        The student, in the mode (training or evaluation), the dtype and on the device of the model. The model itself is
        not changed.

    Raises:
        LimbeckError: unknown mixer, option, layer or group; the model is a student already, quantized or wrapped (PEFT,
            torch.compile, DDP, accelerate's hooks), or its family does not use the attention interface; or there is no
            model of that name.
    """
    if isinstance(model, str | Path):
        # before minutes of loading, so that an unknown mixer or option is reported first
        mixers.resolve_options(mixer, options, preset)
        with quiet_transformers():
            model, _ = load_teacher(resolve_teacher(str(model)), torch.device("cpu"))
        model.requires_grad_(True)
        share_weights = True  # nobody else has this model
    check_not_wrapped(model)
    if hasattr(model.config, "limbeck"):
        raise LimbeckError("this model is a student already", expected="a softmax teacher")
    check_not_quantized(model.config, "this model")
    seq_len = seq_len or get_max_seq_len(model.config)
    # before the family is probed, so that an unknown mixer or option is reported first
    MixerAssignment.create(mixer, options, preset, seq_len)
    sites = find_attention_sites(model)
    assigned = assign_mixers(
        [site.shape.kv_heads for site in sites],
        mixer,
        options,
        preset,
        layers=layers,
        softmax_layers=softmax_layers,
        softmax_heads=softmax_heads,
        softmax_window=softmax_window,
        rules=rules,
        length=seq_len,
    )
    chosen = [sites[i] for i in assigned]
    _check_sharing(model, chosen)
    plan = _build_plan(model, assigned, chosen)
    student = _copy_model(model, plan, chosen, share_weights)
    install_mixers(student, plan)
    dtype, device = model.dtype, model.device
    for site in chosen:
        module = student.get_submodule(site.module)
        module.mixer.to(device=device, dtype=dtype)
        if not copy_projections:
            _reinitialize_projections(student, module)
    return student.train(model.training)


def set_mixer_options(student: PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    """Change options of a student's mixers that leave their weights as they are, such as `branches` or `window`.

    Args:
        student: changed in place.
        options: set in every mixer that has an option of that name.

    Returns:
        The same student, frozen.

    Raises:
        LimbeckError: not a student, no mixer has such an option, or the weights would not fit.
    """
    plan = copy.deepcopy(getattr(student.config, "limbeck", None))
    if plan is None:
        raise LimbeckError("this model is not a student", expected="a student whose mixers get other options")
    student_mixers = get_mixers(student)
    names = {field.name for mixer in student_mixers.values() for field in fields(mixer.options)}
    if unknown := [name for name in options if name not in names]:
        raise LimbeckError(
            f"no mixer of this student has an option '{unknown[0]}'{suggest_closest(unknown[0], names)}",
            expected=", ".join(sorted(names)),
        )
    if "qk_norm" in options:
        raise LimbeckError("qk_norm of a student cannot change", expected="to be set when the teacher is converted")
    for entry in plan["layers"]:
        module = student.get_submodule(entry["module"])
        mixer = student_mixers[entry["module"]]
        changes = {key: value for key, value in options.items() if hasattr(mixer.options, key)}
        entry["options"] = {**entry["options"], **changes}
        new_mixer = type(mixer)(mixer.shape, mixer.options_class.parse(entry["options"], mixer.name))
        weights = mixer.state_dict()
        if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in new_mixer.state_dict().items()}:
            raise LimbeckError(
                f"{', '.join(changes)}: the weights of {entry['mixer']} in layer {entry['layer']} would not fit",
                expected="options that change no weight",
            )
        new_mixer.load_state_dict(weights)
        module.mixer = new_mixer.to(next(iter(weights.values()), torch.empty(0)))
    student.config.limbeck = plan
    return student.requires_grad_(False)


def get_max_seq_len(config: PreTrainedConfig) -> int:
    """Return the length in tokens of the longest sequence that a model supports; 0 if its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 0


def unshare_weights(student: nn.Module) -> None:
    """Give a student made with `share_weights=True`, or a module of it, its own tensors. Tied tensors stay tied."""
    own: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[name] = own[id(parameter)]


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a student by origin: `added` belong to the mixers, `fresh` are not from the teacher."""

    total: int
    added: int
    fresh: int
    copied: int


def count_student_parameters(student: PreTrainedModel, copy_projections: bool = True) -> ParameterCounts:
    """Count a student's parameters: all, added, initialized at random, and copied from the teacher."""
    added = sum(count_parameters(mixer) for mixer in get_mixers(student).values())
    fresh = added
    if not copy_projections:
        fresh = sum(count_parameters(student.get_submodule(name)) for name in get_mixers(student))
    total = count_parameters(student)
    return ParameterCounts(total, added, fresh, total - fresh)


def _check_sharing(model: PreTrainedModel, chosen: list[Site]) -> None:
    """Refuse layers that would keep softmax and read the keys and values of a converted layer, which has none."""
    converted = {getattr(model.get_submodule(site.module), "layer_idx", None) for site in chosen}
    for reader, source in find_kv_sharing(model).items():
        if source in converted and reader not in converted:
            raise LimbeckError(
                f"layer {reader} would stay softmax and reads the keys and values of layer {source}, which has none",
                expected="both converted, or only the one that reads",
                hint="layers='all'",
            )


def _build_plan(model: PreTrainedModel, assigned: dict[int, MixerAssignment], sites: list[Site]) -> dict[str, Any]:
    shapes: list[dict[str, Any]] = []
    layers = []
    for site in sites:
        shape = {f.name: getattr(site.shape, f.name) for f in fields(site.shape) if f.name != "layer"}
        if shape not in shapes:
            shapes.append(shape)
        layers.append(
            {
                "module": site.module,
                "layer": site.shape.layer,
                "mixer": assigned[site.shape.layer].mixer,
                "options": assigned[site.shape.layer].options,
                "shape": shapes.index(shape),
            }
        )
    plan: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "base_model_type": model.config.model_type,
        "base_architecture": type(model).__name__,
        "shapes": shapes,
        "layers": layers,
    }
    names = {name for assignment in assigned.values() for name in assignment.list_mixers()}
    mixer_origins = {name: registry.get_origin(name) for name in sorted(names)}
    origins = {mixer: origin.to_dict() for mixer, origin in mixer_origins.items() if origin is not None}
    if origins:
        plan["origins"] = origins
    return plan


def _copy_model(model: PreTrainedModel, plan: dict[str, Any], sites: list[Site], share: bool) -> PreTrainedModel:
    """Copy a model and turn the copy into a student of its class and config, still without mixers."""
    config_class, model_class = get_student_classes(plan["base_model_type"], plan["base_architecture"])
    memo: dict[int, Any] = {}
    if share:
        converted = {id(p) for site in sites for p in model.get_submodule(site.module).parameters()}
        memo = {id(p): p for p in model.parameters() if id(p) not in converted}
    student = copy.deepcopy(model, memo)
    old = student.config
    raw = old.to_dict()
    raw.pop("quantization_config", None)
    raw.pop("model_type")  # would override that of the student's class
    raw["architectures"] = [model_class.__name__]
    raw["auto_map"] = {
        "AutoConfig": "modeling_limbeck.LimbeckConfig",
        "AutoModelForCausalLM": "modeling_limbeck.LimbeckForCausalLM",
    }
    config = reset_session_settings(config_class.from_dict({**raw, **reset_session_entries(raw), "limbeck": plan}))
    config._attn_implementation = attention.default_attn_implementation(model_class)
    config._experts_implementation = getattr(old, "_experts_implementation", None)
    config._name_or_path = UNSAVED_NAME  # under the teacher's name other libraries would load the teacher
    replacements = dict(_pair_configs(old, config))
    for module in student.modules():
        if id(getattr(module, "config", None)) in replacements:
            module.config = replacements[id(module.config)]  # type: ignore[assignment]
    student.__class__ = model_class
    student.name_or_path = UNSAVED_NAME
    make_generation_config_savable(student)
    return student


def _pair_configs(old: PreTrainedConfig, new: PreTrainedConfig) -> Iterator[tuple[int, PreTrainedConfig]]:
    """Yield the id of a config and of the configs inside it, each with the config that replaces it."""
    yield id(old), new
    for name in old.sub_configs:
        if isinstance(getattr(old, name, None), PreTrainedConfig):
            yield from _pair_configs(getattr(old, name), getattr(new, name))


def _reinitialize_projections(student: PreTrainedModel, module: nn.Module) -> None:
    """Initialize the q, k, v and output projections of an attention module as the family does."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, mixers.Mixer) or child is module:
                continue
            if not any(child is inner for inner in module.mixer.modules()):
                for parameter in child.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                student._init_weights(child)
