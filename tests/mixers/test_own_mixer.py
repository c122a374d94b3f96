"""A mixer of one's own: as an installed package, as a single file, and all that can be wrong with either.

The package is examples/lightning. It is "installed" as pip leaves it, into a folder on the path of a new process.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import limbeck
from helpers.paths import ROOT
from limbeck import LimbeckError, mixers
from limbeck.mixers import registry
from limbeck.models import get_mixers
from limbeck.testing import make_tiny_model
from limbeck.testing.contract import sample_ids

EXAMPLE = ROOT / "examples" / "lightning"
FILE = EXAMPLE / "limbeck_lightning.py"
OWN = """
from limbeck.mixers import Inputs, Mixer, register
from limbeck.ops import scalar_decay

@register
class Plain(Mixer):
    name, summary, operator = "NAME", "linear attention without anything", scalar_decay

    def inputs(self, q, k, v, x, tokens, state):
        return Inputs(q, k, v)
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_FILES", {})
    monkeypatch.setattr(registry, "_BROKEN", {})
    monkeypatch.setattr(registry, "_discovered", False)


def installed(folder: Path, name: str, points: dict[str, str]) -> None:
    """A distribution of that name with those entry points, as far as importlib.metadata looks at it."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[limbeck.mixers]\n{lines}", encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the example package in it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(FILE, folder)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed(folder, project["name"], project["entry-points"]["limbeck.mixers"])
    return folder


def own_file(folder: Path, name: str = "plain", text: str = OWN) -> Path:
    path = folder / "mine.py"
    path.write_text(text.replace("NAME", name), encoding="utf-8")
    return path


def python(*arguments: str, path: Path | None = None, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path) if path else ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **more)


@pytest.mark.slow
def test_the_examples_own_tests_pass(site):
    """The whole contract, as its author runs it."""
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiled", str(EXAMPLE), path=site, cwd=EXAMPLE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.slow
def test_an_installed_mixer_goes_the_whole_way(site, tmp_path, teacher_folder, corpus, own_cache):
    run, main = tmp_path / "run", "from limbeck.cli import main; import sys; sys.argv[0] = 'limbeck'; main()"
    options = ["--teacher", str(teacher_folder), "--data", str(corpus), "--out", str(run)]
    settings = ["stages.2.batch_size=1", "data.seq_len=32", "evaluation.tokens=64", "evaluation.new_tokens=2"]
    command = [
        "distill",
        "quickstart_smoke",
        "--student",
        "lightning",
        *options,
        "--stages",
        "1,2,3",
        "--tokens",
        "192",
    ]
    done = python("-c", main, *command, *(part for s in settings for part in ("--set", s)), path=site)
    assert done.returncode == 0, done.stdout + done.stderr
    said = python("-c", main, "generate", str(run), "copyright", "--tokens", "2", path=site)
    assert said.returncode == 0, said.stderr
    plan = AutoConfig.from_pretrained(run / "student").limbeck
    assert plan["origins"] == {"lightning": {"module": "limbeck_lightning", "package": "limbeck-lightning"}}
    missing = "this student's mixer 'lightning' is not part of Limbeck.*\n.*\n.*pip install limbeck-lightning"
    with pytest.raises(LimbeckError, match=missing):
        AutoModelForCausalLM.from_pretrained(run / "student")


def test_a_broken_package_is_told_and_leaves_the_others_alone(tmp_path, monkeypatch):
    (tmp_path / "broken_mixer.py").write_text("import nothing_of_that_name", encoding="utf-8")
    (tmp_path / "clashing_mixer.py").write_text(OWN.replace("NAME", "gla"), encoding="utf-8")
    (tmp_path / "fine_mixer.py").write_text(OWN.replace("NAME", "fine"), encoding="utf-8")
    points = {"broken": "broken_mixer", "clashing": "clashing_mixer:Plain", "absent": "absent", "fine": "fine_mixer"}
    installed(tmp_path, "several", points)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="of package several is skipped") as skipped:
        names = mixers.list_mixers()
    assert "fine" in names
    assert not {"broken", "clashing", "absent"} & set(names)
    assert mixers.get("gla").__module__ == "limbeck.mixers.gla"
    assert len(skipped) == 3
    with pytest.raises(
        LimbeckError, match=r"'broken' could not be loaded: ModuleNotFoundError: .*nothing_of_that_name"
    ):
        mixers.get("broken")


def test_a_file_is_a_mixer_wherever_one_is_named(tmp_path):
    path = own_file(tmp_path)
    for name in (str(path), f"{path}:Plain", "plain"):
        assert mixers.get(name).__name__ == "Plain"
    assert mixers.get(str(path)) is mixers.get("plain"), "the file ran twice"
    student = limbeck.convert(make_tiny_model("llama"), str(path))
    assert {m.name for m in get_mixers(student).values()} == {"plain"}
    assert "plain" in mixers.list_mixers()
    shutil.copy(path, tmp_path / "copy.py")
    assert mixers.get(str(tmp_path / "copy.py")) is mixers.get("plain"), "a copy is the same mixer"
    own_file(tmp_path, text=OWN.replace("without anything", "edited"))
    assert "edited" in mixers.get(str(path)).summary
    assert "edited" in mixers.get("plain").summary


@pytest.mark.parametrize(
    ("text", "ending", "message"),
    [
        (OWN.replace("NAME", "gla"), "", "the mixer name 'gla' of .*mine.py:Plain is already used by Limbeck"),
        (OWN.replace("@register", ""), "", "registers 0 mixers"),
        (
            OWN + OWN.replace("Plain", "Other").replace("NAME", "o"),
            "",
            r"registers 2 mixers: Plain, Other\n.*\n.*:Plain",
        ),
        (OWN, ":Plan", "registers no class 'Plan', did you mean 'Plain'"),
        (OWN.replace("def", "dfe"), "", "could not be loaded: SyntaxError"),
        (OWN.replace("NAME", "no name"), "", "has name 'no name'"),
        ("from limbeck.mixers import register\nregister(int)", "", "is not a mixer"),
    ],
)
def test_what_is_wrong_with_a_file(text, ending, message, tmp_path):
    path = own_file(tmp_path, text=text)
    before = dict(registry._REGISTRY)
    with pytest.raises(LimbeckError, match=message):
        mixers.get(f"{path}{ending}")
    assert registry._REGISTRY["gla"] is before["gla"]


def test_two_files_cannot_share_a_name(tmp_path):
    mixers.get(str(own_file(tmp_path)))
    other = tmp_path / "other.py"
    other.write_text(OWN.replace("NAME", "plain") + "# another file", encoding="utf-8")
    with pytest.raises(
        LimbeckError, match=r"the mixer name 'plain' of .*other.py:Plain is already used by .*mine.py:Plain"
    ):
        mixers.get(str(other))
    with pytest.raises(LimbeckError, match="no such file"):
        mixers.get(str(tmp_path / "absent.py"))


@pytest.mark.slow
@torch.no_grad()
def test_a_student_brings_its_file_and_runs_it_only_when_trusted(tmp_path):
    ids = sample_ids(1, 9)
    student = limbeck.convert(make_tiny_model("llama"), str(own_file(tmp_path)))
    saved = tmp_path / "student"
    student.save_pretrained(saved)
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    assert (saved / "mixer_plain.py").read_text(encoding="utf-8") == text
    again = AutoModelForCausalLM.from_pretrained(saved)  # known in this process
    assert torch.equal(again(ids).logits, student(ids).logits)
    (tmp_path / "mine.py").unlink()
    code = (
        "import sys, torch, warnings\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "trust = sys.argv[2] == 'trust'\n"
        "if not trust: import limbeck\n"
        "try: model = A.from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "except Exception as error: print(error); sys.exit(3)\n"
        "with torch.no_grad(): print(float(model(torch.tensor([eval(sys.argv[3])])).logits.double().sum()))\n"
        "model.save_pretrained(sys.argv[1] + '-again')\n"
    )
    untrusted = python("-c", code, str(saved), "no", str(ids[0].tolist()), cwd=tmp_path)
    assert untrusted.returncode == 3, untrusted.stderr
    assert "'plain' is not part of Limbeck" in untrusted.stdout
    assert "mixer_plain.py" in untrusted.stdout
    trusted = python("-c", code, str(saved), "trust", str(ids[0].tolist()), cwd=tmp_path)
    assert trusted.returncode == 0, trusted.stdout + trusted.stderr
    assert float(trusted.stdout) == float(student(ids).logits.double().sum())
    assert (tmp_path / "student-again" / "mixer_plain.py").read_text(encoding="utf-8") == text


def test_the_command_line_checks_a_file(tmp_path):
    from limbeck.cli import app, check, students  # noqa: F401

    command = ["check", str(own_file(tmp_path)), "--quick", "--family", "llama"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "cases passed" in done.output
    wrong = OWN.replace("return Inputs(q, k, v)", "return Inputs(q, k * k.shape[1], v)")
    failed = CliRunner().invoke(app, ["check", str(own_file(tmp_path, text=wrong)), "--quick", "--family", "llama"])
    assert failed.exit_code == 1, failed.output
    assert "three_forms\ntoken 0 alone beside the whole pass: off by" in failed.output
    listed = CliRunner().invoke(app, ["--mixer", str(tmp_path / "mine.py"), "students", "plain"])
    assert "linear attention without anything" in " ".join(listed.output.split())
