"""Rows for recall: repeated pieces of real text, and whole documents from their start."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from limbeck import LimbeckError
from limbeck.core.recipe import Recipe, TeacherRecipe
from limbeck.core.signals import TrainingInterrupted
from limbeck.core.text_settings import Data
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.packing import IGNORE_INDEX
from limbeck.data.synthetic import MIN_PIECE_TOKENS, RepeatedTextDataset, RepeatedTextSource
from limbeck.data.token_store import Split
from limbeck.data.whole_documents import WholeDocumentDataset
from limbeck.evaluation.subject import find_training_text
from limbeck.report.privacy import strip_local_paths
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline, setup
from limbeck.training.job import dataset_key

pytestmark = pytest.mark.usefixtures("own_cache")


def make_split(sizes: list[int], name: str = "train", prefix_ids: tuple[int, ...] = (), mask=None) -> Split:
    """Documents of these sizes in which every token is another one, behind the prefix."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.arange(10, 10 + offsets[-1]).astype(np.uint32)
    for begin in offsets[:-1]:
        tokens[begin : begin + len(prefix_ids)] = prefix_ids
    return Split(name, tokens, offsets, mask, prefix_ids)


def parse_row(ids: list[int]) -> tuple[int, int]:
    """Return where the repeat begins in a row, and its distance."""
    seen = {token: place for place, token in enumerate(ids)}
    first = {token: place for place, token in reversed(list(enumerate(ids)))}
    begin = next(place for place, token in enumerate(ids) if first[token] != place)
    assert len(seen) == begin
    return begin, begin - first[ids[begin]]


# ---------------------------------------------------------------------- repeated text


def test_a_row_is_consecutive_text_with_a_piece_that_comes_again():
    length = 192
    data = RepeatedTextDataset(make_split([700, 50, 900]), length, seed=3)
    batch = data.batch(5, 300)
    assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (300, length)
    assert torch.equal(batch.position_ids[0], torch.arange(length))
    sizes, distances = set(), set()
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist()):
        begin, distance = parse_row(ids)
        repeated = length + 1 - begin
        assert ids[:begin] == list(range(ids[0], ids[0] + begin)), "X A B are neighbors in the text"
        assert ids[begin:] == ids[begin - distance : length - distance]
        # the end of a document is followed by nothing, and that A comes again cannot be known before it does
        ends = {place for place, token in enumerate(ids) if token + 1 in (710, 760)}
        unknown = {*ends, begin - 1}
        assert targets[:-1] == [IGNORE_INDEX if place in unknown else token for place, token in enumerate(ids[1:])]
        assert targets[-1] in (ids[-1] + 1, IGNORE_INDEX)
        sizes.add(repeated)
        distances.add(distance)
    assert min(sizes) >= MIN_PIECE_TOKENS
    assert max(sizes) <= length // 3
    assert len(sizes) > 25
    assert min(distances) < 0.4 * length
    assert max(distances) > 0.8 * length, "up to nearly the whole row"


def test_rows_are_a_function_of_seed_length_and_position():
    split = make_split([5000])
    one, other = RepeatedTextDataset(split, 128, seed=1), RepeatedTextDataset(split, 128, seed=2)
    assert torch.equal(one.batch(7, 3).input_ids, one.batch(5, 8).input_ids[2:5])
    assert torch.equal(one.batch(7, 3).targets, RepeatedTextDataset(split, 128, seed=1).batch(7, 3).targets)
    assert not torch.equal(one.batch(7, 3).input_ids, other.batch(7, 3).input_ids)
    assert len({tuple(row) for row in one.batch(0, 200).input_ids.tolist()}) == 200


def test_a_row_lies_in_one_document_that_is_long_enough():
    """Documents come in proportion to their length; a short one goes on with the next."""
    split = make_split([4000, 60, 2000])
    begins = []
    for ids in RepeatedTextDataset(split, 120, seed=0).batch(0, 400).input_ids.tolist():
        documents = np.searchsorted(split.offsets, np.array(ids) - 10, side="right") - 1
        begins.append(int(documents[0]))
        if documents[0] in (0, 2):
            assert set(documents.tolist()) == {int(documents[0])}
    assert 0.55 < begins.count(0) / 400 < 0.75
    assert begins.count(1) > 0


