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

# transformers loads torchao wherever it is installed, and that tells of GPU kernels that this machine cannot load
_loggers = {_logger: _logger.level for _logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
for _logger in _loggers:
    _logger.setLevel(logging.ERROR)

from limbeck.errors import LimbeckError
from limbeck.job import distill
from limbeck.model import convert
from limbeck.recipe import Recipe

for _logger, _level in _loggers.items():
    _logger.setLevel(_level)

__all__ = ["LimbeckError", "Recipe", "convert", "distill"]
