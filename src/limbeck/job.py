"""The main job: teacher in, stages, evaluation, and a student that can be handed over.

    summary = distill(Recipe.load("quickstart"))          # the same call resumes, and does nothing when all is done

Everything that can be wrong with a recipe is found before anything is written.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, mixers
from limbeck import recipe as recipes
from limbeck.adapters import Adapters, check_peft, targets_of
from limbeck.console import console, progress
from limbeck.data.cache import check_room, no_room_is_an_error
from limbeck.data.packing import Sequences
from limbeck.data.text import Text, open_text
from limbeck.distributed import local_device, main_first, on_main, share, take_from_main, together, world
from limbeck.errors import LimbeckError
from limbeck.evaluate.agreement import agreement
from limbeck.evaluate.memory import cache_sizes, peak_memory
from limbeck.generate import continuation
from limbeck.losses import Weights
from limbeck.model import Site, attention_sites, by_mixer, convert, converted_layers, unshare
from limbeck.model.convert import parameter_report
from limbeck.plan import Plan, make_plan
from limbeck.recipe import Recipe
from limbeck.rehearsal import CHOOSING, rehearse
from limbeck.stages.cached import plain, taught
from limbeck.stages.calibrate import RIDGES, NormalEquations
from limbeck.stages.end_to_end import Logits
from limbeck.stages.layerwise import Hidden, Matrix
from limbeck.stages.loop import Stage, train
from limbeck.stages.optimize import steps_of
from limbeck.stages.run import RunDirectory, check_run, environment, open_run
from limbeck.stages.shards import sharded
from limbeck.stages.teacher import load_teacher
from limbeck.summary import write_summary

LONGEST_STEP = 120.0  # seconds: stages whose steps take longer are not rehearsed


@dataclass
class Job:
    """What a run works with once everything has been checked."""

    recipe: Recipe
    device: torch.device
    autocast: Callable[[], Any]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Text]  # by what names the text, see `_name`
    layers: int  # of the teacher
    sites: list[Site]  # of those that are converted
    path: Path

    @property
    def text(self) -> Text:
        """The recipe's own; a stage may have another."""
        return self.texts[_name(self.recipe.data)]

    def training(self, data: recipes.Data) -> Sequences:
        """What a stage with that text learns from."""
        return self.texts[_name(data)].training(data.length, self.recipe.seed)

    def held_out(self, data: recipes.Data) -> Sequences:
        """What it is measured on."""
        return self.texts[_name(data)].held_out(data.length)


def distill(recipe: Recipe, confirm: Callable[[Plan], None] | None = None) -> dict[str, Any]:
    """Run a recipe from where it stands to its end.

    Args:
        recipe: what to do; `recipe.out` is the run directory (runs/<name> by default).
        confirm: called with the plan before long work begins (the command line prints it).

    Returns:
        The summary that is also written to eval.json.

    Raises:
        LimbeckError: anything wrong with the recipe, the data or the machine; nothing was written then. Of several
            processes all raise the error of the first that failed.
    """
    with together():
        torch.manual_seed(recipe.seed)
        with main_first():
            job = prepare_job(recipe)
        plan = on_main(lambda: _plan(job))
        with open_run(job.path, recipe) as run:
            known = on_main(lambda: _known(job, run))
            if known is not None:
                return known
            planned = on_main(lambda: _planned(job, run, plan))
            if confirm:
                confirm(planned)
            _same_text(job)
            run.manifest(**environment(), **_provenance(job))
            student = _student(job)
            _run_stages(job, run, student)
            return on_main(lambda: _hand_over(job, run, student))


def _plan(job: Job) -> Plan:
    plan = make_plan(job.recipe, job.teacher, job.sites)
    check_room(_existing(job.path), plan.disk_bytes, f"the run {job.path}")
    return plan


def _known(job: Job, run: RunDirectory) -> dict[str, Any] | None:
    """The summary of a run that is finished."""
    done = job.path / "eval.json"
    if done.exists() and all(run.finished(i) for i in range(len(job.recipe.stages))):
        known = json.loads(done.read_text())
        if known["evaluation"] == job.recipe.evaluation.model_dump(mode="json"):
            console.print(f"{job.path} is finished already; its summary:")
            return known
    return None


