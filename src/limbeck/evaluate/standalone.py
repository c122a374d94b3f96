"""Evaluation of a saved student, outside a run."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from limbeck import assets
from limbeck.data.packing import Packed
from limbeck.data.shards import prepare
from limbeck.distill.teacher import load_teacher
from limbeck.evaluate.agreement import agreement
from limbeck.recipe import Recipe


def evaluate_folder(
    folder: Path, teacher: str, source: str, tokens: int, length: int, recipe: Recipe
) -> dict[str, Any]:
    """Perplexity and agreement of the student in `folder` on the held-out part of `source`.

    Args:
        recipe: settings of the run that made the student, so that held-out text is the same as there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_teacher(assets.resolve_teacher(teacher), device)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    data = recipe.data
    store = prepare(
        source,
        tokenizer,
        length=length,
        held_out=data.held_out,
        max_tokens=data.max_tokens,
        text_field=data.text_field,
        vocab_size=model.get_input_embeddings().weight.shape[0],
    )
    result = agreement(model, student, Packed(store.held_out, length, shuffle=False), tokens)
    return {"student": str(folder), "teacher": teacher, "text": source, "tokens_key": store.key, **result}
