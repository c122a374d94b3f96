"""Token F1, worked by hand and against the harness; what fits into a context, at the exact boundary."""

import importlib
import sys
from unittest.mock import MagicMock

import pytest

from limbeck.core.errors import LimbeckError
from limbeck.evaluation.lm_eval_tasks import best_f1, normalize_answer, score_answers, token_f1
from limbeck.evaluation.truncation import compute_max_prompt_length, resolve_max_length, truncate_prompt


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Paris", "Paris", 1),
        ("  The PARIS!! ", "paris", 1),
        ("The Eiffel Tower in Paris", "Eiffel tower", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("yes, they do", "Yes", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("no", "yes", 0),
        ("", "yes", 0),
        ("the", "a", 0),  # articles alone are nothing, and nothing matches nothing
        ("yes yes yes", "yes", 0.5),  # repeated tokens are counted once per match
        ("a-b", "ab", 1),  # punctuation goes before articles
        ("state-of-the-art", "state of the art", 0),
        ("U.S.A.", "usa", 1),
        ("naïve – test", "naïve test", 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # only ASCII punctuation goes
    ],
)
def test_token_f1_worked_by_hand(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_the_best_reference_counts():
    assert best_f1("Paris", ["in Paris, France", "Paris"]) == 1
    assert best_f1("Paris", []) == 0
    assert score_answers({"answers": ["No", "not at all"]}, ["not at all."]) == {"qa_f1_score": 1}
    assert normalize_answer("An apple, the pear; a\tplum") == ["apple", "pear", "plum"]


def test_token_f1_is_the_harness_own(monkeypatch):
    pytest.importorskip("lm_eval")
    for name in ("jieba", "fuzzywuzzy", "rouge"):  # for its other metrics; F1 uses none of them
        monkeypatch.setitem(sys.modules, name, MagicMock())
    metrics = importlib.import_module("lm_eval.tasks.longbench.metrics")
    texts = ["The cat, a hat", "cat hat", "an end.", "", "the a", "x-ray of the U.S.", "xray us", "no no yes", "no"]
    for answer in texts:
        for reference in texts:
            assert token_f1(answer, reference) == pytest.approx(metrics.qa_f1_score(answer, reference))


@pytest.mark.parametrize("room", [2, 3, 8, 9, 10])
def test_the_cut_at_the_exact_boundary(room):
    for length in range(1, 13):
        kept = truncate_prompt(list(range(length)), room, "middle")
        assert len(kept) == min(length, room)
        if length <= room:
            assert kept == list(range(length))
            assert truncate_prompt(list(range(length)), room, "refuse") == kept
            continue
        assert truncate_prompt(list(range(length)), room, "left") == list(range(length - room, length))
        first = room // 2
        assert kept[:first] == list(range(first))
        assert kept[first:] == list(range(length - (room - first), length))
        with pytest.raises(LimbeckError, match=f"too long: {length} tokens"):
            truncate_prompt(list(range(length)), room, "refuse")


def test_room_for_prompt():
    assert compute_max_prompt_length(context=10, answer=8) == 2
    with pytest.raises(LimbeckError, match="long_x: an answer of up to 9 tokens does not fit into 10 tokens"):
        compute_max_prompt_length(context=10, answer=9, task="long_x")


class _Config:
    def __init__(self, **sizes):
        self.__dict__.update(sizes)


class _Sized:
    def __init__(self, **sizes):
        self.config = _Config(**sizes)
        self.model_max_length = 10**30


def test_context_of():
    assert resolve_max_length(_Sized(max_position_embeddings=64)) == 64
    assert resolve_max_length(_Sized(n_positions=32), requested_length=16) == 16
    assert resolve_max_length(_Sized(text_config=_Config(max_position_embeddings=48))) == 48
    tokenizer = _Sized()
    tokenizer.model_max_length = 24
    assert resolve_max_length(_Sized(), tokenizer) == 24
    assert resolve_max_length(_Sized(), _Sized(), requested_length=12) == 12
    with pytest.raises(LimbeckError, match=r"tasks\.length is 65 tokens"):
        resolve_max_length(_Sized(max_position_embeddings=64), requested_length=65)
    with pytest.raises(LimbeckError, match="neither the model nor its tokenizer"):
        resolve_max_length(_Sized(), _Sized())
