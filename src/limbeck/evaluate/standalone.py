"""Evaluation of a saved student, outside a run."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from limbeck import assets
from limbeck.data.text import open_text
from limbeck.evaluate.agreement import agreement
from limbeck.recipe import Data, Recipe
from limbeck.stages.teacher import load_teacher


def evaluate_folder(
    folder: Path, teacher: str, source: str, tokens: int, length: int, recipe: Recipe | None
) -> dict[str, Any]:
    """Perplexity and agreement of the student in `folder` on the text in `source`.

    Args:
        recipe: of the run that made the student. Of the text that it was trained on only the part that was held out is
            used; of any other text all.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_teacher(assets.resolve_teacher(teacher), device)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student.to(device)
    known = recipe is not None and source == recipe.data.source
    data = recipe.data if recipe is not None and known else Data(source=source, length=length)
    text = open_text(data, tokenizer, model, length=length, held_out=None if known else 0, held_out_tokens=tokens)
    result = agreement(model, student, text.held_out(length) if known else text.all_in_order(length), tokens)
    part = "held-out part" if known else "all"
    return {"student": str(folder), "teacher": teacher, "text": source, "part": part, "tokens_key": text.key, **result}
