"""What a student inherits from its teacher: a name, a licence, languages.

    teacher_info = resolve_teacher_info("Qwen/Qwen3-0.6B")
    teacher_info.license                                # {"license": "apache-2.0"}

The licence comes from the teacher's card, config or licence file. It is never guessed.
"""

import json
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe
from limbeck.models.hub import split_revision
from limbeck.report.privacy import get_basename, is_local_path

LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LICENSE_TEXTS = {  # how licence files begin, and the hub's name of the licence
    r"\s*Apache License\s+Version 2\.0, January 2004": "apache-2.0",
    r"\s*(?:The )?MIT License\b": "mit",
}
UNKNOWN_LICENSES = ("unknown", "unlicensed", "")


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher as the card names it."""

    display_name: str  # in sentences
    repo_id: str | None = None  # on the hub
    license: dict[str, Any] = field(
        default_factory=dict
    )  # license, and license_name and license_link where it has them
    languages: list[str] = field(default_factory=list)
    license_files: tuple[Path, ...] = ()  # licence and notices that go with the weights
    weights_note: str = ""  # a sentence about these weights


EMBEDDED_TEACHER = TeacherInfo(
    "SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {"license": "apache-2.0"},
    ["en"],
    weights_note="The teacher's weights were four-bit (GGUF Q4_1) and turned back into fp32.",
)


def resolve_teacher_info(
    teacher: str | None, license: str | None = None, teacher_override: str | None = None, family: str = ""
) -> TeacherInfo:
    """Name, licence and languages of a teacher.

    Args:
        teacher: as the recipe has it: "embedded", a local folder or a hub name; None for a student without a run.
        license: the hub's identifier of the licence, from the user; then none is looked for.
        teacher_override: the teacher's hub name or folder, from the user, where the recipe has none or a local folder.
        family: what to call a teacher that nothing is known of.

    Raises:
        LimbeckError: no licence found, or not an identifier.
    """
    if license is not None and not LICENSE_ID.fullmatch(license):
        raise LimbeckError(
            f"'{license}' is no licence identifier", expected="one of the hub's, such as apache-2.0, mit or llama3.2"
        )
    if "embedded" in (teacher, teacher_override):
        _compare(license, EMBEDDED_TEACHER.license, EMBEDDED_TEACHER.display_name)
        return EMBEDDED_TEACHER if license is None else replace(EMBEDDED_TEACHER, license={"license": license})
    named = [split_revision(name)[0] for name in (teacher_override, teacher) if name]
    local = next((Path(name).expanduser() for name in named if Path(name).expanduser().is_dir()), None)
    own = TeacherRecipe.names()  # trained here: not on the hub, whatever has the same name there
    repo_id = next((name for name in named if not is_local_path(name) and name not in own), None) or _cached_repo(local)
    label = repo_id or (get_basename(named[0]) if named else family or "its teacher")
    facts = _local_facts(local) if local else {}
    if not facts.get("license") and license is None and repo_id:
        facts = {**_hub_facts(repo_id), **facts}
    _compare(license, facts, label)
    given = {"license": license} if license else _license_metadata(facts, repo_id)
    if not given:
        asked = f"the card or the licence file of {label}" if named else "a teacher that would tell"
        raise LimbeckError(
            f"the licence of the teacher is not known: not found in {asked}",
            expected="the licence that the teacher's weights come under, which the student inherits",
            hint="--license apache-2.0   (whatever it is)" + ("" if repo_id else ", or --teacher owner/name"),
        )
    language = facts.get("language") or []
    files = tuple(sorted(p for kind in ("LICEN[SC]E*", "NOTICE*") for p in local.glob(kind))) if local else ()
    languages = [language] if isinstance(language, str) else [name for name in language if isinstance(name, str)]
    return TeacherInfo(label, repo_id, given, languages, files)


def _compare(license: str | None, facts: dict[str, Any], label: str) -> None:
    known = facts.get("license")
    if license and known and known != license:
        warnings.warn(f"{label} says that its licence is {known}; the card will say {license}", stacklevel=3)


def _license_metadata(facts: dict[str, Any], repo_id: str | None) -> dict[str, Any]:
    """The licence's part of the card's metadata."""
    found = facts.get("license")
    if not found or found in UNKNOWN_LICENSES:
        return {}
    result = {key: facts[key] for key in ("license", "license_name", "license_link") if facts.get(key)}
    link = result.get("license_link", "")
    if repo_id and link and "://" not in link:  # it meant a file of the teacher's repository
        result["license_link"] = f"https://huggingface.co/{repo_id}/blob/main/{link}"
    return result


def _local_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file():
        facts.update(_front_matter(card))
    config = folder / "config.json"
    if not facts.get("license") and config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("license")
        if isinstance(found, str) and LICENSE_ID.fullmatch(found.lower()):
            facts["license"] = found.lower()
    if not facts.get("license"):
        for path in sorted(folder.glob("LICEN[SC]E*")):
            text = path.read_text(encoding="utf-8", errors="replace")
            known = [name for start, name in LICENSE_TEXTS.items() if re.match(start, text)]
            if known:
                facts["license"] = known[0]
    return facts


def _front_matter(card: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a broken card of somebody else tells nothing
        return {}


def _hub_facts(repo_id: str) -> dict[str, Any]:
    """What the teacher's card on the hub says; nothing where it cannot be asked. Writes no file."""
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(repo_id, timeout=10).card_data
    except Exception:  # no network, no such model, no access: then the licence has to be given
        return {}
    return card.to_dict() if card else {}


def _cached_repo(folder: Path | None) -> str | None:
    """The hub name of a folder in the hub's own cache, models--owner--name/snapshots/revision."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]", f"{folder}") if folder else None
    return f"{found[1]}/{found[2]}" if found else None
