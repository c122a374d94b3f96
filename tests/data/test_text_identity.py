"""`limbeck eval` knows texts by content: which part is measured, what is measured again, what a table says of it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_job import limbeck

from limbeck.core.recipe import Recipe
from limbeck.evaluation import measure
from limbeck.evaluation.subject import SubjectLoader
from limbeck.report import comparison
from limbeck.training import pipeline

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = {"tokens": 100_000, "length": 32, "prefixes": 0}


@pytest.fixture(scope="module")
def place(teacher_folder, corpus, tmp_path_factory) -> Path:
    """A folder with a teacher, texts, and two runs: one of text.jsonl, one of a folder and another file in shares."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(folder)
        shutil.copytree(teacher_folder, "teacher")
        lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
        Path("text.jsonl").write_text("".join(lines), encoding="utf-8")
        Path("other.jsonl").write_text("".join(line.replace("the", "some") for line in lines), encoding="utf-8")
        Path("many").mkdir()
        for n in range(3):
            text = "".join(line.replace("or", f"or{n}") for line in lines)
            (Path("many") / f"{n}.jsonl").write_text(text, encoding="utf-8")
        made = {
            "run": {"source": "text.jsonl"},
            "shares": {"sources": [{"source": "many"}, {"source": "other.jsonl", "weight": 2}]},
        }
        for name, data in made.items():
            raw = {
                "name": "tiny",
                "teacher": "teacher",
                "student": {"mixer": "retnet"},
                "data": {**data, "seq_len": 32, "held_out": 0.2},
                "stages": [{"stage": "calibrate", "tokens": 256, "ridge": 0.1}],
                "evaluation": {"tokens": 128, "prompt": None},
                "out": name,
            }
            pipeline.distill(Recipe.parse(raw))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def measured(run: str, data: str | None, teacher: str | None = None, again: bool = False):
    subject = SubjectLoader(teacher, data).load(run)
    return measure.run_measure(measure.get_measure("agreement"), subject, SMALL, again)


SPELT = {
    "dot": lambda tmp: "./text.jsonl",
    "absolute": lambda tmp: str(Path("text.jsonl").absolute()),
    "around": lambda tmp: "many/../text.jsonl",
    "link": lambda tmp: linked(tmp / "linked.jsonl", Path("text.jsonl")),
    "copy": lambda tmp: shutil.copy("text.jsonl", tmp / "copy.jsonl"),
    "a folder with a copy": lambda tmp: str(Path(shutil.copy("text.jsonl", made(tmp / "folder") / "a.jsonl")).parent),
}


def linked(path: Path, to: Path) -> str:
    path.symlink_to(to.absolute())
    return str(path)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("spelling", SPELT)
def test_a_text_spelt_otherwise_is_measured_on_what_was_held_out(spelling, tmp_path):
    plain = measured("run", None, again=True)
    again = measured("run", str(SPELT[spelling](tmp_path)), again=True)
    assert (again.data["part"], again.data["targets"]) == ("held-out part", plain.data["targets"])
    assert again.values["perplexity"] == plain.values["perplexity"]


@pytest.mark.parametrize("data", [None, "text.jsonl", "other.jsonl"])
def test_a_teacher_beside_its_run_is_measured_on_the_same_part_of_the_same_text(data):
    loader = SubjectLoader(None, data)
    run = loader.load("run")
    teacher = loader.load(run.recipe.teacher)
    assert teacher.held_out_key(32, 256) == run.held_out_key(32, 256)
    assert run.held_out_key(32, 256)[0] == ("all" if data == "other.jsonl" else "held-out part")


def test_a_part_of_a_text_is_measured_on_what_it_holds_out():
    """A file of the folder that was learnt from, and one of several sources."""
    other = measured("run", "other.jsonl", again=True)
    assert other.data["part"] == "all"
    for source in ("many/1.jsonl", "many", "other.jsonl"):
        found = measured("shares", source, again=True)
        assert found.data["part"] == "held-out part", source
        assert found.data["targets"] < other.data["targets"] * (3 if source == "many" else 1) * 0.6


def test_a_text_that_was_moved_is_known_by_what_the_run_wrote_down(tmp_path):
    shutil.copytree("run", tmp_path / "run")
    Path("text.jsonl").rename(tmp_path / "moved.jsonl")
    try:
        assert measured(str(tmp_path / "run"), str(tmp_path / "moved.jsonl")).data["part"] == "held-out part"
    finally:
        (tmp_path / "moved.jsonl").rename("text.jsonl")


