"""The command line itself: what it imports, names printed as they are, run directories, plans, what comes next."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.command_line import run_limbeck
from limbeck.core import console as consoles
from limbeck.report.run_summary import next_commands

LIGHT = """
import sys
from limbeck.cli import main
sys.argv = ["limbeck", *{arguments!r}]
try:
    main()
except SystemExit as end:
    print("ended with", end.code)
print("imported:", sorted(name for name in ("torch", "transformers", "limbeck.models.modeling") if name in sys.modules))
"""


def python(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "distill"),
        (["-h"], 0, "--version"),
        (["--version"], 0, "limbeck 0."),
        (["study", "-h"], 0, "--executor"),
        (["distill", "--help"], 0, "--student"),
        (["study", "--list"], 0, "paper-experiment-1"),
        (["students", "paper-v3", "--preset", "published"], 0, "Kimi Delta Attention"),
        (["eval", "--list"], 0, "agreement"),
        (["recipe"], 0, "teacher: embedded"),
        (["distil"], 2, "Did you mean 'distill'?"),
        (["distill", "--techer", "x"], 2, "--teacher"),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(arguments, code, says):
    said = python(LIGHT.format(arguments=arguments))
    assert says in said
    assert f"ended with {code}" in said
    assert "imported: []" in said


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    "first",
    [
        "import limbeck; from transformers import AutoConfig, AutoModelForCausalLM",
        "import transformers, limbeck; from transformers import AutoConfig",
        "from transformers import AutoConfig, AutoModelForCausalLM; import limbeck",
        "import limbeck; from transformers import GenerationMixin, AutoConfig",
        "from limbeck import convert; from transformers import AutoConfig",
    ],
)
def test_students_are_known_to_transformers_once_limbeck_is_imported(first):
    said = python(f"{first}\nprint(type(AutoConfig.for_model('limbeck')).__module__)")
    assert "limbeck.models.config" in said


@pytest.mark.slow
def test_the_public_names_and_the_modules_are_there():
    said = python(
        "import limbeck\n"
        "print(limbeck.Recipe.__name__, limbeck.LimbeckError.__name__, limbeck.mixers.list_mixers()[0])\n"
        "print(callable(limbeck.convert), callable(limbeck.distill), set(limbeck.__all__) <= set(dir(limbeck)))\n"
        "from limbeck import *\n"
        "print(Recipe is limbeck.Recipe, hasattr(limbeck, 'nonsense'), hasattr(limbeck, '__wrapped__'))\n"
    )
    assert said.split() == ["Recipe", "LimbeckError", "based", "True", "True", "True", "True", "False", "False"]


NAMES = ["[red]x", "[/tmp]", "r/exp[/old]", "run[v2]", "[link=x]", ":smile:", "a[bold]b[/bold]"]


@pytest.mark.parametrize("console", ["console", "output"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is(console, name):
    printer = getattr(consoles, console)
    table = Table(box=None)
    table.add_column(f"head {name}")
    table.add_row(f"cell {name}")
    with printer.capture() as seen:
        printer.print(f"written to {name}/")
        printer.print(f"kept in {name}", style="dim")
        printer.print(table)
    for words in (f"written to {name}/", f"kept in {name}", f"head {name}", f"cell {name}"):
        assert words in seen.get()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_bar_shows_a_name_as_it_is(name, terminal, monkeypatch):
    monkeypatch.setattr(consoles.console, "_force_terminal", terminal)
    with consoles.console.capture() as seen, consoles.progress(f"tokens of {name}", 2, "steps") as advance:
        advance(1, note=f"at {name}")
        advance(1, note=f"at {name}")
    assert f"tokens of {name}" in seen.get()
    assert f"at {name}" in seen.get()


# ------------------------------------------------------------------ run directories, plans and what comes next


def tiny_recipe(folder: Path, teacher: Path, corpus: Path, **more) -> Path:
    raw = {
        "name": "tiny",
        "teacher": str(teacher),
        "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
        "stages": [{"stage": "calibrate", "tokens": 256}, {"stage": "logits", "tokens": 128, "batch_size": 2}],
        "evaluation": {"tokens": 128, "prompt": "The licence", "new_tokens": 4},
        "trackers": [],
        **more,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def limbeck(*arguments: str, capsys) -> tuple[int, str]:
    """Exit code and all that is said."""
    code, out, err = run_limbeck(arguments, capsys)
    return code, out + err


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch, teacher_folder, corpus) -> Path:
    """An empty folder to work in, with a recipe and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    tiny_recipe(tmp_path, teacher_folder, corpus)
    for name in "pq":
        shutil.copy(corpus, tmp_path / f"{name}.jsonl")
    return tmp_path


