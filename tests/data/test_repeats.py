"""Repeated lists: rows, and the source of that name in a recipe, alone and beside text."""

import json

import pytest
import torch
from typer.testing import CliRunner

from limbeck import LimbeckError
from limbeck.core.recipe import Recipe, TeacherRecipe
from limbeck.core.text_settings import Data
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.packing import IGNORE_INDEX
from limbeck.data.synthetic import MIN_LIST_TOKENS, RepeatedSequenceDataset, RepeatedSequenceSource
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline
from limbeck.training.pretraining import held_out_perplexity

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_row_of_repeats_is_one_list_and_asks_only_for_what_it_has_shown():
    repeats = RepeatedSequenceDataset(vocab_size=50, length=24, seed=3)
    batch = repeats.batch(5, 40)
    assert batch.input_ids.shape == batch.targets.shape == (40, 24)
    periods = set()
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist()):
        period = next(n for n in range(1, 25) if ids[n:] == ids[: 24 - n])
        assert len(set(ids[:period])) == period
        assert 0 not in ids
        assert targets[:period] == [IGNORE_INDEX] * period
        assert targets[period:-1] == ids[period + 1 :]
        periods.add(period)
    assert min(periods) == MIN_LIST_TOKENS
    assert max(periods) == 12
    torch.testing.assert_close(repeats.batch(9, 1).input_ids, batch.input_ids[4:5])
    with pytest.raises(LimbeckError, match="repeats of 6 tokens"):
        RepeatedSequenceDataset(vocab_size=50, length=6)


def opened(tokenizer, **data) -> TextData:
    return open_text_data(
        Data.model_validate({"seq_len": 32, "held_out": 0.2, **data}), tokenizer, make_tiny_model("llama")
    )


def test_special_tokens_are_in_no_list(tokenizer):
    lists = RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=1000)
    assert lists.vocab_size == len(tokenizer)
    ids = lists.train_sequences(64, seed=0).batch(0, 50).input_ids
    assert set(ids.flatten().tolist()) == set(range(len(tokenizer))) - {0, *tokenizer.all_special_ids}
    assert (
        RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=50)
        .train_sequences(64, seed=0)
        .batch(0, 50)
        .input_ids.max()
        == 49
    )
    assert (
        lists.key
        == RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=1000).key
        != RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=50).key
    )


def test_lists_alone_are_measured_on_other_rows(tokenizer):
    text = opened(tokenizer, source="repeats")
    assert (text.train_tokens, text.held_out_tokens) == (None, 0)
    training, held_out = text.train_sequences(32, seed=0), text.held_out_sequences(32)
    assert not torch.equal(training.batch(0, 8).input_ids, held_out.batch(0, 8).input_ids)
    assert not torch.equal(training.batch(0, 8).input_ids, text.train_sequences(32, seed=1).batch(0, 8).input_ids)
    assert (held_out.batch(0, 8).targets == IGNORE_INDEX).any()


def test_lists_beside_text(tokenizer, corpus):
    """They come in their share, and what is measured on is the text alone."""
    text = opened(tokenizer, sources=[{"source": str(corpus), "weight": 3.0}, {"source": "repeats", "weight": 1.0}])
    alone = opened(tokenizer, source=str(corpus))
    assert text.train_tokens is None
    assert text.held_out_tokens == alone.held_out_tokens
    assert torch.equal(
        text.held_out_sequences(32).batch(0, 4).input_ids, alone.held_out_sequences(32).batch(0, 4).input_ids
    )
    batch = text.train_sequences(32, seed=0).batch(0, 40)
    periodic = [any(row[n:] == row[: 32 - n] for n in range(MIN_LIST_TOKENS, 17)) for row in batch.input_ids.tolist()]
    assert sum(periodic) == 10
    assert text.key != alone.key


def test_a_teacher_that_reads_lists_beside_text_is_measured_on_the_text(tokenizer, corpus):
    data = {"seq_len": 32, "held_out": 0.2, "sources": [{"source": str(corpus)}, {"source": "repeats"}]}
    stages = [{"stage": "next_token", "tokens": 64}]
    recipe = TeacherRecipe.parse({"name": "x", "model": {}, "vocab_size": 400, "data": data, "stages": stages})
    found = held_out_perplexity(recipe, make_tiny_model("llama").float().eval(), opened(tokenizer, **data))
    assert found.keys() == {str(corpus)}


def test_a_run_with_a_stage_on_lists(teacher_folder, corpus, tmp_path):
    """Its own text is what it is measured on; lists are something to measure on as well."""
    raw = {
        "name": "lists",
        "teacher": str(teacher_folder),
        "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
        "stages": [
            {"stage": "hidden", "tokens": 512, "seq_len": 16, "data": {"source": "repeats"}},
            {
                "stage": "logits",
                "tokens": 512,
                "data": {"source": "repeats", "seq_len": 32},
                "ce": 1.0,
                "eval_steps": 4,
            },
            {"stage": "logits", "tokens": 256},
        ],
        "evaluation": {"tokens": 256, "prompt": None, "new_tokens": 0},
    }
    result = pipeline.distill(Recipe.parse({**raw, "out": str(tmp_path / "run")}))
    assert result["held_out"]["student_perplexity"] > 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["train_tokens"] > 0
    out = str(tmp_path / "eval")
    given = ["eval", str(tmp_path / "run"), "--data", "repeats", "--length", "32", "--tokens", "64", "--out", out]
    from limbeck.cli import app
    from limbeck.cli import eval as _  # noqa: F401

    assert CliRunner().invoke(app, given, catch_exceptions=False).exit_code == 0
