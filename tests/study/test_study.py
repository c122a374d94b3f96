"""Studies: grids, arms that learn together, arms that fail or come later, and studies that are killed."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from limbeck.cli import main
from limbeck.core.errors import LimbeckError
from limbeck.evaluation import measure
from limbeck.report.page import write_report
from limbeck.study import Study, list_builtin_studies, run_study
from limbeck.study import results as record
from limbeck.study.shared_training import train_shared_stages
from limbeck.study.sharing import group_arms_by_pass, pass_key
from limbeck.study.tables import format_results_table
from limbeck.training import trainer
from limbeck.training.pipeline import distill
from limbeck.training.run_directory import RunDirectory
from limbeck.training.setup import prepare_job

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def raw(teacher_folder, corpus) -> dict:
    """A study of four arms that takes seconds."""
    return {
        "name": "tiny",
        "base": {
            "teacher": str(teacher_folder),
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 256, "ridge": 0.01},
                {"stage": "matrix", "tokens": 256, "batch_size": 2},
                {"stage": "hidden", "tokens": 512, "batch_size": 4, "micro_batch_size": 3},
                {"stage": "logits", "tokens": 128, "batch_size": 2},
            ],
            "evaluation": {"tokens": 128, "prompt": None, "new_tokens": 0},
        },
        "grid": {"students": ["gla", "deltanet"], "stages": ["3", "2+3"]},
        "measures": {"agreement": {"tokens": 128}},
    }


def with_grid(raw: dict, **grid) -> Study:
    return Study.parse({**raw, "grid": {**raw["grid"], **grid}})


def tables(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in ("table.md", "values.csv")}


# ---------------------------------------------------------------------- grids


def test_a_grid_is_the_product_of_its_axes(raw, tmp_path):
    study = with_grid(
        raw,
        stages=["3", "1+2+3"],
        copy_projections=[True, False],
        settings={"target": {"attention": {}, "block": {"stages.hidden.target": "block"}}},
        seeds=[0, 1],
    )
    arms = {arm.name: arm for arm in study.arms(tmp_path)}
    # the target is no difference to arms without stage 2, so they are there once
    assert len(arms) == 2 * 2 * 2 * (1 + 2)
    arm = arms["gla_1+2+3_fresh_block_seed1"]
    assert [stage.stage for stage in arm.recipe.stages] == ["matrix", "hidden", "logits"]
    assert arm.recipe.stages[1].target == "block"
    assert not arm.recipe.student.copy_projections
    assert arm.recipe.seed == 1
    assert arm.recipe.student.mixer == "gla"
    assert arm.path == tmp_path / arm.name


def test_names_of_arms_outlive_a_growing_grid(raw, tmp_path):
    few = {arm.name for arm in with_grid(raw).arms(tmp_path)}
    more = with_grid(
        raw,
        copy_projections=[True, False],
        tokens=None,
        seeds=[0, 1],
        students="paper-v3",
        softmax_layers=["none", "0"],
    )
    assert few <= {arm.name for arm in more.arms(tmp_path)}


def test_budgets_students_and_sizes(raw, tmp_path):
    raw["grid"] |= {
        "students": [{"name": "short", "mixer": "gla", "options": {"conv": 4}}],
        "stages": ["hidden+logits"],
        "tokens": [1280],
    }
    raw["sizes"] = {"half": {"grid": {"tokens": [640]}}, "laptop": {}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    (arm,) = Study.load(path, "laptop").arms(tmp_path)
    assert arm.name == "short_2+3_tokens-1280_seed0"
    assert [stage.tokens for stage in arm.recipe.stages] == [1024, 256]
    assert arm.recipe.student.options == {"conv": 4}
    study = Study.load(path, "half")
    assert study.title == "tiny-half"
    assert sum(stage.tokens for stage in study.arms(tmp_path)[0].recipe.stages) == 640


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"measure": {}}, "did you mean 'measures'"),
        ({"base": {"student": "gla"}}, "base.student is 'gla'"),
        ({"base": {"stages": ["logits"]}}, r"stages is \['logits'\]"),
        (
            {"base": {"stages": [{"stage": "logits"}]}, "grid": {"students": "gla", "stages": ["3"], "tokens": [9]}},
            "has tokens",
        ),
        ({"grid": {"student": "gla", "stages": ["3"]}}, "did you mean 'students'"),
        ({"measures": ["agreemnt"]}, "did you mean 'agreement'"),
        ({"measures": {"agreement": {"token": 3}}}, "did you mean 'tokens'"),
        ({"claims": ["xlstm-frist"]}, "did you mean 'xlstm-first'"),
        ({"grid": {"students": "gatd_deltanet", "stages": ["3"]}}, "gated_deltanet"),
        ({"grid": {"students": "gla", "stages": ["2+4"]}}, "unknown stage '4'"),
        ({"grid": {"students": "gla", "stages": ["3"], "settings": {"x": {"a": {"stages.hidden.lr": 1}}}}}, "no arm"),
        ({"grid": {"students": "gla", "stages": ["3"], "settings": {"x": {"a": {"sed": 1}}}}}, "did you mean 'seed'"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(raw, tmp_path, change, says):
    with pytest.raises(LimbeckError, match=says):
        Study.parse({**raw, **change}).arms(tmp_path)


REAL_TEACHER = ("real-stages", "real-starts", "real-teacher")  # studies of the embedded teacher on a CPU


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name in list_builtin_studies()
        for size in (("smoke", "cpu") if name in REAL_TEACHER else ("smoke", "laptop", "gpu"))
    ],
)
def test_every_built_in_study_is_one_in_its_sizes(name, size, tmp_path):
    study = Study.load(name, size)
    arms = study.arms(tmp_path)
    assert {arm.axes["teacher"] for arm in arms} <= {
        "smoke": {"tiny"},
        "laptop": {"tiny", "small"},
        "gpu": {"embedded"},
        "cpu": {"embedded"},
    }[size]
    seeds = {"laptop": {3}, "cpu": {1, 3}}
    assert len({arm.axes["seed"] for arm in arms}) in seeds.get(size, {1})
    assert len(arms) > 1
    assert study.description
    assert study.claims


def test_a_built_in_recipe_is_an_arm_with_the_same_tokens(raw, tmp_path):
    arms = {arm.name: arm for arm in with_grid(raw, stages=["2+3"], recipes=["limbeck"], seeds=[0, 1]).arms(tmp_path)}
    one = arms["limbeck_3_seed1"].recipe
    assert one.student.softmax_heads == 7
    assert (one.teacher, one.seed) == (raw["base"]["teacher"], 1)
    assert one.evaluation == arms["gla_2+3_seed0"].recipe.evaluation
    assert sum(stage.tokens for stage in one.stages) == 512 + 128
    assert arms["limbeck_3_seed1"].axes["student"] == "limbeck"
    with pytest.raises(LimbeckError, match="unknown recipe 'limbek'"):
        with_grid(raw, recipes=["limbek"]).arms(tmp_path)
    named = {"name": "limbeck", "mixer": "gla"}
    with pytest.raises(LimbeckError, match="two arms are named limbeck_3_seed0"):
        with_grid(raw, students=[named], stages=["3"], recipes=["limbeck"]).arms(tmp_path)


# ---------------------------------------------------------------------- sharing


def test_which_stages_are_shared(raw, tmp_path):
    study = with_grid(raw, stages=["3", "2+3", "1+2+3"], copy_projections=[True, False], seeds=[0, 1])
    arms = {arm.name: arm.recipe for arm in study.arms(tmp_path)}
    two, three = arms["gla_2+3_seed0"], arms["gla_1+2+3_seed0"]
    assert pass_key(two, 0) == pass_key(arms["deltanet_2+3_fresh_seed0"], 0) is not None
    assert pass_key(two, 0) != pass_key(arms["gla_2+3_seed1"], 0), "another order of the text"
    assert pass_key(two, 0) != pass_key(three, 1), "stage 1 has read the text before"
    assert pass_key(two, 1) is None, "stage 3 runs on the student's own states"
    groups = group_arms_by_pass(study.arms(tmp_path))
    assert sorted(len(group) for group in groups) == [4, 4, 4, 4]  # two seeds, with stage 1 and without


def weights(path: Path, index: int, stage: str) -> dict[str, torch.Tensor]:
    return load_file(path / "stages" / f"{index}-{stage}" / "done" / "model.safetensors")


def test_arms_that_learn_together_learn_what_they_learn_alone(raw, tmp_path):
    """Bit for bit, stage 0 to 2; different mixers, layers, losses, rates and numbers of steps in one pass."""
    raw["base"]["evaluation"]["tokens"] = 32
    raw["grid"] |= {
        "students": ["gla", "mlstm"],
        "stages": ["0+1+2"],
        "layers": ["all", "1"],
        "settings": {"loss": {"relative": {}, "l2": {"stages.hidden.loss": "l2", "stages.hidden.tokens": 256}}},
    }
    together = {arm.name: arm for arm in Study.parse(raw).arms(tmp_path / "together")}
    alone = {arm.name: arm for arm in Study.parse(raw).arms(tmp_path / "alone")}
    assert len(together) == 8
    job = prepare_job(together["gla_0+1+2_seed0"].recipe)
    assert train_shared_stages(list(together.values()), (job.teacher, job.tokenizer)) == {}
    for name in ("gla_0+1+2_seed0", "mlstm_0+1+2_layers-1_l2_seed0"):
        distill(alone[name].recipe, measure_times=False)
        for index, stage in enumerate(("calibrate", "matrix", "hidden")):
            mine, theirs = weights(together[name].path, index, stage), weights(alone[name].path, index, stage)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), (name, stage)
    facts = RunDirectory(together["gla_0+1+2_seed0"].path, together["gla_0+1+2_seed0"].recipe).load_stage_metrics(2)
    assert facts["students_sharing_pass"] == 8
    assert facts["saved_seconds"] > 0


def test_arms_that_learn_together_are_judged_as_alone(raw, tmp_path):
    """With `keep_better` each student has its own guard: the stage of the one that got worse is not taken."""
    raw["base"] |= {"keep_better": True, "stages": [{"stage": "hidden", "tokens": 512, "warmup_ratio": 0.0}]}
    rates = {name: {"stages.hidden.lr": rate} for name, rate in {"low": 1e-6, "huge": 3.0, "larger": 100.0}.items()}
    raw["grid"] = {"students": ["gla", "gated_deltanet"], "stages": ["2"], "settings": {"rate": rates}}
    together, alone = (Study.parse(raw).arms(tmp_path / name) for name in ("together", "alone"))
    job = prepare_job(together[0].recipe)
    assert train_shared_stages(together, (job.teacher, job.tokenizer)) == {}
    verdicts = []
    for mine, theirs in zip(together, alone):
        distill(theirs.recipe, measure_times=False)
        ours, others = weights(mine.path, 0, "hidden"), weights(theirs.path, 0, "hidden")
        assert all(torch.equal(ours[key], others[key]) for key in ours)
        facts = [RunDirectory(arm.path, arm.recipe).load_stage_metrics(0) for arm in (mine, theirs)]
        assert facts[0]["students_sharing_pass"] == 6
        assert facts[0]["guard"] == facts[1]["guard"]
        verdicts.append(facts[0]["guard"])
    assert {verdict["kept"] for verdict in verdicts} == {True, False}
    assert len({verdict["before"] for verdict in verdicts}) == 2, "one start for each mixer"


def test_arms_that_do_not_fit_into_memory_go_one_after_another(raw, tmp_path):
    arms = with_grid(raw, stages=["2"]).arms(tmp_path)
    job = prepare_job(arms[0].recipe)
    assert train_shared_stages(arms, (job.teacher, job.tokenizer), memory_budget=lambda: 1) == {}
    facts = [RunDirectory(arm.path, arm.recipe).load_stage_metrics(0) for arm in arms]
    assert [one["students_sharing_pass"] for one in facts] == [1, 1]


def test_an_arm_that_fails_among_others_stops_alone(raw, tmp_path, monkeypatch):
    """Its rate is so high that its loss is not finite; the other's weights are those without it."""
    raw["grid"] |= {
        "students": ["gla"],
        "stages": ["2"],
        "settings": {"rate": {"usual": {}, "mad": {"stages.hidden.lr": 1e30, "stages.hidden.max_grad_norm": 1e30}}},
    }
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 1)
    usual, mad = Study.parse(raw).arms(tmp_path / "both")
    job = prepare_job(usual.recipe)
    failures = train_shared_stages([usual, mad], (job.teacher, job.tokenizer))
    assert list(failures) == [mad.name]
    assert "not finite" in str(failures[mad.name])
    alone = Study.parse(raw).arms(tmp_path / "alone")[0]
    distill(alone.recipe, measure_times=False)
    one, other = weights(usual.path, 0, "hidden"), weights(alone.path, 0, "hidden")
    assert all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------- whole studies


