"""The student as a Hugging Face model: the teacher's own class with mixers, under a model type of its own.

    import limbeck
    student = AutoModelForCausalLM.from_pretrained("runs/quickstart/student")
    get_mixers(student)     # {"model.layers.0.self_attn": GatedDeltaNet(...), ...}

A saved student has `model_type: limbeck`, so nothing can load it as a softmax model by accident. Its config is the base
family's config plus one entry, `limbeck`, the plan that says which module has which mixer; its class is made on the fly
as a subclass of the base family's class. `import limbeck` is all that AutoModelForCausalLM needs. Where even that does
not happen, a small file beside the weights lets `trust_remote_code=True` do it.

The file of a custom mixer is saved beside the weights too. It is executed only if the caller trusts the checkpoint's
code or has loaded that file already.
"""

import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from limbeck.core.errors import LimbeckError
from limbeck.mixers import HeadShape, Mixer, registry
from limbeck.models import attention
from limbeck.models.checkpoint import (
    check_loading_info,
    check_no_adapter,
    check_plan_unchanged,
    select_hub_kwargs,
)
from limbeck.models.config import MODEL_TYPE, LimbeckConfig, check_plan_schema
from limbeck.models.generation import check_decoding, raise_paged_unsupported
from limbeck.models.input_checks import register_input_checks
from limbeck.models.quantization import exclude_mixers

ONLY_MIXERS = "limbeck_only"  # an attention implementation that nobody registers
# Name of a student until it is saved: a library that reloads a model by its name shows this text in its error.
UNSAVED_NAME = "a converted student in memory: call save_pretrained(folder), then from_pretrained(folder)"
REMOTE_CODE = '''"""Lets trust_remote_code=True load this student; the code itself is the package limbeck."""

from limbeck import LimbeckConfig, LimbeckForCausalLM  # noqa: F401
'''


class LimbeckForCausalLM(PreTrainedModel):
    """Entry point for remote code: hands over to the class of the family that the student came from."""

    config_class = LimbeckConfig

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs) -> Any:  # type: ignore[override]
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **select_hub_kwargs(kwargs))
        _, model_class = get_student_classes(config.limbeck["base_model_type"], config.limbeck["base_architecture"])
        return model_class.from_pretrained(path, *args, config=config, **kwargs)


class StudentMixin:
    """Adds mixers, and refusals of what a student cannot do, to the model class of a family."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        requested = config._attn_implementation
        if requested in (None, ONLY_MIXERS):
            requested = attention.default_attn_implementation(type(self))
        config._attn_implementation = attention.resolve_attn_implementation(type(self), requested)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_mixers(self, config.limbeck)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: for custom code transformers skips the buffers that a family recomputes at loading."""
        return False

    def generate(self, *args, **kwargs):
        check_decoding(self, *args, **kwargs)  # type: ignore[arg-type]
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    # continuous batching does not go through `generate`
    generate_batch = init_continuous_batching = continuous_batching_context_manager = raise_paged_unsupported

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """Choose how the layers that keep softmax are computed, "sdpa" or "eager"; the mixers do not change."""
        plan = self.config.limbeck  # type: ignore[attr-defined]
        chosen = attention.resolve_attn_implementation(type(self), attn_implementation)
        if chosen != attn_implementation and len(plan["layers"]) == plan["shapes"][0]["layers"]:
            raise LimbeckError(
                f"attention implementation '{attn_implementation}' would drop the student's mixers, and none of its "
                "layers keeps softmax",
                expected=f"'{attention.default_attn_implementation(type(self))}'",
            )
        self.config._attn_implementation = chosen  # type: ignore[attr-defined]

    def add_adapter(self, *args, **kwargs) -> None:
        _refuse_unsaved(self)
        super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def load_adapter(self, *args, **kwargs) -> Any:
        _refuse_unsaved(self)
        return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as any model does; from then on the folder is the student's `name_or_path`."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # with PEFT adapters attached the folder holds the adapters only, not the student
        if not getattr(self, "_hf_peft_config_loaded", False):
            self.name_or_path = self.config._name_or_path = str(save_directory)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls, path, *args, trust_remote_code=False, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ) -> Any:
        """Load as any model does, but raise LimbeckError for weights that do not fit the plan."""
        check_no_adapter(path)
        plan = getattr(kwargs.get("config"), "limbeck", None)
        if plan:
            check_plan_unchanged(path, plan, **kwargs)
            if trust_remote_code:
                load_mixer_files(path, plan)
        if kwargs.get("quantization_config") is not None:
            config = kwargs.get("config") or AutoConfig.from_pretrained(path, **select_hub_kwargs(kwargs))
            kwargs["quantization_config"] = exclude_mixers(kwargs["quantization_config"], cls, config)
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loading_info(path, info, ignore_mismatched_sizes, student=True)
        return (model, info) if output_loading_info else model

    def __reduce_ex__(self, protocol):
        """Pickle by the names of the family, because the class itself is made on the fly."""
        return _reduce_by_family(self, self.config.limbeck, 1, super().__reduce_ex__(max(protocol, 2)))  # type: ignore[attr-defined]


