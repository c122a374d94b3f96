"""The student as a Hugging Face model: the teacher's own class with mixers, under a model type of its own.

A saved student says `model_type: limbeck`, so nothing can load it as softmax by accident. Its config is the base
family's config plus one entry `limbeck` that says which module has which mixer; its class is made on the fly as a
subclass of the base family's class. `import limbeck` is all that AutoModelForCausalLM needs; where even that does not
happen, the small file beside the weights lets `trust_remote_code=True` do it.

    import limbeck
    student = AutoModelForCausalLM.from_pretrained("runs/quickstart/student")

Ways of decoding that a student cannot follow, refused before any work with the reason.

check_decoding(student, prompt_lookup_num_tokens=3)          # a LimbeckError

A recurrent state is what is left of all tokens so far; none can be taken back. Whatever tries tokens and drops them
again (assisted and speculative decoding, prompt lookup, contrastive search) needs a cache that can be cropped.
"""

import copy
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
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from limbeck import mixers
from limbeck.core.errors import LimbeckError
from limbeck.core.model_type import MODEL_TYPE, LimbeckConfig
from limbeck.mixers import HeadShape
from limbeck.models import attention, custom_mixers, entrance
from limbeck.models.checkpoint import (
    check_loading_info,
    check_no_adapter,
    check_plan_schema,
    check_plan_unchanged,
    select_hub_kwargs,
)
from limbeck.models.quantization import exclude_mixers

_ARGUMENTS = inspect.signature(GenerationMixin.generate)
# what stops with an error or a download of its own otherwise, by mode
GOES_BACK = {
    GenerationMode.ASSISTED_GENERATION: "assisted decoding",
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search",
}
FORWARD = "generation that only goes forward: greedy, sampling, beam search"


def check_decoding(model: PreTrainedModel, *args, **kwargs) -> None:
    """Raises a LimbeckError where `model.generate(*args, **kwargs)` would have to take tokens back.

    Args:
        model: a student.
        args, kwargs: as given to `generate`.
    """
    given = _ARGUMENTS.bind_partial(model, *args, **kwargs).arguments
    asked = {**given.pop("kwargs", {}), **given}
    config = _config(asked.get("generation_config") or model.generation_config, asked)  # type: ignore[arg-type]
    if getattr(config, "is_assistant", False):
        raise _refused("a student as the assistant of another model", "a softmax model as the assistant")
    if asked.get("cache_implementation") == "paged":
        raise_paged_unsupported()
    _check_prompt(asked)
    name = GOES_BACK.get(config.get_generation_mode(asked.get("assistant_model")))
    if name is None:
        return
    if config.prompt_lookup_num_tokens is not None:
        name = "prompt lookup"
    raise _refused(name, FORWARD)


