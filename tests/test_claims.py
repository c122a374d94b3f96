"""Claims: verdicts on tables whose answer is known, and what is said where there is too little."""

import math
import random

import pytest

from limbeck.study.claims import by_length, log_perplexity
from limbeck.study.statements import CLAIMS, DELTA, DYNAMIC_DECAY, KERNEL_ONLY, judge_claims
from limbeck.study.statistics import difference, judge

STUDENTS = ("linear_attention", "rebased", "retnet", "gla", "mlstm", "deltanet")


def arm(student="gla", stages="2+3", copied=True, seed=0, **values) -> dict:
    axes = {"student": student, "stages": stages, "copy_projections": copied, "seed": seed}
    return {"axes": axes, "values": {name.replace("__", "."): value for name, value in values.items()}}


def table(loss, seeds=3, noise=0.003, draw=3) -> list[dict]:
    """Experiment 1 with losses `loss(student, stages, copied)` and noise that all arms of a seed share in part."""
    rng, rows = random.Random(draw), []
    for seed in range(seeds):
        shift = rng.gauss(0, 0.5)  # the text of this seed is easier or harder for all
        for student in STUDENTS:
            for stages in ("3", "2+3", "1+2+3"):
                for copied in (True, False):
                    value = loss(student, stages, copied) + shift + rng.gauss(0, noise)
                    early = 6.0 - (1.0 if copied else 0.0) + rng.gauss(0, noise)
                    rows.append(
                        arm(
                            student,
                            stages,
                            copied,
                            seed,
                            agreement__perplexity=math.exp(value),
                            stages__logits__early_loss=early,
                            memory__student_bytes_per_token=0.0,
                            memory__teacher_bytes_per_token=640.0,
                        )
                    )
    return rows


def as_the_paper(student: str, stages: str, copied: bool) -> float:
    base = {"mlstm": 3.0, "gla": 3.1, "deltanet": 3.15, "retnet": 3.3, "rebased": 3.6, "linear_attention": 3.7}[student]
    return base + {"3": 0.3, "2+3": 0.0, "1+2+3": -0.005}[stages] + (0 if copied else 0.1)


def verdicts(rows: list[dict]) -> dict[str, str]:
    names = [
        "dynamic-decay-beats-kernel-only",
        "xlstm-first",
        "hidden-state-alignment-helps",
        "matrix-mixing-adds-little",
        "copying-starts-faster-but-is-not-enough",
        "memory-constant-in-length",
    ]
    return {claim["name"]: claim["verdict"] for claim in judge_claims(names, rows)}


def test_all_claims_hold_where_numbers_are_as_the_paper_says():
    assert set(verdicts(table(as_the_paper)).values()) == {"holds"}