def test_a_study_its_tables_and_an_arm_that_is_added(raw, tmp_path):
    study, folder = with_grid(raw), tmp_path / "study"
    results = run_study(study, folder)
    assert [arm["status"] for arm in results["arms"]] == ["finished"] * 4
    assert results == json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert results["sharing"]["saved_seconds"] > 0
    assert "gla" in (folder / "table.md").read_text(encoding="utf-8")
    assert "| teacher " in (folder / "table.md").read_text(encoding="utf-8")
    teacher = results["teachers"][Path(raw["base"]["teacher"]).name]["values"]
    values = results["arms"][0]["values"]
    assert teacher["agreement.perplexity"] == values["agreement.teacher_perplexity"]
    assert teacher["agreement.kl"] == 0
    arm = folder / "gla_2+3_seed0"
    assert (arm / "metrics.jsonl").exists()
    assert not (arm / "student").exists(), "save_artifacts: none"
    assert not (arm / "stages").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    again = run_study(study, folder)
    assert again["arms"] == results["arms"]
    grown = run_study(with_grid(raw, students=["gla", "deltanet", "retnet"]), folder)
    assert [arm["status"] for arm in grown["arms"]] == ["finished"] * 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_what_is_kept_and_a_measure_that_is_added(raw, tmp_path):
    study = with_grid({**raw, "save_artifacts": "students", "measures": {}}, students=["gla"], stages=["2"])
    folder = tmp_path / "study"
    run_study(study, folder)
    arm = folder / "gla_2_seed0"
    assert (arm / "student").exists()
    assert not (arm / "stages").exists()
    lines = (arm / "metrics.jsonl").read_text(encoding="utf-8")
    measured = study.model_copy(update={"measures": {"agreement": {"tokens": 64}}})
    results = run_study(measured, folder)
    assert results["arms"][0]["values"]["agreement.perplexity"] > 1
    assert (arm / "metrics.jsonl").read_text(encoding="utf-8") == lines, "not trained again"


