"""Agreement token by token and free-running: against plain computations, and a teacher against itself."""

import math
import time

import pytest
import torch
from torch.nn import functional as F

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.evaluation import agreement, measure, stored_states
from limbeck.evaluation.agreement import average_by_bucket, clustered_standard_error, compare_tokens
from limbeck.evaluation.free_running import compare_free_running, compute_perplexity, decode, extract_prefixes
from limbeck.evaluation.stored_states import StoredStates
from limbeck.evaluation.subject import SubjectLoader
from limbeck.report.figures import measures as picture
from limbeck.report.figures.style import save_figure
from limbeck.testing import make_tiny_model
from limbeck.training.losses import TokenLogits

SMALL = {"tokens": 256, "length": 64, "prefixes": 3, "prefix": 8, "new": 6}


@pytest.fixture(scope="module")
def pair():
    """A teacher and a student that nobody has trained."""
    teacher = make_tiny_model("llama").requires_grad_(False)
    return teacher, limbeck.convert(teacher, "retnet").eval().requires_grad_(False)


class Documents:
    """Sequences of random tokens whose documents have the given lengths."""

    def __init__(self, *lengths: int, rows: int = 3):
        self.length, self.n_sequences = sum(lengths), rows
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 60, (rows, self.length), generator=generator)
        self.positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def batch(self, position: int, size: int) -> Batch:
        ids = self.ids[position : position + size]
        positions = self.positions.expand(len(ids), -1)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], 1).masked_fill(positions.roll(-1, 1) == 0, -100)
        return Batch(ids, positions, targets)


def hidden_and_head(seed: int, width: int = 6, vocabulary: int = 40):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator)
    return torch.randn(2, 9, width, generator=generator), lambda h: h @ weight.T