CHANGES = [
    ["--set", "student.softmax_layers=0"],
    ["--set", "student.softmax_layers=every 2", "--tokens", "512"],
    ["--student", "gla", "--set", "student.preset=controlled"],
    ["--stages", "0"],
]


def test_commands_that_differ_do_not_meet_in_one_run_directory_and_each_goes_on_with_its_own(place, capsys):
    seen = []
    for change in [[], *CHANGES, [], *CHANGES]:
        code, said = limbeck("distill", "tiny.yaml", *change, capsys=capsys)
        assert code == 0, said
        seen.append((re.findall(r"written to (\S+)/:", said)[0], "already complete" in said))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [path for path, _ in first] == ["runs/tiny", "runs/tiny-2", "runs/tiny-3", "runs/tiny-gla", "runs/tiny-4"]
    assert [path for path, _ in second] == [path for path, _ in first]
    assert not any(finished for _, finished in first)
    assert all(finished for _, finished in second)


def test_a_numbered_run_says_why_and_a_named_one_is_still_refused(place, capsys):
    limbeck("distill", "tiny.yaml", "--stages", "0", capsys=capsys)
    code, said = limbeck("distill", "tiny.yaml", "--stages", "0", "--tokens", "128", capsys=capsys)
    assert code == 0
    assert "runs/tiny contains another run: stages.0.tokens: was 256, now 128; using runs/tiny-2 for this run" in said
    code, said = limbeck("distill", "tiny.yaml", "--out", "runs/tiny", capsys=capsys)
    assert code == 2
    assert "contains another run" in said