@pytest.mark.slow
def test_an_arm_that_fails_is_told_and_tried_again(raw, tmp_path, monkeypatch):
    """One of four cannot be measured; the others are finished, and it is too once it can."""
    from limbeck.study import tasks

    real = measure.run_measure

    def broken(measure, subject, given):
        if "deltanet_3" in subject.name:
            raise RuntimeError("no luck")
        return real(measure, subject, given)

    monkeypatch.setattr(tasks, "run_measure", broken)
    folder = tmp_path / "study"
    results = run_study(with_grid(raw), folder)
    status = {arm["name"]: arm["status"] for arm in results["arms"]}
    assert status.pop("deltanet_3_seed0") == "failed"
    assert set(status.values()) == {"finished"}
    assert "no luck" in json.loads((folder / "failures.json").read_text(encoding="utf-8"))["deltanet_3_seed0"]
    monkeypatch.setattr(tasks, "run_measure", real)
    results = run_study(with_grid(raw), folder)
    assert {arm["status"] for arm in results["arms"]} == {"finished"}
    assert json.loads((folder / "failures.json").read_text(encoding="utf-8")) == {}


def test_a_changed_recipe_is_refused(raw, tmp_path):
    folder = tmp_path / "study"
    run_study(with_grid(raw, students=["gla"], stages=["2"]), folder)
    raw["base"]["stages"][2]["lr"] = 0.5
    with pytest.raises(LimbeckError, match=r"lr: was 0.001, now 0.5"):
        run_study(with_grid(raw, students=["gla"], stages=["2"]), folder)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("keep", ["none", "students"])
