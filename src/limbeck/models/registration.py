"""What makes transformers know a saved student: the model type `limbeck`, registered with AutoConfig.

`import limbeck` calls `register_when_imported()`. transformers, which takes seconds, is not imported for that: where it
is imported already the registration happens now, else when somebody imports it. What is registered is a small config
class (`limbeck.models.config`); all that a student is made of is imported when the first one is opened.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register students with transformers, now or as soon as its auto classes are imported."""
    if AUTO in sys.modules:
        _register(import_module(AUTO))  # which waits for another thread that is at it
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Sees the import of transformers' auto classes, leaves it to the other finders, and registers when it is done.

    It stays where it is: taking it out could make another thread's import skip the finder behind it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None and hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


def _register(auto: Any) -> None:
    from limbeck.models.config import MODEL_TYPE, LimbeckConfig

    auto.AutoConfig.register(MODEL_TYPE, LimbeckConfig, exist_ok=True)
