"""A disk that is full, a quota, a file that may not grow: refused by the system itself, in every library that writes.

The disks are real: small tmpfs that the tests mount, so they need root.
"""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from limbeck import Recipe, cli, distill
from limbeck.core.cache import ensure_cached_folder
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, explain_write_error, find_write_error
from limbeck.study import Study, run_study
from limbeck.study.tasks import SequentialExecutor

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a disk"
)


class Disk:
    """A tmpfs."""

    def __init__(self, place: Path):
        self.place = place
        place.mkdir()

    def mount(self, *options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.place)], check=False)
        if done.returncode:
            pytest.skip("mounting is not allowed here")

    def change(self, *options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(self.place)], check=True)

    def fill(self, leave: int) -> None:
        """Leave so many bytes free."""
        free = shutil.disk_usage(self.place).free
        with open(self.place / "filler", "wb", buffering=0) as file:
            file.write(bytes(max(free - leave, 0)))

    def free(self) -> None:
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "-l", str(made.place)], check=False, stderr=subprocess.DEVNULL)


BIG = torch.randn(200_000, generator=torch.Generator().manual_seed(0))  # 800 kB


def _figure(path: Path) -> None:
    from limbeck.report.figures.style import create_figure

    figure = create_figure(12, 12)
    figure.gca().imshow(BIG.reshape(400, 500).numpy())
    figure.savefig(path / "x.png", dpi=200)


WRITERS = {
    "safetensors": lambda folder: save_file({"x": BIG}, folder / "x.safetensors"),
    "torch": lambda folder: torch.save({"x": BIG}, folder / "x.pt"),
    "numpy": lambda folder: np.save(folder / "x.npy", BIG.numpy()),
    "numpy raw": lambda folder: BIG.numpy().tofile(folder / "x.tokens"),
    "tokenizers": lambda folder: Tokenizer(models.WordLevel({f"w{i}": i for i in range(50_000)})).save(
        str(folder / "tokenizer.json")
    ),
    "text": lambda folder: (folder / "x.json").write_text("x" * 800_000, encoding="utf-8"),
    "matplotlib": _figure,
    "folders": lambda folder: [(folder / f"{i}").mkdir() for i in range(100)],
}


def fills(write):
    def fill(folder: Path) -> dict:
        write(folder)
        return {}

    return fill


@needs_root
@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_that_meets_a_full_disk_is_understood(disk, writer):
    disk.mount("size=150k", "nr_inodes=50")
    with pytest.raises(LimbeckError, match="full") as told:
        ensure_cached_folder(disk.place / "folder", fills(WRITERS[writer]), what="folder")
    assert str(disk.place) in told.value.found
    assert "free some space" in told.value.hint
    with pytest.raises(LimbeckError, match="full"), atomic_folder(disk.place / "other") as folder:
        WRITERS[writer](folder)
    assert [path for path in disk.place.rglob("*") if not path.name.endswith(".lock")] == [], "something was left"