def test_a_prefix_begins_every_row_and_is_no_target():
    split = make_split([300, 40, 40, 300], prefix_ids=(1, 2))
    batch = RepeatedTextDataset(split, 120, seed=0).batch(0, 100)
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist()):
        assert ids[:2] == [1, 2]
        assert targets[:2] == [IGNORE_INDEX] * 2
        assert not {1, 2} & set(targets)


def test_only_what_the_mask_allows_is_a_target():
    mask = (np.arange(1000) % 3 == 0).astype(np.uint8)
    batch = RepeatedTextDataset(make_split([1000], mask=mask), 120, seed=0).batch(0, 20)
    found = batch.targets[batch.targets != IGNORE_INDEX]
    assert len(found) > 500
    assert bool(((found - 10) % 3 == 0).all())


def test_lengths_that_have_no_such_row_are_refused():
    split = make_split([400])
    with pytest.raises(LimbeckError, match=r"(?s)in sequences of 95 tokens.*--set data.seq_len=96"):
        RepeatedTextDataset(split, 95)
    with pytest.raises(LimbeckError, match=r"(?s)from 400 train tokens.*--set data.seq_len=399"):
        RepeatedTextDataset(split, 400)
    assert RepeatedTextDataset(split, 96).batch(0, 1).input_ids.shape == (1, 96)


def opened(tokenizer, **data) -> TextData:
    return open_text_data(
        Data.model_validate({"seq_len": 96, "held_out": 0.2, **data}), tokenizer, make_tiny_model("llama")
    )


def find_in(split: Split, stretch: list[int]) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(split.tokens.astype(np.int64), len(stretch))
    return bool((windows == np.array(stretch)).all(1).any())


def test_training_rows_come_from_training_documents_and_the_others_from_held_out_ones(tokenizer, corpus):
    text = opened(tokenizer, source=f"repeated-text:{corpus}")
    (part,) = text.sources
    assert isinstance(part, RepeatedTextSource)
    assert (text.train_tokens, text.held_out_tokens) == (None, 0)
    assert text.content_fingerprints == opened(tokenizer, source=str(corpus)).content_fingerprints
    assert text.key != part.store.key
    assert set(text.files) == {f"repeated-text:{corpus}: corpus.jsonl"}
    splits = {"train": part.store.train, "held_out": part.store.held_out}
    for name, dataset in (
        ("train", text.train_sequences(96, seed=0)),
        ("held_out", text.held_out_sequences(96)),
    ):
        other = splits["held_out" if name == "train" else "train"]
        for ids in dataset.batch(0, 30).input_ids.tolist():
            # the row's beginning, before anything repeats, behind the prefix
            stretch = ids[len(part.store.train.prefix_ids) :][:60]
            assert find_in(splits[name], stretch)
            assert not find_in(other, stretch)


def test_beside_text_it_comes_in_its_share_and_is_not_evaluated_on(tokenizer, corpus):
    sources = [{"source": str(corpus), "weight": 3.0}, {"source": f"repeated-text:{corpus}", "weight": 1.0}]
    text, alone = opened(tokenizer, sources=sources), opened(tokenizer, source=str(corpus))
    held_out = text.held_out_sequences(96).batch(0, 2)
    assert torch.equal(held_out.input_ids, alone.held_out_sequences(96).batch(0, 2).input_ids)
    rows = text.train_sequences(96, seed=0).batch(0, 40)
    repeated = opened(tokenizer, source=f"repeated-text:{corpus}").train_sequences(96, seed=0).batch(0, 10)
    got = {tuple(row) for row in rows.input_ids.tolist()}
    assert len(got & {tuple(row) for row in repeated.input_ids.tolist()}) == 10
    assert text.key != alone.key


