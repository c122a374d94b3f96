"""Any model with its tokenizer, students included, from a folder or from the hub.

is_student("someone/my-student")                       # reads the config alone
model, tokenizer = open_model("someone/my-student")    # float32, on the CPU, frozen
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import limbeck.model.student  # noqa: F401  registers students with transformers
from limbeck.errors import LimbeckError
from limbeck.hub import look_up, split_revision


def is_student(name: str) -> bool:
    """Whether a folder or a name on the hub holds a student; of what cannot be read the loading knows more.

    Raises:
        LimbeckError: no folder, and the hub has no model of that name or cannot be reached.
    """
    if not Path(name).exists():
        look_up(name)
    try:
        place, revision = split_revision(name)
        return hasattr(AutoConfig.from_pretrained(place, revision=revision), "limbeck")
    except (OSError, ValueError):
        return False


def open_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for use and its tokenizer.

    Raises:
        LimbeckError: nothing of that name, or a part of it is missing or damaged.
    """
    if not Path(name).exists():
        look_up(name)
    try:
        place, revision = split_revision(name)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=torch.float32)
    except LimbeckError:
        raise
    except (OSError, ValueError) as error:
        raise LimbeckError(f"cannot load '{name}': {str(error).splitlines()[0]}", expected="a whole model") from error
    return model.eval().requires_grad_(False), tokenizer
