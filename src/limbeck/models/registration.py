"""What `import limbeck` registers: students with transformers, and who trains a small teacher when one is asked for.

    register_when_imported()                       # AutoModelForCausalLM.from_pretrained then opens students
    register_teacher_maker(train_or_load_teacher)  # `teacher: small` in a recipe then trains it on first use

Neither torch nor transformers is imported here, for they take seconds: where transformers is imported already the
registration happens now, else when somebody imports it. What is registered is a small config class
(`limbeck.models.config`); all that a student is made of is imported when the first one is opened.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"

TeacherMaker = Callable[[str], Path]
_teacher_maker: TeacherMaker | None = None


def register_teacher_maker(maker: TeacherMaker) -> None:
    """Register the function that returns the folder of one of Limbeck's own teachers, training it if need be.

    Training stands above the models, so `limbeck.models.loading` cannot import it; the package's face hands it down.
    """
    global _teacher_maker
    _teacher_maker = maker


def get_teacher_maker() -> TeacherMaker | None:
    """The function registered by `register_teacher_maker`, or None."""
    return _teacher_maker


def register_when_imported() -> None:
    """Register students with transformers, now or as soon as its auto classes are imported."""
    if AUTO_CONFIG_MODULE in sys.modules:
        _register(import_module(AUTO_CONFIG_MODULE))  # which waits while another thread is still importing it
    elif not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())


class _ImportWatcher:
    """Watches for the import of transformers' auto classes, leaves it to the other finders, and registers afterwards.

    It stays in `sys.meta_path`: removing it could make another thread's import skip the finder behind it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_CONFIG_MODULE:
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
    # start-up time: the config class imports transformers
    from limbeck.models.config import MODEL_TYPE, LimbeckConfig

    auto.AutoConfig.register(MODEL_TYPE, LimbeckConfig, exist_ok=True)
