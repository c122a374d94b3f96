"""Limbeck distils a pretrained softmax-attention language model into a subquadratic one.

    import limbeck
    student = limbeck.convert("Qwen/Qwen3-0.6B", mixer="gla")         # a Hugging Face model, linear in length
    summary = limbeck.distill("quickstart", data=documents)           # stages, evaluation, export
    limbeck.evaluate("runs/quickstart", measure="agreement")          # numbers beside the teacher's
    AutoModelForCausalLM.from_pretrained("runs/quickstart/student")   # works once limbeck is imported

Models and texts are names and paths, as on the command line, or objects in memory. The README shows the command line,
examples/notebooks this; docs/concepts/architecture.md how it is built.
"""

import logging
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from limbeck.core.version import __version__
from limbeck.models.registration import redirect_old_modules, register_teacher_maker, register_when_imported

if TYPE_CHECKING:
    from limbeck.core.errors import LimbeckError
    from limbeck.core.recipe import Recipe
    from limbeck.models.cache import cache_bytes
    from limbeck.models.config import LimbeckConfig
    from limbeck.models.conversion import convert
    from limbeck.models.loading import load
    from limbeck.models.modeling import LimbeckForCausalLM
    from limbeck.report.evaluate import evaluate
    from limbeck.training.pipeline import distill

# what may be imported from here; saved students import from here alone, so these names stay
__all__ = [
    "LimbeckConfig",
    "LimbeckError",
    "LimbeckForCausalLM",
    "Recipe",
    "__version__",
    "cache_bytes",
    "convert",
    "distill",
    "evaluate",
    "load",
]


def _train_or_load_teacher(name: str) -> Path:
    # start-up time: training imports torch and transformers
    from limbeck.training import pretraining

    return pretraining.train_or_load_teacher(name, verify=True)


register_when_imported()
redirect_old_modules()
register_teacher_maker(_train_or_load_teacher)

# where the names of `__all__` are; imported when they are first used, for torch and transformers take seconds and
# `limbeck --help` needs neither
_HOMES = {
    "LimbeckConfig": "limbeck.models.config",
    "LimbeckError": "limbeck.core.errors",
    "LimbeckForCausalLM": "limbeck.models.modeling",
    "Recipe": "limbeck.core.recipe",
    "cache_bytes": "limbeck.models.cache",
    "convert": "limbeck.models.conversion",
    "distill": "limbeck.training.pipeline",
    "evaluate": "limbeck.report.evaluate",
    "load": "limbeck.models.loading",
}


class _Package(ModuleType):
    """This package, whose functions no module hides: `limbeck.evaluate` was one, and files of 0.1 import it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package (`limbeck.mixers`), imported now."""
    home = _HOMES.get(name, f"{__name__}.{name}")
    if name not in _HOMES and (name.startswith("_") or find_spec(home) is None):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    # transformers loads torchao wherever it is installed, and that tells of GPU kernels that this machine cannot load
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # tqdm misses widgets in a notebook; what Limbeck shows there needs none
            warnings.filterwarnings("ignore", message="IProgress not found")
            module = import_module(home)
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    found = globals()[name] = getattr(module, name) if name in _HOMES else module
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
