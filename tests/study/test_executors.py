"""Where a study runs: the same tables whoever does the work, and whoever is killed meanwhile."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from limbeck.cli import main
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TrainingInterrupted
from limbeck.study import Study, list_builtin_studies, run_study
from limbeck.study.executors import (
    ProcessExecutor,
    RayExecutor,
    SlurmExecutor,
    create_executor,
    processes,
    slurm,
    worker,
)
from limbeck.study.plan import estimate_wall_seconds, schedule_tasks
from limbeck.study.spec import study_to_yaml
from limbeck.study.tasks import StudyTask

# a scheduler of one machine: the array's tasks one after the other, each as its script says
SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", text).groups())
print("77", flush=True)
for number in range(first, last + 1):
    env = dict(os.environ, SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(number))
    log = re.search(r"--output=(.*)", text)[1].replace("%A", "77").replace("%a", str(number))
    subprocess.run(["bash", sys.argv[-1]], env=env, stdout=open(log, "a"), stderr=subprocess.STDOUT)
"""


@pytest.fixture(scope="module")
def raw(teacher_folder, corpus, tmp_path_factory):
    """A study of four arms: two learn together, and the two others share nothing; in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {
            "name": "tiny",
            "base": {
                "teacher": str(teacher_folder),
                "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
                "stages": [
                    {"stage": "hidden", "tokens": 1024, "batch_size": 2},
                    {"stage": "logits", "tokens": 512, "batch_size": 2},
                ],
                "evaluation": {"tokens": 128, "prompt": None, "new_tokens": 0},
                "checkpoint_seconds": 0.1,
                "device": "cpu",
            },
            "grid": {"students": ["gla", "deltanet"], "stages": ["3", "2+3"]},
            "measures": {"agreement": {"tokens": 128}},
            "claims": ["memory-constant-in-length"],
        }


@pytest.fixture(scope="module")
def study(raw) -> Study:
    return Study.parse(raw)


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory) -> dict[str, str]:
    """What the study leaves when nothing disturbs it, arm after arm in one process."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    run_study(study, folder)
    return tables(folder)


def tables(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in ("table.md", "values.csv", "claims.md")}


def with_a_bad_arm(raw: dict) -> Study:
    """Two arms of the study, and one of a layer that the teacher has not."""
    grid = {"students": ["gla"], "stages": ["3"], "seeds": [0, 1], "layers": ["all", [9]]}
    return Study.parse({**raw, "grid": grid})