class StudentConfig:
    """Adds the model type `limbeck` and the files beside config.json to the config class of a family."""

    model_type = MODEL_TYPE

    @property
    def output_attentions(self) -> bool:
        """Whether to return attention weights; the softmax layers compute them with any implementation."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Accept any value: see `output_attentions`."""

    def to_diff_dict(self) -> dict[str, Any]:
        # If the family's own class is told to load this as a softmax model, it stops at this unknown name.
        return {**super().to_diff_dict(), "attn_implementation": ONLY_MIXERS}  # type: ignore[misc]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write config.json, and beside it the files that remote code and custom mixers need."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / "modeling_limbeck.py").write_text(REMOTE_CODE, encoding="utf-8")
        save_mixer_files(Path(save_directory), self.limbeck)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol):
        return _reduce_by_family(self, getattr(self, "limbeck", None), 0, super().__reduce_ex__(max(protocol, 2)))


class HeadlessStudent(PreTrainedModel):
    """Stands for a student in every other auto class and refuses: the plan names the modules of the whole model."""

    auto_class = "AutoModel"

    @classmethod
    def from_pretrained(cls, path=None, *args, **kwargs) -> Any:  # type: ignore[override]
        loads = "loads a backbone without its head" if cls.auto_class == "AutoModel" else "puts another head on a model"
        raise LimbeckError(
            f"{cls.auto_class} {loads}, but a student is saved as a whole model",
            expected="AutoModelForCausalLM",
            hint="AutoModelForCausalLM.from_pretrained(...).base_model is the backbone with its mixers; put the other "
            "head on its hidden states",
        )

    @classmethod
    def _from_config(cls, config, **kwargs) -> Any:
        return cls.from_pretrained()


@cache
def get_student_classes(base_model_type: str, base_architecture: str) -> tuple[Any, Any]:
    """Make the config and model class of students of a family, and register them with transformers' auto classes.

    Args:
        base_model_type: the teacher's `config.model_type`, e.g. "llama".
        base_architecture: the teacher's class, e.g. "LlamaForCausalLM".
    """
    base_model = getattr(transformers, base_architecture, None)
    if isinstance(base_model, type) and issubclass(base_model, PreTrainedModel):
        of_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base_model_type, ())
        listed = base_architecture in ([of_type] if isinstance(of_type, str) else of_type)
        config_class = base_model.config_class
        if base_model_type in CONFIG_MAPPING and not (listed or config_class is CONFIG_MAPPING[base_model_type]):
            raise LimbeckError(
                f"{base_architecture} is not a model of type '{base_model_type}'",
                expected="the student's base family as its config.json was written",
                hint="export or download the folder again",
            )
    elif base_model is not None:
        raise LimbeckError(f"'{base_architecture}' is not a model class", expected="a class such as LlamaForCausalLM")
    if base_model_type not in CONFIG_MAPPING or base_model is None:
        raise LimbeckError(
            f"this transformers ({transformers.__version__}) has no {base_architecture} of type '{base_model_type}'",
            expected="a version that knows the student's base family",
            hint="pip install --upgrade transformers",
        )
    base_config = CONFIG_MAPPING[base_model_type]
    config_attributes = {"model_type": MODEL_TYPE, "__module__": __name__}
    config_class = type(f"Limbeck{base_config.__name__}", (StudentConfig, base_config), config_attributes)
    name = f"Limbeck{base_architecture}"
    model_attributes = {"config_class": config_class, "__module__": __name__}
    model_class = type(name, (StudentMixin, base_model), model_attributes)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    auto_classes: list[Any] = [value for value in vars(modeling_auto).values() if inspect.isclass(value)]
    for auto in auto_classes:
        if auto is not AutoModelForCausalLM and getattr(auto, "_model_mapping", None) is not None:
            headless = type(f"{name}Headless", (HeadlessStudent,), {**model_attributes, "auto_class": auto.__name__})
            auto.register(config_class, headless, exist_ok=True)
    # Some families store tensors in another layout than their modules (experts one by one) and register that layout
    # by class or model type.
    layout = get_checkpoint_conversion_mapping(base_architecture) or get_checkpoint_conversion_mapping(base_model_type)
    if layout:
        register_checkpoint_conversion_mapping(name, layout, overwrite=True)
    return config_class, model_class


