"""Choose the groups of heads that keep softmax at the start of a run, where its recipe says only how many.

    student = choose_softmax_heads(recipe, teacher, folder, open_text)     # recipe.student, with a file of the groups
    student = find_chosen_heads(recipe.student, folder)                    # the same for a run that has begun

The choice depends on teacher, text and number alone (`limbeck.training.head_selection`). It is kept in the run
directory, where a resumed run finds it, and in the cache, where other runs with the same teacher and text do.
"""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from limbeck.core.cache import get_dry_run_notes
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe, Student
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.data.dataset import TextData
from limbeck.data.packing import take_sequences_with_targets
from limbeck.data.tokenization import hash_settings
from limbeck.models import find_attention_sites
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


def choose_softmax_heads(
    recipe: Recipe, teacher: PreTrainedModel, folder: Path, open_text: Callable[[], TextData]
) -> Student:
    """Return a recipe's student with the groups of heads that keep softmax, choosing them first if need be.

    In a plan (`limbeck.core.cache.cache_dry_run`) nothing is computed: the first groups stand for those to be chosen.

    Args:
        folder: the run directory; only read.
        open_text: returns the recipe's text.

    Raises:
        LimbeckError: more groups than the converted layers have.
    """
    count = recipe.student.softmax_heads
    student = find_chosen_heads(recipe.student, folder)
    if not isinstance(student.softmax_heads, int) or not isinstance(count, int):
        return student
    sites = find_attention_sites(teacher)
    chosen = select_converted_layers(student.layers, student.softmax_layers, len(sites))
    sites = [sites[i] for i in chosen]
    groups = [f"{site.shape.layer}.{group}" for site in sites for group in range(site.shape.kv_heads)]
    head_selection.check_count(count, len(groups))
    notes = get_dry_run_notes()
    if notes is not None:
        notes.append(
            f"would be chosen first, once: {count} of {len(groups)} groups of heads, in a few minutes on a CPU"
        )
        return student.model_copy(update={"softmax_heads": groups[:count]})
    text = open_text()
    length = min(ROW_TOKENS, recipe.longest)
    settings = {
        "format": FORMAT,
        "teacher": fingerprint_tensors(teacher),
        "text": text.key,
        "count": count,
        "layers": chosen,
        "rows": [ROWS, length],
        "window": WINDOW,
    }
    path = cache_root() / "selections" / f"{hash_settings(settings)}.json"
    if not path.is_file():
        console.print(f"Choosing {count} of {len(groups)} groups of heads that look further back than the others")
        batch, _ = take_sequences_with_targets(text.train_sequences(length, recipe.seed), 0, ROWS)
        gated = head_selection.GatedTeacher(teacher, sites, WINDOW)
        worth, losses = head_selection.select_heads(
            gated, head_selection.prepare_texts(batch, teacher.device), count, "path"
        )
        content = head_selection.head_selection_to_dict(worth, losses, **settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    return student.model_copy(update={"softmax_heads": str(path)})


def store_chosen_heads(recipe: Recipe, student: Student, folder: Path) -> None:
    """Copy the choice into the run directory, for resuming without the cache; does nothing where there was none."""
    path = folder / SELECTION_FILE
    if isinstance(recipe.student.softmax_heads, int) and not path.is_file():
        try:
            content = Path(str(student.softmax_heads)).read_text(encoding="utf-8")
        except OSError as error:
            raise LimbeckError(f"cannot read the choice of heads: {error}", hint="the same command") from error
        atomic_write_text(path, content)