def limbeck(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["limbeck", "study", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


# ---------------------------------------------------------------------- what is to be done


def test_the_lists_of_a_study(study, tmp_path):
    arms = study.arms(tmp_path)
    states = {arm.name: "train" for arm in arms}
    first, later = schedule_tasks(arms, states)
    assert first == [
        StudyTask("shared", ("gla_2+3_seed0", "deltanet_2+3_seed0")),
        StudyTask("alone", ("gla_3_seed0",)),
        StudyTask("alone", ("deltanet_3_seed0",)),
    ]
    assert later == [StudyTask("alone", ("gla_2+3_seed0",)), StudyTask("alone", ("deltanet_2+3_seed0",))]
    first, later = schedule_tasks(arms, states | {"gla_3_seed0": "finished", "deltanet_2+3_seed0": "measure"})
    assert {task.kind for task in first} == {"alone"}, "one alone shares with nobody"
    assert {name for task in first for name in task.arms} == set(states) - {"gla_3_seed0"}
    assert later == []


def test_idle_workers_get_a_part_of_a_team(raw, tmp_path):
    grid = {"students": "paper-v2", "stages": ["2+3"], "seeds": [0, 1]}
    arms = Study.parse({**raw, "grid": grid}).arms(tmp_path)
    states = {arm.name: "train" for arm in arms}
    for workers, sizes in ((1, [8, 8]), (2, [8, 8]), (3, [8, 4, 4]), (5, [4, 4, 4, 2, 2])):
        first, later = schedule_tasks(arms, states, workers)
        assert [len(task.arms) for task in first] == sizes
        assert {name for task in first for name in task.arms} == set(states)
        assert sorted(task.arms[0] for task in later) == sorted(states)
    first, later = schedule_tasks(arms, states, 40)
    assert [task.kind for task in first] == ["alone"] * 16
    assert later == []


def test_the_time_of_several_workers():
    tasks = [StudyTask("alone", (name,)) for name in "abcd"]
    takes = dict(zip(tasks, (4.0, 3.0, 2.0, 1.0)))
    for workers, wall in ((1, 10 + 10), (2, 5 + 5), (4, 4 + 4), (9, 4 + 4)):
        assert estimate_wall_seconds(tasks, tasks, lambda task, first: takes[task], workers) == wall


def test_what_is_wrong_with_an_executor_is_said(raw, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    mine = [str(path), "--out", str(tmp_path / "out")]
    assert "did you mean 'slurm'" in limbeck(monkeypatch, capsys, *mine, "--executor", "slrum")
    assert "the executor local has no option --workers" in limbeck(monkeypatch, capsys, *mine, "--workers", "2")
    told = limbeck(monkeypatch, capsys, *mine, "--executor", "processes", "--partition", "gpu")
    assert "no option --partition" in told
    assert "--executor slurm" in told
    assert "-3 workers" in limbeck(monkeypatch, capsys, *mine, "--executor", "processes", "--workers", "-3")
    assert "--sbatch" in limbeck(monkeypatch, capsys, *mine, "--executor", "slurm", "--sbatch", "account=x")
    assert "has no tasks" in limbeck(monkeypatch, capsys, str(tmp_path), "--task", "0")
    assert not (tmp_path / "out").exists()


def test_gpus_and_workers(monkeypatch):
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert create_executor("processes").workers == 2
    assert ProcessExecutor().gpus == ["5", "GPU-7"]
    with pytest.raises(LimbeckError, match="3 workers for 2 GPUs"):
        ProcessExecutor(3)


def test_a_second_driver_is_refused_before_it_plans(study, tmp_path):
    with open(tmp_path / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LimbeckError, match="another process"):
            run_study(study, tmp_path, confirm=lambda plan: pytest.fail("planned"))


# ---------------------------------------------------------------------- processes


def test_workers_that_always_die_are_reported(study, tmp_path, monkeypatch):
    """Killed with a task in hand, as the system does with a process that wants too much memory."""
    dies = (
        "import os, sys; sys.stdin.readline(); print('too much', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(processes, "WORKER_COMMAND", [sys.executable, "-c", dies])
    tasks = [StudyTask("alone", ("gla_3_seed0",)), StudyTask("shared", ("gla_2+3_seed0", "deltanet_2+3_seed0"))]
    done = list(ProcessExecutor(2).run(study, tmp_path, tasks))
    assert {one.task for one in done} == set(tasks)
    assert {name for one in done for name in one.failures} == {name for task in tasks for name in task.arms}
    for text in (text for one in done for text in one.failures.values()):
        assert "killed by signal 9, 3 times" in text
        assert "too much" in text


@pytest.mark.slow
def test_processes_leave_the_tables_of_one_process(study, whole, tmp_path, monkeypatch, capsys):
    """Though one of the two is killed in the middle of a stage."""
    folder, killed, plans = tmp_path / "study", [], []
    give = processes._Worker.submit

    def give_and_kill(self, task):
        give(self, task)
        if not killed:
            killed.append(task)
            threading.Thread(target=_kill_in, args=(self.process.pid, folder / task.arms[0])).start()

    monkeypatch.setattr(processes._Worker, "submit", give_and_kill)
    place = ProcessExecutor(2)
    results = run_study(study, folder, plans.append, place)
    assert killed
    assert {arm["status"] for arm in results["arms"]} == {"finished"}
    assert tables(folder) == whole
    assert plans[0].seconds / 2 - 1e-9 < plans[0].wall_seconds < plans[0].seconds
    told = capsys.readouterr().err
    assert "4 arms to run, 2 side by side" in told
    assert "4 of 4 arms done" in told
    assert re.search(r"arms done.*; about \d[\d.]* (s|min|h) left", told)
    assert len(list((folder / "logs").glob("worker-*.log"))) == 2
    assert place._workers == [], "ended with the study"


def _kill_in(pid: int, arm: Path) -> None:
    """SIGKILL once the arm has done some steps."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        if (arm / "metrics.jsonl").exists() and len(
            (arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ) > 2:
            break
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


def test_a_stop_reaches_the_workers(study, tmp_path, monkeypatch):
    """SIGTERM to the study: the workers get it, and the study ends as stopped."""
    waits = "import signal, sys, time; signal.signal(15, lambda *_: (print('kept', file=sys.stderr), sys.exit(143)))\n"
    waits += "sys.stdin.readline(); print('at work', file=sys.stderr, flush=True); time.sleep(60)"
    monkeypatch.setattr(processes, "WORKER_COMMAND", [sys.executable, "-c", waits])
    log = tmp_path / "logs" / "worker-0.log"

    def stop():
        while not (log.exists() and "at work" in log.read_text(encoding="utf-8")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="1 arms or groups"):
        list(ProcessExecutor(1).run(study, tmp_path, [StudyTask("alone", ("gla_3_seed0",))]))
    assert "kept" in log.read_text(encoding="utf-8")


def test_a_worker_ends_with_the_one_who_started_it(tmp_path):
    """Its stdin is closed when that one is killed."""
    process = subprocess.Popen(
        [*processes.WORKER_COMMAND, str(tmp_path), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.close()
    assert process.wait(60) == 0


# ---------------------------------------------------------------------- the study is killed


def _run(raw: dict, folder: Path, workers: int) -> None:
    import torch

    torch.set_num_threads(1)
    run_study(Study.parse(raw), folder, executor=ProcessExecutor(workers) if workers else None)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "most"), [(0, 3), (2, 1)])
def test_a_study_killed_at_random_instants_leaves_the_same_tables(raw, whole, tmp_path, workers, most):
    """SIGKILL, again and again; workers that it has end with it, so nobody is in the way of the next one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.study.executors"])
    rng, folder, kills = random.Random(workers), tmp_path / "study", 0
    for _ in range(12):
        driver = context.Process(target=_run, args=(raw, folder, workers))
        driver.start()
        # after its start, so that each gets some way; the last ones are let alone
        seen = len(list(folder.glob("*/metrics.jsonl"))), _lines(folder)
        until = time.monotonic() + 60
        while kills < most and driver.is_alive() and time.monotonic() < until:
            if (len(list(folder.glob("*/metrics.jsonl"))), _lines(folder)) != seen:
                driver.join(rng.uniform(0.0, 0.5))
                break
            time.sleep(0.02)
        if kills < most and driver.is_alive():
            driver.kill()
        driver.join()
        if driver.exitcode == 0:
            break
        assert driver.exitcode == -signal.SIGKILL
        kills += 1
    assert kills
    assert tables(folder) == whole
    assert json.loads((folder / "study.json").read_text(encoding="utf-8"))["arms"][0]["failure"] is None


def _lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*/metrics.jsonl"))


# ---------------------------------------------------------------------- Ray


@pytest.mark.slow
def test_a_ray_of_two_workers(study, whole, tmp_path):
    """The same tables, though one of its processes is killed with an arm in hand; nothing is left of the cluster."""
    pytest.importorskip("ray")
    folder = tmp_path / "study"

    def kill():
        until = time.monotonic() + 100
        while time.monotonic() < until:
            for log in folder.glob("logs/shared-*.log"):
                found = re.search(r"process (\d+) on", log.read_text(encoding="utf-8"))
                if found:
                    _kill_in(int(found[1]), folder / log.stem.removeprefix("shared-"))
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    results = run_study(study, folder, executor=RayExecutor(workers=2))
    killer.join()
    assert {arm["status"] for arm in results["arms"]} == {"finished"}
    assert tables(folder) == whole
    log = (folder / "logs" / "shared-gla_2+3_seed0.log").read_text(encoding="utf-8")
    assert len(re.findall(r"process \d+ on", log)) == 2, "begun twice"
    assert not list(Path("/tmp").glob(f"limbeck-ray-{os.getpid()}-*"))


def test_a_cluster_that_is_not_there_is_said(study, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    with pytest.raises(LimbeckError, match="no Ray cluster at auto"):
        list(RayExecutor(address="auto").run(study, tmp_path, [StudyTask("alone", ("gla_3_seed0",))]))


# ---------------------------------------------------------------------- Slurm


@pytest.fixture
def scheduler(tmp_path, monkeypatch) -> Path:
    """A folder at the head of PATH, with a Slurm of one machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "sbatch", SBATCH.format(python=sys.executable))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL_INTERVAL_S", 0.05)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def test_the_script_of_an_array(tmp_path):
    (tmp_path / "a study").mkdir()
    made = SlurmExecutor(workers=4, cpus=8, gpus=1, partition="gpu", time="4:00:00", sbatch=["--account=abc"])
    path = made.write_script(tmp_path / "a study", [StudyTask("alone", (name,)) for name in "abc"])
    text = path.read_text(encoding="utf-8")
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--array=0-2%4", "--partition=gpu", "--gpus=1", "--cpus-per-task=8", "--time=4:00:00"} <= options
    assert {"--requeue", "--signal=B:USR1@120", "--account=abc", f"--chdir={os.getcwd()}"} <= options
    assert "OMP_NUM_THREADS=8" in text
    assert f"limbeck study '{tmp_path}/a study' --task \"$SLURM_ARRAY_TASK_ID\"" in text
    subprocess.run(["bash", "-n", path], check=True)
    assert [one["arms"] for one in json.loads((path.parent / "tasks.json").read_text(encoding="utf-8"))] == [
        ["a"],
        ["b"],
        ["c"],
    ]


@pytest.mark.parametrize("bad", ["a\ntouch x #", "a\rtouch x", "a\x00", "a\u2028b"])
def test_no_value_ends_its_line_of_the_script(tmp_path, monkeypatch, bad):
    for given in ({"partition": bad}, {"time": bad}, {"sbatch": [f"--account={bad}"]}):
        with pytest.raises(LimbeckError, match=r"sbatch|one line"):
            SlurmExecutor(**given)
    with pytest.raises(LimbeckError, match="--out"):
        SlurmExecutor().write_script(tmp_path / bad.replace("\x00", "\n"), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "requeued"), [("USR1", True), ("TERM", False)])
def test_an_array_task_whose_time_is_over_asks_for_more(tmp_path, scheduler, sent, requeued):
    """Before its time is over it keeps its state and is queued again; a task that is cancelled is not."""
    script(scheduler / "scontrol", f'#!/bin/bash\necho "$@" > {tmp_path}/requeued\n')
    trains = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(1, flush=True); time.sleep(60)"
    )
    text = slurm.SCRIPT.format(options="", command=f'{sys.executable} -c "{trains}"')
    script(tmp_path / "array.sh", text)
    env = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    shell = subprocess.Popen(["bash", tmp_path / "array.sh"], env=env, stdout=subprocess.PIPE)
    assert shell.stdout.readline() == b"1\n"
    shell.send_signal(getattr(signal, f"SIG{sent}"))
    assert shell.wait(30) == 143
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 7_3\n"


def test_without_sbatch_the_script_is_written_and_the_answers_are_read(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    task = StudyTask("alone", ("gla_3_seed0",))
    with pytest.raises(LimbeckError, match=r"no sbatch(.|\n)*sbatch .*array\.sh"):
        list(SlurmExecutor().run(study, tmp_path, [task]))
    (tmp_path / "slurm" / "0.json").write_text('{"gla_3_seed0": "no luck"}', encoding="utf-8")  # as the task leaves it
    (done,) = SlurmExecutor().run(study, tmp_path, [task])
    assert done.failures == {"gla_3_seed0": "no luck"}
    with pytest.raises(LimbeckError, match="no sbatch"):  # what failed is told once, and then tried again
        list(SlurmExecutor().run(study, tmp_path, [task]))


def test_what_sbatch_refuses_and_what_ends_without_an_answer(study, tmp_path, scheduler):
    task = StudyTask("alone", ("gla_3_seed0",))
    script(scheduler / "sbatch", "#!/bin/bash\necho 'invalid partition specified: gpo' >&2; exit 1\n")
    with pytest.raises(LimbeckError, match="invalid partition specified: gpo"):
        list(SlurmExecutor(partition="gpo").run(study, tmp_path, [task]))
    script(scheduler / "sbatch", f"#!/bin/bash\necho '9;here'; echo 'out of memory' > {tmp_path}/slurm/9_0.log\n")
    (done,) = SlurmExecutor().run(study, tmp_path, [task])
    assert "9_0 ended without a result" in done.failures["gla_3_seed0"]
    assert "out of memory" in done.failures["gla_3_seed0"]
    assert not (tmp_path / "slurm" / "job").exists()


def test_an_array_that_a_killed_study_left_is_waited_for(study, tmp_path, scheduler, capsys):
    """It is under way at two looks, then over; the answers that it left are read."""
    (tmp_path / "slurm").mkdir()
    task = StudyTask("alone", ("gla_3_seed0",))
    SlurmExecutor().write_script(tmp_path, [task])
    (tmp_path / "slurm" / "job").write_text("77\n", encoding="utf-8")
    left = tmp_path / "looks"
    left.write_text("..", encoding="utf-8")
    script(
        scheduler / "squeue",
        f"#!/bin/bash\nif [ -s {left} ]; then echo 77_0; truncate -s -1 {left}; else\n"
        f'[ -f {tmp_path}/slurm/job ] && echo \'{{"gla_3_seed0": "said"}}\' > {tmp_path}/slurm/0.json; fi\n',
    )
    (done,) = SlurmExecutor().run(study, tmp_path, [task])
    assert done.failures == {"gla_3_seed0": "said"}
    assert left.read_text(encoding="utf-8") == ""
    assert "array 77 of this study is still running" in capsys.readouterr().err


@pytest.mark.slow
def test_an_array_of_slurm_with_an_arm_that_fails(raw, tmp_path, scheduler):
    """Each task in a process of its own, as the script starts it; what the others leave is what they leave here."""
    study = with_a_bad_arm(raw)
    results = run_study(study, tmp_path / "study", executor=SlurmExecutor())
    status = {arm["name"]: arm["status"] for arm in results["arms"]}
    assert {name for name, one in status.items() if one == "failed"} == {f"gla_3_layers-9_seed{i}" for i in (0, 1)}
    assert "9" in json.loads((tmp_path / "study" / "failures.json").read_text(encoding="utf-8"))["gla_3_layers-9_seed0"]
    run_study(study, tmp_path / "here")
    assert tables(tmp_path / "study") == tables(tmp_path / "here")
    assert not list((tmp_path / "study" / "slurm").glob("[0-9].json"))


# ---------------------------------------------------------------------- a worker


def test_the_study_that_workers_read_is_the_one_that_was_given(study, tmp_path):
    built_in = [Study.load(name, "cpu" if name.startswith("real-") else "gpu") for name in list_builtin_studies()]
    for one in (study, *built_in):
        (tmp_path / "study.yaml").write_text(study_to_yaml(one), encoding="utf-8")
        read = Study.load(tmp_path / "study.yaml")
        assert read == one
        mine, theirs = one.arms(tmp_path), read.arms(tmp_path)
        assert [(arm.name, arm.recipe) for arm in mine] == [(arm.name, arm.recipe) for arm in theirs]


def test_a_worker_waits_for_an_arm_that_is_held(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    held = open(tmp_path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, held.close).start()
    began = time.monotonic()
    worker._wait_until_free(tmp_path)
    assert 0.3 < time.monotonic() - began < 30


def test_an_arm_that_the_study_has_not(study, tmp_path):
    (tmp_path / "study.yaml").write_text(study_to_yaml(study), encoding="utf-8")
    (text,) = worker.run_study_task(str(tmp_path), worker.task_to_dict(StudyTask("alone", ("gone",)))).values()
    assert "has no arm gone" in text
