"""The student before it learnt anything: the teacher converted by the student's own plan.

    fresh = fresh_student(teacher, student, seed=0)       # what stage 0 began with

What a measure finds in it is the mixer's start and the teacher's projections; the rest is what training changed.
"""

import torch
from transformers import PreTrainedModel

from limbeck.model import convert


def fresh_student(teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """An untrained student with the same mixers and options in the same layers.

    Everything outside the converted attention modules is the teacher's very tensors. Mixers that draw some of their
    start at random draw it from `seed`.
    """
    layers = student.config.limbeck["layers"]
    first = layers[0]
    rules = [{"layers": [one["layer"]], "mixer": one["mixer"], "options": one["options"]} for one in layers[1:]]
    numbers = [one["layer"] for one in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = convert(teacher, first["mixer"], numbers, options=first["options"], rules=rules, share=True)
    return fresh.eval().requires_grad_(False)
