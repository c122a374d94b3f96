"""Limbeck distils a pretrained softmax-attention language model into a subquadratic one.

    import limbeck
    student = limbeck.convert(model, mixer="gated_deltanet")          # a Hugging Face model, linear in length
    limbeck.distill(limbeck.Recipe.load("quickstart"))                # stages, evaluation, export
    AutoModelForCausalLM.from_pretrained("runs/quickstart/student")   # works once limbeck is imported

The README shows the command line; docs/architecture.md how it is built.
"""

__version__ = "0.1.0"

from limbeck.errors import LimbeckError
from limbeck.job import distill
from limbeck.model import convert
from limbeck.recipe import Recipe

__all__ = ["LimbeckError", "Recipe", "convert", "distill"]