@pytest.mark.parametrize("writer", ["safetensors", "torch", "numpy", "tokenizers", "text"])
def test_a_file_that_may_not_grow_is_no_traceback(tmp_path, writer):
    """`ulimit -f`: the system says "file too large", some libraries say nothing of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(LimbeckError) as told:
            ensure_cached_folder(tmp_path / "folder", fills(WRITERS[writer]), what="folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "folder" in told.value.found
    assert told.value.hint
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (Exception("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), "quota"),
        (OSError(errno.EROFS, "Read-only file system", "/run/x"), "cannot write to /run/x"),
        (Exception("Permission denied (os error 13)"), "cannot write to /run"),
        (OSError(errno.ESTALE, "Stale file handle"), "gone"),
        (OSError(errno.EIO, "Input/output error"), "fails"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_to_do(error, says):
    told = explain_write_error(error, Path("/run"))
    assert says in told.found
    assert "--out" in told.hint


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), RuntimeError("CUDA error"), OSError("odd")])
def test_other_errors_stay_what_they_are(error):
    assert explain_write_error(error, Path("/run")) is None


def test_the_hint_names_the_setting_of_the_place(own_cache):
    assert "LIMBECK_CACHE" in explain_write_error(OSError(errno.ENOSPC, "full"), own_cache / "tokens").hint
    assert "--out" in explain_write_error(OSError(errno.ENOSPC, "full"), Path("/somewhere/run")).hint


def recipe(teacher: Path, corpus: Path, out: Path, **changes) -> Recipe:
    learnt = {"tokens": 256, "batch_size": 2}
    return Recipe.parse(
        {
            "name": "tiny",
            "teacher": str(teacher),
            "student": {"mixer": "linear_attention"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 256},
                {"stage": "hidden", **learnt},
                {"stage": "logits", **learnt},
            ],
            "evaluation": {"tokens": 64, "prompt": None},
            "checkpoint_seconds": 1e-6,
            "trackers": [],
            "out": str(out),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def undisturbed(teacher_folder, corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    distill(recipe(teacher_folder, corpus, run), plot_curves=False)
    return (run / "student" / "model.safetensors").read_bytes()


@needs_root
@pytest.mark.parametrize("leave", [0, 60_000, 150_000, 250_000, 350_000])
def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(
    disk, teacher_folder, corpus, own_cache, undisturbed, leave
):
    """So much room is left at its beginning that it ends in the log, in checkpoints of each stage, in the export."""
    disk.mount("size=40m")
    chosen = recipe(teacher_folder, corpus, disk.place / "run")
    with pytest.raises(LimbeckError, match=r"full|not enough disk space"):
        distill(chosen, confirm=lambda plan: disk.fill(leave), measure_times=False, plot_curves=False)
    assert not [path for path in disk.place.rglob("*.tmp") if path.is_dir()], "a half-made folder was left"
    disk.free()
    distill(chosen, measure_times=False, plot_curves=False)
    assert (disk.place / "run" / "student" / "model.safetensors").read_bytes() == undisturbed
    assert not list(disk.place.rglob("*.tmp"))


@needs_root
def test_a_study_whose_disk_fills_up_goes_on_when_there_is_room(disk, teacher_folder, corpus, own_cache):
    disk.mount("size=40m")
    base = recipe(teacher_folder, corpus, Path("unused")).model_dump(mode="json")
    study = Study.parse(
        {
            "name": "small",
            "base": {key: value for key, value in base.items() if key not in ("out", "name", "student")},
            "grid": {"students": ["linear_attention", "gla"], "stages": ["0+2+3"], "seeds": [0]},
            "measures": {},
        }
    )
    folder = disk.place / "study"
    try:
        said = json.dumps(run_study(study, folder, executor=Filling(disk)))  # the arms failed
    except LimbeckError as told:
        said = str(told)
    assert "full" in said or "not enough disk space" in said
    assert "Traceback" not in said + "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
    disk.free()
    found = run_study(study, folder)
    assert [one["status"] for one in found["arms"]] == ["finished", "finished"]


class Filling(SequentialExecutor):
    """An executor whose disk fills up after the study has begun."""

    def __init__(self, disk: Disk):
        super().__init__()
        self.disk = disk

    def run(self, study, folder, tasks):
        self.disk.fill(100_000)
        yield from super().run(study, folder, tasks)


def command(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command line, run here."""
    monkeypatch.setattr(sys, "argv", ["limbeck", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capsys.readouterr().err


@needs_root
def test_convert_and_report_leave_nothing_half_made(
    disk, teacher_folder, corpus, own_cache, tmp_path, monkeypatch, capsys
):
    disk.mount("size=60k")
    code, said = command(monkeypatch, capsys, "convert", str(teacher_folder), str(disk.place / "student"))
    assert code == 2
    assert "is full" in said
    assert list(disk.place.iterdir()) == []
    run = tmp_path / "run"
    distill(recipe(teacher_folder, corpus, run), measure_times=False, plot_curves=False)
    code, said = command(monkeypatch, capsys, "report", str(run), "--out", str(disk.place / "page.html"))
    assert code == 2
    assert "is full" in said


@needs_root
def test_a_disk_without_room_for_another_file(disk, teacher_folder, corpus, own_cache):
    disk.mount("size=40m", "nr_inodes=12")
    chosen = recipe(teacher_folder, corpus, disk.place / "run")
    with pytest.raises(LimbeckError, match="full"):
        distill(chosen, measure_times=False, plot_curves=False)
    disk.change("nr_inodes=1000")
    distill(chosen, measure_times=False, plot_curves=False)
    assert (disk.place / "run" / "eval.json").exists()


@needs_root
def test_a_cache_on_a_full_disk(disk, teacher_folder, corpus, tmp_path, monkeypatch):
    disk.mount("size=8k")
    monkeypatch.setenv("LIMBECK_CACHE", str(disk.place))
    with pytest.raises(LimbeckError, match=r"full|not enough disk space") as told:
        distill(recipe(teacher_folder, corpus, tmp_path / "run"), measure_times=False)
    assert "LIMBECK_CACHE" in told.value.hint
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- places that cannot be written to


@needs_root
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that holds no files of ours")
def test_a_file_system_that_takes_no_files_is_said():
    error = find_write_error(Path("/proc/limbeck"))
    assert error is not None
    assert "cannot write to /proc/limbeck" in error.found


def test_the_numbers_of_somebody_elses_run_are_shown(
    disk, teacher_folder, corpus, own_cache, monkeypatch, capsys, tmp_path
):
    disk.mount("size=40m")
    run = disk.place / "run"
    distill(recipe(teacher_folder, corpus, run), measure_times=False, plot_curves=False)
    disk.change("ro")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert find_write_error(run / "eval") is not None
    monkeypatch.setattr(sys, "argv", ["limbeck", "eval", str(run), "--tokens", "64"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert not ended.value.code
    assert "perplexity" in told.out, "the table is shown all the same"
    assert told.err.index("cannot write to") < told.err.index("evaluate"), "told before anything is measured"
    assert "--out" in told.err
    assert "kept in" not in told.err
    out = str(tmp_path / "kept")
    assert command(monkeypatch, capsys, "eval", str(run), "--tokens", "64", "--out", out)[0] == 0
    assert list((tmp_path / "kept").rglob("agreement.json"))
    code, said = command(monkeypatch, capsys, "report", str(run))
    assert code == 2
    assert "--out report.html" in said
    assert command(monkeypatch, capsys, "report", str(run), "--out", "report.html")[0] == 0, "the hint holds"
    for words in (["eval", str(run), "--out", str(disk.place / "x")], ["convert", str(teacher_folder), f"{run}/x"]):
        code, said = command(monkeypatch, capsys, *words)
        assert code == 2
        assert "cannot write to" in said


@needs_root
def test_a_student_on_another_disk(disk, teacher_folder, corpus, own_cache, tmp_path, undisturbed):
    """student/ may be a link; what is behind it is replaced, whole."""
    disk.mount("size=40m")
    (disk.place / "mine").mkdir()
    (disk.place / "mine" / "old").touch()
    run = tmp_path / "run"
    chosen = recipe(teacher_folder, corpus, run)
    distill(chosen, measure_times=False, plot_curves=False)
    (run / "eval.json").unlink()
    shutil.rmtree(run / "student")
    (run / "student").symlink_to(disk.place / "mine")
    distill(chosen, measure_times=False, plot_curves=False)
    assert (run / "student").is_symlink()
    assert (disk.place / "mine" / "model.safetensors").read_bytes() == undisturbed
    assert sorted(path.name for path in disk.place.iterdir()) == ["mine"]
    assert not (disk.place / "mine" / "old").exists()


@pytest.mark.parametrize("where", ["run", "run/student"])
def test_links_that_lead_nowhere_are_told_before_anything_is_written(tmp_path, teacher_folder, corpus, where):
    link = tmp_path / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "unmounted" / "x")
    with pytest.raises(LimbeckError, match="is a link to"):
        distill(recipe(teacher_folder, corpus, tmp_path / "run"), measure_times=False)
    assert not (tmp_path / "unmounted").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "student") as folder:
            WRITERS["safetensors"](folder)
            (folder / "config.json").write_text("{}", encoding="utf-8")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "student").iterdir()} == {mode}


def test_an_exported_student_can_be_read_by_others(teacher_folder, corpus, own_cache, tmp_path, monkeypatch, capsys):
    before = os.umask(0o022)
    try:
        distill(recipe(teacher_folder, corpus, tmp_path / "run"), measure_times=False, plot_curves=False)
        assert command(monkeypatch, capsys, "convert", str(teacher_folder), str(tmp_path / "made"))[0] == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "run" / "student", tmp_path / "made"):
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_what_a_killed_export_left_goes_with_the_next_command(teacher_folder, corpus, own_cache, tmp_path):
    chosen = recipe(teacher_folder, corpus, tmp_path / "run")
    distill(chosen, measure_times=False, plot_curves=False)
    (tmp_path / "run" / ".student.tmp").mkdir()
    distill(chosen, measure_times=False, plot_curves=False)  # finished already
    assert not (tmp_path / "run" / ".student.tmp").exists()
