"""Sequences without a target: passed over, counted in no mean, and no run begins where there is no target at all."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.signals import TrainingInterrupted
from limbeck.data.packing import (
    IGNORE_INDEX,
    PackedDataset,
    count_eval_sequences,
    count_sequences_with_targets,
    take_sequences_with_targets,
)
from limbeck.data.token_store import Split
from limbeck.evaluation.agreement import compare_tokens
from limbeck.models import convert
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.loading import load_model_and_tokenizer
from limbeck.training import pipeline, setup
from limbeck.training.pretraining import NextTokenStage
from limbeck.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_cache")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
LONG = "the work of the licensor and any contribution to the work that was made for it "


def split_of(rng, documents: int, share: float) -> Split:
    """Documents of 1 to 20 tokens, of whose tokens a share is learnt, in a few documents."""
    lengths = rng.integers(1, 20, documents)
    mask = np.concatenate([np.full(n, rng.random() < share, np.uint8) for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split("train", rng.integers(3, 90, offsets[-1]).astype(np.uint16), offsets, mask)


@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
def test_reading_on_is_a_function_of_the_position_and_leaves_no_target_out(share):
    data = PackedDataset(split_of(np.random.default_rng(0), 400, share), 16, seed=3)
    every = data.batch(0, 2 * data.n_sequences)
    wanted = every.select_rows((every.targets != IGNORE_INDEX).any(1))
    found, position = [], 0
    while position < 2 * data.n_sequences - 100:
        batch, position = take_sequences_with_targets(data, position, 3)
        found.append(batch.input_ids)
        assert (batch.targets != IGNORE_INDEX).any(1).all()
        assert len(batch.input_ids) == 3
    torch.testing.assert_close(torch.cat(found), wanted.input_ids[: 3 * len(found)])


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("masked", [True, False])
def test_how_many_have_a_target_is_counted_exactly(share, masked):
    split = split_of(np.random.default_rng(1), 300, share)
    if not masked:  # documents of one token have nothing to foretell
        offsets = np.concatenate([np.arange(200), 200 + np.arange(11) * 5])
        split = Split("train", np.ones(250, np.uint16), offsets)
    data = PackedDataset(split, 16, shuffle=False)
    has = (data.batch(0, data.n_sequences).targets != IGNORE_INDEX).any(1)
    assert count_sequences_with_targets(split, 16) == (int(has.sum()), data.n_sequences)
    if has.any():
        assert count_eval_sequences(data, 1) == int(has.nonzero()[0]) + 1
    else:
        with pytest.raises(LimbeckError, match="no token"):
            count_eval_sequences(data, 1)
        with pytest.raises(LimbeckError, match="no token"):
            take_sequences_with_targets(data, 0, 1)


def say(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TEXTS = {
    # of most sequences the question fills all; of ready tokens most documents are a lone EOS
    "short answers": lambda i: say(f"{i} {LONG * 4}", "so"),
    "some long answers": lambda i: say(f"{i} {LONG * 3}", LONG if i % 4 == 0 else "no"),
    "ready tokens": None,
}


@pytest.fixture
def recipe(teacher_folder, tmp_path):
    def make(text: str, **changes) -> Recipe:
        teacher = tmp_path / "teacher"
        if not teacher.exists():
            shutil.copytree(teacher_folder, teacher)
            (teacher / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        source = tmp_path / text.replace(" ", "-")
        if TEXTS[text] is None:
            source.mkdir(exist_ok=True)
            rng = np.random.default_rng(0)
            parts = [[*rng.integers(5, 90, 9), 2] if rng.random() < 0.02 else [2] for _ in range(6000)]
            np.concatenate(parts).astype("<u2").tofile(source / "a.bin")
            (source / "index.json").write_text('{"dtype": "uint16"}', encoding="utf-8")
        else:
            source = source.with_suffix(".jsonl")
            rows = [json.dumps(TEXTS[text](i)) + "\n" for i in range(120)]
            source.write_text("".join(rows), encoding="utf-8")
        stage = {"stage": "logits", "tokens": 512, "batch_size": 2, "ce": 1.0, "kl": 0.0, "lr": 1e-3}
        stage |= {"eval_steps": 1, "eval_sequences": 40, **changes.pop("stage", {})}
        raw = {
            "teacher": str(teacher),
            "student": {"mixer": "gla"},
            "data": {"source": str(source), "seq_len": 32, "held_out": 0.2},
            "stages": [stage],
            "evaluation": {"tokens": 40 * 32, "prompt": None},
            "out": str(tmp_path / "run"),
            "checkpoint_seconds": 1e9,
        }
        return Recipe.parse(raw | changes)

    return make


def lines_of(out: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("text", TEXTS)
def test_the_held_out_loss_is_what_the_evaluation_measures_and_no_step_is_empty(text, recipe, capsys):
    made = recipe(text)
    result = pipeline.distill(made)
    lines = lines_of(made.out)
    assert lines[-1]["held_out_loss"] == pytest.approx(math.log(result["held_out"]["student_perplexity"]), abs=1e-6)
    assert len(lines) == 8
    assert all(line["loss"] > 1 and line["held_out_loss"] > 1 and line["grad_norm"] > 0 for line in lines)
    told = capsys.readouterr().err
    assert "train sequences of 32 tokens have a target; stage logits skips the others" in told
    # the same by hand, document by document and one sequence at a time
    ready = setup.prepare_job(made)
    student, _ = load_model_and_tokenizer(f"{made.out}/student")
    data = ready.held_out_dataset(made.data)
    parts = []
    with torch.no_grad():
        for at in range(result["held_out"]["sequences"]):
            batch = data.batch(at, 1)
            hidden = run_backbone(student, batch)
            parts.append(compare_tokens(LMHead(student), hidden, LMHead(student), hidden, batch.targets).get("ce"))
    by_hand = torch.cat([part for part in parts if part is not None]).double().mean()
    assert lines[-1]["held_out_loss"] == pytest.approx(float(by_hand), abs=1e-6)


def test_the_first_held_out_sequences_may_hold_no_target(recipe):
    """Patience counts losses that are there, and an evaluation of one sequence reads on to one with a target."""
    made = recipe("short answers", stage={"eval_sequences": 1, "patience": 2}, evaluation={"tokens": 32})
    result = pipeline.distill(made)
    losses = [line["held_out_loss"] for line in lines_of(made.out)]
    assert all(loss > 1 for loss in losses)
    assert len(losses) == 8, "it gets better in every step"
    assert result["held_out"]["targets"] > 0


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("text", ["short answers", "ready tokens"])
def test_a_resumed_stage_reads_on_where_it_stopped(text, recipe, tmp_path, monkeypatch):
    whole, cut = recipe(text, out=str(tmp_path / "whole")), recipe(text, out=str(tmp_path / "cut"))
    pipeline.distill(whole)
    real = Trainer.train_step

    def stop_after_three(self):
        if self.step == 3:
            self.save_checkpoint()
            raise TrainingInterrupted("now")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_three)
        with pytest.raises(TrainingInterrupted):
            pipeline.distill(cut)
    pipeline.distill(cut)
    a, b = (load_file(f"{made.out}/student/model.safetensors") for made in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    skipped = {"tokens_per_second"}
    assert [{k: v for k, v in line.items() if k not in skipped} for line in lines_of(whole.out)] == [
        {k: v for k, v in line.items() if k not in skipped} for line in lines_of(cut.out)
    ]


def test_a_cached_teacher_is_asked_of_what_is_read(recipe):
    made = recipe("short answers", stage={"ce": 0.5, "top_kl": 0.5, "top_k": 8, "cache_teacher": "top-k"})
    pipeline.distill(made)
    assert [line["loss"] > 1 for line in lines_of(made.out)] == [True] * 8


def test_the_ridge_is_chosen_on_sequences_with_targets(recipe):
    made = recipe("short answers")
    stages = [{"stage": "calibrate", "tokens": 256}, made.stages[0].model_dump()]
    result = pipeline.distill(Recipe.parse({**made.model_dump(mode="json"), "stages": stages}))
    assert all(one["loss"] > 1 for one in result["stages"][0]["tried"].values())


@pytest.mark.parametrize("text", ["no answer to learn", "lone ends", "a limit before the first answer"])
def test_a_text_without_any_target_is_refused_before_anything_is_written(text, recipe, tmp_path):
    made = recipe("ready tokens" if text == "lone ends" else "short answers")
    source = Path(made.data.source)
    raw = made.model_dump(mode="json")
    if text == "lone ends":
        np.full(6000, 2, "<u2").tofile(source / "a.bin")
    elif text == "no answer to learn":
        template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% else %}"
        template += "{{ m.content }}{% endif %}{% endfor %}"
        (tmp_path / "teacher" / "chat_template.jinja").write_text(template, encoding="utf-8")
        rows = [json.dumps(say(f"{i} {LONG}", "yes")) + "\n" for i in range(80)]
        source.write_text("".join(rows), encoding="utf-8")
    else:
        rows = [json.dumps(say(f"{i} {LONG * 40}", "yes")) + "\n" for i in range(40)]
        source.write_text("".join(rows), encoding="utf-8")
        raw["data"]["max_tokens"] = 600
    with pytest.raises(LimbeckError, match=r"held_out|training target|dropped"):
        pipeline.distill(Recipe.parse(raw))
    assert not Path(made.out).exists()


def test_losses_of_no_target_are_not_there(teacher_folder):
    """A mean over nothing is no zero, in either of the two stages that learn from targets."""
    from transformers import AutoModelForCausalLM

    from limbeck.models import find_attention_sites
    from limbeck.models.hooks import DistillationPair
    from limbeck.training.logit_distillation import LogitsStage
    from limbeck.training.losses import ObjectiveWeights

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    data = PackedDataset(split_of(np.random.default_rng(0), 100, 0.0), 16)
    batch = data.batch(0, 2)
    pair = DistillationPair(teacher, convert(teacher, "gla"), find_attention_sites(teacher), nullcontext)
    assert LogitsStage(pair, ObjectiveWeights(ce=1.0)).evaluate(batch) == {}
    assert NextTokenStage(teacher).evaluate(batch) == {}
