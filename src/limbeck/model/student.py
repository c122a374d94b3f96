"""The student as a Hugging Face model: the teacher's own class with mixers, under a model type of its own.

A saved student says `model_type: limbeck`, so nothing can load it as softmax by accident. Its config is the base
family's config plus one entry `limbeck` that says which module has which mixer; its class is made on the fly as a
subclass of the base family's class. `import limbeck` is all that AutoModelForCausalLM needs; where even that does not
happen, the small file beside the weights lets `trust_remote_code=True` do it.

    import limbeck
    student = AutoModelForCausalLM.from_pretrained("runs/quickstart/student")
"""

from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from limbeck import mixers
from limbeck.errors import LimbeckError
from limbeck.mixers import HeadShape
from limbeck.model import attention, foreign
from limbeck.model.decoding import check_decoding
from limbeck.model.loading import check_plan, check_tensors, where
from limbeck.model_type import MODEL_TYPE, LimbeckConfig

ONLY_MIXERS = "limbeck_only"  # an attention implementation that nobody registers
REMOTE_CODE = '''"""Lets trust_remote_code=True load this student; the code itself is the package limbeck."""

from limbeck.model.student import LimbeckConfig, LimbeckForCausalLM  # noqa: F401
'''


class LimbeckForCausalLM(PreTrainedModel):
    """Entry point for remote code: hands over to the class of the family that the student came from."""

    config_class = LimbeckConfig

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs) -> Any:  # type: ignore[override]
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **where(kwargs))
        _, model_class = student_classes(config.limbeck["base_model_type"], config.limbeck["base_architecture"])
        return model_class.from_pretrained(path, *args, config=config, **kwargs)


class StudentMixin:
    """What a student's class adds to its family's class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        config._attn_implementation = attention.implementation(type(self))
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, config.limbeck)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not what transformers calls so: buffers that the family computes anew at loading would be skipped."""
        return False

    def generate(self, *args, **kwargs):
        check_decoding(self, *args, **kwargs)  # type: ignore[arg-type]
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        if attn_implementation != attention.implementation(type(self)):
            raise LimbeckError(
                f"attention implementation '{attn_implementation}' would drop the student's mixers",
                expected=f"'{attention.implementation(type(self))}'",
            )

    @classmethod
    def from_pretrained(
        cls, path, *args, trust_remote_code=False, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ) -> Any:
        """As of any model, but weights that do not fit the plan are a LimbeckError and never drawn at random."""
        plan = getattr(kwargs.get("config"), "limbeck", None)
        if plan:
            check_plan(path, plan, **kwargs)
            if trust_remote_code:
                foreign.load_beside(path, plan)
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_tensors(path, info, ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    def __reduce_ex__(self, protocol):
        """Pickled by the names of its family: the class itself is made on the fly."""
        return _by_name(self, self.config.limbeck, 1, super().__reduce_ex__(max(protocol, 2)))  # type: ignore[attr-defined]


class StudentConfig:
    """What a student's config adds to its family's config."""

    model_type = MODEL_TYPE

    def to_diff_dict(self) -> dict[str, Any]:
        # the family's own class, asked to load this as softmax, finds no attention of that name and stops
        return {**super().to_diff_dict(), "attn_implementation": ONLY_MIXERS}  # type: ignore[misc]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes what remote code needs beside config.json, before anything is uploaded."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / "modeling_limbeck.py").write_text(REMOTE_CODE, encoding="utf-8")
        foreign.save_beside(Path(save_directory), self.limbeck)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol):
        return _by_name(self, getattr(self, "limbeck", None), 0, super().__reduce_ex__(max(protocol, 2)))


class HeadlessStudent(PreTrainedModel):
    """What AutoModel makes of a student: an error, for the plan names the modules of the whole model."""

    @classmethod
    def from_pretrained(cls, path=None, *args, **kwargs) -> Any:  # type: ignore[override]
        raise LimbeckError(
            "AutoModel loads a body without its head, and a student is saved whole",
            expected="AutoModelForCausalLM",
            hint="AutoModelForCausalLM.from_pretrained(...).base_model is the body with its mixers",
        )

    @classmethod
    def _from_config(cls, config, **kwargs) -> Any:
        return cls.from_pretrained()


@cache
def student_classes(base_model_type: str, base_architecture: str) -> tuple[Any, Any]:
    """Config and model class of a student of that family, registered with transformers' auto classes.

    Args:
        base_model_type: the teacher's `config.model_type`, e.g. "llama".
        base_architecture: the teacher's class, e.g. "LlamaForCausalLM".
    """
    base_model = getattr(transformers, base_architecture, None)
    if base_model_type not in CONFIG_MAPPING or base_model is None:
        raise LimbeckError(
            f"this transformers ({transformers.__version__}) has no {base_architecture} of type '{base_model_type}'",
            expected="a version that knows the student's base family",
            hint="pip install --upgrade transformers",
        )
    base_config = CONFIG_MAPPING[base_model_type]
    made = {"model_type": MODEL_TYPE, "__module__": __name__}
    config_class = type(f"Limbeck{base_config.__name__}", (StudentConfig, base_config), made)
    name = f"Limbeck{base_architecture}"
    of_config = {"config_class": config_class, "__module__": __name__}
    model_class = type(name, (StudentMixin, base_model), of_config)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    AutoModel.register(config_class, type(f"{name}Headless", (HeadlessStudent,), of_config), exist_ok=True)
    # families whose files are laid out otherwise than their modules (experts one by one) say so by class or model type
    layout = get_checkpoint_conversion_mapping(base_architecture) or get_checkpoint_conversion_mapping(base_model_type)
    if layout:
        register_checkpoint_conversion_mapping(name, layout, overwrite=True)
    return config_class, model_class


def _by_name(made: Any, plan: dict[str, Any] | None, which: int, reduced: Any) -> Any:
    """How an object of a class made here is pickled and copied; of a class derived from it, as Python does."""
    if plan and type(made) is student_classes(plan["base_model_type"], plan["base_architecture"])[which]:
        return _blank, (plan["base_model_type"], plan["base_architecture"], which), *reduced[2:]
    return reduced


def _blank(base_model_type: str, base_architecture: str, which: int) -> Any:
    made = student_classes(base_model_type, base_architecture)[which]
    return made.__new__(made)


def install(model: nn.Module, plan: dict[str, Any]) -> None:
    """Put the mixers of a plan (`config.limbeck`) into a model of the right shape."""
    shapes = [HeadShape(**shape) for shape in plan["shapes"]]
    for entry in plan["layers"]:
        module = model.get_submodule(entry["module"])
        shape = HeadShape(**{**vars(shapes[entry["shape"]]), "layer": entry["layer"]})
        cls = foreign.find(entry["mixer"], plan)
        attention.attach(module, cls(shape, cls.options_class.parse(entry["options"], cls.name)))


def mixers_of(model: nn.Module) -> dict[str, mixers.Mixer]:
    """The mixers of a student by the name of their attention module."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, mixers.Mixer)}
    # a mixer may be made of mixers; those within are its own business
    return {name.removesuffix(".mixer"): m for name, m in found.items() if ".mixer." not in name}
