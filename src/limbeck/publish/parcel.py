"""What would be sent: the files of a student's folder and its card, checked whole, with nothing private in them.

    parcel = prepare("runs/quickstart", "owner/name")
    for item in parcel.items:
        print(item.path, item.size, item.sha256)

Nothing is written here. Only the teacher's licence is asked for on the network, where no file on this machine tells it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.data.cache import read_json, sha256_of
from limbeck.errors import LimbeckError
from limbeck.model.folders import check_safetensors
from limbeck.model.foreign import file_name
from limbeck.model.opening import load_config, load_model
from limbeck.model_type import MODEL_TYPE
from limbeck.publish.card import write_card
from limbeck.publish.origin import Origin, find_origin
from limbeck.publish.privacy import check_private, named_places, paths_in, without_paths
from limbeck.publish.results import RunFacts
from limbeck.recipe import Recipe
from limbeck.stages.run import manifest_of

CARD = "README.md"
SENT = (".json", ".jinja", ".safetensors", ".model", ".txt", ".tiktoken", ".spm", ".md")  # code: by name only
VOCABULARY = ("tokenizer.json", "vocab.json", "added_tokens.json")  # sent as they are: any text may be a token
LARGE = 10_000_000  # bytes from which the hub keeps a file in LFS whatever its name


@dataclass(frozen=True)
class Item:
    """One file of the repository; content is a file on disk, or bytes where it is made or had paths taken out."""

    path: str
    content: Path | bytes
    size: int
    sha256: str

    @property
    def lfs(self) -> bool:
        """Will the hub keep it in LFS? By its defaults; the hub decides."""
        return self.path.endswith((".safetensors", ".model")) or self.size > LARGE

    @classmethod
    def of(cls, path: str, content: Path | bytes) -> "Item":
        if isinstance(content, Path):
            return cls(path, content, content.stat().st_size, sha256_of(content))
        return cls(path, content, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Parcel:
    """All that a push sends."""

    repo: str
    private: bool
    message: str
    items: list[Item]
    card: str
    left_out: list[str] = field(default_factory=list)  # files of the folder that are not sent

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(item.size for item in self.items)


def prepare(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    teacher: str | None = None,
) -> Parcel:
    """Check a student and make its card.

    Args:
        path: a run directory, or a student's folder in or outside of one.
        repo: the repository, `owner/name`.
        private: seen by its owner alone.
        licence: the hub's identifier, where the teacher's licence is found nowhere.
        teacher: the teacher's hub name or folder, where the run does not say it (a local path, no run).

    Raises:
        LimbeckError: no student there, a run that is not finished, missing or cut files, no licence, an invalid name of
            a repository, or local paths where they cannot be taken out.
    """
    check_name(repo)
    folder = find_student(Path(path))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = config["limbeck"]
    recipe_file = folder.parent / "recipe.yaml"
    recipe = Recipe.load(recipe_file, stored=True) if folder.name == "student" and recipe_file.is_file() else None
    run = _run_facts(folder.parent, recipe) if recipe else None
    check_whole(folder, plan)
    origin = find_origin(
        recipe.teacher if recipe else None,
        licence,
        teacher,
        family=f"a model of the family {plan['base_model_type']}",
    )
    places = [Path.home(), Path.cwd(), folder.resolve(), folder.resolve().parent]
    if recipe:
        places += named_places(recipe.model_dump(mode="json"))
        _check_prompt(recipe, recipe_file)
    card = _card(folder, repo, plan, origin, run)
    check_private(card, "the card", places)
    items = [Item.of(CARD, card.encode())]
    left_out = []
    code = {"modeling_limbeck.py", *(file_name(name) for name in plan.get("origins", {}))}
    for name, file in _files(folder):
        if name == CARD:
            continue
        if not (name in code or name.endswith(SENT) or name.startswith(("LICENSE", "LICENCE", "NOTICE"))):
            left_out.append(name)
        else:
            items.append(Item.of(name, _published(name, file, places)))
    items += [Item.of(p.name, p) for p in origin.files if p.name not in {item.path for item in items}]
    what = " and ".join(dict.fromkeys(entry["mixer"] for entry in plan["layers"]))
    message = f"{what} in {len(plan['layers'])} layers of {origin.label}"
    return Parcel(repo, private, message, sorted(items, key=lambda item: item.path), card, left_out)


def check_name(repo: str) -> None:
    """Raises LimbeckError unless the hub would take `repo` as the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise LimbeckError(
            f"'{repo}' cannot be a repository: {error}".rstrip("."),
            expected="owner/name of letters, digits, '-', '_' and '.', 96 at most",
            hint="limbeck push RUN your-name/student-name",
        ) from error


