"""A student's folder, opened again and compared with the student before anybody relies on it.

    student.save_pretrained(folder), tokenizer.save_pretrained(folder)
    check_export(folder, student, tokenizer)              # LimbeckError unless all of it comes back, bit for bit

What is written and what is meant may differ: an adapter alone is saved in the place of the model, a tensor is taken for
tied, a tokenizer loses a setting. Weights are compared one tensor at a time, so no second student is in memory.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import LimbeckError
from limbeck.model.opening import SAFE, check_finite, load_config, load_model, load_tokenizer

SAMPLE = "In 1984, the café's 12 guests said: «It's fine!»\n\n\tnaïve 你好 🙂"


def check_export(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: bool = True
) -> None:
    """Refuse a folder from which another student would be loaded than the one that was saved there.

    Args:
        weights: compare the weights too; False where only a few of them were written, as a rehearsal.

    Raises:
        LimbeckError: what is missing or differs; or weights of the student that are not finite.
    """
    config = load_config(str(folder))
    GenerationConfig.from_pretrained(folder)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, **SAFE)
    ours, theirs = _shapes(student), _shapes(made)
    wrong = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if type(made) is not type(student) or wrong:
        raise _differs(folder, f"it opens as {type(made).__name__}", wrong)
    again = load_tokenizer(str(folder))
    if again(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids or again.chat_template != tokenizer.chat_template:
        raise _differs(folder, "its tokenizer reads a text otherwise, or has another chat template", [])
    if weights:
        check_finite("the student", student)
        _check_weights(folder, student, config)


def _check_weights(folder: Path, student: PreTrainedModel, config: Any) -> None:
    ours = student.state_dict()
    files = sorted(folder.glob("*.safetensors"))
    written: set[str] = set()
    wrong = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it has no iterator
                written.add(name)
                if name in ours and not _same(tensors.get_tensor(name), ours[name]):
                    wrong.append(name)
    if not written <= ours.keys():  # a family whose files are laid out otherwise than its modules
        loaded = load_model(str(folder), config).state_dict()
        wrong = [name for name, tensor in ours.items() if not _same(loaded[name], tensor)]
    else:
        held = {ours[name].data_ptr() for name in written}
        wrong += [name for name, tensor in ours.items() if name not in written and tensor.data_ptr() not in held]
    if wrong:
        raise _differs(folder, "weights came back otherwise, or not at all", wrong)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _differs(folder: Path, how: str, names: list[str]) -> LimbeckError:
    several = f": {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else ""
    return LimbeckError(
        f"what was written to {folder} is not the student: {how}{several}",
        expected="the same student, read back",
        hint="the same command again writes it anew; what the stages learnt is kept",
    )