def test_what_was_measured_is_taken_only_where_text_and_teacher_are_what_they_were(tmp_path, capsys):
    shutil.copytree("run", tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    shutil.copytree("teacher", tmp_path / "teacher")
    text = tmp_path / "mine.jsonl"
    shutil.copy("other.jsonl", text)

    def take():
        found = measured(str(tmp_path / "run"), str(text), str(tmp_path / "teacher"))
        return found, "using the cached result" in capsys.readouterr().err

    first, known = take()
    assert not known
    assert take() == (first, True)
    text.write_text(text.read_text(encoding="utf-8").replace("a", "e"), encoding="utf-8")
    second, known = take()
    assert not known
    assert second.values["teacher_perplexity"] != first.values["teacher_perplexity"]
    assert take() == (second, True)
    weights = tmp_path / "teacher" / "model.safetensors"
    save_file({name: 1.7 * x for name, x in load_file(weights).items()}, weights, {"format": "pt"})
    third, known = take()
    assert not known
    assert third.values["teacher_perplexity"] != second.values["teacher_perplexity"]
    assert third.provenance.teacher_weights != second.provenance.teacher_weights
    assert take() == (third, True)
    text.unlink()
    told, known = take()
    assert (told, known) == (third, True)


def test_a_long_text_that_changed_is_read_again(tmp_path, capsys):
    text = tmp_path / "long.txt"
    text.write_text("the work of the licence " * 40, encoding="utf-8")
    found = []
    for words in ("licence", "licence", "license"):
        text.write_text(text.read_text(encoding="utf-8").replace("licence", words), encoding="utf-8")
        subject = SubjectLoader(out=tmp_path / "out").load("run")
        settings = {"text": str(text), "length": 64, "past_context": True}
        found.append(measure.run_measure(measure.get_measure("positions"), subject, settings))
    assert capsys.readouterr().err.count("using the cached result") == 1
    assert found[0] == found[1] != found[2]


def test_a_table_says_which_text_and_which_part_and_warns_of_several():
    same = [measured("run", "other.jsonl"), measured("shares", "many/1.jsonl")]
    assert "| text | other.jsonl, all | 1.jsonl, held-out part |" in comparison.format_comparison(same)
    (line,) = comparison.find_text_mismatches(same)
    assert line.startswith("agreement: run and shares were not measured on the same text")
    assert line in comparison.format_comparison(same)
    assert comparison.find_text_mismatches(same[:1]) == []
    many = [same[0].model_copy(update={"model": f"model-{n}"}) for n in range(7)]
    assert "| model-3 | other.jsonl, all |" in comparison.format_comparison(many)


def test_the_command_line_says_it_too():
    arguments = ("--tokens", "64", "--set", "agreement.prefixes=0")
    told = limbeck("eval", "run", "shares", *arguments)
    assert told.returncode == 0, told.stderr
    plain = " ".join(told.stdout.split())
    assert "held-out part" in plain
    assert "run and shares were not measured on the same text" in plain
    told = limbeck("eval", "run", "shares", *arguments, "--data", "other.jsonl")
    assert "held-out part" in told.stdout  # of `shares`, which learnt from it
    assert "were not measured on the same text" in " ".join(told.stdout.split())
    told = limbeck("eval", "run", "teacher", *arguments, "--data", "text.jsonl")
    assert told.returncode == 0, told.stderr


def test_a_cut_file_of_results_is_no_traceback(tmp_path, place):
    for name in ("eval.json", "plan.json", "manifest.json"):
        run = tmp_path / name.partition(".")[0]
        shutil.copytree(place / "run", run)
        path = run / name
        path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
        for verb in (("push", str(run), "ann/x", "--license", "mit", "--dry-run"), ("report", str(run))):
            told = limbeck(*verb)
            assert "Traceback" not in told.stderr, (name, verb)
            assert told.returncode == (0 if name == "plan.json" else 2), (name, verb, told.stderr)
            if told.returncode:
                assert f"{name} is damaged" in told.stderr.replace("\n", "")
                assert "try:" in told.stderr
        told = limbeck("distill", str(run / "recipe.yaml"), "--out", str(run))
        assert told.returncode == (2 if name == "manifest.json" else 0), (name, told.stderr)
        if name == "manifest.json":
            assert f"rm {path}" in told.stderr.replace("\n", "")
            path.unlink()  # as the hint says
            told = limbeck("distill", str(run / "recipe.yaml"), "--out", str(run))
            assert told.returncode == 0, told.stderr
        elif name == "eval.json":
            assert "evaluating the student again" in " ".join(told.stderr.split())
            assert json.loads(path.read_text(encoding="utf-8"))["held_out"]
