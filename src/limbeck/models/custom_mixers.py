"""Mixers that are not Limbeck's own, in students: where they came from, and how they are found again.

A student's plan (`config.limbeck`) says for each such mixer which package or file it came from. A file is saved beside
the weights; it is executed again only where the caller trusts the checkpoint's code, or has loaded it already.

    AutoModelForCausalLM.from_pretrained("runs/mine/student", trust_remote_code=True)
"""

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from limbeck.core.errors import LimbeckError
from limbeck.mixers import Mixer, registry


def resolve_mixer_class(name: str, plan: dict[str, Any]) -> type[Mixer]:
    """The class of a mixer in a plan; where it is missing, LimbeckError says what to install or to load."""
    origin = plan.get("origins", {}).get(name)
    if origin is None or registry.is_registered(name):
        return registry.get(name)
    found = f"this student's mixer '{name}' is not part of Limbeck and not known here"
    if "file" in origin:
        raise LimbeckError(
            found,
            expected=f"the file {origin['file']}, which is saved beside the weights as {mixer_file_name(name)}",
            hint=f"read that file, then pass trust_remote_code=True, or call limbeck.mixers.get('{origin['file']}') "
            f"first; on the command line: limbeck --mixer {origin['file']} ...",
        )
    if "package" in origin:
        raise LimbeckError(found, expected=f"the package {origin['package']}", hint=f"pip install {origin['package']}")
    raise LimbeckError(found, expected=f"the module {origin['module']}", hint=f"import {origin['module']} first")


def save_mixer_files(folder: Path, plan: dict[str, Any]) -> None:
    """Write the files that the student's mixers came from into its folder."""
    for name in plan.get("origins", {}):
        text = registry.get_source_code(name)
        if text is not None:
            (folder / mixer_file_name(name)).write_text(text, encoding="utf-8")


def load_mixer_files(path: str, plan: dict[str, Any]) -> None:
    """Execute the mixers' files that a trusted checkpoint has beside its weights, unless their mixers are known."""
    for name, origin in plan.get("origins", {}).items():
        if "file" in origin and not registry.is_registered(name):
            registry.load_file(str(cached_file(path, mixer_file_name(name))))


def mixer_file_name(name: str) -> str:
    return f"mixer_{name}.py"
