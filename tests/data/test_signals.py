"""The teacher's most likely tokens on disk: what is read is what was said, and it is said once."""

import json
import shutil

import numpy as np
import pytest
import torch

from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.data import teacher_logits
from limbeck.data.packing import PackedDataset
from limbeck.data.teacher_logits import TeacherLogitsCache, TeacherLogitsDataset
from limbeck.data.token_store import Split
from limbeck.models.fingerprint import fingerprint_model
from limbeck.training import pipeline, teacher_cache
from limbeck.training.chunked_losses import TeacherLogitsFromCache, TeacherLogitsFromHidden, logit_losses
from limbeck.training.losses import ObjectiveWeights

LENGTH = 16


@pytest.fixture
def data(monkeypatch) -> PackedDataset:
    monkeypatch.setattr(teacher_logits, "PART_TOKENS", 4 * LENGTH)
    tokens = np.random.default_rng(0).integers(3, 90, 700).astype("<u2")
    return PackedDataset(Split("train", tokens, np.arange(0, 701, 35)), LENGTH, seed=2)


class Teacher:
    """Says something of its own about every token, and counts; breaks down after `lasts` sequences."""

    def __init__(self, vocabulary: int, top: int, lasts: int = 10**9):
        self.vocabulary, self.top, self.lasts, self.asked = vocabulary, top, lasts, 0

    def __call__(self, batch):
        if self.asked >= self.lasts:
            raise KeyboardInterrupt
        self.asked += len(batch.input_ids)
        generator = torch.Generator().manual_seed(int(batch.input_ids.sum()))
        shape = (*batch.input_ids.shape, self.vocabulary)
        return teacher_cache.top_log_probs(torch.randn(shape, generator=generator) * 5, self.top)


@pytest.mark.parametrize(("vocabulary", "top"), [(97, 5), (65_536, 64), (70_001, 7), (262_144, 64)])
def test_what_is_read_is_what_was_said(data, tmp_path, vocabulary, top):
    said, teacher = TeacherLogitsCache(tmp_path, vocabulary, top), Teacher(vocabulary, top)
    assert said.bytes_per_token <= 4.5 * top + 0.5
    assert top < 64 or said.bytes_per_token <= 300
    assert said.fill(data, 2, 5, teacher) == 3 * LENGTH
    text = TeacherLogitsDataset(data, said, 2, 5)
    for position in (4, 2, 3):
        batch, plain = text.batch(position, 1), data.batch(position, 1)
        index, log_q = teacher(plain)
        assert torch.equal(batch.input_ids, plain.input_ids)
        assert torch.equal(batch.index, index)
        assert torch.allclose(batch.log_q.float(), log_q, rtol=1e-3)
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) - 2 * 2 * 128  # heads of the files
    assert stored == 3 * LENGTH * said.bytes_per_token
    assert text.batch(2, 3).to("cpu").index.shape == (3, LENGTH, top)


def test_it_goes_on_where_it_was_killed_and_ranges_share_their_parts(data, tmp_path):
    said = TeacherLogitsCache(tmp_path, 97, 5)
    with pytest.raises(KeyboardInterrupt):
        said.fill(data, 0, 12, Teacher(97, 5, lasts=9))
    assert said.missing_parts(LENGTH, 0, 12) == [(8, 12)]
    assert said.fill(data, 0, 12, Teacher(97, 5)) == 4 * LENGTH
    assert said.fill(data, 3, 14, Teacher(97, 5)) == 2 * LENGTH, "parts of another range were not used"
    assert said.fill(data, 3, 14, Teacher(97, 5)) == 0
    assert torch.equal(TeacherLogitsDataset(data, said, 3, 14).batch(3, 1).index, Teacher(97, 5)(data.batch(3, 1))[0])


def test_a_damaged_part_is_made_again(data, tmp_path):
    TeacherLogitsCache(tmp_path, 97, 5).fill(data, 0, 8, Teacher(97, 5))
    file = tmp_path / "000000004-000000008" / "log_q.npy"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(bytes(raw))
    again = TeacherLogitsCache(tmp_path, 97, 5)
    assert again.missing_parts(LENGTH, 0, 8) == [(4, 8)]
    assert again.fill(data, 0, 8, Teacher(97, 5)) == 4 * LENGTH
    assert again.missing_parts(LENGTH, 0, 8) == []
    shutil.rmtree(file.parent)
    with pytest.raises(LimbeckError, match="are missing"):
        TeacherLogitsDataset(data, TeacherLogitsCache(tmp_path, 97, 5), 0, 8).batch(5, 1)


def test_rounding_changes_the_loss_by_less_than_a_thousandth(data, tmp_path):
    torch.manual_seed(0)
    head_s, head_t = torch.nn.Linear(32, 3000), torch.nn.Linear(32, 3000)
    with torch.no_grad():
        head_t.weight *= 8
    h, hidden = torch.randn(1, LENGTH, 32), torch.randn(1, LENGTH, 32)
    said = TeacherLogitsCache(tmp_path, 3000, 64)
    index, log_q = teacher_cache.top_log_probs(head_t(hidden[0]).detach(), 64)
    said.fill(data, 0, 1, lambda batch: (index[None], log_q[None]))
    batch = TeacherLogitsDataset(data, said, 0, 1).batch(0, 1)
    weights = ObjectiveWeights(kl=0, top_kl=1, top_k=64)
    found = [
        logit_losses(head_s, h, signal, batch.targets, weights)
        for signal in (TeacherLogitsFromHidden(head_t, hidden), TeacherLogitsFromCache(batch.index, batch.log_q))
    ]
    live, read = (float(sums["loss"]) for sums, _ in found)
    assert read == pytest.approx(live, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.9999


def test_the_key_knows_the_weights():
    from limbeck.testing import make_tiny_model

    teacher = make_tiny_model("llama")
    before = fingerprint_model(teacher)
    assert fingerprint_model(make_tiny_model("llama")) == before
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint_model(teacher) != before


def test_a_run_asks_the_teacher_once_and_other_students_never(teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    stage = {"stage": "logits", "tokens": 512, "batch_size": 2, "kl": 0, "top_kl": 1, "ce": 0.2, "top_k": 20}
    stage |= {"eval_steps": 4, "eval_sequences": 2, "lr": 1e-3}

    def run(name: str, **changes) -> tuple[dict, list[dict]]:
        raw = {
            "teacher": str(teacher_folder),
            "student": {"mixer": changes.pop("mixer", "gla")},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [{**stage, **changes}],
            "evaluation": {"tokens": 64, "prompt": None},
            "out": str(tmp_path / name),
        }
        result = pipeline.distill(Recipe.parse(raw))
        lines = [
            json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return result["stages"][0], lines

    _, live = run("live")
    facts, read = run("cached", cache_teacher="top-k")
    assert facts["cached_teacher"]["asked_tokens"] == 512
    assert len(read) == len(live) == 8
    for a, b in zip(live, read):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    assert read[-1]["held_out_loss"] == pytest.approx(live[-1]["held_out_loss"], rel=2e-3)

    def refuse(*args):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(teacher_cache, "run_backbone", refuse)
    facts, _ = run("other", cache_teacher="top-k", mixer="retnet")
    assert facts["cached_teacher"]["asked_tokens"] == 0


def test_what_cannot_be_had_from_a_cache_is_refused():
    with pytest.raises(LimbeckError, match="most likely tokens"):
        Recipe.parse({"stages": [{"stage": "logits", "tokens": 64, "cache_teacher": "top-k"}]})