def test_the_name_alone_means_the_recipes_own_text():
    recipe = Recipe.parse(
        {
            "data": {"source": "a.jsonl", "text_field": "body", "held_out": 0.1, "max_tokens": 5000},
            "stages": [
                {"stage": "hidden", "tokens": 64, "data": {"source": "repeated-text", "seq_len": 128}},
                {
                    "stage": "hidden",
                    "tokens": 64,
                    "data": {"sources": [{"source": "repeats"}, {"source": "repeated-text"}]},
                },
                {"stage": "hidden", "tokens": 64, "data": {"source": "repeated-text:b.jsonl"}},
            ],
        }
    )
    first, second, third = (stage.data for stage in recipe.stages)
    assert (first.source, first.text_field, first.held_out, first.max_tokens, first.seq_len) == (
        "repeated-text:a.jsonl",
        "body",
        0.1,
        5000,
        128,
    )
    assert [one.source for one in second.sources] == ["repeats", "repeated-text:a.jsonl"]
    assert (second.sources[1].text_field, second.held_out) == ("body", 0.1)
    assert third.source == "repeated-text:b.jsonl"
    mixed = Recipe.parse({"data": {"sources": [{"source": "repeated-text", "weight": 2}, {"source": "a.jsonl"}]}})
    assert mixed.data.source == "2 repeated-text:a.jsonl + 1 a.jsonl"
    assert Recipe.parse(json.loads(mixed.model_dump_json())) == mixed
    with pytest.raises(LimbeckError, match="repeated-text needs a text"):
        Recipe.parse({"data": {"source": "repeated-text"}})
    with pytest.raises(LimbeckError, match="without streaming"):
        Recipe.parse({"data": {"source": "repeated-text:a", "streaming": True}})


def test_a_text_that_would_be_split_twice_is_refused(teacher_folder, corpus, tmp_path):
    stage = {"stage": "hidden", "tokens": 512, "data": {"source": f"repeated-text:{corpus}", "seq_len": 96}}
    recipe = Recipe.parse(
        {
            "teacher": str(teacher_folder),
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [stage],
            "out": str(tmp_path / "run"),
        }
    )
    with pytest.raises(
        LimbeckError, match=r"held-out share of 0\.2 in data, and of 0\.02 in stages\.0\.data"
    ) as raised:
        setup.prepare_job(recipe)
    assert "--set stages.0.data.held_out=0.2" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_paths_in_names_are_cut_before_publishing(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("{}", encoding="utf-8")
    assert strip_local_paths(f"repeated-text:{path}") == "repeated-text:notes.jsonl"
    assert strip_local_paths(f"2 repeated-text:{path} + 1 embedded") == "2 repeated-text:notes.jsonl + 1 embedded"
    assert strip_local_paths("repeated-text:embedded") == "repeated-text:embedded"


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    def make(name: str) -> Recipe:
        mixture = [{"source": str(corpus)}, {"source": "repeated-text"}]
        raw = {
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "hidden", "tokens": 768, "batch_size": 2, "data": {"source": "repeated-text", "seq_len": 96}},
                {
                    "stage": "logits",
                    "tokens": 768,
                    "ce": 1.0,
                    "eval_steps": 4,
                    "data": {"sources": mixture, "seq_len": 96},
                },
            ],
            "evaluation": {"tokens": 128, "prompt": None, "new_tokens": 0},
            "checkpoint_seconds": 1e-6,
            "trackers": [],
            "out": str(tmp_path / name),
        }
        return Recipe.parse(raw)

    return make


