"""The main job: teacher in, stages, evaluation, and a student that can be loaded by transformers.

    summary = distill("limbeck")                          # the same call resumes, and does nothing when all is done

Everything that can be wrong with a recipe is found before anything is written.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, main_process_first, process_group, run_on_main
from limbeck.core.errors import LimbeckError
from limbeck.core.live import Phase, View
from limbeck.core.recipe import Recipe
from limbeck.core.screen import is_drawn, watch
from limbeck.core.stage_settings import Calibrate
from limbeck.core.storage import check_disk_space, check_writable, read_json, read_manifest
from limbeck.core.system import get_command_line
from limbeck.data.in_memory import name_text
from limbeck.models.loading import check_given_teacher
from limbeck.models.temporary import frozen, quiet_transformers
from limbeck.report.run_summary import RunSummary, format_outcome
from limbeck.report.teacher_info import get_teacher_name
from limbeck.training.automatic_heads import store_chosen_heads
from limbeck.training.export import check_exported_files, export_and_evaluate, provenance
from limbeck.training.identity import matches_run_identity
from limbeck.training.job import Job
from limbeck.training.plan import Plan, make_plan
from limbeck.training.precision import numerics_context
from limbeck.training.recipe_options import build_recipe
from limbeck.training.rehearsal import dry_run_export, measure_stage_times
from limbeck.training.run_directory import RunDirectory, check_run, collect_environment, open_run, remove_stale_export
from limbeck.training.setup import assign_run_directory, build_student, prepare_job, run_path
from limbeck.training.stage_protocol import Stage
from limbeck.training.stages import make_stage, run_stages
from limbeck.training.teacher_loading import LoadedTeacher, get_teacher_source

MAX_MEASURED_STEP_SECONDS = 120.0  # stages are not rehearsed if a step is planned to take longer


def distill(
    recipe: Recipe | str | Path | None = None,
    *,
    teacher: str | Path | LoadedTeacher | None = None,
    student: str | None = None,
    layers: str | list[int] | None = None,
    stages: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    data: Any = None,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    confirm: Callable[[Plan], None] | None = None,
    loaded: LoadedTeacher | None = None,
    measure_times: bool = True,
    plot_curves: bool = True,
) -> RunSummary:
    """Distill a teacher into a subquadratic student: run a recipe to its end, from where it was interrupted if it was.

    The options are those of the command line. A hint in an error, `--set KEY=VALUE`, is
    `overrides={KEY: VALUE}` here.

    Example:
        >>> no_exam = {"evaluation.exam_documents": 0}
        >>> summary = limbeck.distill("quickstart_smoke", teacher="my-teacher", data=documents, overrides=no_exam)
        >>> summary["held_out"]["student_perplexity"] > 1
        True
        >>> student = AutoModelForCausalLM.from_pretrained(summary.student_folder)

    Args:
        recipe: a built-in recipe ("limbeck", "quickstart", "smoke", ...), a YAML file or a `Recipe`. None: "limbeck",
            or "quickstart" where `student` or `stages` is given, whose stages fit any mixer.
        teacher: "embedded", "small", a folder or a Hub name; or a model in memory with its tokenizer, (model,
            tokenizer), in float32.
        student: the mixer in place of softmax attention.
        layers: the layers to convert, "all" or numbers.
        stages: the stages to run: "0,2,3".
        tokens: training tokens over all stages, divided among them as in the recipe.
        seq_len: tokens in a training sequence, in all stages.
        data: a file, a folder, a dataset's name or "embedded"; or the text itself: a list of strings, a list of records
            or a `datasets.Dataset`.
        out: the run directory; by default the first of runs/<name>, runs/<name>-2, ... that is free or holds this run.
        overrides: any other key of the recipe by its dotted name: {"stages.hidden.lr": 5e-4}.
        confirm: called with the plan before long work begins (the command line prints it).
        loaded: the recipe's teacher and its tokenizer, if they are in memory already.
        measure_times: run a step of each stage first, for the plan's times; otherwise they are estimated from FLOPs.
        plot_curves: draw the losses into the run directory (if matplotlib is installed).

    Returns:
        The summary that is also written to eval.json: a dict, which a notebook shows as tables.

    Raises:
        LimbeckError: anything wrong with the recipe, the data or the machine; nothing was written then. With several
            processes all raise the error of the first that failed.
    """
    check_given_teacher(teacher)
    if isinstance(teacher, tuple):
        loaded, teacher = teacher, get_teacher_source(*teacher)
    options: dict[str, Any] = {"teacher": teacher and str(teacher), "student": student, "layers": layers}
    options |= {"stages": stages, "tokens": tokens, "seq_len": seq_len, "data": name_text(data)}
    options |= {"out": out, "overrides": overrides}
    if not isinstance(recipe, Recipe) or any(value is not None for value in options.values()):
        recipe = build_recipe(recipe, **options)
    with frozen(loaded[0]) if loaded else nullcontext(), quiet_transformers():
        return RunSummary(_run(recipe, confirm, loaded, measure_times, plot_curves))


def _run(
    recipe: Recipe,
    confirm: Callable[[Plan], None] | None,
    loaded: LoadedTeacher | None,
    measure_times: bool,
    plot_curves: bool,
) -> dict[str, Any]:
    with process_group(), numerics_context(recipe):
        recipe = recipe.model_copy(update={"out": run_on_main(lambda: assign_run_directory(recipe).out)})
        cached_summary = run_on_main(lambda: _load_finished_summary(recipe))
        if cached_summary is not None:
            run_on_main(lambda: remove_stale_export(run_path(recipe)))
            return cached_summary
        run_on_main(lambda: check_writable(run_path(recipe)))
        title = f"{recipe.student.mixer} student of {get_teacher_name(recipe.teacher)}"
        with watch(View(title, [Phase("prepare", "prepare")], str(run_path(recipe)))) as view:
            view.begin("prepare")

            # set up: load the teacher, open the text, check all that the recipe asks for
            torch.manual_seed(recipe.seed)
            with main_process_first():  # the other processes find what the first one has put into the caches
                job = prepare_job(recipe, loaded, before_choice=lambda job: _show_choice(view, job))
            plan = run_on_main(lambda: _make_plan(job))
            view.plan([Phase("rehearse", "rehearse"), *_list_phases(plan)])
            view.begin("rehearse")
            run_on_main(lambda: _dry_run_export_once(job))

            with open_run(job.path, recipe) as run:
                plan = run_on_main(lambda: _measure_plan_once(job, run, plan, measure_times))
                if confirm:
                    confirm(plan)
                start_run(job, run)
                view.plan(_list_phases(plan))
                for index in range(len(recipe.stages)):
                    if run.is_finished(index):
                        facts = run.load_stage_metrics(index)
                        outcome = format_outcome({"stage": recipe.stages[index].stage, **facts})
                        view.finish(index, outcome, facts["seconds"])

                # train, then save the student and evaluate it
                student = build_student(job)
                run_stages(job, run, student)
                view.begin("evaluate")
                return run_on_main(lambda: export_and_evaluate(job, run, student, plot_curves))


def _show_choice(view: View, job: Job) -> None:
    """Show that heads are chosen, and what comes after it by a plan that nothing was measured for."""
    if is_drawn():
        choice, rehearsal = Phase("choose", "choose heads", counted_by="score heads"), Phase("rehearse", "rehearse")
        view.plan([choice, rehearsal, *_list_phases(make_plan(job.recipe, job.teacher, job.sites))])
    view.begin("choose")


def _list_phases(plan: Plan) -> list[Phase]:
    """List stages and evaluation of a plan for the live view."""
    stages = [Phase(i, row.stage, row.seconds, f"{row.tokens:,} tokens") for i, row in enumerate(plan.stages)]
    return [*stages, Phase("evaluate", "evaluate", max(plan.seconds - sum(row.seconds for row in plan.stages), 0.0))]


def _load_finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of a run that is complete, without loading a model; None if there is anything left to do."""
    path = run_path(recipe)
    summary_path = path / "eval.json"
    if not summary_path.is_file():
        return None
    check_run(path, recipe)
    run = RunDirectory(path, recipe)
    try:
        summary = read_json(summary_path, "the same command evaluates again")
    except LimbeckError as error:
        console.print(f"{error.found}; evaluating the student again", markup=False)
        return None
    if not recipe.evaluation.matches(summary["evaluation"]):
        return None
    if not all(run.is_finished(i) for i in range(len(recipe.stages))) or not matches_run_identity(path, recipe):
        return None
    if (problem := check_exported_files(path / "student", read_manifest(path).get("exported"))) is not None:
        console.print(f"{path / 'student'}: {problem}; exporting it again from {path / 'stages'}", markup=False)
        return None
    console.print(f"Run {path} is already complete. Summary:", markup=False)
    return {**summary, "run": str(path)}  # its present path: the folder may have been moved


