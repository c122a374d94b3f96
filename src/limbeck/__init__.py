"""Limbeck distils a pretrained softmax-attention language model into a subquadratic one.

    import limbeck
    student = limbeck.convert(model, mixer="gated_deltanet")          # a Hugging Face model, linear in length
    limbeck.distill(limbeck.Recipe.load("quickstart"))                # stages, evaluation, export
    AutoModelForCausalLM.from_pretrained("runs/quickstart/student")   # works once limbeck is imported

The README shows the command line; docs/architecture.md how it is built.
"""

# ruff: noqa: E402  what quietens loggers has to stand before the imports that make them speak

import logging

__version__ = "0.1.0"

for _name in ("torchao", "torch.utils._pytree"):
    # transformers loads torchao wherever it is installed, and that tells of GPU kernels that this machine cannot load
    logging.getLogger(_name).setLevel(logging.ERROR)

from limbeck.errors import LimbeckError
from limbeck.job import distill
from limbeck.model import convert
from limbeck.recipe import Recipe

__all__ = ["LimbeckError", "Recipe", "convert", "distill"]
