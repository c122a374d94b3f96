"""Writing an export, and the record beside its files: what they are, of which student, and what their engine measured.

    record = write_export(exporter, student, tokenizer, folder, "f16", source=Path("runs/quickstart/student"))
    save_record(folder, replace(record, verification=exporter.verify(student, tokenizer, folder)))
    for folder in find_export_folders(Path("runs/quickstart/student")):
        load_record(folder).find_problem(folder, student)        # why it is not this student's any more; None if it is

The record is `export.json` in the export's folder. `limbeck push` and the model card read it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, atomic_write_text
from limbeck.core.version import __version__
from limbeck.models.export import Exporter, Verification, check_exportable
from limbeck.models.fingerprint import fingerprint_checkpoint

RECORD_FILE = "export.json"
EXPORT_FOLDER = "export"  # in a run directory, or in a student's folder without a run


@dataclass(frozen=True)
class TextScore:
    """Perplexity on a text that nobody trained on, in the engine and of the student itself, on the same tokens."""

    text: str
    targets: int
    perplexity: float
    student_perplexity: float


@dataclass(frozen=True)
class Rates:
    """Decoding speed with the same prompt and the same number of threads, in tokens per second."""

    engine: float
    student: float  # in transformers
    threads: int


@dataclass(frozen=True)
class ExportRecord:
    """What is known of an export; what was not measured is None.

    files: bytes and sha256 by name.
    student: fingerprint of the student's folder (`limbeck.models.fingerprint`); None for one in memory.
    """

    format: str
    engine: str
    layout: str
    quantization: str
    files: dict[str, dict[str, Any]]
    student: str | None = None
    limbeck: str = __version__
    verification: Verification | None = None
    score: TextScore | None = None
    rates: Rates | None = None

    @property
    def size(self) -> int:
        """Total bytes of the files."""
        return sum(entry["bytes"] for entry in self.files.values())

    def find_problem(self, folder: Path, student: str) -> str | None:
        """Return why the files cannot stand for a student, as a clause; None if they can.

        Args:
            student: the fingerprint of the student's folder as it is now.
        """
        if self.student != student:
            return "was written from other weights than the student has now"
        if self.verification is not None and not self.verification.passed:
            return "did not pass its verification"
        for name, entry in self.files.items():
            file = folder / name
            if not file.is_file():
                return f"lacks {name}"
            if file.stat().st_size != entry["bytes"] or compute_sha256(file) != entry["sha256"]:
                return f"has another {name} than was written"
        return None


def write_export(
    exporter: Exporter,
    student: Any,
    tokenizer: Any,
    folder: Path,
    quantization: str | None = None,
    *,
    source: Path | None = None,
    force: bool = False,
) -> ExportRecord:
    """Write a student and its record into `folder`: all files, or none and the folder as it was.

    Args:
        source: the folder that the student was loaded from.

    Raises:
        LimbeckError: it does not fit (all reasons), the folder has files and is no export or `force` is not set, or a
            write failed.
    """
    quantization = check_exportable(exporter, student, tokenizer, quantization)
    check_free(folder, force=force)
    record = ExportRecord(
        format=exporter.name,
        engine=exporter.engine,
        layout=exporter.plan(student, tokenizer, quantization).layout,
        quantization=quantization,
        files={},
        student=None if source is None else fingerprint_checkpoint(source),
    )
    with atomic_folder(folder) as temporary:
        exporter.write(student, tokenizer, temporary, quantization)
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
            for path in written
        }
        record = replace(record, files=files)
        save_record(temporary, record)
    return record


def check_free(folder: Path, *, force: bool = False) -> None:
    """Raise LimbeckError if there is something at `folder` that an export would replace.

    With `force` an earlier export may be replaced, but no other folder: all that is in it would be lost.
    """
    if folder.is_file():
        raise LimbeckError(f"{folder} is a file", expected="a folder", hint="--out FOLDER")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RECORD_FILE).is_file():
        raise LimbeckError(
            f"{folder} has files, and none of them is the record of an export ({RECORD_FILE})",
            expected="a new or empty folder, or with --force one that `limbeck export` wrote",
            hint="--out FOLDER",
        )
    if not force:
        raise LimbeckError(
            f"{folder} exists", expected="a new or empty folder", hint="--force to replace it, or --out FOLDER"
        )


def save_record(folder: Path, record: ExportRecord) -> Path:
    """Write the record beside the exported files; returns its path."""
    content = asdict(record)
    if record.verification is not None:
        content["verification"]["passed"] = record.verification.passed
    path = folder / RECORD_FILE
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def load_record(folder: Path) -> ExportRecord | None:
    """Read the record of an export; None for one that has none.

    Raises:
        LimbeckError: it is damaged, or of another version.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, Any] = {"verification": Verification, "score": TextScore, "rates": Rates}
        for name, kind in kinds.items():
            if content[name] is not None:
                content[name].pop("passed", None)
                content[name] = kind(**content[name])
        return ExportRecord(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LimbeckError(
            f"{path} cannot be read: {error}",
            expected="the record that `limbeck export` writes",
            hint="limbeck export ... --force",
        ) from error


def find_export_folders(student: Path) -> list[Path]:
    """Find the folders of a student's exports, in its own folder or in the run around it, by name."""
    places = [student / EXPORT_FOLDER] + ([student.parent / EXPORT_FOLDER] if student.name == "student" else [])
    return sorted(path for place in places for path in place.glob("*") if path.is_dir() and path.name[0] != ".")
