"""Limbeck distils a pretrained softmax-attention language model into a subquadratic one.

    import limbeck
    student = limbeck.convert(model, mixer="gated_deltanet")          # a Hugging Face model, linear in length
    limbeck.distill(limbeck.Recipe(teacher="embedded"))               # stages, evaluation, export
    AutoModelForCausalLM.from_pretrained("runs/quickstart/student")   # works once limbeck is imported
"""

from limbeck.errors import LimbeckError
from limbeck.model import convert

__all__ = ["LimbeckError", "convert"]
__version__ = "0.1.0"