def prepare_job(recipe: Recipe) -> Job:
    """Check a recipe and load what it names. Writes nothing but the caches."""
    _check_shares(recipe)
    mixers.options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    path = Path(recipe.out or f"runs/{recipe.name}")
    if world().main:
        check_run(path, recipe)
    device = local_device(recipe.device)
    teacher, tokenizer = load_teacher(assets.resolve_teacher(recipe.teacher), device, recipe.teacher_bits)
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.length": recipe.data.length}
    lengths |= {f"stages.{i}.length": recipe.text_of(stage).length for i, stage in enumerate(recipe.stages)}
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise LimbeckError(
                f"sequences of {length} tokens, the teacher was made for {longest}",
                expected=f"{key} of at most {longest}",
                hint=f"--set {key}={longest}",
            )
    sites = attention_sites(teacher)
    chosen = [sites[i] for i in converted_layers(recipe.student.layers, recipe.student.keep, len(sites))]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.lora is not None:
            check_peft()
            targets_of(teacher, chosen, stage.lora.targets)
    texts = _open_texts(recipe, teacher, tokenizer)
    autocast: Callable[[], Any] = contextlib.nullcontext
    if device.type == "cuda":
        autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    job = Job(recipe, device, autocast, teacher, tokenizer, texts, len(sites), chosen, path)
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            plain(job.training(recipe.text_of(stage)))
    return job


def _open_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Text]:
    """All texts of a recipe, each opened once, for the longest sequences that are read of it."""
    uses = [(recipe.data, 0), *((recipe.text_of(stage), stage.tokens) for stage in recipe.stages)]
    texts: dict[str, Text] = {}
    for name, data in {_name(data): data for data, _ in uses}.items():
        length = max(one.length for one, _ in uses if _name(one) == name)
        text = open_text(data, tokenizer, teacher, length=length, held_out_tokens=recipe.evaluation.tokens)
        wanted = sum(tokens for one, tokens in uses if _name(one) == name)
        if text.train_tokens is not None and wanted > text.train_tokens:
            console.print(f"the stages take {wanted:,} tokens, the text has {text.train_tokens:,}: it is read again")
        texts[name] = text
    return texts


def _name(data: recipes.Data) -> str:
    """What tells one text from another: all of its settings but the length of the sequences."""
    return json.dumps(data.model_dump(mode="json", exclude={"length", "cache_gb"}))


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
        return _stage(job, student, settings, number)

    with torch.random.fork_rng():
        student = _student(job)
        seen = rehearse(recipe, job.teacher, student, job.sites, job.autocast, make, index)
    return plan.measured(seen)


def _planned(job: Job, run: RunDirectory, plan: Plan) -> Plan:
    """The measured plan of a run that begins, which is kept; of one that goes on the plan that was kept then."""
    path = run.path / "plan.json"
    if not path.exists():
        plan = measured_plan(job, plan)
        run.write(path.name, json.dumps(plan.facts(), indent=1) + "\n")
        return plan
    known = json.loads(path.read_text())
    rows = [replace(row, seconds=then["seconds"]) for row, then in zip(plan.rows, known["stages"])]
    return replace(plan, rows=rows, seconds=known["seconds"], memory_bytes=known["memory_bytes"])


