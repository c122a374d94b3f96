"""Find which stages of which arms can train on the same passes of the teacher.

    key = pass_key(recipe, 1)          # equal keys: the same teacher reads the same text at the same positions
    group_arms_by_pass(arms)           # arms that share a pass with each other, directly or through others

Stages 0 to 2 run the teacher without a gradient, and nothing that they train changes what it sees. So only the teacher,
the text, the position in it, the batches and the seed, which orders the text, have to agree. Mixer, layers, loss,
target and learning rates may differ.
"""

import json
from typing import Any

from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Calibrate, Logits, Matrix
from limbeck.study.spec import Arm
from limbeck.training.calibration import RIDGE_EVAL_SEQUENCES, count_calibration_sequences
from limbeck.training.job import dataset_key
from limbeck.training.optim import count_training_steps


def pass_key(recipe: Recipe, index: int) -> str | None:
    """Describe what the teacher sees in a stage, as text; None where no pass can be shared.

    That is so in stage 3, where the student runs on its own hidden states, and after a stage that may stop early,
    since the position in the text is unknown then.
    """
    before, stage = recipe.stages[:index], recipe.stages[index]
    if isinstance(stage, Logits) or any(isinstance(earlier, Logits) or _ends_early(earlier) for earlier in before):
        return None
    text = recipe.text_of(stage)
    opened = [recipe.data, *(recipe.text_of(other) for other in recipe.stages)]
    if recipe.keep_better:
        opened.append(recipe.guard_text)
    inputs: dict[str, Any] = {
        "teacher": (recipe.teacher, recipe.teacher_bits, recipe.device),
        "arithmetic": (recipe.precision, recipe.tf32, recipe.deterministic),
        "seed": recipe.seed,
        "text": dataset_key(text),
        "length": text.seq_len,
        # a text is opened for the longest sequences that are read of it, and gathers what is evaluated on
        "opened": (
            max(data.seq_len for data in opened if dataset_key(data) == dataset_key(text)),
            recipe.evaluation.tokens,
        ),
        "read": [
            _count_sequences(recipe, earlier)
            for earlier in before
            if dataset_key(recipe.text_of(earlier)) == dataset_key(text)
        ],
        "stage": stage.stage,
        "batch": (stage.batch_size, stage.micro_batch_size),
    }
    if isinstance(stage, Calibrate):
        inputs["sequences"] = count_calibration_sequences(stage, text.seq_len)
    if isinstance(stage, Matrix):
        inputs["rows"] = stage.sampled_queries
    return json.dumps(inputs, sort_keys=True)


def group_arms_by_pass(arms: list[Arm]) -> list[list[Arm]]:
    """Group arms so that no two groups share a pass; an arm that shares none is in no group."""
    group = {arm.name: {arm.name} for arm in arms}
    first_arm: dict[str, str] = {}
    for arm in arms:
        for key in list_pass_keys(arm.recipe):
            other = first_arm.setdefault(key, arm.name)
            if group[other] is not group[arm.name]:
                group[other] |= group[arm.name]
                for name in group[arm.name]:
                    group[name] = group[other]
    groups: dict[int, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(id(group[arm.name]), []).append(arm)
    return [members for members in groups.values() if len(members) > 1]


def list_pass_keys(recipe: Recipe) -> list[str]:
    """List the keys of the stages whose passes can be shared, in order."""
    keys = [pass_key(recipe, index) for index in range(len(recipe.stages))]
    return [key for key in keys if key is not None]


def _ends_early(stage: Any) -> bool:
    """Tell whether a stage may stop before all its tokens are read."""
    return bool(getattr(stage, "patience", None) or getattr(stage, "layer_early_stopping", None))


def _count_sequences(recipe: Recipe, stage: Any) -> tuple[int, int]:
    """Return the length and number of the sequences that a stage reads."""
    length = recipe.text_of(stage).seq_len
    if isinstance(stage, Calibrate):
        return length, count_calibration_sequences(stage, length) + (
            RIDGE_EVAL_SEQUENCES if stage.ridge == "auto" else 0
        )
    return length, count_training_steps(stage, length) * stage.batch_size