def find_student(path: Path) -> Path:
    """The student's folder of a run directory, or the folder itself."""
    path = path.expanduser()
    folder = path / "student" if (path / "student").is_dir() else path
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    config = folder / "config.json"
    if not config.is_file():
        unfinished = (path / "recipe.yaml").is_file()
        raise LimbeckError(
            f"{path} is a run without a student yet" if unfinished else f"{path} holds no student",
            expected="a finished run directory, or a folder that `limbeck convert` or save_pretrained wrote",
            hint=f"limbeck distill {path / 'recipe.yaml'}" if unfinished else None,
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimbeckError(f"{config} is not readable JSON: {error}") from error
    if found.get("model_type") != MODEL_TYPE or not (found.get("limbeck") or {}).get("layers"):
        raise LimbeckError(
            f"{folder} holds a model of type '{found.get('model_type')}', not a student",
            expected=f"model_type '{MODEL_TYPE}' with its mixers in config.json",
            hint="limbeck distill, or limbeck convert",
        )
    return folder


def check_whole(folder: Path, plan: dict[str, Any]) -> None:
    """Raises LimbeckError where weights are missing, cut short or not the plan's, or code or tokenizer are missing."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        weights = [single]
    elif index.is_file():
        weights = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    else:
        raise LimbeckError(f"{folder} holds no weights", expected="model.safetensors, or its index with all parts")
    code = ["modeling_limbeck.py", *(file_name(n) for n, o in plan.get("origins", {}).items() if o.get("file"))]
    for file in [*weights, *(folder / name for name in code)]:
        if not file.is_file():
            raise LimbeckError(f"{folder} is not whole: {file.name} is missing", hint="save the student again")
    for file in weights:
        check_safetensors(file)
    if not code[1:]:  # the code of somebody's own mixer is not executed for this
        load_model(str(folder), load_config(str(folder)))
    if not (folder / "tokenizer_config.json").is_file():
        raise LimbeckError(
            f"{folder} holds no tokenizer", expected="the teacher's", hint=f"tokenizer.save_pretrained('{folder}')"
        )


# ---------------------------------------------------------------------- inside


def _run_facts(path: Path, recipe: Recipe) -> RunFacts:
    result_file = path / "eval.json"
    result = read_json(result_file, _resume(path, recipe)) if result_file.is_file() else None
    if result is None or len(result["stages"]) != len(recipe.stages):
        raise LimbeckError(
            f"the run {path} is not finished", expected="all stages and the evaluation", hint=_resume(path, recipe)
        )
    known = recipe.model_dump(mode="json", exclude={"out"})
    prompt = known["evaluation"]["prompt"]  # text, even where it begins with a slash
    known = without_paths(known)
    known["evaluation"]["prompt"] = prompt
    return RunFacts(known, result, manifest_of(path))


def _check_prompt(recipe: Recipe, file: Path) -> None:
    """Raises LimbeckError where the prompt, which is published with its answers, names a place on this machine."""
    if found := paths_in(recipe.evaluation.prompt or ""):
        raise LimbeckError(
            f"the recipe's prompt names {found[0]}, a place on this machine, and the card would publish it",
            expected="a prompt without local paths",
            hint=f"limbeck distill {file} --set evaluation.prompt='The history of science is'   "
            "(only the evaluation is made again)",
        )


def _resume(path: Path, recipe: Recipe) -> str:
    out = "" if recipe.out and Path(recipe.out) == path else f" --out {path}"
    return f"limbeck distill {path / 'recipe.yaml'}{out}"


def _card(folder: Path, repo: str, plan: dict[str, Any], origin: Origin, run: RunFacts | None) -> str:
    """The folder's own README.md where its user wrote one, else a made one."""
    own = folder / CARD
    if not own.is_file():
        return write_card(repo, plan, origin, run)
    from huggingface_hub import ModelCard

    text = own.read_text(encoding="utf-8")
    try:
        data = ModelCard(text).data.to_dict()
    except Exception as error:  # the library raises what its YAML reader does
        raise LimbeckError(f"the metadata of {own} cannot be read: {error}") from error
    if not data.get("license"):
        raise LimbeckError(
            f"{own} states no licence",
            expected=f"a line `license: {origin.licence['license']}` between two lines of --- at its top",
            hint=f"delete {own}, and a card is made",
        )
    return text


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files in the folder and below, by their name in the repository; what is hidden stays here."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            yield "/".join(parts), file


def _published(name: str, file: Path, places: list[Path]) -> Path | bytes:
    """A file's content as it is sent: settings without local paths, all else untouched."""
    if name in VOCABULARY or name.endswith((".safetensors", ".model", ".tiktoken", ".spm", ".index.json")):
        return file
    text = file.read_text(encoding="utf-8", errors="replace")
    if name.endswith(".json"):
        found = json.loads(text)
        clean = without_paths(found)
        if clean != found:
            text = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
            check_private(text, name, places)
            return text.encode()
    check_private(text, name, places)
    return file
