"""What comes out of a verb: results on standard output, all else on standard error, JSON for programs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from helpers.command_line import run_limbeck
from limbeck.cli.results import to_plain
from limbeck.core import extras
from limbeck.core.console import UncroppedConsole, console, output


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, its output into pipes."""
    code = "from limbeck.__main__ import main; main()"
    surroundings = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**surroundings, **environment},
    )


def limbeck(*arguments: str, capsys) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    return run_limbeck(arguments, capsys)


@pytest.fixture
def place(tmp_path, monkeypatch, teacher_folder, corpus) -> Path:
    """An empty folder to work in, with a recipe and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    raw = {
        "teacher": str(teacher_folder),
        "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
        "stages": [{"stage": "calibrate", "tokens": "0.1k"}, {"stage": "logits", "tokens": 64, "batch_size": 1}],
        "evaluation": {"tokens": 64, "new_tokens": 2},
        "trackers": [],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return tmp_path


def test_a_run_and_its_evaluation_as_documents(place, capsys):
    """In a pipe: one JSON document on standard output, no escape codes anywhere, and with --quiet nothing else."""
    made = run("distill", "tiny.yaml", "--preset", "controlled", "--out", "runs/a", "--json", "--quiet")
    assert (made.returncode, made.stderr) == (0, "")
    result = json.loads(made.stdout)
    assert result == json.loads((place / "runs/a/eval.json").read_text(encoding="utf-8")) | {"run": result["run"]}
    assert (
        yaml.safe_load((place / "runs/a/recipe.yaml").read_text(encoding="utf-8"))["student"]["preset"] == "controlled"
    )
    seen = run("eval", "runs/a", "--tokens", "0.1k", "--length", "32", "--json", FORCE_COLOR="1")
    assert seen.returncode == 0, seen.stderr
    (measurement,) = json.loads(seen.stdout)["measurements"][:1]
    assert (measurement["measure"], measurement["model"]) == ("agreement", "runs/a")
    assert "note: --length is now --seq-len" in seen.stderr

    code, out, _ = limbeck("eval", "--from", "runs/a", capsys=capsys)
    assert (code, "\x1b" in out, "…" in out) == (0, False, False)
    code, out, _ = limbeck("distill", "tiny.yaml", "--out", "runs/b", "--plan", "--json", capsys=capsys)
    assert [stage["stage"] for stage in json.loads(out)["plan"]["stages"]] == ["calibrate", "logits"]
    code, out, err = limbeck("distill", "tiny.yaml", "--out", "runs/b", "--plan", "--quiet", capsys=capsys)
    assert ("trained parameters" in out, err) == (True, ""), "a plan that is asked for is a result"
    assert not (place / "runs/b").exists()

    # a run stands for its student, and as a teacher for its teacher
    code, out, err = limbeck(
        *("select", "--teacher", "runs/a", "--data", str(place / "none.jsonl"), "--json"), capsys=capsys
    )
    assert (code, out) == (2, "")
    assert "runs/a is a run; its teacher is " in err
    code, out, err = limbeck("convert", "runs/a", "--set", "options.conv=0", "--out", "c", "--json", capsys=capsys)
    assert (code, json.loads(out)["state"]) == (0, "weights unchanged"), err
    code, out, err = limbeck("generate", "c", "The", "--new-tokens", "2", "--quiet", capsys=capsys)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["students", "gla"], {"preset", "shape", "mixers"}),
        (["eval", "--list"], {"measures"}),
        (["study", "--list"], {"studies"}),
        (["recipe", "paper-experiment-1"], {"name", "grid"}),
        (["recipe"], {"teacher", "student", "stages"}),
        (["doctor"], {"versions", "extras", "device", "kernels", "assets", "cache"}),
        (["families", "llama"], {"student", "families"}),
    ],
)
def test_lists_as_documents(arguments, keys, place, capsys):
    code, out, _ = limbeck(*arguments, "--json", capsys=capsys)
    assert code == 0
    assert keys <= json.loads(out).keys()


def test_a_mistake_leaves_standard_output_empty_and_is_told_however_quiet(place, capsys):
    for arguments in (["students", "glaa"], ["eval", "nowhere"], ["convert", "nowhere"]):
        code, out, err = limbeck(*arguments, "--json", "--quiet", capsys=capsys)
        assert (code, out) == (2, "")
        assert "error: " in err
        assert "expected: " in err
    code, out, _ = limbeck("students", "gla", capsys=capsys)
    assert "gla" in out, "what --json and --quiet changed is as before"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["students", "GLA"], "did you mean 'gla'?"),
        (["distill", "--set", "stages.logits.learning_rate=1e-4"], "did you mean 'lr'?"),
        (["distill", "--set", "data.max_length=512"], "did you mean 'seq_len'?"),
        (["distill", "--set", "data.textfield=body"], "did you mean 'text_field'?"),
    ],
)
def test_what_others_call_it_is_understood(arguments, words, place, capsys):
    code, _, err = limbeck(*arguments, capsys=capsys)
    assert code == 2
    assert words in err


def test_what_json_lacks_becomes_null_and_paths_become_text():
    plain = to_plain({"a": [math.nan, math.inf, 1.5], "b": Path("x"), 3: (True, None, {"c"})})
    assert plain == {"a": [None, None, 1.5], "b": "x", "3": [True, None, ["c"]]}


# ------------------------------------------------------------------ colors and widths


@pytest.mark.parametrize(
    ("environment", "escaped"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False)]
)
def test_a_pipe_has_no_width_and_colors_only_if_they_are_forced(environment, escaped, monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = UncroppedConsole(highlight=False, markup=False)
    table = Table(box=None)
    table.add_column("head", style="red")
    table.add_row("a long line, " * 40)
    with console.capture() as seen:
        console.print(table)
    assert ("\x1b[31m" in seen.get()) == escaped
    assert "a long line, " * 40 in seen.get()
    assert not console.is_terminal, "no bars"


# ------------------------------------------------------------------ extras


def test_every_extra_for_users_has_its_purpose_and_what_is_missing_is_named(monkeypatch):
    listed = {extra.name: extra for extra in extras.list_extras()}
    assert set(listed) == set(extras.PURPOSES)
    assert "matplotlib" in listed["report"].packages
    assert listed["report"].missing == []
    assert extras.find_missing("matplotlib") is None
    without("matplotlib", "lm_eval", "peft", "accelerate", monkeypatch=monkeypatch)
    assert extras.find_missing("matplotlib").command == "pip install 'limbeck[report]'"
    assert extras.find_missing("lm_eval").name == "eval"
    assert extras.find_missing("accelerate").name == "gguf"


@pytest.mark.parametrize("arguments", [["students", "gla", "--json"], ["students", "gla"], ["recipe", "quickstart"]])
def test_of_several_processes_the_first_one_prints(arguments, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for one in (console, output):
        monkeypatch.setattr(one, "quiet", False)  # and so again afterwards
    monkeypatch.setenv("RANK", "0")
    assert limbeck(*arguments, capsys=capsys)[1]
    monkeypatch.setenv("RANK", "1")
    assert limbeck(*arguments, capsys=capsys) == (0, "", "")
    assert console.quiet, "what runs after a verb, such as an error's message, is that of the first process too"


@pytest.mark.parametrize("quiet", [[], ["--quiet"], ["-q"]])
def test_quiet_holds_for_notes_on_options_too(quiet, place, capsys):
    code, _, err = limbeck("bench", "--batch", "x", *quiet, capsys=capsys)
    assert (code, "note: --batch is now" in err) == (2, not quiet)
    assert "error: no model to benchmark" in err


def without(*modules: str, monkeypatch) -> None:
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name, *rest: None if name in modules else find(name, *rest)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["matrices", "--out", "m.png"], "pip install 'limbeck[report]'"),
        (["matrices", "m.bmp"], "a file name ending in .png, .svg or .pdf"),
        (["matrices", "--steps=-1"], "--steps -1"),
        (["select", "--eval-tokens", "0"], "--eval-tokens 0"),
        (["report", "runs"], "pip install 'limbeck[report]'"),
        (["eval", "nowhere", "--measure", "all"], "left out: tasks, which needs the extra eval"),
    ],
)
def test_an_absent_extra_is_named_before_any_work(arguments, words, place, capsys, monkeypatch):
    without("matplotlib", "lm_eval", monkeypatch=monkeypatch)
    code, _, err = limbeck(*arguments, capsys=capsys)
    assert code == 2
    assert words in err
