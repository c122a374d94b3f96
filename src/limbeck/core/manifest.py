import shlex
from pathlib import Path
from typing import Any

from limbeck.core.storage import (
    read_json,
)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a run's manifest.json says; nothing where there is none yet.

    Raises:
        LimbeckError: it is damaged.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    return read_json(file, f"rm {shlex.quote(str(file))}   (the run goes on without comparing what it was begun with)")
