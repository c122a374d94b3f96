"""The model type `limbeck`: the config class by which AutoConfig opens a student, and the form of a student's plan.

    config = AutoConfig.from_pretrained("runs/quickstart/student")
    config.limbeck["layers"][0]     # {"module": "model.layers.0.self_attn", "layer": 0, "mixer": "gla", ...}

A plan (`config.limbeck`) says which attention module has which mixer with which options. This module is imported with
transformers (`limbeck.models.registration`) and therefore imports little itself.
"""

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from limbeck.core.errors import LimbeckError

MODEL_TYPE = "limbeck"
FORMAT_VERSION = 1


class LimbeckConfig(PreTrainedConfig):
    """Entry point for AutoConfig: builds the config of the family that the student came from."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        # start-up time: `modeling` imports torch and the model classes, which only an opened student needs
        from limbeck.models.modeling import get_student_classes

        plan = config_dict.get("limbeck")
        if not plan:
            raise LimbeckError("config.json has model_type 'limbeck' but no entry 'limbeck' with the mixers")
        if isinstance(plan, dict) and isinstance(plan.get("format"), int) and plan["format"] > FORMAT_VERSION:
            raise LimbeckError(
                f"this student was saved in format {plan['format']}",
                expected=f"at most {FORMAT_VERSION}",
                hint="pip install --upgrade limbeck",
            )
        check_plan_schema(plan)
        config_class, _ = get_student_classes(plan["base_model_type"], plan["base_architecture"])
        return config_class.from_dict(config_dict, **kwargs)


def check_plan_schema(plan: Any) -> None:
    """Refuse a plan (`config.limbeck`) that does not have the form in which `convert` writes it.

    Raises:
        LimbeckError: names the entry that is missing, has another type, or points at nothing.
    """
    _check_entries("limbeck", plan, {"base_model_type": str, "base_architecture": str, "shapes": list, "layers": list})
    if not isinstance(plan.get("format", 0), int):
        raise _malformed(f"limbeck.format is {plan['format']!r}"[:80], "int")
    shape_types = {"hidden": int, "heads": int, "kv_heads": int, "key_width": int, "value_width": int}
    for i, shape in enumerate(plan["shapes"]):
        _check_entries(f"limbeck.shapes.{i}", shape, shape_types)
    layer_types = {"module": str, "layer": int, "mixer": str, "options": dict, "shape": int}
    for i, layer in enumerate(plan["layers"]):
        _check_entries(f"limbeck.layers.{i}", layer, layer_types)
        if not 0 <= layer["shape"] < len(plan["shapes"]):
            raise _malformed(f"limbeck.layers.{i}.shape is {layer['shape']}", f"0 to {len(plan['shapes']) - 1}")


def _check_entries(path: str, entry: Any, types: Mapping[str, type]) -> None:
    if not isinstance(entry, dict):
        raise _malformed(f"{path} is {entry!r}"[:80], "a mapping")
    for key, expected_type in types.items():
        if key not in entry:
            raise _malformed(f"{path} has no entry '{key}'", expected_type.__name__)
        # bool is a subclass of int in Python, and `true` is no layer number
        if not isinstance(entry[key], expected_type) or isinstance(entry[key], bool):
            raise _malformed(f"{path}.{key} is {entry[key]!r}"[:80], expected_type.__name__)


def _malformed(problem: str, expected: str) -> LimbeckError:
    return LimbeckError(
        f"the student's plan in config.json is damaged: {problem}",
        expected=expected,
        hint="export or download the folder again",
    )
