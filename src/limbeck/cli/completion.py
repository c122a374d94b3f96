"""What a shell completes: names of recipes, studies, mixers, presets, stages, measures, teachers, formats and packs.

    limbeck --install-completion                     # once; then TAB
    complete_list(["gla", "kda"], "gla,k")           # ["gla,kda"]

Nothing here imports torch, so that a TAB is answered at once: names come from files, those of mixers and measures from
the catalog.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from limbeck.cli.catalog import read_catalog

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "core" / "recipes"
EXPORT_FORMATS = ("gguf", "qwen3_5", "onnx")
STAGES = ("calibrate", "matrix", "hidden", "logits", "0", "1", "2", "3")


def complete_recipes(incomplete: str) -> list[str]:
    """Complete the name of a recipe, or of a YAML file in this folder."""
    return _starting_with(incomplete, [*_stems(RECIPES), *_yaml_files(incomplete)])


def complete_recipes_and_studies(incomplete: str) -> list[str]:
    """Complete what `limbeck recipe` prints."""
    names = [*_stems(RECIPES), *_stems(PACKAGE / "study" / "studies"), *_stems(RECIPES / "teachers")]
    return _starting_with(incomplete, [*names, *_yaml_files(incomplete)])


def complete_studies(incomplete: str) -> list[str]:
    """Complete the name of a study, or of a YAML file in this folder."""
    return _starting_with(incomplete, [*_stems(PACKAGE / "study" / "studies"), *_yaml_files(incomplete)])


def complete_mixers(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a mixer, with what it is."""
    mixers = read_catalog()["mixers"]
    return [(name, mixers[name]["default"]["summary"]) for name in mixers if name.startswith(incomplete)]


def complete_mixer_sets(incomplete: str) -> list[str]:
    """Complete a set of mixers, or mixers joined by commas."""
    catalog = read_catalog()
    return [*_starting_with(incomplete, catalog["mixer_sets"]), *complete_list(catalog["mixers"], incomplete)]


def complete_presets(incomplete: str) -> list[str]:
    """Complete the name of a preset."""
    return _starting_with(incomplete, read_catalog()["presets"])


def complete_stages(incomplete: str) -> list[str]:
    """Complete stages joined by commas."""
    return complete_list(STAGES, incomplete)


def complete_measures(incomplete: str) -> list[str]:
    """Complete measures joined by commas."""
    return [*_starting_with(incomplete, ["all"]), *complete_list(read_catalog()["measures"], incomplete)]


def complete_teachers(incomplete: str) -> list[str]:
    """Complete the name of a teacher of Limbeck's own."""
    return _starting_with(incomplete, ["embedded", *_stems(RECIPES / "teachers")])


def complete_choices(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that completes one of a few words."""

    def complete(incomplete: str) -> list[str]:
        return _starting_with(incomplete, choices)

    return complete


def complete_list(names: Iterable[str], incomplete: str) -> list[str]:
    """Complete the last of several names that are joined by commas; those before it are not offered again."""
    head, comma, last = incomplete.rpartition(",")
    given = head.split(",")
    return [f"{head}{comma}{name}" for name in names if name.startswith(last) and name not in given]


def _starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _yaml_files(incomplete: str) -> list[str]:
    """Return the YAML files of the folder that is being typed."""
    folder = Path(incomplete).expanduser()
    folder = folder if incomplete.endswith("/") else folder.parent
    try:
        files = (path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
        return sorted(str(path) for path in files if not path.name.startswith("."))
    except OSError:
        return []
