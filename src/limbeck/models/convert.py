"""Conversion: a softmax model in, a student out, with its plan in the config.

    student = limbeck.convert(model, mixer="gated_deltanet", layers="all")

The student keeps the teacher's class, its projections (grouped keys and values stay grouped), norms and head; only the
attention function of the chosen layers is another. The given model is left as it is.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck import mixers
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.model_type import FORMAT_VERSION
from limbeck.mixers import registry
from limbeck.models import attention
from limbeck.models.checkpoint import make_generation_config_savable, reset_session_entries, reset_session_settings
from limbeck.models.folders import check_not_wrapped
from limbeck.models.layers import parse_layers, select_converted_layers
from limbeck.models.modeling import UNSAVED_NAME, get_mixers, get_student_classes, install_mixers
from limbeck.models.probe import Site, find_attention_sites, find_kv_sharing
from limbeck.models.quantization import check_not_quantized


def convert(
    model: PreTrainedModel,
    mixer: str = "gated_deltanet",
    layers: str | list[int] = "all",
    options: dict[str, Any] | None = None,
    *,
    preset: str = "default",
    softmax_layers: str | list[int] = "none",
    rules: Sequence[dict[str, Any]] = (),
    copy_projections: bool = True,
    share_weights: bool = False,
    seq_len: int | None = None,
) -> PreTrainedModel:
    """A student of `model` with `mixer` in place of softmax attention.

    Args:
        model: a causal language model of transformers whose family uses its attention interface.
        mixer: name of the mixer (`limbeck students` lists them), or a file with one: "mine.py", "mine.py:ClassName".
        layers: "all", a list of layer numbers, or text such as "0,2,5-9"; the others keep softmax.
        softmax_layers: of these, layers that keep softmax all the same: numbers, "every 4", "uniform 7", or a file that
            `limbeck select` wrote.
        rules: other mixers for some of the layers, later ones over earlier ones: dicts with `layers` and any of
            `mixer`, `preset`, `options`.
        options: the mixer's options; what is not given is as the preset has it.
        preset: what the mixer's options start from: "default", "published" (as its authors have it) or "controlled"
            (all mixers alike but for the recurrence).
        copy_projections: keep the teacher's q, k, v and output projections; False draws fresh ones.
        share_weights: let everything outside the converted attention modules be the teacher's very tensors (saves memory while
            only the mixers are trained); False copies all.
        seq_len: tokens of the longest sequences that the student will learn from, for mixers that depend on it
            (`cosformer`); None for the most that the teacher was made for.

    Raises:
        LimbeckError: unknown mixer, option or layer, a student already, weights in few bits, a model that is wrapped
            (PEFT, torch.compile, DDP, accelerate's hooks), or a family without the attention interface.
    """
    check_not_wrapped(model)
    if hasattr(model.config, "limbeck"):
        raise LimbeckError("this model is a student already", expected="a softmax teacher")
    check_not_quantized(model.config, "this model")
    seq_len = seq_len or get_max_seq_len(model.config)
    MixerAssignment.create(
        mixer, options, preset, seq_len
    )  # an unknown mixer is told before a family that cannot be converted
    sites = find_attention_sites(model)
    chosen = [sites[i] for i in select_converted_layers(layers, softmax_layers, len(sites))]
    _check_sharing(model, chosen)
    assigned = assign_mixers([site.shape.layer for site in chosen], mixer, options, preset, rules, len(sites), seq_len)
    plan = _plan(model, assigned, chosen)
    student = _clone(model, plan, chosen, share_weights)
    install_mixers(student, plan)
    dtype, device = model.dtype, model.device
    for site in chosen:
        module = student.get_submodule(site.module)
        module.mixer.to(device=device, dtype=dtype)
        if not copy_projections:
            _draw_projections(student, module)
    return student.train(model.training)


def set_mixer_options(student: PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    """The same student, its weights untouched, with other options of its mixers, such as `branches` or `window`.

    Args:
        student: is changed in place.
        options: every mixer that has an option of that name gets it.

    Raises:
        LimbeckError: not a student, no mixer has such an option, or its weights would not fit.
    """
    plan = copy.deepcopy(getattr(student.config, "limbeck", None))
    if plan is None:
        raise LimbeckError("this model is no student", expected="a student whose mixers get other options")
    found = get_mixers(student)
    known = {field.name for mixer in found.values() for field in fields(mixer.options)}
    if missing := [name for name in options if name not in known]:
        raise LimbeckError(
            f"no mixer of this student has an option '{missing[0]}'{suggest_closest(missing[0], known)}",
            expected=", ".join(sorted(known)),
        )
    for entry in plan["layers"]:
        module = student.get_submodule(entry["module"])
        mixer = found[entry["module"]]
        mine = {key: value for key, value in options.items() if hasattr(mixer.options, key)}
        entry["options"] = {**entry["options"], **mine}
        made = type(mixer)(mixer.shape, mixer.options_class.parse(entry["options"], mixer.name))
        weights, wanted = mixer.state_dict(), made.state_dict()
        if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in wanted.items()}:
            raise LimbeckError(
                f"{', '.join(mine)}: the weights of {entry['mixer']} in layer {entry['layer']} do not fit it",
                expected="options that change no weight",
            )
        made.load_state_dict(weights)
        module.mixer = made.to(next(iter(weights.values()), torch.empty(0)))
    student.config.limbeck = plan
    return student.requires_grad_(False)


@dataclass(frozen=True)
class MixerAssignment:
    """A mixer for a layer, with all its options."""

    mixer: str
    options: dict[str, Any]

    @classmethod
    def create(cls, mixer: str, options: dict[str, Any] | None, preset: str, length: int) -> "MixerAssignment":
        chosen = mixers.get(mixer).adapt_to_seq_len(mixers.resolve_options(mixer, options, preset), length)
        return cls(mixers.get(mixer).name, asdict(chosen))


def assign_mixers(
    layers: list[int],
    mixer: str,
    options: dict[str, Any] | None,
    preset: str,
    rules: Sequence[dict[str, Any]],
    count: int,
    length: int,
) -> dict[int, MixerAssignment]:
    """Which mixer each of these layers gets, of a teacher of `count` layers; see `convert`."""
    assigned = dict.fromkeys(layers, MixerAssignment.create(mixer, options, preset, length))
    for rule in rules:
        assigned.update(_ruled(rule, mixer, preset, assigned, count, length))
    return assigned


def get_max_seq_len(config: PreTrainedConfig) -> int:
    """The tokens of the longest sequence that a model was made for; 0 where its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 0


def _ruled(
    rule: dict[str, Any], mixer: str, preset: str, assigned: dict[int, MixerAssignment], count: int, length: int
) -> dict[int, MixerAssignment]:
    """What a rule assigns, by layer."""
    known = ("layers", "mixer", "preset", "options")
    unknown = [key for key in rule if key not in known]
    if unknown or "layers" not in rule:
        raise LimbeckError(
            f"a rule has {', '.join(map(repr, rule)) or 'nothing'}",
            expected="layers, and any of mixer, preset, options",
        )
    layers = parse_layers(rule["layers"], count)
    absent = [i for i in layers if i not in assigned]
    if absent:
        raise LimbeckError(f"a rule names layer {absent[0]}, which keeps softmax", expected="layers that are converted")
    new = MixerAssignment.create(rule.get("mixer", mixer), rule.get("options"), rule.get("preset", preset), length)
    return dict.fromkeys(layers, new)


def unshare_weights(student: nn.Module) -> None:
    """Give a student made with `share=True`, or a module of it, tensors of its own. Tied tensors stay tied."""
    own: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[name] = own[id(parameter)]


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a student by where they come from."""

    total: int
    added: int
    fresh: int
    copied: int


def count_student_parameters(student: PreTrainedModel, copy_projections: bool = True) -> ParameterCounts:
    """How many parameters the student has, how many are new, how many came from the teacher."""
    added = sum(count_parameters(mixer) for mixer in get_mixers(student).values())
    fresh = added
    if not copy_projections:
        fresh = sum(count_parameters(student.get_submodule(name)) for name in get_mixers(student))
    total = count_parameters(student)
    return ParameterCounts(total, added, fresh, total - fresh)


def _check_sharing(model: PreTrainedModel, chosen: list[Site]) -> None:
    """A converted layer stores no keys and values, so nothing that stays softmax may read them."""
    converted = {getattr(model.get_submodule(site.module), "layer_idx", None) for site in chosen}
    for reader, source in find_kv_sharing(model).items():
        if source in converted and reader not in converted:
            raise LimbeckError(
                f"layer {reader} would stay softmax and reads the keys and values of layer {source}, which keeps none",
                expected="both converted, or the reading one alone",
                hint="layers='all'",
            )


def _plan(model: PreTrainedModel, assigned: dict[int, MixerAssignment], sites: list[Site]) -> dict[str, Any]:
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
    foreign = {a.mixer: registry.get_origin(a.mixer) for a in assigned.values()}
    origins = {mixer: origin.to_dict() for mixer, origin in foreign.items() if origin is not None}
    if origins:
        plan["origins"] = origins
    return plan


def _clone(model: PreTrainedModel, plan: dict[str, Any], sites: list[Site], share: bool) -> PreTrainedModel:
    config_class, model_class = get_student_classes(plan["base_model_type"], plan["base_architecture"])
    memo: dict[int, Any] = {}
    if share:
        converted = {id(p) for site in sites for p in model.get_submodule(site.module).parameters()}
        memo = {id(p): p for p in model.parameters() if id(p) not in converted}
    student = copy.deepcopy(model, memo)
    old = student.config
    raw = old.to_dict()
    raw.pop("quantization_config", None)
    raw.pop("model_type")  # it would stand before the class's own
    raw["architectures"] = [model_class.__name__]
    raw["auto_map"] = {
        "AutoConfig": "modeling_limbeck.LimbeckConfig",
        "AutoModelForCausalLM": "modeling_limbeck.LimbeckForCausalLM",
    }
    config = reset_session_settings(config_class.from_dict({**raw, **reset_session_entries(raw), "limbeck": plan}))
    config._attn_implementation = attention.default_attn_implementation(model_class)
    config._experts_implementation = getattr(old, "_experts_implementation", None)
    config._name_or_path = UNSAVED_NAME  # whoever loads it by the teacher's name would get the teacher
    renewed = dict(_pairs(old, config))
    for module in student.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]  # type: ignore[assignment]
    student.__class__ = model_class
    student.name_or_path = UNSAVED_NAME
    make_generation_config_savable(student)
    return student


def _pairs(old: PreTrainedConfig, new: PreTrainedConfig) -> Iterator[tuple[int, PreTrainedConfig]]:
    """A config and the configs inside it, each with the one that takes its place."""
    yield id(old), new
    for name in old.sub_configs:
        if isinstance(getattr(old, name, None), PreTrainedConfig):
            yield from _pairs(getattr(old, name), getattr(new, name))


def _draw_projections(student: PreTrainedModel, module: nn.Module) -> None:
    """Fresh q, k, v and output projections as the family initialises them."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, mixers.Mixer) or child is module:
                continue
            if not any(child is inner for inner in module.mixer.modules()):
                for parameter in child.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                student._init_weights(child)
