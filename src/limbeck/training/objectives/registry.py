"""The further objectives of stage 3 by name; a new one is a module of this folder, its settings and a line here."""

from transformers import PreTrainedTokenizerBase

from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Logits
from limbeck.training.objectives.adapted_features import AdaptedFeaturesObjective
from limbeck.training.objectives.base import Objective, Surroundings
from limbeck.training.objectives.exits import ExitsObjective
from limbeck.training.objectives.features import FeaturesObjective
from limbeck.training.objectives.gram import GramObjective
from limbeck.training.objectives.on_policy import OnPolicyObjective
from limbeck.training.objectives.online_teacher import OnlineTeacherObjective
from limbeck.training.objectives.stochastic_teacher import StochasticTeacherObjective
from limbeck.training.objectives.teachers import TeachersObjective

# by the name of the settings in `limbeck.core.objectives.Objectives`
PLUGINS: dict[str, type[Objective]] = {
    plugin.name: plugin
    for plugin in (
        OnPolicyObjective,
        GramObjective,
        FeaturesObjective,
        ExitsObjective,
        AdaptedFeaturesObjective,
        OnlineTeacherObjective,
        StochasticTeacherObjective,
        TeachersObjective,
    )
}


def check_objectives(recipe: Recipe, blocks: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse further objectives that do not fit the teacher, the text or the processes, before a run begins.

    Args:
        blocks: of the teacher.
        tokenizer: of the teacher; None for a plan.

    Raises:
        LimbeckError: one does not fit.
    """
    for index, stage in enumerate(recipe.stages):
        chosen = stage.objectives.active() if isinstance(stage, Logits) else {}
        for name, settings in chosen.items():
            plugin, key = PLUGINS[name], f"stages.{index}.objectives.{name}"
            if plugin.single_process and get_process_info().world_size > 1:
                raise LimbeckError(f"{key}: {plugin.single_process}", expected="one process")
            plugin.check(settings, Surroundings(recipe.text_of(stage).seq_len, blocks, tokenizer), key)