def test_no_claim_holds_where_numbers_say_the_opposite():
    def opposite(student, stages, copied):
        kind = -0.5 if student in KERNEL_ONLY else 0.0
        return 3 + kind + {"3": 0.0, "2+3": 0.1, "1+2+3": -0.3}[stages]

    found = verdicts(
        [{**row, "values": {**row["values"], "memory.student_bytes_per_token": 64.0}} for row in table(opposite)]
    )
    assert set(found.values()) == {"does not hold"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_leave_all_undecided_and_say_so(seeds):
    claims = judge_claims(["dynamic-decay-beats-kernel-only"], table(as_the_paper, seeds))
    (finding,) = claims[0]["findings"]
    assert claims[0]["verdict"] == finding["verdict"] == "undecided"
    assert "3 are needed" in finding["reason"]
    assert finding["effect"] == pytest.approx(0.6, abs=0.02)


def test_noise_leaves_undecided():
    """An effect far smaller than the noise: of three seeds few studies could say anything."""

    def flat(student, stages, copied):
        return 3.0 + (0.05 if student in KERNEL_ONLY else 0.0)

    name = "dynamic-decay-beats-kernel-only"
    found = [judge_claims([name], table(flat, noise=3.0, draw=draw))[0]["verdict"] for draw in range(20)]
    assert found.count("undecided") > 15


def test_what_is_not_measured_is_undecided():
    for claim in judge_claims(list(CLAIMS), [arm(seed=seed) for seed in range(3)]):
        assert claim["verdict"] == "undecided", claim["name"]
        assert all(part["reason"] == "not measured" for part in claim["findings"])


def test_effects_are_paired_within_a_seed():
    """Seeds differ by far more than the students do; pairs take that out."""
    found = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla",)}).at_places(table(as_the_paper))
    assert set(found) == {"0", "1", "2"}
    assert all(len(places) == 6 for places in found.values())
    finding = judge(found, "more", 0.01)
    assert finding.effect == pytest.approx(0.2, abs=0.01)
    assert 0.19 < finding.low <= finding.effect <= finding.high < 0.21
    assert finding.consistent == 1


@pytest.mark.parametrize(
    ("values", "kind", "verdict"),
    [
        ((0.100, 0.102, 0.098), "more", "holds"),
        ((0.100, 0.102, 0.098), "little", "does not hold"),
        ((0.001, 0.002, 0.0015), "more", "does not hold"),  # there, but too small to matter
        ((0.001, 0.002, 0.0015), "little", "holds"),
        ((-0.10, -0.11, -0.09), "more", "does not hold"),
        ((0.5, -0.4, 0.2), "more", "undecided"),
        ((0.5, -0.4, 0.2), "little", "undecided"),
        ((0.0, 0.0, 0.0), "little", "holds"),
        ((0.0, 0.0, 0.0), "more", "does not hold"),
        ((0.3, 0.3, 0.3), "more", "holds"),
    ],
)
def test_verdicts_on_differences(values, kind, verdict):
    found = judge({str(seed): [value] for seed, value in enumerate(values)}, kind, margin=0.01)
    assert found.verdict == verdict
    assert found == judge({str(seed): [value] for seed, value in enumerate(values)}, kind, margin=0.01), "drawn anew"


def test_the_level_is_kept_where_there_is_no_effect():
    """Of a thousand studies without any difference about one in twenty calls it one, not more."""
    rng = random.Random(1)
    wrong = 0
    for _ in range(300):
        found = {str(seed): [rng.gauss(0, 1)] for seed in range(4)}
        wrong += judge(found, "more", 0.0).verdict == "holds"
    assert wrong / 300 < 0.08


def test_length_retrieval_order_and_time_are_read_from_other_measures():
    rows = []
    for seed in range(3):
        for number, student in enumerate(("linear_attention", "retnet", "gla", "mlstm", "gated_deltanet", "deltanet")):
            for tokens in (1000, 10_000):
                rise = 0.01 if student in DYNAMIC_DECAY else 0.5
                found = 0.9 if student in DELTA else 0.1
                row = arm(student, seed=seed, agreement__perplexity=20.0 + number + 0.01 * seed)
                row["axes"]["tokens"] = tokens
                row["values"] |= {
                    "positions.loss, tokens 1 to 512": 3.0,
                    "positions.loss, tokens 513 to 1024": 9.9,
                    "positions.loss, tokens 1025 to 2048": 3.0 + rise + 0.001 * seed,
                    "needle.niah 1, 512 tokens, among 10": found + 0.001 * seed,
                    "needle.niah 1, 512 tokens": 0.0,
                    "recall.recall, 16 pairs": found + 0.001 * seed,
                    "recall.chance, 16 pairs": 0.5,
                    "speed.token_milliseconds@512x1": 2.0,
                    "speed.token_milliseconds@8192x1": 2.02 + 0.01 * seed,
                }
                row["teacher"] = {"speed.token_milliseconds@512x1": 1.0, "speed.token_milliseconds@8192x1": 4.0}
                rows.append(row)
    names = ["dynamic-decay-keeps-perplexity-with-length", "delta-rule-keeps-retrieval", "delta-rule-keeps-needles"]
    names += ["time-constant-in-length", "faster-than-the-teacher-at-length", "gaps-set-early"]
    assert [claim["verdict"] for claim in judge_claims(names, rows)] == ["holds"] * 6
    slower = [{**row, "teacher": dict.fromkeys(row["teacher"], 1.0)} for row in rows]
    assert judge_claims(["faster-than-the-teacher-at-length"], slower)[0]["verdict"] == "does not hold"
    metric = by_length("positions", r"loss, tokens \d+ to (\d+)", last=False)
    assert metric(rows[0]) == 3.0