def _make_plan(job: Job) -> Plan:
    plan = make_plan(job.recipe, job.teacher, job.sites)
    folder = job.path.absolute()
    while not folder.exists():
        folder = folder.parent
    check_disk_space(folder, plan.disk_bytes, f"the run {job.path}")
    return plan


def _dry_run_export_once(job: Job) -> None:
    """Before a new run starts, try out its end; a resumed run did so when it started."""
    if not (job.path / "plan.json").exists():
        with torch.random.fork_rng():
            dry_run_export(job, build_student(job))


def _measure_plan_once(job: Job, run: RunDirectory, plan: Plan, measure_times: bool) -> Plan:
    """Measure the plan of a new run and save it; for a resumed run return the plan saved then."""
    path = run.path / "plan.json"
    try:
        saved = read_json(path, "the same command makes the plan again") if path.exists() else None
    except LimbeckError as error:
        console.print(f"{error.found}; making the plan again", markup=False)
        saved = None
    if saved is None:
        plan = measure_plan(job, plan) if measure_times else plan
        run.write_file(path.name, json.dumps(plan.to_dict(), indent=1) + "\n")
        return plan
    stages = [replace(stage, seconds=before["seconds"]) for stage, before in zip(plan.stages, saved["stages"])]
    return replace(plan, stages=stages, seconds=saved["seconds"], memory_bytes=saved["memory_bytes"])


