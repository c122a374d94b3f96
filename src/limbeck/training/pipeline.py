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

from limbeck.core import recipe as recipes
from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, main_process_first, process_group, run_on_main
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.storage import check_disk_space, check_writable, read_json, read_manifest
from limbeck.training.export import check_exported_files, export_and_evaluate, provenance
from limbeck.training.identity import matches_run_identity
from limbeck.training.plan import Plan, make_plan
from limbeck.training.precision import numerics_context
from limbeck.training.rehearsal import dry_run_export, measure_stage_times
from limbeck.training.run_directory import RunDirectory, check_run, collect_environment, open_run, remove_stale_export
from limbeck.training.setup import Job, assign_run_directory, build_student, prepare_job, run_path
from limbeck.training.stages import make_stage, run_stages
from limbeck.training.teacher_loading import LoadedTeacher
from limbeck.training.trainer import Stage

LONGEST_STEP = 120.0  # seconds: stages whose steps take longer are not rehearsed


def distill(
    recipe: Recipe,
    confirm: Callable[[Plan], None] | None = None,
    loaded: LoadedTeacher | None = None,
    measure_times: bool = True,
    plot_curves: bool = True,
) -> dict[str, Any]:
    """Run a recipe from where it stands to its end.

    Args:
        recipe: what to do; `recipe.out` is the run directory, by default the first of runs/<name>, runs/<name>-2, ...
            that is free or holds this run.
        confirm: called with the plan before long work begins (the command line prints it).
        loaded: the teacher and its tokenizer where they are in memory already.
        measure_times: run a step of each stage first, for the plan's times; otherwise those are counted.
        plot_curves: draw the losses into the run directory (where matplotlib is installed).

    Returns:
        The summary that is also written to eval.json.

    Raises:
        LimbeckError: anything wrong with the recipe, the data or the machine; nothing was written then. Of several
            processes all raise the error of the first that failed.
    """
    with process_group(), numerics_context(recipe):
        recipe = recipe.model_copy(update={"out": run_on_main(lambda: assign_run_directory(recipe).out)})
        known = run_on_main(lambda: _known(recipe))
        if known is not None:
            run_on_main(lambda: remove_stale_export(run_path(recipe)))
            return known
        run_on_main(lambda: check_writable(run_path(recipe)))
        torch.manual_seed(recipe.seed)
        with main_process_first():
            job = prepare_job(recipe, loaded)
        plan = run_on_main(lambda: _plan(job))
        run_on_main(lambda: _dry_run_export(job))
        with open_run(job.path, recipe) as run:
            planned = run_on_main(lambda: _planned(job, run, plan, measure_times))
            if confirm:
                confirm(planned)
            start_run(job, run)
            student = build_student(job)
            run_stages(job, run, student)
            return run_on_main(lambda: export_and_evaluate(job, run, student, plot_curves))


def start_run(job: Job, run: RunDirectory) -> None:
    """Check that a run's text is what it was, and write down what it works with."""
    check_text(job)
    run.update_manifest(**collect_environment(), **provenance(job))


def _plan(job: Job) -> Plan:
    plan = make_plan(job.recipe, job.teacher, job.sites)
    check_disk_space(_existing(job.path), plan.disk_bytes, f"the run {job.path}")
    return plan


def _dry_run_export(job: Job) -> None:
    """Before a run begins: its end must work. Of one that goes on it was tried then."""
    if not (job.path / "plan.json").exists():
        with torch.random.fork_rng():
            dry_run_export(job, build_student(job))


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
    if not all(run.is_finished(i) for i in range(len(recipe.stages))) or not matches_run_identity(path, recipe):
        return None
    if (problem := check_exported_files(path / "student", read_manifest(path).get("exported"))) is not None:
        console.print(f"{path / 'student'}: {problem}; it is exported again from {path / 'stages'}", markup=False)
        return None
    console.print(f"{path} is finished already; its summary:", markup=False)
    return {**known, "run": str(path)}  # where it is now, should it have been moved


def measure_plan(job: Job, plan: Plan, stages: list[int] | None = None) -> Plan:
    """The plan after a step of each stage (all by default) has been run; as it is where those would cost too much."""
    recipe = job.recipe
    index = list(range(len(recipe.stages))) if stages is None else stages
    step = max((row.seconds / max(row.steps, 1) for row in plan.stages if row.steps), default=0.0)
    adapted = any(getattr(settings, "lora", None) is not None for settings in recipe.stages)
    if (
        not index
        or step > LONGEST_STEP
        or recipe.teacher_bits is not None
        or adapted
        or get_process_info().world_size > 1
    ):
        return plan

    def make(number: int) -> Stage:
        settings = recipe.stages[number]
        assert not isinstance(settings, recipes.Calibrate)
        return make_stage(job, student, settings, number)

    with torch.random.fork_rng():
        student = build_student(job)
        seen = measure_stage_times(recipe, job.make_pair(student), make, index)
    return plan.with_measured_times(seen)


def _planned(job: Job, run: RunDirectory, plan: Plan, measure_times: bool) -> Plan:
    """The measured plan of a run that begins, which is kept; of one that goes on the plan that was kept then."""
    path = run.path / "plan.json"
    try:
        known = read_json(path, "the same command makes the plan again") if path.exists() else None
    except LimbeckError as error:
        console.print(f"{error.found}; the plan is made again", markup=False)
        known = None
    if known is None:
        plan = measure_plan(job, plan) if measure_times else plan
        run.write_file(path.name, json.dumps(plan.to_dict(), indent=1) + "\n")
        return plan
    rows = [replace(row, seconds=then["seconds"]) for row, then in zip(plan.stages, known["stages"])]
    return replace(plan, stages=rows, seconds=known["seconds"], memory_bytes=known["memory_bytes"])


def check_text(job: Job) -> None:
    """Raises LimbeckError where a text has changed since the run began: positions would mean other sequences."""
    before = read_manifest(job.path).get("texts", {})
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
