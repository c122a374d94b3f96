"""Choose the groups of heads that keep softmax at the start of a run, where its recipe says only how many.

    student = find_chosen_heads(recipe.student, folder)             # of a run that has begun
    student = choose_softmax_heads(recipe, teacher, sites, text)     # recipe.student, with a file of the groups

The choice depends on teacher, text and number alone (`limbeck.training.head_selection`). It is kept in the run
directory, where a resumed run finds it, and in the cache, where other runs with the same teacher and text do.
"""

import json
from pathlib import Path

from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe, Student
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.data.dataset import TextData
from limbeck.data.packing import take_sequences_with_targets
from limbeck.data.tokenization import hash_settings
from limbeck.models import Site
from limbeck.models.fingerprint import fingerprint_tensors
from limbeck.models.layers import select_converted_layers
from limbeck.training import head_selection

SELECTION_FILE = "softmax_heads.json"  # in the run directory
ROWS = 2  # rows of A B A
ROW_TOKENS = 768  # tokens of a row, or as many as the recipe's longest sequences have
WINDOW = 64  # of the groups that are not chosen, while others are priced
FORMAT = 1  # raise when the same teacher and text give another choice


def find_chosen_heads(student: Student, folder: Path) -> Student:
    """Return a recipe's student with the groups that its run directory has; as it is where it names them itself."""
    path = folder / SELECTION_FILE
    if isinstance(student.softmax_heads, int) and path.is_file():
        return student.model_copy(update={"softmax_heads": str(path)})
    return student


def take_first_heads(student: Student, sites: list[Site]) -> Student:
    """Return a recipe's student with its first groups in the place of those that are still to be chosen.

    Args:
        sites: all attention layers of the teacher.

    Raises:
        LimbeckError: more groups than the converted layers have.
    """
    groups = _list_groups(student, sites)
    head_selection.check_count(int(student.softmax_heads), len(groups))  # type: ignore[arg-type]
    return student.model_copy(update={"softmax_heads": groups[: student.softmax_heads]})  # type: ignore[index, misc]


def describe_choice(student: Student, sites: list[Site]) -> str:
    """Say what is to be chosen, for a plan."""
    return f"{student.softmax_heads} of {len(_list_groups(student, sites))} groups of heads, in a few minutes on a CPU"


def choose_softmax_heads(recipe: Recipe, teacher: PreTrainedModel, sites: list[Site], text: TextData) -> Student:
    """Choose the groups of heads of a recipe that says only how many; returns its student with a file of them.

    Args:
        sites: all attention layers of the teacher.
        text: the recipe's.
    """
    count = recipe.student.softmax_heads
    assert isinstance(count, int)
    converted = select_converted_layers(recipe.student.layers, recipe.student.softmax_layers, len(sites))
    length = min(ROW_TOKENS, recipe.longest)
    settings = {
        "format": FORMAT,
        "teacher": fingerprint_tensors(teacher),
        "text": text.key,
        "count": count,
        "layers": converted,
        "rows": [ROWS, length],
        "window": WINDOW,
        "seed": recipe.seed,
    }
    path = cache_root() / "selections" / f"{hash_settings(settings)}.json"
    if not path.is_file():
        groups = len(_list_groups(recipe.student, sites))
        console.print(f"choosing {count} of {groups} groups of heads, those that look furthest back")
        batch, _ = take_sequences_with_targets(text.train_sequences(length, recipe.seed), 0, ROWS)
        candidates = [sites[i] for i in converted]
        content = head_selection.choose_heads(teacher, candidates, batch, count, window=WINDOW, facts=settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    return recipe.student.model_copy(update={"softmax_heads": str(path)})


def store_chosen_heads(recipe: Recipe, student: Student, folder: Path) -> None:
    """Copy the choice into the run directory, for resuming without the cache; does nothing where there was none."""
    path = folder / SELECTION_FILE
    if isinstance(recipe.student.softmax_heads, int) and not path.is_file():
        try:
            content = Path(str(student.softmax_heads)).read_text(encoding="utf-8")
        except OSError as error:
            raise LimbeckError(f"cannot read the choice of heads: {error}", hint="the same command") from error
        atomic_write_text(path, content)


def _list_groups(student: Student, sites: list[Site]) -> list[str]:
    """List the groups of the layers that a student converts, by name."""
    converted = select_converted_layers(student.layers, student.softmax_layers, len(sites))
    return [f"{sites[i].shape.layer}.{group}" for i in converted for group in range(sites[i].shape.kv_heads)]
