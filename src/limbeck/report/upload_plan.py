"""What `limbeck push` would send: a student's folder, its exports and its card, checked for completeness and privacy.

    upload_plan = plan_upload("runs/quickstart", "owner/name")
    for item in upload_plan.files:
        print(item.path_in_repo, item.size, item.sha256)

Nothing is written here. The network is asked only for the teacher's license, if no file on this machine states it.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.storage import read_json, read_manifest
from limbeck.models.config import MODEL_TYPE
from limbeck.models.export.record import EXPORT_FOLDER, ExportRecord, find_export_folders, load_record
from limbeck.models.fingerprint import fingerprint_checkpoint
from limbeck.models.folders import check_safetensors
from limbeck.models.loading import load_config, load_model
from limbeck.models.modeling import mixer_file_name
from limbeck.report.model_card import PublishedRun, generate_model_card
from limbeck.report.privacy import check_no_local_paths, find_local_folders, find_local_paths, strip_local_paths
from limbeck.report.teacher_info import TeacherInfo, resolve_teacher_info

MODEL_CARD_FILE = "README.md"
# code is sent by name only, so that a stray script stays here
UPLOADED_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".tiktoken", ".spm", ".md")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # never edited: any text may be a token
WEIGHT_FILES = (".safetensors", ".model", ".tiktoken", ".spm", ".index.json", ".gguf", ".onnx", ".onnx.data")
LFS_THRESHOLD_BYTES = 10_000_000  # the size from which the Hub keeps a file in LFS whatever its name


@dataclass(frozen=True)
class UploadFile:
    """One file of the repository. content: a file on disk; bytes for the card and where local paths were removed."""

    path_in_repo: str
    content: Path | bytes
    size: int
    sha256: str

    @property
    def is_lfs(self) -> bool:
        """Whether the Hub keeps it in LFS, by the Hub's defaults."""
        return self.path_in_repo.endswith((".safetensors", ".model", ".onnx")) or self.size > LFS_THRESHOLD_BYTES

    @classmethod
    def from_content(cls, path_in_repo: str, content: Path | bytes) -> "UploadFile":
        if isinstance(content, Path):
            return cls(path_in_repo, content, content.stat().st_size, compute_sha256(content))
        return cls(path_in_repo, content, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class UploadPlan:
    """Everything that a push sends."""

    repo_id: str
    private: bool
    commit_message: str
    files: list[UploadFile]
    model_card: str
    skipped_files: list[str] = field(default_factory=list)  # files of the folder that are not sent
    skipped_exports: dict[str, str] = field(default_factory=dict)  # why not, as a clause, by folder

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(item.size for item in self.files)

    @property
    def exports_size(self) -> int:
        """Bytes of the exports."""
        return sum(item.size for item in self.files if item.path_in_repo.startswith(f"{EXPORT_FOLDER}/"))


def plan_upload(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    teacher: str | None = None,
    exports: bool = True,
) -> UploadPlan:
    """Check a student, generate its card, and list everything to upload.

    Args:
        path: a run directory, or a student's folder inside or outside of one.
        repo_id: the repository, `owner/name`.
        private: create the repository as private.
        license: the Hub's identifier, if the teacher's license cannot be determined.
        teacher: the teacher's Hub name or folder, if the run does not name it (a local path, no run).
        exports: send along what `limbeck export` wrote of this student.

    Raises:
        LimbeckError: no student, an unfinished run, missing or damaged files, no license, an invalid repository name,
            or local paths that cannot be removed.
    """
    check_repo_id(repo_id)
    folder = find_student_folder(Path(path))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = config["limbeck"]
    recipe_file = folder.parent / "recipe.yaml"
    recipe = Recipe.load(recipe_file, stored=True) if folder.name == "student" and recipe_file.is_file() else None
    run = _load_published_run(folder.parent, recipe) if recipe else None
    check_student_folder(folder, plan)
    teacher_info = resolve_teacher_info(
        recipe.teacher if recipe else None,
        license,
        teacher,
        family=f"a model of the family {plan['base_model_type']}",
    )
    local_folders = [Path.home(), Path.cwd(), folder.resolve(), folder.resolve().parent]
    if recipe:
        local_folders += find_local_folders(recipe.model_dump(mode="json"))
        _check_prompt(recipe, recipe_file)
    records, skipped_exports = _choose_exports(folder) if exports else ({}, {})
    sent_exports = [(f"{EXPORT_FOLDER}/{place.name}", record) for place, record in records.items()]
    card = _load_or_generate_card(folder, repo_id, plan, teacher_info, run, sent_exports)
    check_no_local_paths(card, "the card", local_folders)
    files = [UploadFile.from_content(MODEL_CARD_FILE, card.encode())]
    skipped_files = []
    code = {"modeling_limbeck.py", *(mixer_file_name(name) for name in plan.get("origins", {}))}
    for name, file in _list_files(folder):
        if name == MODEL_CARD_FILE or name.startswith(f"{EXPORT_FOLDER}/"):
            continue
        if not (name in code or name.endswith(UPLOADED_SUFFIXES) or name.startswith(("LICENSE", "LICENCE", "NOTICE"))):
            skipped_files.append(name)
        else:
            files.append(UploadFile.from_content(name, _strip_settings(name, file, local_folders)))
    for place, record in records.items():
        for name in record.files:
            content = _strip_settings(Path(name).name, place / name, local_folders)
            files.append(UploadFile.from_content(f"{EXPORT_FOLDER}/{place.name}/{name}", content))
    files += [
        UploadFile.from_content(p.name, p)
        for p in teacher_info.license_files
        if p.name not in {item.path_in_repo for item in files}
    ]
    what = " and ".join(dict.fromkeys(entry["mixer"] for entry in plan["layers"]))
    commit_message = f"{what} in {len(plan['layers'])} layers of {teacher_info.display_name}"
    files.sort(key=lambda item: item.path_in_repo)
    return UploadPlan(repo_id, private, commit_message, files, card, skipped_files, skipped_exports)


def _choose_exports(folder: Path) -> tuple[dict[Path, ExportRecord], dict[str, str]]:
    """Choose the exports that hold what the student's folder holds: their records, and why others stay here."""
    chosen: dict[Path, ExportRecord] = {}
    skipped: dict[str, str] = {}
    places = find_export_folders(folder)
    student = fingerprint_checkpoint(folder) if places else ""
    for place in places:
        record = load_record(place)
        problem = None if record is None else record.find_problem(place, student)
        if record is None:
            skipped[f"{EXPORT_FOLDER}/{place.name}"] = "has no record; limbeck export ... --force writes it again"
        elif problem is not None:
            skipped[f"{EXPORT_FOLDER}/{place.name}"] = problem
        else:
            chosen[place] = record
    return chosen, skipped


def check_repo_id(repo_id: str) -> None:
    """Raise LimbeckError unless the Hub accepts `repo_id` as a repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LimbeckError(
            f"'{repo_id}' is not a valid repository name: {error}".rstrip("."),
            expected="owner/name of at most 96 letters, digits, '-', '_' and '.'",
            hint="limbeck push RUN your-name/student-name",
        ) from error


def find_student_folder(path: Path) -> Path:
    """Find the student's folder in a run directory; a student's folder is returned as it is."""
    path = path.expanduser()
    folder = path / "student" if (path / "student").is_dir() else path
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    config = folder / "config.json"
    if not config.is_file():
        unfinished = (path / "recipe.yaml").is_file()
        raise LimbeckError(
            f"the run {path} has no student yet" if unfinished else f"{path} holds no student",
            expected="a finished run directory, or a folder written by `limbeck convert` or save_pretrained",
            hint=f"limbeck distill {shlex.quote(str(path / 'recipe.yaml'))}" if unfinished else None,
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimbeckError(f"{config} is not valid JSON: {error}") from error
    if content.get("model_type") != MODEL_TYPE or not (content.get("limbeck") or {}).get("layers"):
        raise LimbeckError(
            f"{folder} holds a model of type '{content.get('model_type')}', not a student",
            expected=f"model_type '{MODEL_TYPE}' with its mixers in config.json",
            hint="limbeck distill, or limbeck convert",
        )
    return folder


def check_student_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Raise LimbeckError if weights are missing, damaged or not the plan's, or if code or tokenizer are missing."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        weights = [single]
    elif index.is_file():
        weights = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    else:
        raise LimbeckError(f"{folder} holds no weights", expected="model.safetensors, or its index with all shards")
    code = ["modeling_limbeck.py", *(mixer_file_name(n) for n, o in plan.get("origins", {}).items() if o.get("file"))]
    for file in [*weights, *(folder / name for name in code)]:
        if not file.is_file():
            raise LimbeckError(f"{folder} is incomplete: {file.name} is missing", hint="save the student again")
    for file in weights:
        check_safetensors(file)
    if not code[1:]:  # loading would execute the code of a custom mixer, which publishing must not
        load_model(str(folder), load_config(str(folder)))
    if not (folder / "tokenizer_config.json").is_file():
        raise LimbeckError(
            f"{folder} holds no tokenizer", expected="the teacher's", hint=f"tokenizer.save_pretrained('{folder}')"
        )


def _load_published_run(path: Path, recipe: Recipe) -> PublishedRun:
    result_file = path / "eval.json"
    result = read_json(result_file, _resume_command(path, recipe)) if result_file.is_file() else None
    if result is None or len(result["stages"]) != len(recipe.stages):
        raise LimbeckError(
            f"the run {path} is not finished",
            expected="all stages and the evaluation",
            hint=_resume_command(path, recipe),
        )
    published = strip_local_paths(recipe.model_dump(mode="json", exclude={"out"}))
    # a prompt is text even if it begins with a slash
    published["evaluation"]["prompt"] = recipe.evaluation.prompt
    return PublishedRun(published, result, read_manifest(path))


def _check_prompt(recipe: Recipe, file: Path) -> None:
    """Raise LimbeckError if the prompt, which the card shows, names a path on this machine."""
    if paths := find_local_paths(recipe.evaluation.prompt or ""):
        raise LimbeckError(
            f"the recipe's prompt names {paths[0]}, a path on this machine, which the card would publish",
            expected="a prompt without local paths",
            hint=f"limbeck distill {shlex.quote(str(file))} --set evaluation.prompt='The history of science is'   "
            "(only the evaluation is repeated)",
        )


def _resume_command(path: Path, recipe: Recipe) -> str:
    out = "" if recipe.out and Path(recipe.out) == path else f" --out {shlex.quote(str(path))}"
    return f"limbeck distill {shlex.quote(str(path / 'recipe.yaml'))}{out}"


def _load_or_generate_card(
    folder: Path,
    repo_id: str,
    plan: dict[str, Any],
    teacher_info: TeacherInfo,
    run: PublishedRun | None,
    exports: list[tuple[str, ExportRecord]],
) -> str:
    """Take the folder's own README.md if its user wrote one, else generate the card."""
    own = folder / MODEL_CARD_FILE
    if not own.is_file():
        return generate_model_card(repo_id, plan, teacher_info, run, exports)
    text = own.read_text(encoding="utf-8")
    try:
        data = ModelCard(text).data.to_dict()
    except Exception as error:  # the library raises what its YAML reader does
        raise LimbeckError(f"the metadata of {own} cannot be read: {error}") from error
    if not data.get("license"):
        raise LimbeckError(
            f"{own} states no license",
            expected=f"a line `license: {teacher_info.license['license']}` between two lines of --- at its top",
            hint=f"delete {own} to have a card generated",
        )
    return text


def _list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """List the files in a folder and below with their names in the repository; hidden files are left out."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            yield "/".join(parts), file


def _strip_settings(name: str, file: Path, local_folders: list[Path]) -> Path | bytes:
    """Remove local paths from settings; every other file is sent untouched, and refused if it names a local folder."""
    if name in VOCABULARY_FILES or name.endswith(WEIGHT_FILES):
        return file
    text = file.read_text(encoding="utf-8", errors="replace")
    if name.endswith(".json"):
        settings = json.loads(text)
        clean = strip_local_paths(settings)
        if clean != settings:
            text = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
            check_no_local_paths(text, name, local_folders)
            return text.encode()
    check_no_local_paths(text, name, local_folders)
    return file
