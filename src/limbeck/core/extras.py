"""Optional libraries: which extra of the package brings them, whether they are installed, and what is said if not.

    require("matplotlib", "figures")                   # LimbeckError: it is needed for figures, and how to get it
    find_missing("lm_eval")                            # the Extra that would bring it; None where it is installed
    for extra in list_extras(): print(extra.name, extra.missing)

What an extra consists of is read from the metadata of the installed package, so it is as pyproject.toml has it.
"""

import importlib.util
import re
from dataclasses import dataclass

from limbeck.core.errors import LimbeckError

# by extra: what it is for
PURPOSES = {
    "gguf": "the embedded teacher",
    "export": "GGUF and ONNX files, and llama.cpp to check and run them",
    "data": "datasets of the Hub and Parquet files as text",
    "report": "figures and report pages",
    "eval": "benchmarks of lm-evaluation-harness",
    "study": "tests of a study's claims",
    "ray": "studies on a Ray cluster",
    "peft": "LoRA adapters on a student",
    "track": "runs watched in TensorBoard and other trackers",
    "cuda": "kernels on an NVIDIA GPU",
    "quantised": "teachers in 8 or 4 bits, students in int8",
}
# modules whose name is not that of their package, and packages that several extras have: the one to install for it
MODULES = {"lm_eval": "lm-eval", "fla": "fla-core"}
PREFERRED = {"gguf": "gguf", "accelerate": "gguf", "pyarrow": "data"}


@dataclass(frozen=True)
class Extra:
    """An extra: its name, and its packages with the installed version of each, None where it is missing."""

    name: str
    packages: dict[str, str | None]

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package, version in self.packages.items() if version is None]

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install 'limbeck[{self.name}]'"


def list_extras() -> list[Extra]:
    """List the extras for users; those of developers are left out."""
    # late, for start-up time
    import importlib.metadata

    packages: dict[str, dict[str, str | None]] = {name: {} for name in PURPOSES}
    for line in importlib.metadata.requires("limbeck") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and extra[1] in packages:
            packages[extra[1]][name[0]] = _find_version(name[0])
    return [Extra(name, content) for name, content in packages.items()]


def find_missing(module: str) -> Extra | None:
    """Return the extra that would bring a module; None if the module is installed."""
    if importlib.util.find_spec(module) is not None:
        return None
    package = MODULES.get(module, module)
    extras = [extra for extra in list_extras() if package in extra.packages]
    preferred = PREFERRED.get(package)
    return next((extra for extra in extras if preferred in (None, extra.name)), Extra("dev", {package: None}))


def require(module: str, what: str, extra: str | None = None) -> None:
    """Refuse to go on without an optional library.

    Args:
        what: what it is needed for: "figures".
        extra: the extra to name, where several have the library.

    Raises:
        LimbeckError: it is not installed.
    """
    found = find_missing(module)
    if found is not None:
        name = extra or found.name
        command = Extra(name, {}).command
        raise LimbeckError(
            f"{MODULES.get(module, module)} is not installed, which is needed for {what}",
            expected=f"the extra {name} ({PURPOSES.get(name, 'for developers')})",
            hint=command,
        )


def _find_version(package: str) -> str | None:
    # late, for start-up time
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