def raise_paged_unsupported(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises the LimbeckError of continuous batching, in the place of any method that begins it."""
    raise LimbeckError(
        "continuous batching pages keys and values, and a student keeps none",
        expected="generate(), with cache_implementation: dynamic, static or offloaded",
        hint="pad the batch on the left: generate(input_ids, attention_mask=mask)",
    )


def _check_prompt(asked: dict[str, Any]) -> None:
    """Raises LimbeckError where a prompt brings nothing new to the cache that it comes with."""
    cache = next((asked[name] for name in ("past_key_values", "cache") if isinstance(asked.get(name), Cache)), None)
    tokens = next(
        (asked[name] for name in ("inputs", "input_ids", "inputs_embeds") if asked.get(name) is not None), None
    )
    if cache is None or tokens is None:
        return
    held, length = int(cache.get_seq_length()), tokens.shape[1]
    if 0 < length <= held:
        raise LimbeckError(
            f"the prompt has {length} tokens, and its cache has read {held} already",
            expected="the whole text so far: all that the cache has read, and new tokens behind it",
            hint="to go back to an earlier point, keep a copy of the cache made there: copy.deepcopy(cache)",
        )


def _config(config: GenerationConfig, asked: dict[str, Any]) -> GenerationConfig:
    """The generation config with what stands beside it in the call."""
    merged = copy.copy(config)
    for name, value in asked.items():
        if value is not None and hasattr(merged, name):
            setattr(merged, name, value)
    return merged


def _refused(what: str, expected: str) -> LimbeckError:
    return LimbeckError(
        f"{what} drops tokens again, and a recurrent state cannot: it has no memory of its earlier self",
        expected=expected,
        hint="leave out assistant_model, prompt_lookup_num_tokens, assistant_early_exit, use_mtp and penalty_alpha",
    )


ONLY_MIXERS = "limbeck_only"  # an attention implementation that nobody registers
# what a student is called until it is saved: libraries that load a model anew by its name say this in their error
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
    """What a student's class adds to its family's class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        asked = config._attn_implementation
        if asked in (None, ONLY_MIXERS):
            asked = attention.default_attn_implementation(type(self))
        config._attn_implementation = attention.resolve_attn_implementation(type(self), asked)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_mixers(self, config.limbeck)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not what transformers calls so: buffers that the family computes anew at loading would be skipped."""
        return False

    def generate(self, *args, **kwargs):
        check_decoding(self, *args, **kwargs)  # type: ignore[arg-type]
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    # continuous batching has entrances of its own
    generate_batch = init_continuous_batching = continuous_batching_context_manager = raise_paged_unsupported

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """Choose how the layers that stay softmax compute: "sdpa" or "eager"; the mixers stay what they are."""
        plan = self.config.limbeck  # type: ignore[attr-defined]
        chosen = attention.resolve_attn_implementation(type(self), attn_implementation)
        if chosen != attn_implementation and len(plan["layers"]) == plan["shapes"][0]["layers"]:
            raise LimbeckError(
                f"attention implementation '{attn_implementation}' would drop the student's mixers, and no layer of it "
                "is softmax",
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
        """As of any model; from then on the student is called after the folder, which holds what it is."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not getattr(self, "_hf_peft_config_loaded", False):  # then the folder holds the adapters alone
            self.name_or_path = self.config._name_or_path = str(save_directory)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls, path, *args, trust_remote_code=False, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ) -> Any:
        """As of any model, but weights that do not fit the plan are a LimbeckError and never drawn at random."""
        check_no_adapter(path)
        plan = getattr(kwargs.get("config"), "limbeck", None)
        if plan:
            check_plan_unchanged(path, plan, **kwargs)
            if trust_remote_code:
                custom_mixers.load_mixer_files(path, plan)
        if kwargs.get("quantization_config") is not None:
            config = kwargs.get("config") or AutoConfig.from_pretrained(path, **select_hub_kwargs(kwargs))
            kwargs["quantization_config"] = exclude_mixers(kwargs["quantization_config"], cls, config)
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loading_info(path, info, ignore_mismatched_sizes, student=True)
        return (model, info) if output_loading_info else model

    def __reduce_ex__(self, protocol):
        """Pickled by the names of its family: the class itself is made on the fly."""
        return _by_name(self, self.config.limbeck, 1, super().__reduce_ex__(max(protocol, 2)))  # type: ignore[attr-defined]


class StudentConfig:
    """What a student's config adds to its family's config."""

    model_type = MODEL_TYPE

    @property
    def output_attentions(self) -> bool:
        """Whether attention weights are given back; softmax layers find them with any implementation."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: see `output_attentions`."""

    def to_diff_dict(self) -> dict[str, Any]:
        # the family's own class, asked to load this as softmax, finds no attention of that name and stops
        return {**super().to_diff_dict(), "attn_implementation": ONLY_MIXERS}  # type: ignore[misc]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes what remote code needs beside config.json, before anything is uploaded."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / "modeling_limbeck.py").write_text(REMOTE_CODE, encoding="utf-8")
        custom_mixers.save_mixer_files(Path(save_directory), self.limbeck)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol):
        return _by_name(self, getattr(self, "limbeck", None), 0, super().__reduce_ex__(max(protocol, 2)))


