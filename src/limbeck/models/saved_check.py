"""The check of a saved student: the folder has to load as the student that was saved there.

    check_export(folder, student, tokenizer)       # LimbeckError unless it loads bit for bit

What is written may differ from what is meant: only an adapter is saved instead of the model, a tensor is taken for
tied, a tokenizer loses a setting.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.errors import LimbeckError
from limbeck.models.checkpoint import format_names
from limbeck.models.loading import SAFE_KWARGS, check_finite, load_config, load_model, load_tokenizer

SAMPLE_TEXT = "In 1984, the café's 12 guests said: «It's fine!»\n\n\tnaïve 你好 🙂"


def check_export(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: bool = True
) -> None:
    """Refuse a folder that would not load as the student that was saved there.

    Weights are compared one tensor at a time, so that no second student is in memory.

    Args:
        weights: compare the weights too; False if only a few of them were written, in a rehearsal.

    Raises:
        LimbeckError: says what is missing or differs; or that weights of the student are not finite.
    """
    config = load_config(str(folder))
    GenerationConfig.from_pretrained(folder)
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(config, **SAFE_KWARGS)
    expected, actual = _shapes(student), _shapes(loaded)
    different = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if type(loaded) is not type(student) or different:
        raise _export_error(folder, f"it loads as {type(loaded).__name__}", different)
    saved_tokenizer = load_tokenizer(str(folder))
    if (
        saved_tokenizer(SAMPLE_TEXT).input_ids != tokenizer(SAMPLE_TEXT).input_ids
        or saved_tokenizer.chat_template != tokenizer.chat_template
    ):
        raise _export_error(folder, "its tokenizer gives other tokens, or has another chat template", [])
    if weights:
        check_finite("the student", student)
        _compare_weights(folder, student, config)


def _compare_weights(folder: Path, student: PreTrainedModel, config: Any) -> None:
    expected = student.state_dict()
    saved: set[str] = set()
    different = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it has no iterator
                saved.add(name)
                if name in expected and not _same(tensors.get_tensor(name), expected[name]):
                    different.append(name)
    if not saved <= expected.keys():  # a family whose files have another layout than its modules
        loaded = load_model(str(folder), config).state_dict()
        different = [name for name, tensor in expected.items() if not _same(loaded[name], tensor)]
    else:  # a tensor that is not in the files has to be tied to one that is
        tied = {expected[name].data_ptr() for name in saved}
        different += [name for name, tensor in expected.items() if name not in saved and tensor.data_ptr() not in tied]
    if different:
        raise _export_error(folder, "weights differ or are missing", different)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _export_error(folder: Path, problem: str, names: list[str]) -> LimbeckError:
    return LimbeckError(
        f"the student saved in {folder} is not the trained one: {problem}{': ' if names else ''}{format_names(names)}",
        expected="the same student after loading",
        hint="repeat the command: it saves the student again, without repeating its stages",
    )
