"""What a shell, a container or a login on another machine brings along: locale, home, folders, pipes."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import limbeck
from limbeck import LimbeckError, Recipe, cli
from limbeck.core.console import console, output
from limbeck.core.storage import cache_root

SOURCES = sorted(Path(limbeck.__file__).parent.rglob("*.py"))
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*words: str, cwd: Path, drop: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return subprocess.run(
        [sys.executable, "-m", "limbeck", *words], cwd=cwd, env={**kept, **env}, capture_output=True, check=False
    )


def ended(monkeypatch, *words: str) -> int:
    """Exit code of a command line that is run here."""
    monkeypatch.setattr(sys, "argv", ["limbeck", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0


def calibration(teacher: Path, corpus: Path, path: Path) -> Path:
    """A recipe that is over in a moment."""
    recipe = {
        "name": "Größe 你好",
        "teacher": str(teacher),
        "student": {"mixer": "linear_attention"},
        "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
        "stages": [{"stage": "calibrate", "tokens": 256}],
        "evaluation": {"tokens": 64, "prompt": "naïve ‖ 😀", "new_tokens": 2},
        "trackers": [],
    }
    path.write_text(json.dumps(recipe, ensure_ascii=False), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- locales and terminals


@pytest.mark.slow
def test_names_beyond_ascii_in_a_locale_that_has_none(teacher_folder, corpus, own_cache, tmp_path):
    """Recipe, teacher, text and run: a run that comes to its end, with what it wrote in UTF-8."""
    teacher, text, out = tmp_path / "Lehrer-ü", tmp_path / "文本.jsonl", tmp_path / "läufe" / "😀"
    shutil.copytree(teacher_folder, teacher)
    shutil.copy(corpus, text)
    recipe = calibration(teacher, text, tmp_path / "Rezept-é.yaml")
    done = run("distill", str(recipe), "--out", str(out), cwd=tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    done.stdout.decode("ascii")  # the terminal got what it can show
    assert "‖" in (out / "summary.md").read_text(encoding="utf-8")
    assert Recipe.load(out / "recipe.yaml").name == "Größe 你好"
    assert Recipe.load(out / "recipe.yaml").teacher == str(teacher)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_write_a_character_ends_nothing(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    cli._escape_unencodable_output()
    print("‖ 你好")
    output.print("‖ é 😀")
    console.print("→")
    for stream in streams:
        stream.flush()
    shown, told = (stream.buffer.getvalue() for stream in streams)
    assert rb"\u4f60\u597d" in shown
    assert "é".encode(encoding, "backslashreplace") in shown
    assert rb"\u2192" in told


def test_a_name_that_is_no_utf8_is_refused_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert ended(monkeypatch, "distill", "--out", os.fsdecode(b"caf\xe9")) == 2
    assert "not UTF-8" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _text_without_encoding(tree: ast.AST) -> list[ast.Call]:
    """Calls that open text and leave its encoding to the locale."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        given = {keyword.arg for keyword in node.keywords}
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [one.value for one in values if isinstance(one, ast.Constant) and set(str(one.value)) <= set("rwaxbt+")]
        of_path = isinstance(function, ast.Attribute) and not node.args  # path.open(); others' open(x) is not ours
        text_mode = any("t" in mode for mode in modes) or (
            (isinstance(function, ast.Name) or of_path or bool(modes)) and not any("b" in mode for mode in modes)
        )
        at = {"read_text": 0, "write_text": 1}.get(name)
        asks = {
            "open": text_mode,
            "fdopen": text_mode,
            "run": bool({"text", "universal_newlines"} & given),
            "Popen": bool({"text", "universal_newlines"} & given),
        }.get(name, at is not None and len(node.args) <= at)
        if asks and "encoding" not in given and None not in given:
            found.append(node)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "open(p)", "open(p, 'w')", "path.open()", "path.open('a')", "x.read_text()", "x.write_text(t)",
        "subprocess.run(c, text=True)", "os.fdopen(1, 'w')", "gzip.open(p, 'rt')",
    ],
)  # fmt: skip
def test_the_look_for_encodings_finds_what_it_is_for(line):
    assert _text_without_encoding(ast.parse(line))


def test_all_text_is_opened_in_a_named_encoding():
    missing = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES
        for node in _text_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert missing == []


# ---------------------------------------------------------------------------- homes and folders


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """A container that runs under a number without a name: no HOME, no entry in the list of users."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("changes the user")
    code = (
        "import os; from limbeck.core.storage import cache_root; from limbeck import LimbeckError\n"
        "os.environ.pop('HOME', None); os.environ.pop('LIMBECK_CACHE', None); os.setuid(54321)\n"
        "try: cache_root()\nexcept LimbeckError as told: print(told)\n"
        "os.environ['LIMBECK_CACHE'] = '/tmp/limbeck'; print(cache_root())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True, cwd="/"
    )
    assert "no home directory" in done.stdout
    assert "export LIMBECK_CACHE=/tmp/limbeck" in done.stdout
    assert done.stdout.strip().endswith("/tmp/limbeck")


def test_the_cache_of_a_home_that_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("LIMBECK_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "limbeck"


def test_a_current_folder_that_was_deleted(tmp_path):
    """The check comes before anything that would fall over it."""
    code = (
        "import os; os.makedirs('gone'); from limbeck import cli; os.chdir('gone'); os.rmdir(os.getcwd()); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert b"the current folder has been deleted" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("out", "says"),
    [("x" * 300, b"too long"), ("/".join(["d" * 200] * 25), b"too long"), ("text.jsonl/run", b"is a file")],
)
def test_paths_that_cannot_be(out, says, teacher_folder, corpus, own_cache, tmp_path, monkeypatch, capfd):
    shutil.copy(corpus, tmp_path / "text.jsonl")
    recipe = calibration(teacher_folder, corpus, tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    assert ended(monkeypatch, "distill", str(recipe), "--out", out) == 2
    assert says in capfd.readouterr().err.encode()


@pytest.mark.slow
def test_nothing_listens_to_the_output(own_cache, tmp_path):
    """`limbeck students | head -1`, and a standard output that is closed."""
    line = f"{sys.executable} -m limbeck students"
    for shell in (f"{line} | head -1", f"{line} >&-"):
        done = subprocess.run(["bash", "-c", shell], capture_output=True, cwd=tmp_path, check=False)
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr


# ---------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("seed", [10**20, -1, 1e20, "nan"])
def test_a_seed_that_no_generator_takes(seed):
    with pytest.raises(LimbeckError, match="seed"):
        Recipe.parse({"seed": seed})


@pytest.mark.parametrize(
    "words", [["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "-1"], ["--seed", str(10**20)]]
)
def test_settings_of_generate_that_mean_nothing(words, teacher_folder, monkeypatch, capfd):
    assert ended(monkeypatch, "generate", str(teacher_folder), "hi", *words) == 2
    assert "Traceback" not in capfd.readouterr().err
