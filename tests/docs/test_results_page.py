"""The page of results: it says what the studies beside it say, and a new study finds its place on it."""

import json
import shutil

import pytest

from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck import LimbeckError
from limbeck.study import Study, run_study

RESULTS = ROOT / "docs" / "project" / "results"
STUDENTS = ["gla", "retnet", "linear_attention", "softmax"]


@pytest.fixture(scope="module")
def build():
    return load_script(RESULTS / "build.py")


@pytest.fixture(scope="module")
def study(tmp_path_factory, teacher_folder):
    """Four students of one seed that sat an exam, as `limbeck study` leaves them."""
    folder = tmp_path_factory.mktemp("studies") / "mine"
    text = tmp_path_factory.mktemp("text") / "long.jsonl"
    words = " ".join(f"{name} {number}" for number in range(400) for name in ("once", "upon", "a", "time"))
    text.write_text("".join(json.dumps({"text": f"{i} {words}"}) + "\n" for i in range(8)), encoding="utf-8")
    exam = {"exam_text": str(text), "exam_documents": 2, "exam_tokens": 800}
    base = {
        "teacher": str(teacher_folder),
        "data": {"source": str(text), "seq_len": 64, "held_out": 0.2},
        "stages": [{"stage": "logits", "tokens": 128, "batch_size": 2}],
        "evaluation": {"tokens": 64, "prompt": None, "new_tokens": 0, **exam},
    }
    content = {"name": "mine", "base": base, "grid": {"students": STUDENTS, "stages": ["3"], "seeds": [0]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_study(Study.parse({**content, "measures": {}, "claims": ["training-beats-untrained-window"]}), folder)
    return folder


def test_the_page_is_current(build):
    assert build.write_page(RESULTS, check=True), "run: python docs/project/results/build.py"


def test_a_study_of_the_real_teacher_finds_its_place(build, study, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(RESULTS, root, ignore=shutil.ignore_patterns("real-teacher", "small-teacher", "figures"))
    build.add_study(study, root / "real-teacher")
    assert not build.write_page(root)
    assert build.write_page(root, check=True)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "Not measured yet" not in text
    content = json.loads((study / "study.json").read_text(encoding="utf-8"))
    perplexities = {arm["axes"]["student"]: arm["values"]["exam.student_perplexity"] for arm in content["arms"]}
    rows = [
        line.strip("| ").split(" | ")
        for line in text.split("generated: students")[1].split("<!-- end -->")[0].splitlines()
    ]
    rows = [row for row in rows if row[0] in STUDENTS]
    assert [row[0] for row in rows] == sorted(STUDENTS, key=perplexities.__getitem__)
    assert "**One seed**" in text
    # three students are in experiment 1 too: a correlation without an interval, and without the control arm
    order = next(line for line in text.splitlines() if line.startswith("| [experiment-1]") and "| 3 | 3 |" in line)
    assert order.endswith("| none: too few students |  |")
    claim = next(line for line in text.splitlines() if "[real-teacher](real-teacher/study.json)" in line)
    assert "undecided, 1 seed" in claim
    for name in ("exam", "orders"):
        assert "retnet" in (root / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    # this teacher's context is too short for a passage that comes again
    assert "Figure 2" not in text
    assert not (root / "figures" / "repeat.svg").exists()
    assert str(study.parents[1]) not in (root / "real-teacher" / "study.json").read_text(encoding="utf-8")


def test_arms_that_were_run_elsewhere_join_their_study(build, study, tmp_path):
    """Two more seeds of one student: its claim has three seeds then; another study's arms are refused."""
    root, more = tmp_path / "results", tmp_path / "more"
    build.add_study(study, root / "mine")
    content = json.loads((study / "study.json").read_text(encoding="utf-8"))
    (first,) = [arm for arm in content["arms"] if arm["axes"]["student"] == "gla"]
    content["arms"] = [
        {**first, "name": f"gla_3_seed{seed}", "axes": {**first["axes"], "seed": seed}} for seed in (1, 2)
    ]
    content["study"]["grid"] |= {"students": ["gla"], "seeds": [1, 2]}
    more.mkdir()
    (more / "study.json").write_text(json.dumps(content), encoding="utf-8")
    build.add_arms(more, root / "mine")
    joined = json.loads((root / "mine" / "study.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in joined["arms"]] == [f"{name}_3_seed0" for name in STUDENTS] + [
        "gla_3_seed1",
        "gla_3_seed2",
    ]
    assert joined["study"]["grid"]["seeds"] == [0, 1, 2]
    assert joined["sharing"]["seconds"] == pytest.approx(sum(arm["seconds"] for arm in joined["arms"]), rel=1e-4)
    (finding,) = joined["claims"][0]["findings"]
    assert list(finding["by_seed"]) == ["0", "1", "2"]
    content["study"]["base"]["stages"][0]["tokens"] = 256
    (more / "study.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LimbeckError, match="base of"):
        build.add_arms(more, root / "mine")
