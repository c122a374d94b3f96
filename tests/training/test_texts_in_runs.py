"""Mixtures, streams, conversations and lengths of stages in whole runs on a tiny teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from limbeck import LimbeckError
from limbeck.cli.distill import build_recipe
from limbeck.core.recipe import Recipe
from limbeck.core.signals import TrainingInterrupted
from limbeck.data.mixture import MixtureDataset
from limbeck.data.streaming import StreamingDataset
from limbeck.evaluation.measure import get_measure, run_measure
from limbeck.evaluation.subject import SubjectLoader
from limbeck.training import pipeline, setup
from limbeck.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("own_cache")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path, tokenizer):
    """A mixture that is streamed, a longer stage, and a stage of conversations; takes seconds."""
    shards = tmp_path / "shards"
    shards.mkdir()
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    for i in range(4):
        (shards / f"{i}.jsonl").write_text("".join(lines[i::4]), encoding="utf-8")
    chats = tmp_path / "chats.jsonl"
    words = [json.loads(line)["text"].split()[:6] for line in lines]
    chats.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": " ".join(w)},
                        {"role": "assistant", "content": " ".join(w[::-1])},
                    ]
                }
            )
            + "\n"
            for w in words
        ),
        encoding="utf-8",
    )
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    settings = json.loads((teacher / "tokenizer_config.json").read_text(encoding="utf-8"))
    (teacher / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": TEMPLATE}), encoding="utf-8"
    )

    def make(**changes) -> Recipe:
        mixed = [{"source": str(shards), "weight": 0.7}, {"source": str(corpus), "weight": 0.3}]
        raw = {
            "teacher": str(teacher),
            "student": {"mixer": "gla"},
            "data": {"sources": mixed, "seq_len": 32, "held_out": 0.2, "streaming": True},
            "stages": [
                {"stage": "calibrate", "tokens": 256, "ridge": 0.01},
                {"stage": "hidden", "tokens": 512, "batch_size": 4},
                {"stage": "logits", "tokens": 512, "batch_size": 2, "seq_len": 64},
                {
                    "stage": "logits",
                    "tokens": 256,
                    "ce": 1.0,
                    "kl": 0.0,
                    "data": {"source": str(chats), "seq_len": 32, "held_out": 0.2},
                },
            ],
            "evaluation": {"tokens": 128, "prompt": None, "new_tokens": 0},
            "checkpoint_seconds": 1e-6,
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


def weights(made: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(made.out) / "student" / "model.safetensors")


@pytest.mark.slow
def test_a_run_of_all_kinds_of_text_ends_the_same_when_it_is_stopped_twice(recipe, tmp_path, monkeypatch):
    straight = recipe(out=str(tmp_path / "straight"))
    result = pipeline.distill(straight)
    assert [stage["tokens"] for stage in result["stages"]] == [256, 512, 512, 256]
    assert [stage["position"] for stage in result["stages"]][:2] == [8, 24]
    assert result["text"].startswith("0.7 ")
    assert Recipe.load(tmp_path / "straight" / "recipe.yaml") == straight
    texts = json.loads((tmp_path / "straight" / "manifest.json").read_text(encoding="utf-8"))["texts"]
    assert sorted(len(text["files"]) for text in texts.values()) == [1, 5]

    made, stopped, batch = recipe(), [], MixtureDataset.batch

    def interrupted(self, position, size):
        if position in (16, 20, 32) and position not in stopped:
            stopped.append(position)
            raise TrainingInterrupted("asked to stop")
        return batch(self, position, size)

    monkeypatch.setattr(MixtureDataset, "batch", interrupted)
    for _ in range(5):
        try:
            pipeline.distill(made)
            break
        except TrainingInterrupted:
            continue
    assert len(stopped) >= 2
    expected, got = weights(straight), weights(made)
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    subject = SubjectLoader().load(str(tmp_path / "run"))
    again = run_measure(get_measure("agreement"), subject, {"tokens": 128, "length": 32})
    assert again.values["perplexity"] == pytest.approx(result["held_out"]["student_perplexity"], rel=1e-4)


def test_plan_and_texts_follow_the_stages(recipe):
    made = recipe()
    ready = setup.prepare_job(made)
    assert [row.tokens for row in make_plan(made, ready.teacher, ready.sites).stages] == [256, 512, 512, 256]
    first, second, third = (ready.train_dataset(made.text_of(made.stages[i])) for i in (1, 2, 3))
    assert isinstance(first, MixtureDataset)
    assert isinstance(first.datasets[0], StreamingDataset)
    assert (first.length, second.length, third.length) == (32, 64, 32)
    at = second.position_after(first, 24)
    assert not {tuple(r) for r in first.batch(0, 24).input_ids.unfold(1, 16, 16).reshape(-1, 16).tolist()} & {
        tuple(r) for r in second.batch(at, 6).input_ids.unfold(1, 16, 16).reshape(-1, 16).tolist()
    }
    chat = third.batch(0, 4)
    assert 0 < chat.n_targets < chat.targets.numel() / 1.5


def test_a_text_that_changed_since_the_run_began_is_refused_by_name(recipe, tmp_path):
    stages = [{"stage": "calibrate", "tokens": 128, "ridge": 0.01}]
    pipeline.distill(recipe(stages=stages))
    (tmp_path / "run" / "eval.json").unlink()
    (tmp_path / "shards" / "3.jsonl").unlink()
    with pytest.raises(LimbeckError, match=r"the text has changed since the run .*3\.jsonl is missing"):
        pipeline.distill(recipe(stages=stages))


def test_a_stage_longer_than_the_teacher_is_refused(recipe):
    stages = [{"stage": "hidden", "tokens": 128, "seq_len": 10**6}]
    with pytest.raises(LimbeckError, match=r"(?s)1000000 tokens.*stages\.0\.seq_len of at most"):
        setup.prepare_job(recipe(stages=stages))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "a", "sources": [{"source": "b"}]}, "source and sources exclude each other"),
        ({"sources": []}, "data.sources"),
        ({"sources": [{"source": "b", "weight": 0}]}, "data.sources.0.weight is 0"),
        ({"sources": [{"source": "b", "wieght": 1}]}, r"unknown key 'data.sources.0.wieght'.*did you mean 'weight'"),
        ({"streaming": True, "max_tokens": 5}, "max_tokens limits text that is tokenized in advance"),
        ({"sources": [{"source": "b"}], "text_field": "x"}, "text_field has to be set for each source"),
    ],
)
def test_impossible_texts_are_refused(data, message):
    with pytest.raises(LimbeckError, match=f"(?s){message}"):
        Recipe.parse({"data": data})


def test_a_text_on_the_command_line_takes_the_place_of_several(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"data": {"sources": [{"source": "a"}, {"source": "b"}]}}), encoding="utf-8")
    assert Recipe.load(path).data.source == "1 a + 1 b"
    nothing = dict.fromkeys(("teacher", "student", "layers", "stages", "tokens", "out"))
    made = build_recipe(str(path), **nothing, data="c.jsonl", settings=[])
    assert (made.data.source, made.data.sources) == ("c.jsonl", None)
    assert (
        build_recipe(str(path), **nothing, data=None, settings=["data.seq_len=64"]).data.sources
        == Recipe.load(path).data.sources
    )
