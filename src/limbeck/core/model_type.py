"""Names the model type of students and holds the class by which AutoConfig opens one.

    AutoConfig.from_pretrained("runs/quickstart/student")        # transformers finds LimbeckConfig by the model type

It stands on the ground floor because transformers loads it while it is itself being imported: whatever of Limbeck imports
transformers would run into a circle. The rest is imported when a student is opened.
"""

from importlib import import_module
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
        plan = config_dict.get("limbeck")
        if not plan:
            raise LimbeckError("config.json has model_type 'limbeck' but no entry 'limbeck' with the mixers")
        if isinstance(plan, dict) and isinstance(plan.get("format"), int) and plan["format"] > FORMAT_VERSION:
            raise LimbeckError(
                f"this student was saved in format {plan['format']}",
                expected=f"at most {FORMAT_VERSION}",
                hint="pip install --upgrade limbeck",
            )
        # by name: the room of the models stands above this one
        import_module("limbeck.models.checkpoint").check_plan_schema(plan)
        config_class, _ = import_module("limbeck.models.modeling").get_student_classes(
            plan["base_model_type"], plan["base_architecture"]
        )
        return config_class.from_dict(config_dict, **kwargs)
