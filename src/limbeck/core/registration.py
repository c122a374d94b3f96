"""Makes transformers know saved students, and old paths of modules lead to where these are now.

    register_when_imported()                        # AutoConfig knows the model type `limbeck`
    redirect_old_modules()                          # `import limbeck.model.student` still works

`import limbeck` calls both. transformers, which takes seconds, is not imported for that: where it is imported already the
registration happens now, else when somebody imports it. What is registered is a small config class
(`limbeck.core.model_type`); all that a student is made of is imported when the first one is opened.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
# paths that are written into files of users: the code beside a saved student's weights, the tasks of a benchmark pack
OLD_MODULES = {
    "limbeck.model": "limbeck.models",
    "limbeck.model.student": "limbeck.models.modeling",
    "limbeck.evaluate": "limbeck.evaluation",
    "limbeck.evaluate.token_f1": "limbeck.evaluation.lm_eval_tasks",
}


def register_when_imported() -> None:
    """Register students with transformers, now or as soon as its auto classes are imported."""
    if AUTO in sys.modules:
        _register(import_module(AUTO))  # which waits for another thread that is at it
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def redirect_old_modules() -> None:
    """Let files that name modules of Limbeck 0.1 be executed."""
    if not any(isinstance(finder, _Redirect) for finder in sys.meta_path):
        sys.meta_path.append(_Redirect())


class _Redirect:
    """Finds modules under their old names: empty ones that hand on what is asked of them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name in OLD_MODULES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # not the module itself: the import system would write the old name into it
        def __getattr__(name: str) -> Any:
            if name.startswith("__"):  # asked of every module by `inspect`, in the midst of other imports
                raise AttributeError(name)
            return getattr(import_module(OLD_MODULES[module.__name__]), name)

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


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
    config = import_module("limbeck.core.model_type")  # which needs transformers
    auto.AutoConfig.register(config.MODEL_TYPE, config.LimbeckConfig, exist_ok=True)