class HeadlessStudent(PreTrainedModel):
    """What every other auto class makes of a student: an error, for the plan names the modules of the whole model."""

    auto_class = "AutoModel"

    @classmethod
    def from_pretrained(cls, path=None, *args, **kwargs) -> Any:  # type: ignore[override]
        without = "loads a body without its head" if cls.auto_class == "AutoModel" else "puts another head on the model"
        raise LimbeckError(
            f"{cls.auto_class} {without}, and a student is saved whole",
            expected="AutoModelForCausalLM",
            hint="AutoModelForCausalLM.from_pretrained(...).base_model is the body with its mixers; a head of another "
            "kind takes what the body gives",
        )

    @classmethod
    def _from_config(cls, config, **kwargs) -> Any:
        return cls.from_pretrained()


@cache
def get_student_classes(base_model_type: str, base_architecture: str) -> tuple[Any, Any]:
    """Config and model class of a student of that family, registered with transformers' auto classes.

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
                f"{base_architecture} is no model of type '{base_model_type}'",
                expected="the student's base family as its config.json was written",
                hint="export or download the folder again",
            )
    elif base_model is not None:
        raise LimbeckError(f"'{base_architecture}' is no model", expected="a class such as LlamaForCausalLM")
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
    autos: list[Any] = [found for found in vars(modeling_auto).values() if inspect.isclass(found)]
    for auto in autos:
        if auto is not AutoModelForCausalLM and getattr(auto, "_model_mapping", None) is not None:
            other = {**of_config, "auto_class": auto.__name__}
            auto.register(config_class, type(f"{name}Headless", (HeadlessStudent,), other), exist_ok=True)
    # families whose files are laid out otherwise than their modules (experts one by one) say so by class or model type
    layout = get_checkpoint_conversion_mapping(base_architecture) or get_checkpoint_conversion_mapping(base_model_type)
    if layout:
        register_checkpoint_conversion_mapping(name, layout, overwrite=True)
    return config_class, model_class


def _by_name(made: Any, plan: dict[str, Any] | None, which: int, reduced: Any) -> Any:
    """How an object of a class made here is pickled and copied; of a class derived from it, as Python does."""
    if plan and type(made) is get_student_classes(plan["base_model_type"], plan["base_architecture"])[which]:
        return _blank, (plan["base_model_type"], plan["base_architecture"], which), *reduced[2:]
    return reduced


def _blank(base_model_type: str, base_architecture: str, which: int) -> Any:
    made = get_student_classes(base_model_type, base_architecture)[which]
    return made.__new__(made)


def install_mixers(model: nn.Module, plan: dict[str, Any]) -> None:
    """Put the mixers of a plan (`config.limbeck`) into a model of the right shape."""
    check_plan_schema(plan)
    known = {f.name for f in fields(HeadShape)}
    shapes = [HeadShape(**{key: value for key, value in shape.items() if key in known}) for shape in plan["shapes"]]
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
        cls = custom_mixers.resolve_mixer_class(entry["mixer"], plan)
        attention.attach_mixer(module, cls(shape, cls.options_class.parse(entry["options"], cls.name)))
    entrance.register_input_checks(model)  # type: ignore[arg-type]
    body = model.base_model
    if body is not model:
        body.save_pretrained = _refuse_body  # type: ignore[assignment, union-attr]


def _refuse_body(*args: Any, **kwargs: Any) -> NoReturn:
    raise LimbeckError(
        "the body of a student saved without its head could not be loaded again: its plan names modules of the whole",
        expected="student.save_pretrained(folder)",
        hint="AutoModelForCausalLM.from_pretrained(folder).base_model gives the body",
    )


def _refuse_unsaved(student: Any) -> None:
    if student.name_or_path == UNSAVED_NAME:
        raise LimbeckError(
            "this student was never saved, and a model with adapters saves the adapters alone: nothing could load them",
            expected="a student from a folder",
            hint="student.save_pretrained(folder) first",
        )


def get_mixers(model: nn.Module) -> dict[str, mixers.Mixer]:
    """The mixers of a student by the name of their attention module."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, mixers.Mixer)}
    # a mixer may be made of mixers; those within are its own business
    return {name.removesuffix(".mixer"): m for name, m in found.items() if ".mixer." not in name}