def test_a_run_on_repeated_text_ends_the_same_when_it_is_stopped(recipe, corpus, monkeypatch):
    straight, stopped = recipe("straight"), recipe("stopped")
    result = pipeline.distill(straight, measure_times=False)
    assert [stage["tokens"] for stage in result["stages"]] == [768, 768]
    batch, calls = RepeatedTextDataset.batch, []

    def interrupted(self, position, size):
        calls.append(position)
        if len(calls) in (3, 6):
            raise TrainingInterrupted("asked to stop")
        return batch(self, position, size)

    monkeypatch.setattr(RepeatedTextDataset, "batch", interrupted)
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            pipeline.distill(stopped, measure_times=False)
    pipeline.distill(stopped, measure_times=False)
    ours, theirs = (load_file(Path(made.out) / "student" / "model.safetensors") for made in (stopped, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert pipeline.distill(stopped, measure_times=False)["run"] == stopped.out, "a finished run is found again"
    found = find_training_text(str(corpus), straight, Path(straight.out))
    assert (found.source, found.held_out) == (str(corpus), 0.2)


# ---------------------------------------------------------------------- whole documents


def test_each_long_document_comes_once_an_epoch_from_its_start():
    split = make_split([64, 65, 10, 200, 63, 64])
    data = WholeDocumentDataset(split, 64, seed=5)
    assert data.n_sequences == 4
    epochs = [data.batch(4 * epoch, 4) for epoch in range(3)]
    starts = {10 + int(split.offsets[i]) for i in (0, 1, 3, 5)}
    for batch in epochs:
        assert set(batch.input_ids[:, 0].tolist()) == starts
        assert torch.equal(batch.input_ids, batch.input_ids[:, :1] + torch.arange(64))
        assert torch.equal(batch.position_ids, torch.arange(64).repeat(4, 1))
        assert torch.equal(batch.targets[:, :-1], batch.input_ids[:, 1:])
        # documents of just 64 tokens have no token after their last
        for ids, last in zip(batch.input_ids.tolist(), batch.targets[:, -1].tolist()):
            assert last == (IGNORE_INDEX if ids[0] - 10 in (split.offsets[0], split.offsets[5]) else ids[-1] + 1)
    assert len({tuple(batch.input_ids[:, 0].tolist()) for batch in epochs}) > 1
    assert torch.equal(data.batch(3, 2).input_ids, torch.cat([epochs[0].input_ids[3:], epochs[1].input_ids[:1]]))
    fixed = WholeDocumentDataset(split, 64, shuffle=False).batch(0, 4).input_ids[:, 0]
    assert fixed.tolist() == sorted(starts)
    with pytest.raises(LimbeckError, match="no train document has 201 tokens, the longest has 200"):
        WholeDocumentDataset(split, 201)


def test_a_longer_length_goes_on_behind_what_was_read():
    rng = np.random.default_rng(0)
    split = make_split(rng.integers(20, 400, 200).tolist())
    short, long = WholeDocumentDataset(split, 32, seed=1), WholeDocumentDataset(split, 128, seed=1)
    for read, then in ((short, long), (long, short), (short, short)):
        for position in (0, 1, 17, read.n_sequences - 1, read.n_sequences + 5):
            epoch, row = divmod(position, read.n_sequences)
            done = read.batch(epoch * read.n_sequences, row).input_ids[:, 0].tolist() if row else []
            start = then.position_after(read, position)
            assert start // then.n_sequences in (epoch, epoch + 1)
            left = (epoch + 1) * then.n_sequences - start
            rest = then.batch(start, left).input_ids[:, 0].tolist() if left else []
            assert not set(done) & set(rest), "no document twice in an epoch"
    assert short.position_after(short, 17) == 17


def test_whole_documents_of_a_recipe(tokenizer, corpus):
    text = opened(tokenizer, source=str(corpus), documents="whole", seq_len=100)
    packed = opened(tokenizer, source=str(corpus), seq_len=100)
    sizes = np.diff(text.sources[0].train.offsets)
    train, held_out = text.train_sequences(100, seed=0), text.held_out_sequences(100)
    assert train.n_sequences == (sizes >= 100).sum() < len(sizes)
    batch = held_out.batch(0, held_out.n_sequences)
    offsets, tokens = text.sources[0].held_out.offsets, text.sources[0].held_out.tokens
    starts = [tokens[begin : begin + 100].tolist() for begin, end in pairwise(offsets) if end - begin >= 100]
    assert batch.input_ids.tolist() == starts
    assert text.key == packed.key, "the same tokens"
    with pytest.raises(LimbeckError, match="without streaming"):
        Data(source="a", documents="whole", streaming=True)


def test_documents_too_short_are_refused_before_anything_is_written(teacher_folder, corpus, tmp_path):
    data = {"source": str(corpus), "seq_len": 250, "held_out": 0.2, "documents": "whole"}
    texts = [line for line in corpus.read_text(encoding="utf-8").splitlines() if len(line) < 300]
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(texts * 8), encoding="utf-8")
    recipe = Recipe.parse(
        {
            "teacher": str(teacher_folder),
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [{"stage": "hidden", "tokens": 512, "data": {**data, "source": str(short)}}],
            "out": str(tmp_path / "run"),
        }
    )
    with pytest.raises(LimbeckError, match="document has 250 tokens"):
        setup.prepare_job(recipe)
    assert not (tmp_path / "run").exists()


def test_keys_of_small_teachers_do_not_change_with_a_key_that_is_not_used():
    recipe = TeacherRecipe.load("small")
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"documents": "whole"})})
    assert whole.key != recipe.key
    old = dict(json.loads(dataset_key(recipe.data)))
    assert "documents" not in old
    assert "documents" in json.loads(dataset_key(whole.data))