def measure_plan(job: Job, plan: Plan, stages: list[int] | None = None) -> Plan:
    """Run one step of each stage and put the measured times into the plan.

    The plan is returned as it is where a step would cost too much or cannot be run alone: with a quantized teacher,
    LoRA, or several processes.

    Args:
        stages: numbers of the stages to measure; None for all.
    """
    recipe = job.recipe
    measured = list(range(len(recipe.stages))) if stages is None else stages
    step_seconds = max((stage.seconds / max(stage.steps, 1) for stage in plan.stages if stage.steps), default=0.0)
    has_lora = any(getattr(settings, "lora", None) is not None for settings in recipe.stages)
    if (
        not measured
        or step_seconds > MAX_MEASURED_STEP_SECONDS
        or recipe.teacher_bits is not None
        or has_lora
        or get_process_info().world_size > 1
    ):
        return plan

    def make(number: int) -> Stage:
        settings = recipe.stages[number]
        assert not isinstance(settings, Calibrate)
        return make_stage(job, student, settings, number)

    with torch.random.fork_rng():  # the run itself draws the same numbers with and without this
        student = build_student(job)
        times = measure_stage_times(recipe, job.make_pair(student), make, measured)
    return plan.with_measured_times(times)


def start_run(job: Job, run: RunDirectory) -> None:
    """Check that the text is the one the run started with, and record the environment in the manifest."""
    _check_text_unchanged(job)
    earlier = read_manifest(run.path).get("commands", [])
    commands = [*earlier, *(command for command in [get_command_line()] if command not in earlier)]
    run.update_manifest(**collect_environment(), **provenance(job), commands=commands)
    store_chosen_heads(job.recipe, job.student, job.path)


def _check_text_unchanged(job: Job) -> None:
    """Refuse to resume with another text, in which the saved positions would mean other sequences."""
    recorded = read_manifest(job.path).get("texts", {})
    for name, text in job.texts.items():
        if recorded.get(name, {}).get("key", text.key) == text.key:
            continue
        before, now = recorded[name]["files"], text.files
        changed = [file for file in {**before, **now} if before.get(file) != now.get(file)]
        details = "; ".join(f"{file} {'is missing' if file not in now else 'has changed'}" for file in changed[:4])
        raise LimbeckError(
            f"the text has changed since the run {job.path} started{': ' if details else ''}{details}",
            expected=f"the same {json.loads(name)['source']} and the same tokenizer, to resume",
            hint=f"restore it, or start a new run: --out {shlex.quote(f'{job.path}-2')}",
        )
