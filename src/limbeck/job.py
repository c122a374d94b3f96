"""The main job: teacher in, stages, evaluation, and a student that can be handed over.

    summary = distill(Recipe.load("quickstart"))          # the same call resumes, and does nothing when all is done

Everything that can be wrong with a recipe is found before anything is written.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck import recipe as recipes
from limbeck.console import console
from limbeck.data.cache import check_room, check_writable, read_json
from limbeck.distributed import main_first, on_main, together, world
from limbeck.errors import LimbeckError
from limbeck.handover import hand_over, missing_of, provenance
from limbeck.identity import looks_the_same
from limbeck.plan import Plan, make_plan
from limbeck.precision import arithmetic
from limbeck.prepare import Job, Loaded, new_student, placed, prepare_job, run_path
from limbeck.recipe import Recipe
from limbeck.rehearsal import rehearse, rehearse_end
from limbeck.stages.learner import Stage
from limbeck.stages.run import RunDirectory, check_run, environment, manifest_of, open_run, sweep
from limbeck.teach import make_stage, run_stages

LONGEST_STEP = 120.0  # seconds: stages whose steps take longer are not rehearsed


def distill(
    recipe: Recipe,
    confirm: Callable[[Plan], None] | None = None,
    loaded: Loaded | None = None,
    rehearsed: bool = True,
    curves: bool = True,
) -> dict[str, Any]:
    """Run a recipe from where it stands to its end.

    Args:
        recipe: what to do; `recipe.out` is the run directory, by default the first of runs/<name>, runs/<name>-2, ...
            that is free or holds this run.
        confirm: called with the plan before long work begins (the command line prints it).
        loaded: the teacher and its tokenizer where they are in memory already.
        rehearsed: run a step of each stage first, for the plan's times; otherwise those are counted.
        curves: draw the losses into the run directory (where matplotlib is installed).

    Returns:
        The summary that is also written to eval.json.

    Raises:
        LimbeckError: anything wrong with the recipe, the data or the machine; nothing was written then. Of several
            processes all raise the error of the first that failed.
    """
    with together(), arithmetic(recipe):
        recipe = recipe.model_copy(update={"out": on_main(lambda: placed(recipe).out)})
        known = on_main(lambda: _known(recipe))
        if known is not None:
            on_main(lambda: sweep(run_path(recipe)))
            return known
        on_main(lambda: check_writable(run_path(recipe)))
        torch.manual_seed(recipe.seed)
        with main_first():
            job = prepare_job(recipe, loaded)
        plan = on_main(lambda: _plan(job))
        on_main(lambda: _rehearse_end(job))
        with open_run(job.path, recipe) as run:
            planned = on_main(lambda: _planned(job, run, plan, rehearsed))
            if confirm:
                confirm(planned)
            begin(job, run)
            student = new_student(job)
            run_stages(job, run, student)
            return on_main(lambda: hand_over(job, run, student, curves))


def begin(job: Job, run: RunDirectory) -> None:
    """Check that a run's text is what it was, and write down what it works with."""
    check_text(job)
    run.manifest(**environment(), **provenance(job))


def _plan(job: Job) -> Plan:
    plan = make_plan(job.recipe, job.teacher, job.sites)
    check_room(_existing(job.path), plan.disk_bytes, f"the run {job.path}")
    return plan


def _rehearse_end(job: Job) -> None:
    """Before a run begins: its end must work. Of one that goes on it was tried then."""
    if not (job.path / "plan.json").exists():
        with torch.random.fork_rng():
            rehearse_end(job, new_student(job))


def _known(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a run that is finished; nothing is loaded for it."""
    path = run_path(recipe)
    done = path / "eval.json"
    if not done.is_file():
        return None
    check_run(path, recipe)
    run = RunDirectory(path, recipe)
    try:
        known = read_json(done, "the same command evaluates again")
    except LimbeckError as error:
        console.print(f"{error.found}; the student is evaluated again", markup=False)
        return None
    if known["evaluation"] != recipe.evaluation.model_dump(mode="json"):
        return None
    if not all(run.finished(i) for i in range(len(recipe.stages))) or not looks_the_same(path, recipe):
        return None
    if (problem := missing_of(path / "student", manifest_of(path).get("exported"))) is not None:
        console.print(f"{path / 'student'}: {problem}; it is exported again from {path / 'stages'}", markup=False)
        return None
    console.print(f"{path} is finished already; its summary:", markup=False)
    return {**known, "run": str(path)}  # where it is now, should it have been moved


def measured_plan(job: Job, plan: Plan, stages: list[int] | None = None) -> Plan:
    """The plan after a step of each stage (all by default) has been run; as it is where those would cost too much."""
    recipe = job.recipe
    index = list(range(len(recipe.stages))) if stages is None else stages
    step = max((row.seconds / max(row.steps, 1) for row in plan.rows if row.steps), default=0.0)
    adapted = any(getattr(settings, "lora", None) is not None for settings in recipe.stages)
    if not index or step > LONGEST_STEP or recipe.teacher_bits is not None or adapted or world().size > 1:
        return plan

    def make(number: int) -> Stage:
        settings = recipe.stages[number]
        assert not isinstance(settings, recipes.Calibrate)
        return make_stage(job, student, settings, number)

    with torch.random.fork_rng():
        student = new_student(job)
        seen = rehearse(recipe, job.pair(student), make, index)
    return plan.measured(seen)


def _planned(job: Job, run: RunDirectory, plan: Plan, rehearsed: bool) -> Plan:
    """The measured plan of a run that begins, which is kept; of one that goes on the plan that was kept then."""
    path = run.path / "plan.json"
    try:
        known = read_json(path, "the same command makes the plan again") if path.exists() else None
    except LimbeckError as error:
        console.print(f"{error.found}; the plan is made again", markup=False)
        known = None
    if known is None:
        plan = measured_plan(job, plan) if rehearsed else plan
        run.write(path.name, json.dumps(plan.facts(), indent=1) + "\n")
        return plan
    rows = [replace(row, seconds=then["seconds"]) for row, then in zip(plan.rows, known["stages"])]
    return replace(plan, rows=rows, seconds=known["seconds"], memory_bytes=known["memory_bytes"])


def check_text(job: Job) -> None:
    """Raises LimbeckError where a text has changed since the run began: positions would mean other sequences."""
    before = manifest_of(job.path).get("texts", {})
    for name, text in job.texts.items():
        if before.get(name, {}).get("key", text.key) == text.key:
            continue
        old, now = before[name]["files"], text.files
        changed = [file for file in {**old, **now} if old.get(file) != now.get(file)]
        which = "; ".join(f"{file} {'is gone' if file not in now else 'is not what it was'}" for file in changed[:4])
        raise LimbeckError(
            f"the text has changed since the run {job.path} began{': ' if which else ''}{which}",
            expected=f"the same {json.loads(name)['source']} and the same tokenizer, to go on",
            hint=f"put it back, or begin a new run: --out {job.path}-2",
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
