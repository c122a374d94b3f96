"""The model type of students, and the class by which AutoConfig opens one; imports no more than that."""

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
        from limbeck.models.checkpoint import check_plan_schema
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