def test_tokens_against_whole_logits():
    (s, head_s), (t, head_t) = hidden_and_head(0), hidden_and_head(1, width=5, vocabulary=37)
    targets = torch.randint(0, 37, (2, 9))
    targets[0, 3] = targets[1, -1] = -100
    found = compare_tokens(head_s, s, head_t, t, targets, chunk_size=4)
    valid = targets != -100
    log_p = head_s(s)[valid][:, :37].log_softmax(-1)
    log_q = head_t(t)[valid].log_softmax(-1)
    label = targets[valid]
    expected = {
        "ce": F.nll_loss(log_p, label, reduction="none"),
        "teacher_ce": F.nll_loss(log_q, label, reduction="none"),
        "kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "top1": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    for row, (mine, theirs) in enumerate(zip(log_p, log_q)):
        five, others = set(mine.topk(5).indices.tolist()), set(theirs.topk(5).indices.tolist())
        assert found["overlap"][row] == pytest.approx(len(five & others) / 5)
        assert found["top"][row] == float(int(theirs.argmax()) in five)


def test_divergences_equal_those_of_the_training_loss():
    (s, head_s), (t, head_t) = hidden_and_head(0), hidden_and_head(1)
    targets = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    metrics = compare_tokens(head_s, s, head_t, t, targets, chunk_size=4)
    logits = TokenLogits(head_s(s).flatten(0, 1), head_t(t).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(metrics["kl"], logits.kl_divergence(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["reverse_kl"], logits.kl_divergence(reverse=True), rtol=1e-5, atol=1e-6)


def test_no_more_logits_than_a_chunk():
    s, head = hidden_and_head(0)
    seen = []

    def counted(h):
        seen.append(len(h))
        return head(h)

    compare_tokens(counted, s, counted, s, torch.zeros(2, 9, dtype=torch.long), chunk_size=4)
    assert max(seen) == 4
    assert sum(seen) == 2 * 18


def test_buckets_lose_no_token():
    number, place = torch.rand(100), torch.randint(0, 50, (100,))
    rows = average_by_bucket({"x": number}, place, [4, 16, 400, 1000])
    assert [(row["from"], row["below"]) for row in rows] == [(None, 4), (4, 16), (16, 400)]
    assert rows[0]["targets"] == int((place < 4).sum())
    assert sum(row["x"] * row["targets"] for row in rows) == pytest.approx(float(number.sum()), rel=1e-5)


def test_standard_error_over_sequences():
    values = torch.randn(5, 8)
    sequence = torch.arange(5).repeat_interleave(8)
    expected = float(values.double().mean(1).std() / math.sqrt(5))
    assert clustered_standard_error(values.flatten(), sequence) == pytest.approx(expected)
    assert clustered_standard_error(values[0], torch.zeros(8, dtype=torch.long)) is None


def test_prefixes_keep_to_one_document():
    data = Documents(5, 12, 20)
    found = extract_prefixes(data, 4, 8)
    assert found.tolist() == [data.ids[r, b : b + 8].tolist() for r, b in ((0, 8), (0, 24), (1, 8), (1, 24))]
    with pytest.raises(LimbeckError, match="no document of 21 tokens"):
        extract_prefixes(data, 4, 21)


@pytest.mark.parametrize("which", [0, 1])
def test_greedy_is_what_generate_writes(pair, which):
    model = pair[which]
    starts = Documents(9).ids
    written = model.generate(starts, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert decode(model, starts, 7).tolist() == written[:, 9:].tolist()


def test_free_running(pair):
    teacher, student = pair
    starts = Documents(9).ids
    found = compare_free_running(teacher, student, starts, 6)
    theirs, ours = decode(teacher, starts, 6).tolist(), decode(student, starts, 6).tolist()
    apart = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), 6) for x, y in zip(theirs, ours)]
    assert found["equal_tokens"] == pytest.approx(sum(apart) / 3)
    assert found["together"] == pytest.approx([sum(n > i for n in apart) / 3 for i in range(6)])
    share = [sum(x[i] == y[i] for x, y in zip(theirs, ours)) / 3 for i in range(6)]
    assert found["equal_share"] == pytest.approx(share)
    ids = torch.cat([starts, torch.tensor(ours)], 1)
    loss = F.cross_entropy(teacher(ids).logits[:, 8:-1].flatten(0, 1), ids[:, 9:].flatten())
    assert found["text_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert compute_perplexity(teacher, starts, torch.tensor(theirs)) == found["teacher_text_perplexity"]


def test_a_teacher_agrees_with_itself(own_cache, teacher_folder, corpus, tmp_path):
    teacher = SubjectLoader(data=str(corpus), out=tmp_path).load(str(teacher_folder))
    found = measure.run_measure(measure.get_measure("agreement"), teacher, SMALL)
    assert found.values["kl"] == found.values["reverse_kl"] == 0
    for name in ("top1_agreement", "top5_agreement", "top5_overlap"):
        assert found.values[name] == 1
    assert found.values["equal_tokens"] == SMALL["new"]
    assert found.details["equal_share"] == found.details["together"] == [1.0] * SMALL["new"]
    assert found.values["text_perplexity"] == found.values["teacher_text_perplexity"]


def test_the_measure_by_position_and_frequency(own_cache, teacher_folder, corpus, tmp_path, pair, tokenizer):
    folder = tmp_path / "student"
    pair[1].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    subject = SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path / "out").load(str(folder))
    found = measure.run_measure(measure.get_measure("agreement"), subject, SMALL)
    for key in ("by_position", "by_frequency"):
        rows = found.details[key]
        assert len(rows) > 1
        assert sum(row["targets"] for row in rows) == found.data["targets"]
        mean = sum(row["targets"] * row["kl"] for row in rows) / found.data["targets"]
        assert mean == pytest.approx(found.values["kl"], rel=1e-5)
    assert found.values["top5_agreement"] >= found.values["top1_agreement"]
    counts = subject.count_token_frequencies(64)
    assert f"{int(counts.sum()):,} tokens" in found.data["frequencies_from"]
    assert counts.sum() > 1000
    save_figure(picture.draw_agreement([found]), tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").stat().st_size > 10_000
    none = measure.run_measure(measure.get_measure("agreement"), subject, {**SMALL, "prefixes": 0})
    assert "equal_tokens" not in none.values


# ------------------------------------------------------------------ what a teacher reads and writes, kept


def test_a_text_is_read_once_for_all_students(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    teacher, student = pair
    data, read = Documents(9, 20), agreement.run_backbone
    plain = agreement.compare_models(teacher, student, data, 87, batch_size=2)

    def compare(identity, again=False):
        reads = []
        states = StoredStates(identity, again)
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "run_backbone", lambda model, batch: reads.append(model) or read(model, batch))
            found = agreement.compare_models(teacher, student, data, 87, batch_size=2, states=states)
        assert all(torch.equal(found.metrics[name], values) for name, values in plain.metrics.items())
        return sum(model is teacher for model in reads)

    one, other = {"model": "one"}, {"model": "other"}
    assert [compare(None), compare(one), compare(one)] == [2, 2, 0]
    file = next((tmp_path / "states").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])  # as a full disk leaves it
    assert [compare(one), compare(one), compare(other), compare(one, again=True)] == [1, 0, 2, 2]
    data.ids[2, 3] += 1  # the second batch is another text
    plain = agreement.compare_models(teacher, student, data, 87, batch_size=2)
    assert compare(one) == 1


def test_kept_states_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    monkeypatch.setattr(stored_states, "MAX_KEPT_BYTES", 1500)
    batch, runs = Documents(9).batch(0, 1), []

    def read(name):
        time.sleep(0.02)  # files are as old as the clock of the file system tells
        states = StoredStates({"model": name}).read(batch, lambda: runs.append(name) or torch.full((100,), float(name)))
        assert states.tolist() == [name] * 100

    for name in (0, 1, 2, 0, 3, 0, 1):
        read(name)
    assert runs == [0, 1, 2, 3, 1]  # what was not read for longest had to go
    monkeypatch.setattr(stored_states, "MAX_PASS_BYTES", 399)
    read(4)
    read(4)
    assert runs[5:] == [4, 4]


def test_a_teacher_continues_once_for_all_students(own_cache, teacher_folder, corpus, tmp_path, monkeypatch):
    loader = SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path)
    teacher = limbeck.models.loading.load_teacher(str(teacher_folder), torch.device("cpu"))[0]
    student = limbeck.convert(teacher, "gla")
    measures = measure.get_measure("agreement")
    first = measure.run_measure(measures, loader.adopt("one", student, tmp_path), SMALL)
    written = agreement.write_continuations
    monkeypatch.setattr(agreement, "write_continuations", lambda *args: pytest.fail("again"))
    second = measure.run_measure(measures, loader.adopt("other", student, tmp_path), SMALL)
    assert (second.values, second.details) == (first.values, first.details)
    calls = []
    monkeypatch.setattr(agreement, "write_continuations", lambda *args: calls.append(args) or written(*args))
    measure.run_measure(measures, loader.adopt("third", student, tmp_path), SMALL | {"new": 5})
    measure.run_measure(measures, loader.adopt("other", student, tmp_path), SMALL, ignore_cache=True)
    assert len(calls) == 2
