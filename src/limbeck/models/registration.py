"""What `import limbeck` registers: students with transformers, and who trains a small teacher when one is asked for.

    register_when_imported()                       # AutoModelForCausalLM.from_pretrained then opens students
    redirect_old_modules()                         # `import limbeck.model.student`, as older students have it, works
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
# paths that are written into files of users: the code beside a saved student's weights, the tasks of a benchmark pack
OLD_MODULES = {
    "limbeck.model": "limbeck.models",
    "limbeck.model.student": "limbeck.models.modeling",
    "limbeck.evaluate": "limbeck.evaluation",
    "limbeck.evaluate.token_f1": "limbeck.evaluation.lm_eval_tasks",
}

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
