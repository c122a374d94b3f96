"""What a student inherits from its teacher: a name, a license, languages.

    teacher_info = resolve_teacher_info("Qwen/Qwen3-0.6B")
    teacher_info.license                                # {"license": "apache-2.0"}

The license comes from the teacher's card, config or license file. It is never guessed.
"""

import json
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe
from limbeck.models.hub import split_revision
from limbeck.report.privacy import get_basename, is_local_path

LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LICENSE_TEXTS = {  # beginnings of license files, with the Hub's identifiers
    r"\s*Apache License\s+Version 2\.0, January 2004": "apache-2.0",
    r"\s*(?:The )?MIT License\b": "mit",
}
UNKNOWN_LICENSES = ("unknown", "unlicensed", "")


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher as the card names it."""

    display_name: str  # in sentences
    repo_id: str | None = None  # on the Hub
    # metadata of the card: license, and license_name and license_link if it has them
    license: dict[str, Any] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    license_files: tuple[Path, ...] = ()  # license and notices that go with the weights
    weights_note: str = ""  # a sentence about these weights


EMBEDDED_TEACHER = TeacherInfo(
    "SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {"license": "apache-2.0"},
    ["en"],
    weights_note="The teacher's weights were four-bit (GGUF Q4_1) and turned back into fp32.",
)


def get_teacher_name(teacher: str) -> str:
    """Return the name of a recipe's teacher for people: that of the embedded one, or without folders."""
    if teacher == "embedded":
        return EMBEDDED_TEACHER.display_name
    name = split_revision(teacher)[0]
    return get_basename(name) if is_local_path(name) else name


def resolve_teacher_info(
    teacher: str | None, license: str | None = None, teacher_override: str | None = None, family: str = ""
) -> TeacherInfo:
    """Find the name, license and languages of a teacher.

    Args:
        teacher: the recipe's: "embedded", a local folder or a Hub name; None for a student without a run.
        license: the Hub's identifier of the license, given by the user; then none is looked up.
        teacher_override: the teacher's Hub name or folder, given by the user if the recipe has none or a local folder.
        family: what to call a teacher without a name.

    Raises:
        LimbeckError: no license was found, or `license` is not an identifier.
    """
    if license is not None and not LICENSE_ID.fullmatch(license):
        raise LimbeckError(
            f"'{license}' is not a license identifier", expected="one of the Hub's, such as apache-2.0, mit or llama3.2"
        )
    if "embedded" in (teacher, teacher_override):
        _warn_if_different(license, EMBEDDED_TEACHER.license, EMBEDDED_TEACHER.display_name)
        return EMBEDDED_TEACHER if license is None else replace(EMBEDDED_TEACHER, license={"license": license})
    named = [split_revision(name)[0] for name in (teacher_override, teacher) if name]
    local = next((Path(name).expanduser() for name in named if Path(name).expanduser().is_dir()), None)
    # a teacher trained by Limbeck is not on the Hub, whatever has the same name there
    own = TeacherRecipe.names()
    repo_id = next((name for name in named if not is_local_path(name) and name not in own), None) or _cached_repo(local)
    label = repo_id or (get_basename(named[0]) if named else family or "its teacher")
    facts = _read_local_metadata(local) if local else {}
    if not facts.get("license") and license is None and repo_id:
        facts = {**_fetch_hub_metadata(repo_id), **facts}
    _warn_if_different(license, facts, label)
    metadata = {"license": license} if license else _license_metadata(facts, repo_id)
    if not metadata:
        source = f"the card and the license file of {label} do not state it" if named else "the teacher is unknown"
        raise LimbeckError(
            f"cannot determine the teacher's license: {source}",
            expected="the license of the teacher's weights, which the student inherits",
            hint="--license apache-2.0   (or whichever it is)" + ("" if repo_id else ", or --teacher owner/name"),
        )
    language = facts.get("language") or []
    files = tuple(sorted(p for kind in ("LICEN[SC]E*", "NOTICE*") for p in local.glob(kind))) if local else ()
    languages = [language] if isinstance(language, str) else [name for name in language if isinstance(name, str)]
    return TeacherInfo(label, repo_id, metadata, languages, files)


def _warn_if_different(license: str | None, facts: dict[str, Any], label: str) -> None:
    stated = facts.get("license")
    if license and stated and stated != license:
        warnings.warn(f"{label} states the license {stated}; the card will state {license}", stacklevel=3)


def _license_metadata(facts: dict[str, Any], repo_id: str | None) -> dict[str, Any]:
    """Select the license keys of the card's metadata; {} without a license."""
    if facts.get("license") in (None, *UNKNOWN_LICENSES):
        return {}
    result = {key: facts[key] for key in ("license", "license_name", "license_link") if facts.get(key)}
    link = result.get("license_link", "")
    if repo_id and link and "://" not in link:  # relative to the teacher's repository
        result["license_link"] = f"https://huggingface.co/{repo_id}/blob/main/{link}"
    return result


def _read_local_metadata(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file():
        facts.update(_front_matter(card))
    config = folder / "config.json"
    if not facts.get("license") and config.is_file():
        license = json.loads(config.read_text(encoding="utf-8")).get("license")
        if isinstance(license, str) and LICENSE_ID.fullmatch(license.lower()):
            facts["license"] = license.lower()
    if not facts.get("license"):
        for path in sorted(folder.glob("LICEN[SC]E*")):
            text = path.read_text(encoding="utf-8", errors="replace")
            matches = [name for start, name in LICENSE_TEXTS.items() if re.match(start, text)]
            if matches:
                facts["license"] = matches[0]
    return facts


def _front_matter(card: Path) -> dict[str, Any]:
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a broken card counts as none
        return {}


def _fetch_hub_metadata(repo_id: str) -> dict[str, Any]:
    """Fetch the metadata of the teacher's card on the Hub; {} if the Hub cannot be reached. Writes no file."""
    try:
        card = HfApi().model_info(repo_id, timeout=10).card_data
    except Exception:  # no network, no such model, no access: then --license is required
        return {}
    return card.to_dict() if card else {}


def _cached_repo(folder: Path | None) -> str | None:
    """Read the Hub name from a folder of the Hub's own cache, models--owner--name/snapshots/revision."""
    match = re.search(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]", f"{folder}") if folder else None
    return f"{match[1]}/{match[2]}" if match else None