def _reduce_by_family(instance: Any, plan: dict[str, Any] | None, index: int, reduced: Any) -> Any:
    """Pickle an instance of a class from `get_student_classes` by its family; one of a subclass as Python does."""
    if plan and type(instance) is get_student_classes(plan["base_model_type"], plan["base_architecture"])[index]:
        return _new_instance, (plan["base_model_type"], plan["base_architecture"], index), *reduced[2:]
    return reduced


def _new_instance(base_model_type: str, base_architecture: str, index: int) -> Any:
    cls = get_student_classes(base_model_type, base_architecture)[index]
    return cls.__new__(cls)


def install_mixers(model: nn.Module, plan: dict[str, Any]) -> None:
    """Put the mixers of a plan (`config.limbeck`) into the attention modules of a model, in place."""
    check_plan_schema(plan)
    names = {f.name for f in fields(HeadShape)}
    shapes = [HeadShape(**{key: value for key, value in shape.items() if key in names}) for shape in plan["shapes"]]
    for entry in plan["layers"]:
        try:
            module = model.get_submodule(entry["module"])
        except AttributeError as error:
            raise LimbeckError(
                f"the student's plan names {entry['module']}, which {type(model).__name__} does not have",
                expected="the family and the number of layers that the plan was made for",
                hint="export or download the folder again",
            ) from error
        shape = HeadShape(**{**vars(shapes[entry["shape"]]), "layer": entry["layer"]})
        cls = resolve_mixer_class(entry["mixer"], plan)
        options = cls.options_class.parse(entry["options"], cls.name)
        for name in cls.list_inner_mixers(options):
            resolve_mixer_class(name, plan)
        attention.attach_mixer(module, cls(shape, options))
    register_input_checks(model)  # type: ignore[arg-type]
    backbone = model.base_model
    if backbone is not model:
        backbone.save_pretrained = _refuse_to_save_backbone  # type: ignore[assignment, union-attr]


def _refuse_to_save_backbone(*args: Any, **kwargs: Any) -> NoReturn:
    raise LimbeckError(
        "a student's backbone cannot be loaded without its head: the plan names modules of the whole model",
        expected="student.save_pretrained(folder)",
        hint="AutoModelForCausalLM.from_pretrained(folder).base_model gives the backbone",
    )


def _refuse_unsaved(student: Any) -> None:
    if student.name_or_path == UNSAVED_NAME:
        raise LimbeckError(
            "this student was never saved, and a model with adapters saves only the adapters; their base would be lost",
            expected="a student loaded from a folder",
            hint="call student.save_pretrained(folder) first",
        )


def get_mixers(model: nn.Module) -> dict[str, Mixer]:
    """Return the mixers of a student by the name of their attention module."""
    # a mixer may contain other mixers, which are not listed
    mixers = {name: m for name, m in model.named_modules() if isinstance(m, Mixer) and ".mixer." not in name}
    return {name.removesuffix(".mixer"): m for name, m in mixers.items()}


# Mixers that are not part of Limbeck: a plan says in `origins` which package or file each came from.


def resolve_mixer_class(name: str, plan: dict[str, Any]) -> type[Mixer]:
    """Return the class of a mixer in a plan.

    Raises:
        LimbeckError: the mixer is not registered; says what to install or to load.
    """
    origin = plan.get("origins", {}).get(name)
    if origin is None or registry.is_registered(name):
        return registry.get(name)
    problem = f"this student's mixer '{name}' is not part of Limbeck and not registered"
    if "file" in origin:
        raise LimbeckError(
            problem,
            expected=f"the file {origin['file']}, which is saved beside the weights as {mixer_file_name(name)}",
            hint=f"read that file, then pass trust_remote_code=True, or call limbeck.mixers.get('{origin['file']}') "
            f"first; on the command line: limbeck --mixer-file {origin['file']} ...",
        )
    if "package" in origin:
        raise LimbeckError(
            problem, expected=f"the package {origin['package']}", hint=f"pip install {origin['package']}"
        )
    raise LimbeckError(problem, expected=f"the module {origin['module']}", hint=f"import {origin['module']} first")


def save_mixer_files(folder: Path, plan: dict[str, Any]) -> None:
    """Copy the files that define a student's custom mixers into its folder."""
    for name in plan.get("origins", {}):
        text = registry.get_source_code(name)
        if text is not None:
            (folder / mixer_file_name(name)).write_text(text, encoding="utf-8")


def load_mixer_files(path: str, plan: dict[str, Any]) -> None:
    """Execute the mixer files beside a trusted checkpoint's weights, except for mixers that are registered already."""
    for name, origin in plan.get("origins", {}).items():
        if "file" in origin and not registry.is_registered(name):
            registry.load_file(str(cached_file(path, mixer_file_name(name))))


def mixer_file_name(name: str) -> str:
    """Return the name under which a custom mixer's file is saved beside the weights."""
    return f"mixer_{name}.py"