def test_a_plan_is_never_refused_and_writes_nothing(place, capsys):
    limbeck("distill", "tiny.yaml", "--stages", "0", capsys=capsys)
    (place / "runs" / "full").mkdir()
    (place / "runs" / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    before = files(place)
    for out in ([], ["--out", "runs/tiny"], ["--out", "runs/full"], ["--out", "runs/new"]):
        code, said = limbeck("distill", "tiny.yaml", *out, "--plan", capsys=capsys)
        assert code == 0, said
        assert "calibrate" in said
        assert ("without --plan this would be refused" in said) == (out[1:] in (["runs/tiny"], ["runs/full"]))
    assert files(place) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "tiny.yaml"], ["would be tokenized first, once: ", "corpus.jsonl"]),
        (["distill", "tiny.yaml", "--teacher", "tiny"], ["teacher 'tiny': 0.41 M parameters", "corpus.jsonl"]),
        (["distill", "tiny.yaml", "--data", "embedded"], ["the embedded text (quick), 30 MB"]),
        pytest.param(
            ["distill", "laptop", "--student", "retnet"],
            ["teacher 'small'", "the recall tasks"],
            marks=pytest.mark.slow,
        ),
        (["study", "mine.yaml"], ["teacher 'tiny'", "2 runs"]),
        (["assets", "--teacher", "tiny"], ["teacher 'tiny'", "the embedded text (quick)"]),
        (["assets"], ["the embedded teacher, 800 MB", "the embedded text (quick)"]),
        (["assets", "--pack", "benchmarks"], ["pack benchmarks"]),
    ],
)
def test_a_plan_makes_nothing_and_says_what_would_be_made(place, arguments, words, capsys):
    study = {
        "name": "mine",
        "base": {"teacher": "tiny", "data": {"seq_len": 64}, "stages": [{"stage": "hidden", "tokens": 512}]},
        "grid": {"students": ["gla", "retnet"], "stages": ["2"]},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    before = files(place)
    code, said = limbeck(*arguments, "--plan", capsys=capsys)
    assert code == 0, said
    for word in words:
        assert word in said
    assert files(place) == before, "nothing is written, the cache included"


def test_a_plan_still_finds_what_cannot_be(place, capsys):
    for wrong in (["--data", "no-such.jsonl"], ["--teacher", "./no-such-folder"], ["--student", "no_such_mixer"]):
        code, said = limbeck("distill", "tiny.yaml", *wrong, "--plan", capsys=capsys)
        assert code == 2, said
        assert "error:" in said


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("out", ["runs/next", "runs/with space", "runs/[red]x", "runs/exp[/old]"])
def test_the_commands_that_a_run_ends_with_are_about_that_run(place, out, capsys, teacher_folder, corpus):
    code, said = limbeck("distill", "tiny.yaml", "--student", "mlstm", "--out", out, capsys=capsys)
    assert code == 0, said
    assert f"written to {out}/" in said
    summary = (place / out / "summary.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (limbeck .*)$", summary, re.M)
    assert [shlex.split(command)[1] for command in commands] == ["generate", "eval", "report"]
    for command in commands:
        code, said = limbeck(*shlex.split(command)[1:], capsys=capsys)
        assert code == 0, said
    # the report of one run is named after it, its mixer and its teacher, with a sample and the command that made it
    page = html.unescape((place / out / "report.html").read_text(encoding="utf-8"))
    sample = json.loads((place / out / "eval.json").read_text(encoding="utf-8"))["samples"]["student"]
    command = shlex.join(["limbeck", "distill", "tiny.yaml", "--student", "mlstm", "--out"])
    for words in ('class="kind">Run<', "The mlstm student of tiny-llama", "“The licence”", sample, command):
        assert words in page
    assert str(place) not in page


RESULT = {"run": "runs/a b", "teacher": "embedded", "prompt": "", "exam": None}


@pytest.mark.parametrize(
    ("facts", "verbs_expected"),
    [
        ({}, ["generate", "eval", "push"]),
        ({"chats": True, "exam": {"student_perplexity": 20.0}}, ["chat", "eval", "push"]),
        ({"exports": ["gguf", "qwen3_5"], "held_out_tokens": 900}, ["generate", "eval", "export", "chat"]),
        ({"teacher": "/models/mine"}, ["generate", "eval", "report"]),
    ],
)
def test_the_next_commands_suit_the_run_and_parse(facts, verbs_expected, verbs):
    commands = [shlex.split(command) for command in next_commands({**RESULT, **facts})]
    assert [words[1] for words in commands] == verbs_expected
    for _, verb, *arguments in commands:
        context = verbs[verb].make_context(verb, list(arguments))
        assert any("runs/a b" in str(value) for value in context.params.values())


# ------------------------------------------------------------------ limbeck convert


def mixers_in(folder: Path) -> dict[int, tuple[str, dict]]:
    plan = json.loads((folder / "config.json").read_text(encoding="utf-8"))["limbeck"]
    return {entry["layer"]: (entry["mixer"], entry["options"]) for entry in plan["layers"]}


def test_convert_takes_what_a_recipes_student_takes(place, teacher_folder, capsys):
    code, said = limbeck(
        "convert", str(teacher_folder), "a", "--softmax-layers", "0", "--set", "options.conv=4", capsys=capsys
    )
    assert code == 0, said
    assert [(layer, options["conv"]) for layer, (_, options) in mixers_in(place / "a").items()] == [(1, 4)]
    rules = "rules=[{layers: 0, mixer: retnet, options: {conv: 2}}]"
    code, said = limbeck("convert", str(teacher_folder), "b", "--student", "gla", "--set", rules, capsys=capsys)
    assert code == 0, said
    assert [name for name, _ in mixers_in(place / "b").values()] == ["retnet", "gla"]
    keep = {"softmax_layers": [1]}
    (place / "softmax_layers.json").write_text(json.dumps(keep), encoding="utf-8")
    code, said = limbeck(
        "convert", str(teacher_folder), "c", "--set", "student.softmax_layers=softmax_layers.json", capsys=capsys
    )
    assert code == 0, said
    assert list(mixers_in(place / "c")) == [0]


def test_convert_gives_a_trained_student_other_options_and_leaves_its_weights(place, capsys):
    hybrid = ["--student", "hybrid", "--set", "student.options={linear: gla, window: 4}"]
    code, said = limbeck("distill", "tiny.yaml", *hybrid, "--out", "runs/h", capsys=capsys)
    assert code == 0, said
    code, said = limbeck("convert", "runs/h", "window", "--set", "options.branches=window", capsys=capsys)
    assert code == 0, said
    before, after = (load_file(path / "model.safetensors") for path in (place / "runs/h/student", place / "window"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(options["branches"] == "window" for _, options in mixers_in(place / "window").values())
    code, _ = limbeck("generate", "window", "The licence", "--tokens", "3", capsys=capsys)
    assert code == 0
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in ("runs/h/student", "window"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "options.cnov=4"], "did you mean 'conv'"),
        (["--set", "softmax_layer=0"], "did you mean 'softmax_layers'"),
        (["--set", "options"], "--set key=value"),
        (["--softmax-layers", "every 0"], "softmax_layers"),
    ],
)
def test_convert_refuses_before_it_writes(place, teacher_folder, arguments, words, capsys):
    code, said = limbeck("convert", str(teacher_folder), "new", *arguments, capsys=capsys)
    assert (code, words in said) == (2, True), said
    assert not (place / "new").exists()


def test_convert_of_a_student_changes_no_layers(place, teacher_folder, capsys):
    limbeck("convert", str(teacher_folder), "a", capsys=capsys)
    for wrong in (
        ["--softmax-layers", "0"],
        ["--student", "gla"],
        ["--set", "options.conv=4"],
        ["--set", "options.convv=4"],
    ):
        code, said = limbeck("convert", "a", "b", *wrong, capsys=capsys)
        assert code == 2, said
        assert "expected:" in said
        assert not (place / "b").exists()