def test_evaluations_of_different_size_do_not_meet_in_one_mean(raw, tmp_path, keep):
    """With more held-out text asked for, an arm that kept nothing to evaluate again is refused by name."""
    raw["save_artifacts"] = keep
    folder = tmp_path / "study"
    run_study(with_grid(raw, students=["gla"], stages=["2"]), folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    raw["base"]["evaluation"]["tokens"] = 256
    larger = with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1])
    with pytest.raises(LimbeckError, match=r"tokens 128, now 256.*gla_2_seed0"):
        run_study(larger, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_an_arm_that_kept_its_stages_is_evaluated_again(raw, tmp_path):
    raw["save_artifacts"] = "all"
    folder = tmp_path / "study"
    run_study(with_grid(raw, students=["gla"], stages=["2"]), folder)
    raw["base"]["evaluation"]["tokens"] = 256
    results = run_study(with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1]), folder)
    targets = [arm["values"]["held_out.targets"] for arm in results["arms"]]
    assert len(set(targets)) == 1
    assert targets[0] > 128
    lines = (folder / "gla_2_seed0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4, "not trained again"


@pytest.mark.slow
def test_each_text_has_a_teacher_of_its_own(raw, tmp_path, corpus):
    """Two texts under one teacher: its row under a student is measured on that student's text."""
    half = tmp_path / "half.jsonl"
    lines = Path(corpus).read_text(encoding="utf-8").splitlines(keepends=True)
    half.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
    settings = {"text": {"all": {}, "half": {"data.source": str(half)}}}
    study = with_grid(raw, students=["gla"], stages=["2"], settings=settings)
    results = run_study(study, tmp_path / "study")
    assert len(results["teachers"]) == 2
    theirs = {name: one["values"]["agreement.perplexity"] for name, one in results["teachers"].items()}
    assert len(set(theirs.values())) == 2
    for arm in results["arms"]:
        name = next(name for name in theirs if f"text {arm['axes']['text']}" in name)
        assert arm["values"]["agreement.teacher_perplexity"] == theirs[name]


def test_teachers_whose_names_are_alike_as_file_names_have_a_file_each(raw, tmp_path):
    study = with_grid(raw, teachers=["org/a-b", "org-a/b", "org.a/b c"], students=["gla"], stages=["2"])
    assert len({record.get_teacher_result_path(arm) for arm in study.arms(tmp_path)}) == 3


@pytest.mark.slow
def test_a_task_at_which_the_teacher_guesses_is_marked(raw):
    values = {"tasks.piqa acc": 0.6, "tasks.arc_easy acc": 0.3, "tasks.mean score": 0.6}
    arms = [{"axes": {"student": "gla", "seed": 0}, "values": values, "teacher_at_chance": ["tasks.arc_easy"]}]
    table = format_results_table(Study.parse({**raw, "measures": {"tasks": {"limit": 3}}}), arms)
    assert "arc easy acc (teacher at chance)" in table
    assert table.count("(teacher at chance)") == 1


def test_an_arm_that_diverged_is_told_in_tables_and_stops_nothing(raw, tmp_path):
    study, folder = with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1, 2]), tmp_path / "study"
    run_study(study, folder)
    path = folder / "gla_2_seed1" / "result.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    known["values"]["agreement.perplexity"] = float("nan")
    known["values"]["held_out.student_perplexity"] = float("inf")
    path.write_text(json.dumps(known), encoding="utf-8")
    run_study(study, folder)
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table.count("diverged in 1 of 3") == 2
    write_report([folder])
    assert "diverged in 1 of 3" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_arms_of_one_table_have_one_teacher(raw, teacher_folder, tmp_path):
    """A seed that is added later must not learn from other weights under the same name."""
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    raw["base"]["teacher"] = str(teacher)
    folder = tmp_path / "study"
    run_study(with_grid(raw, students=["gla"], stages=["2"], seeds=[0]), folder)
    weights = load_file(teacher / "model.safetensors")
    kept = (teacher / "model.safetensors").read_bytes()
    save_file({name: 1.5 * x for name, x in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(LimbeckError, match="different weights in the run gla_2_seed0 and now"):
        run_study(with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1]), folder)
    assert not (folder / "gla_2_seed1").exists()
    (teacher / "model.safetensors").write_bytes(kept)
    results = run_study(with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1]), folder)
    assert {arm["status"] for arm in results["arms"]} == {"finished"}
    # the hint: without the runs of the old teacher, everything is of the new one, its own row too
    before = results["teachers"][teacher.name]["values"]["agreement.perplexity"]
    save_file({name: 1.5 * x for name, x in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    for arm in ("gla_2_seed0", "gla_2_seed1"):
        shutil.rmtree(folder / arm)
    results = run_study(with_grid(raw, students=["gla"], stages=["2"], seeds=[0, 1]), folder)
    assert results["teachers"][teacher.name]["values"]["agreement.perplexity"] != before


def test_a_folder_of_something_else_is_refused(raw, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(LimbeckError, match="not a study"):
        run_study(with_grid(raw), tmp_path)


def test_the_command_plans_and_runs(raw, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    raw["grid"] |= {"students": ["gla", "deltanet"], "stages": ["2"]}
    raw |= {"claims": ["memory-constant-in-length"], "base": {**raw["base"], "checkpoint_seconds": 60}}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")

    def limbeck(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["limbeck", "study", *arguments])
        with contextlib.suppress(SystemExit):
            main()
        shown = capsys.readouterr()
        return " ".join((shown.out + shown.err).split())  # lines are broken as wide as the terminal is

    assert "paper-experiment-1" in limbeck("--list")
    assert "did you mean 'paper-v3'" in limbeck("paper-v4")
    assert "2 runs, 0 of them finished" in limbeck(str(path), "--out", str(tmp_path / "out"), "--plan")
    assert not (tmp_path / "out").exists()
    shown = limbeck(str(path), "--out", str(tmp_path / "out"))
    assert "sharing teacher passes saved" in shown
    assert "3 are needed" in shown
    assert "undecided" in (tmp_path / "out" / "claims.md").read_text(encoding="utf-8")
    assert "report.html" in shown
    assert "undecided" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


class Killed(BaseException):
    """As sudden as a kill: nothing catches it, nothing is tidied up."""


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_the_tables_of_one_that_is_not(raw, tmp_path, monkeypatch):
    """Killed at random lines of the logs and files, again and again, until it is done."""
    import random

    from limbeck.study import results as record

    raw["base"]["checkpoint_seconds"] = 1e-6
    study = with_grid(raw, stages=["1+2+3", "2+3"])
    run_study(study, tmp_path / "whole")
    rng, left = random.Random(5), [0]
    real_log, real_put = RunDirectory.log, record.write_atomically

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def log(self, line):
        real_log(self, line)
        count()

    def put(path, text):
        count()
        real_put(path, text)

    monkeypatch.setattr(RunDirectory, "log", log)
    monkeypatch.setattr(record, "write_atomically", put)
    kills = 0
    for _ in range(60):
        left[0] = rng.randint(5, 25)
        try:
            run_study(study, tmp_path / "killed")
            break
        except Killed:
            kills += 1
    assert kills > 2
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