def _check_shares(recipe: Recipe) -> None:
    """Every process needs a row of every step."""
    size = world().size
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index} ({stage.stage}): a batch of {stage.batch} for {size} processes"
        whole = -(-stage.batch // size) * size
        if stage.batch < size:
            raise LimbeckError(at, expected="a sequence for each, or more", hint=f"--set stages.{index}.batch={size}")
        if size > 1 and getattr(stage, "sharding", "none") == "full":
            if stage.batch % size:
                raise LimbeckError(
                    f"{at}, sharded", expected="as many for each", hint=f"--set stages.{index}.batch={whole}"
                )
            if recipe.teacher_bits is not None:
                raise LimbeckError(
                    f"stages.{index}: a teacher in {recipe.teacher_bits} bits cannot be sharded",
                    expected="sharding: none, or no teacher_bits",
                )
            if getattr(stage, "optimizer", "adamw") == "muon":
                raise LimbeckError(
                    f"stages.{index}: muon needs whole matrices, and sharding leaves a part of each",
                    expected="optimizer: adamw, or sharding: none",
                )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _student(job: Job) -> PreTrainedModel:
    student = job.recipe.student
    teacher = job.teacher
    if job.recipe.teacher_bits is not None:
        # the student is what it would be without bits: it takes the checkpoint's own weights, and keeps all of them
        teacher, _ = load_teacher(assets.resolve_teacher(job.recipe.teacher), job.device)
    torch.manual_seed(job.recipe.seed)
    return convert(
        teacher,
        student.mixer,
        [site.shape.layer for site in job.sites],
        student.options,
        preset=student.preset,
        rules=[rule.model_dump(exclude_none=True) for rule in student.rules],
        copy_projections=student.copy_projections,
        share=True,
    ).requires_grad_(False)


# ---------------------------------------------------------------------- stages


def _run_stages(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Bring the student through all stages, skipping what is finished."""
    reached: dict[str, tuple[Sequences, int]] = {}  # of each text, how far it was read, in sequences of which length
    shared = job.recipe.teacher_bits is None
    for index, settings in enumerate(job.recipe.stages):
        if shared and getattr(settings, "train", "attention") not in ("mixer", "attention", "lora"):
            unshare(student)
            shared = False
        text = job.recipe.text_of(settings)
        data = job.training(text)
        if run.finished(index):
            _load(student, job.teacher, run.result(index))
            facts = run.facts(index)
            reached[_name(text)] = data, facts["position"]
            console.print(f"{settings.stage}: finished before ({facts['seconds']:.0f} s)")
            continue
        position = data.after(*reached[_name(text)]) if _name(text) in reached else 0
        if isinstance(settings, recipes.Calibrate):
            facts = _calibrate(job, student, settings, data, position)
            learnt: dict[str, nn.Parameter] = {
                f"{s.module}.{s.output}.{name}": p
                for s in job.sites
                for name, p in student.get_submodule(f"{s.module}.{s.output}").named_parameters()
            }
        else:
            stage = _stage(job, student, settings, index)
            with main_first():
                learn, held_out, cached = _texts(job, settings, text, data, position)
            with _sharded(job, student, settings, stage):
                facts = {**train(stage, settings, learn, run, index, position, held_out), **cached}
            adapters = getattr(stage, "adapters", None)
            learnt = stage.parameters() if adapters is None else adapters.merge()
        reached[_name(text)] = data, facts["position"]
        run.finish(index, dict(learnt), facts)


def _sharded(job: Job, student: PreTrainedModel, settings: Any, stage: Stage) -> contextlib.AbstractContextManager:
    if getattr(settings, "sharding", "none") == "none":
        return contextlib.nullcontext()
    blocks = [site.block for site in attention_sites(job.teacher)]
    return sharded(job.teacher, student, blocks, set(stage.parameters()))


def _stage(
    job: Job, student: PreTrainedModel, settings: recipes.Matrix | recipes.Hidden | recipes.Logits, index: int
) -> Stage:
    common = (job.teacher, student, job.sites, job.autocast)
    if isinstance(settings, recipes.Matrix):
        return Matrix(*common, rows=settings.rows, seed=job.recipe.seed)
    if isinstance(settings, recipes.Hidden):
        return Hidden(*common, target=settings.target, loss=settings.loss, train=settings.train)
    weights = Weights(**{f.name: getattr(settings, f.name) for f in fields(Weights)})
    adapters = None
    if settings.lora is not None:
        lora = settings.lora
        names = targets_of(student, job.sites, lora.targets)
        seed = job.recipe.seed + 1000 * index
        adapters = Adapters(student, names, lora.rank, lora.alpha, lora.dropout, seed)
    return Logits(
        *common,
        weights,
        train=settings.train,
        chunk=settings.chunk,
        adapters=adapters,
        checkpoint_activations=settings.checkpoint_activations,
    )


def _texts(
    job: Job, settings: recipes.Trained, text: recipes.Data, data: Sequences, position: int
) -> tuple[Sequences, Sequences, dict[str, Any]]:
    """A stage's text and the held-out text, with the teacher's signals where they are cached, and facts about those."""
    held_out = job.held_out(text)
    if getattr(settings, "cache_teacher", None) is None:
        return data, held_out, {}
    assert isinstance(settings, recipes.Logits)
    store = job.texts[_name(text)].key
    ask = partial(taught, job.teacher, store=store, top=settings.top, autocast=job.autocast)
    end = position + steps_of(settings, data.length) * settings.batch
    learn, facts = ask(data=plain(data), begin=position, end=end)
    if settings.evaluate_every:
        count = min(settings.evaluate_sequences, held_out.n_sequences)
        held_out, _ = ask(data=plain(held_out), begin=0, end=count)
    return learn, held_out, {"cached_teacher": facts}


def _calibrate(
    job: Job, student: PreTrainedModel, settings: recipes.Calibrate, data: Sequences, position: int
) -> dict[str, Any]:
    began = time.monotonic()
    length = data.length
    sequences = max(1, round(settings.tokens / length))
    fits = NormalEquations(job.teacher, student, job.sites, job.autocast, settings.weight)
    with progress("calibrate", sequences, "sequences") as advance:
        for at in range(0, sequences, settings.batch):
            size = min(settings.batch, sequences - at)
            first, mine = share(size)
            if mine:
                fits.add(data.batch(position + at + first, mine).to(job.device))
            advance(size, note=f"{(at + size) * length / (time.monotonic() - began):.0f} tokens/s")
    fits.add_processes()
    fitted = time.monotonic() - began
    position += sequences
    tried: dict[str, dict[str, float]] = {}
    ridge = settings.ridge
    if ridge == "auto":
        judge = Logits(job.teacher, student, job.sites, job.autocast, Weights())
        batch = data.batch(position, CHOOSING).to(job.device)
        position += CHOOSING
        with progress("choose the ridge", len(RIDGES), "fits") as advance:
            for candidate in RIDGES:
                unexplained = fits.solve(candidate)
                loss = float(judge.evaluate(batch)["ce"])
                tried[f"{candidate:g}"] = {"unexplained": unexplained, "loss": loss}
                advance(1, note=f"ridge {candidate:g}: loss {loss:.3f}")
        ridge = on_main(lambda: float(min(tried, key=lambda name: tried[name]["loss"])))
    unexplained = fits.solve(float(ridge))
    take_from_main(p for projection in fits.projections.values() for p in projection.parameters())
    return {
        "fit_seconds": fitted,
        "ridge": ridge,
        "unexplained": unexplained,
        "tried": tried,
        "tokens": sequences * length,
        "seconds": time.monotonic() - began,
        "position": position,
        "trained_parameters": sum(p.numel() for m in fits.projections.values() for p in m.parameters()),
    }


@torch.no_grad()
def _load(student: PreTrainedModel, teacher: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the student what a finished stage taught; what it shares with the teacher becomes its own before."""
    theirs = {id(p) for p in teacher.parameters()}
    for name, tensor in tensors.items():
        parameter = student.get_parameter(name)
        if id(parameter) in theirs:  # an adapter outside the attention was merged
            unshare(student.get_submodule(name.rpartition(".")[0]))
            parameter = student.get_parameter(name)
        parameter.copy_(tensor)


# ---------------------------------------------------------------------- results


def _hand_over(job: Job, run: RunDirectory, student: PreTrainedModel) -> dict[str, Any]:
    recipe = job.recipe
    student.eval()
    _export(job, student)
    evaluation = recipe.evaluation
    stages = [{**s.model_dump(mode="json"), **run.facts(i)} for i, s in enumerate(recipe.stages)]
    samples = {}
    if evaluation.prompt and evaluation.new_tokens:
        for name, model in (("teacher", job.teacher), ("student", student)):
            samples[name] = continuation(model, job.tokenizer, evaluation.prompt, evaluation.new_tokens)
    report = parameter_report(student, recipe.student.copy_projections)
    result = {
        "run": str(job.path),
        "teacher": recipe.teacher,
        "mixer": recipe.student.mixer,
        "mixers": by_mixer(student.config.limbeck, job.layers),
        "layers": f"{len(job.sites)} of {job.layers}",
        "text": recipe.data.source,
        "held_out": agreement(job.teacher, student, job.held_out(recipe.data), evaluation.tokens, job.autocast),
        "parameters": vars(report),
        "stages": stages,
        "memory": cache_sizes(job.teacher, student),
        "prompt": evaluation.prompt,
        "samples": samples,
        "evaluation": evaluation.model_dump(mode="json"),
        "seed": recipe.seed,
        "peak_memory_bytes": peak_memory(),
        "plan": json.loads((run.path / "plan.json").read_text()),
    }
    run.write("summary.md", write_summary(result))
    run.write("eval.json", json.dumps(result, indent=1) + "\n")
    return result


def _export(job: Job, student: PreTrainedModel) -> None:
    """Save the student as a Hugging Face folder, whole or not at all."""
    final = job.path / "student"
    temporary = job.path / ".student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with no_room_is_an_error(job.path):
        student.save_pretrained(temporary)
        job.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)


def _same_text(job: Job) -> None:
    """Raises LimbeckError where a text has changed since the run began: positions would mean other sequences."""
    path = job.path / "manifest.json"
    before = json.loads(path.read_text()).get("texts", {}) if path.exists() else {}
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


def _provenance(job: Job) -> dict[str, Any]:
    return {
        "teacher": {"name": job.recipe.teacher, "architecture": type(job.teacher).__name__},
        "tokens_key": job.text.key,
        "train_tokens": job.text.train_tokens,
        "held_out_tokens": job.text.held_out_tokens,
        "texts": {name: {"key": text.key, "files": text.files} for name, text in job.texts.items()},
        "seed": job.recipe.seed,
        "device": str(job.device),
        "backend": "torch",
    }