# ------------------------------------------------------------------ what an error says to try, tried


@pytest.mark.parametrize(
    ("arguments", "prepare"),
    [
        (["distill", "tiny.yaml", "--set", "data.seq_len=4096"], []),
        (["distill", "tiny.yaml", "--set", "stages.1.seq_len=2048"], []),
        (
            ["distill", "tiny.yaml", "--out", "runs/one", "--tokens", "128"],
            ["distill", "tiny.yaml", "--out", "runs/one"],
        ),
        (["distill", "tiny.yaml", "--out", "tiny.yaml"], []),
        (["convert", "runs/one", "made", "--softmax-layers", "0"], ["distill", "tiny.yaml", "--out", "runs/one"]),
        (["students", "gla_"], []),
        (["distill", "tiny.yaml", "--data", "p.jsonl,q.jsonl"], []),
        (["distill", "tiny.yaml", "--data", "[pq].jsonl"], []),
        (["eval"], []),
        (["eval", "runs/one", "--set", "agreement.tokens"], ["distill", "tiny.yaml", "--out", "runs/one"]),
    ],
)
def test_what_an_error_says_to_try_works_when_it_is_typed(place, arguments, prepare, capsys):
    if prepare:
        assert limbeck(*prepare, capsys=capsys)[0] == 0
    code, said = limbeck(*arguments, capsys=capsys)
    assert code == 2, said
    hint = re.search(r"^try: (.*)$", said, re.M)
    assert hint or "expected: " in said
    if hint:
        words = shlex.split(re.sub(r"\(.*?\)|, or .*", "", hint[1]))
        again = words[1:] if words[0] == "limbeck" else [*arguments, *words]
        code, said = limbeck(*again, capsys=capsys)
        assert code == 0, f"{again}: {said}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "runs/one", "--measure", "agreement", "--measure", "exam"], "--measure is given 2 times; the last"),
        (["generate", "runs/one", "hi", "--new-tokens", "3", "--new-tokens=4"], "--new-tokens is given 2 times"),
        (["distill", "no.yaml", "--tokens=1k", "--tokens", "2k", "--tokens=3k"], "--tokens is given 3 times"),
        (["distill", "tiny.yaml", "--set", "seed=1", "--set", "seed=-2"], "--set seed is given 1, then -2; the last"),
        (["convert", "a", "--out", "b", "--set", "layers=0", "--set", "layers=1"], "--set layers is given 0, then 1"),
        (["distill", "tiny.yaml", "--data", "p.jsonl", "--data", "q.jsonl"], "error: --data is given 2 times"),
    ],
)
def test_what_is_said_of_two_values(place, arguments, words, capsys):
    before = files(place)
    code, said = limbeck(*arguments, capsys=capsys)
    assert code == 2
    assert words in said
    assert files(place) == before
    assert words.startswith("error") or words not in limbeck(*arguments, "--quiet", capsys=capsys)[1]


def test_what_may_come_several_times_is_no_second_value(place, capsys):
    arguments = [
        "distill",
        "tiny.yaml",
        "--plan",
        "--plan",
        "--set",
        "seed=1",
        "--set",
        "seed=1",
        "--set",
        "device=cpu",
    ]
    assert "the last counts" not in limbeck(*arguments, capsys=capsys)[1]


def test_a_folder_of_nearly_the_name_is_what_an_error_says_to_try(place, capsys):
    (place / "runs" / "mine one").mkdir(parents=True)
    for name in ("runs/mineone", "./runs/mineone"):
        code, said = limbeck("eval", name, "--measure", "agreement", capsys=capsys)
        assert (code, "try: 'runs/mine one'" in said) == (2, True), said


def test_a_file_of_layers_that_is_broken_is_made_again_by_what_the_error_says(place, teacher_folder, corpus, capsys):
    (place / "softmax_layers.json").write_text("{}", encoding="utf-8")
    code, said = limbeck("distill", "tiny.yaml", "--set", "student.softmax_layers=softmax_layers.json", capsys=capsys)
    assert code == 2, said
    words = shlex.split(re.search(r"^try: limbeck (.*)$", said, re.M)[1])
    mine = ["--teacher", str(teacher_folder), "--data", str(corpus), "--seq-len", "32", "--num-softmax-layers", "1"]
    code, said = limbeck(*words, *mine, "--tokens", "64", "--judged", "64", capsys=capsys)
    assert code == 0, said
    code, said = limbeck(
        "distill", "tiny.yaml", "--set", "student.softmax_layers=softmax_layers.json", "--plan", capsys=capsys
    )
    assert code == 0, said
