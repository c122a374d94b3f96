"""Claims: verdicts on tables whose answer is known, and what is said where there is too little."""

import math
import random

import pytest

from limbeck.study.claims import (
    CLAIMS,
    DELTA,
    DYNAMIC_DECAY,
    KERNEL_ONLY,
    evaluate_claims,
    log_perplexity,
    select_by_length,
)
from limbeck.study.statistics import (
    correlate_ranks,
    decide_verdict,
    difference,
    gap_at_equal_time,
    kendall_tau,
    rank_correlation_by_seed,
    t_interval,
)

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
    return {claim["name"]: claim["verdict"] for claim in evaluate_claims(names, rows)}


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
    claims = evaluate_claims(["dynamic-decay-beats-kernel-only"], table(as_the_paper, seeds))
    (finding,) = claims[0]["findings"]
    assert claims[0]["verdict"] == finding["verdict"] == "undecided"
    assert "3 are needed" in finding["reason"]
    assert finding["effect"] == pytest.approx(0.6, abs=0.02)


def test_noise_leaves_undecided():
    """An effect far smaller than the noise: of three seeds few studies could say anything."""

    def flat(student, stages, copied):
        return 3.0 + (0.05 if student in KERNEL_ONLY else 0.0)

    name = "dynamic-decay-beats-kernel-only"
    found = [evaluate_claims([name], table(flat, noise=3.0, draw=draw))[0]["verdict"] for draw in range(20)]
    assert found.count("undecided") > 15


def test_what_is_not_measured_is_undecided():
    for claim in evaluate_claims(list(CLAIMS), [arm(seed=seed) for seed in range(3)]):
        assert claim["verdict"] == "undecided", claim["name"]
        assert all(part["reason"] == "not measured" for part in claim["findings"])


def test_effects_are_paired_within_a_seed():
    """Seeds differ by far more than the students do; pairs take that out."""
    found = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla",)}).compute_contrasts(
        table(as_the_paper)
    )
    assert set(found) == {"0", "1", "2"}
    assert all(len(places) == 6 for places in found.values())
    finding = decide_verdict(found, "more", 0.01)
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
        ((0.0, 0.0, 0.0), "little", "undecided"),  # one number, three times: nothing was repeated
        ((0.3, 0.3, 0.3), "more", "undecided"),
    ],
)
def test_verdicts_on_differences(values, kind, verdict):
    found = decide_verdict({str(seed): [value] for seed, value in enumerate(values)}, kind, margin=0.01)
    assert found.verdict == verdict
    assert found == decide_verdict({str(seed): [value] for seed, value in enumerate(values)}, kind, margin=0.01), (
        "drawn anew"
    )


def test_the_level_is_kept_where_there_is_no_effect():
    """Of a thousand studies without any difference about one in twenty calls it one, not more."""
    rng = random.Random(1)
    wrong = 0
    for _ in range(300):
        found = {str(seed): [rng.gauss(0, 1)] for seed in range(4)}
        wrong += decide_verdict(found, "more", 0.0).verdict == "holds"
    assert wrong / 300 < 0.08


def test_length_retrieval_order_and_time_are_read_from_other_measures():
    rows = []
    for seed in range(3):
        for number, student in enumerate(("linear_attention", "retnet", "gla", "mlstm", "gated_deltanet", "deltanet")):
            for tokens in (1000, 10_000):
                rise = 0.01 if student in DYNAMIC_DECAY else 0.5
                found = 0.9 + 0.001 * seed if student in DELTA else 0.1
                row = arm(student, seed=seed, agreement__perplexity=20.0 + number + 0.01 * seed)
                row["axes"]["tokens"] = tokens
                row["values"] |= {
                    "positions.loss, tokens 1 to 512": 3.0,
                    "positions.loss, tokens 513 to 1024": 9.9,
                    "positions.loss, tokens 1025 to 2048": 3.0 + rise * (1 + 0.001 * seed),
                    "needle.niah 1, 512 tokens, among 10": found,
                    "needle.niah 1, 512 tokens": 0.0,
                    "recall.recall, 16 pairs": found,
                    "recall.chance, 16 pairs": 0.5,
                    "speed.token_milliseconds@512x1": 2.0,
                    "speed.token_milliseconds@8192x1": 2.02 + 0.01 * seed,
                }
                row["teacher"] = {"speed.token_milliseconds@512x1": 1.0, "speed.token_milliseconds@8192x1": 4.0}
                rows.append(row)
    names = ["dynamic-decay-keeps-perplexity-with-length", "delta-rule-keeps-retrieval", "delta-rule-keeps-needles"]
    names += ["time-constant-in-length", "faster-than-the-teacher-at-length", "gaps-set-early"]
    assert [claim["verdict"] for claim in evaluate_claims(names, rows)] == ["holds"] * 6
    slower = [{**row, "teacher": dict.fromkeys(row["teacher"], 1.0)} for row in rows]
    assert evaluate_claims(["faster-than-the-teacher-at-length"], slower)[0]["verdict"] == "does not hold"
    metric = select_by_length("positions", r"loss, tokens \d+ to (\d+)", last=False)
    assert metric(rows[0]) == 3.0


@pytest.mark.parametrize(
    ("values", "kind", "verdict"),
    [
        ((0.0, 0.0, 0.0), "little", "holds"),
        ((0.0, 0.0, 0.0), "more", "does not hold"),
        ((0.3, 0.3, 0.3), "more", "holds"),
        ((0.3, 0.3, 0.3), "little", "does not hold"),
    ],
)
def test_what_is_counted_needs_no_test(values, kind, verdict):
    found = decide_verdict({str(seed): [value] for seed, value in enumerate(values)}, kind, margin=0.01, discrete=True)
    assert (found.verdict, found.p, found.low) == (verdict, None, None)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_of_few_seeds_covers_what_it_says(seeds):
    rng, inside = random.Random(seeds), 0
    for _ in range(2000):
        low, high = t_interval([rng.gauss(0.7, 1) for _ in range(seeds)])
        inside += low <= 0.7 <= high
    assert 0.93 < inside / 2000 < 0.97


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((0.005, 0.0064, 0.0078), "smaller than 0.0075"),  # surely above zero; it is the margin that it fails
        ((0.5, -0.4, 0.2), "the seeds differ too much"),
        ((0.02, 0.08, 0.13), "the seeds differ too much"),
    ],
)
def test_an_undecided_finding_names_the_condition_that_failed(values, says):
    found = decide_verdict({str(seed): [value] for seed, value in enumerate(values)}, "more", margin=0.0075)
    assert found.verdict == "undecided"
    assert says in found.reason


def order(stages, losses) -> list[dict]:
    """Arms at two axes: `losses[tokens]` by student, the same at all stages but those named "reversed"."""
    rows = []
    for seed in range(3):
        for stage in stages:
            for tokens, table in losses.items():
                for student, loss in table.items():
                    loss = -loss if (stage, tokens) == ("2+3", 2000) else loss
                    row = arm(student, stage, seed=seed, agreement__perplexity=math.exp(3 + loss + 0.001 * seed))
                    row["axes"]["tokens"] = tokens
                    rows.append(row)
    return rows


@pytest.mark.parametrize("stages", [["3", "2+3"], ["2+3", "3"]])
def test_orders_are_compared_at_the_same_place_of_all_other_axes(stages):
    """At stages 3 the order is kept from one budget to the next, at 2+3 it is reversed; so tau is 0, not 1 or -1."""
    table = {"gla": 0.1, "retnet": 0.2, "mlstm": 0.3}
    found = rank_correlation_by_seed(order(stages, {1000: table, 2000: table}), "tokens", log_perplexity)
    assert {seed: sorted(values) for seed, values in found.items()} == {s: [-1.0, 1.0] for s in "012"}


def test_neighbors_are_told_by_their_value_and_a_missing_table_is_not_skipped():
    table = {"gla": 0.1, "retnet": 0.2, "mlstm": 0.3}
    rows = order(["3"], {4000: table, 1000: table, 2000: table})
    assert all(len(values) == 2 for values in rank_correlation_by_seed(rows, "tokens", log_perplexity).values())
    failed = [row for row in rows if not (row["axes"]["tokens"] == 2000 and row["axes"]["seed"] == 1)]
    found = rank_correlation_by_seed(failed, "tokens", log_perplexity)
    assert not found, "1,000 and 4,000 are no neighbors"
    assert any("2000" in one for one in found.left_out)


def test_ties_and_divergence_are_no_agreement():
    names = ["a", "b", "c"]
    assert kendall_tau(dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0), names) == 0
    assert kendall_tau({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 2}, names) == pytest.approx(2 / 3)
    table = {"gla": 0.1, "retnet": 0.2, "mlstm": math.nan}
    found = rank_correlation_by_seed(order(["3"], {1000: table, 2000: table}), "tokens", log_perplexity)
    assert decide_verdict(found, "more", 0.5).verdict == "undecided"
    assert "mlstm" in decide_verdict(found, "more", 0.5).reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_student_that_diverged_decides_nothing_and_is_named(bad):
    rows = table(as_the_paper)
    next(row for row in rows if row["axes"]["student"] == "gla")["values"]["agreement.perplexity"] = bad
    claim = evaluate_claims(["dynamic-decay-beats-kernel-only"], rows)[0]
    assert claim["verdict"] == "undecided"
    assert "gla" in claim["findings"][0]["reason"]
    assert math.isfinite(claim["findings"][0]["effect"] or 0.0)


def test_an_arm_that_failed_in_one_seed_counts_in_none():
    """Without RetNet's worst seed its mean would look better than that of students who were there."""
    rows = table(as_the_paper)
    gone = [r for r in rows if not (r["axes"]["student"] == "mlstm" and r["axes"]["seed"] == 1)]
    effect = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla", "mlstm")})
    whole, found = effect.compute_contrasts(rows), effect.compute_contrasts(gone)
    only = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla",)}).compute_contrasts(rows)
    assert whole != found == only
    assert found.left_out
    assert all("mlstm" in one for one in found.left_out)
    half = [r for r in rows if r["axes"]["seed"] != 2 or r["axes"]["student"] == "gla"]
    assert "seed 2" in effect.compute_contrasts(half).left_out[0]
    assert set(effect.compute_contrasts(half)) == {"0", "1"}


def test_seeds_that_repeat_the_same_part_of_the_arms_count_with_that_part():
    """Another seed of the best students alone would else look like a better seed of all."""
    rows = [r for r in table(as_the_paper) if r["axes"]["seed"] == 0 or r["axes"]["student"] in ("gla", "retnet")]
    effect = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla", "mlstm", "mamba2")})
    found = effect.compute_contrasts(rows)
    only = difference(log_perplexity, {"student": ("retnet",)}, {"student": ("gla",)}).compute_contrasts(rows)
    assert found == only
    assert set(found) == {"0", "1", "2"}
    assert found.left_out
    assert not any("seed" in one for one in found.left_out)
    lacking = {"student": tuple(name for name in STUDENTS if name not in ("gla", "retnet"))}
    other = difference(log_perplexity, lacking, {"student": ("gla",)}).compute_contrasts(rows)
    assert set(other) == {"0"}, "those seeds say nothing of a student that they lack"


def test_the_window_is_beaten_or_not_by_the_same_students_in_all_seeds():
    def made(mixer: str, seed: int, student: float) -> dict:
        row = arm(student=mixer, seed=seed)
        row["values"] = {"exam.window_perplexity": 20.0, "exam.student_perplexity": student + 0.01 * seed}
        return row

    rows = [made("mine", seed, 19.0) for seed in range(3)] + [made("softmax", seed, 20.0) for seed in range(3)]
    rows += [made(mixer, 0, 900.0) for mixer in ("gla", "retnet", "mlstm", "kda")]
    claim = evaluate_claims(["training-beats-untrained-window"], rows)[0]
    (finding,) = claim["findings"]
    assert (claim["verdict"], len(finding["by_seed"])) == ("holds", 3)
    assert finding["effect"] == pytest.approx(math.log(20 / 19.01), abs=1e-4)
    assert {one.split()[0] for one in finding["left_out"]} == {"gla", "retnet", "mlstm", "kda"}


def test_claims_know_students_by_their_mixer():
    """What a study calls a student says nothing: "gla" may be a RetNet, and "mine" a Gated DeltaNet."""
    rows = table(as_the_paper)
    named = []
    for row in rows:
        name = row["axes"]["student"]
        named.append({**row, "mixer": name, "axes": {**row["axes"], "student": f"my-{name}"}})
    names = ["dynamic-decay-beats-kernel-only", "xlstm-first"]
    assert [c["verdict"] for c in evaluate_claims(names, named)] == ["holds"] * 2
    swapped = {"gla": "linear_attention", "linear_attention": "gla", "mlstm": "rebased", "rebased": "mlstm"}
    lying = [{**row, "mixer": swapped.get(row["axes"]["student"], row["axes"]["student"])} for row in rows]
    assert [c["verdict"] for c in evaluate_claims(names, lying)] == ["does not hold"] * 2


@pytest.mark.parametrize(("sign", "verdict"), [(1, "holds"), (-1, "does not hold")])
def test_windows_heads_and_starts_are_judged(sign, verdict):
    """The best window against linear students of other stages, heads against layers, calibration against each start."""
    rng, rows = random.Random(5), []
    for seed in range(3):
        shift = rng.gauss(0, 0.5)

        def add(student, loss, stages="2+3", seed=seed, shift=shift, **axes):
            values = {
                "agreement.perplexity": math.exp(loss + shift + rng.gauss(0, 0.003)),
                "exam.student_perplexity": math.exp(3 + rng.gauss(0, 0.003)),
                "exam.window_perplexity": math.exp(3 + 0.2 * sign),
                "exam.student_repeat_loss@512": 1.0,
                "exam.student_repeat_loss@1280": loss + rng.gauss(0, 0.003),
            }
            row = arm(student, stages, seed=seed)
            rows.append({"axes": {**row["axes"], **axes}, "values": values})

        for number, student in enumerate(("gla", "deltanet", "linear_attention")):
            add(student, 3 + 0.1 * number)
        add("sliding_window", 3 - 0.2 * sign, "3")
        add("sliding_window", 9.0, "1")  # a window that was trained badly is not the best one
        add("softmax", 1.0)  # a control, and no student
        for softmax, loss in (("heads", 3.0), ("layers", 3.0 + 0.3 * sign)):
            add("mlstm", loss, softmax=softmax)
        for start, loss in (
            ("calibrated", 3.0),
            ("calibrated-33k", 2.0),
            ("copied", 3.0 + 0.3 * sign),
            ("taylor", 3.5),
        ):
            add("kda", loss, start=start)
    names = [
        "window-beats-linear-students",
        "training-beats-untrained-window",
        "heads-beat-layers",
        "calibration-beats-other-starts",
    ]
    found = {claim["name"]: claim for claim in evaluate_claims(names, rows)}
    assert {name: claim["verdict"] for name, claim in found.items()} == dict.fromkeys(names, verdict)
    starts = {part["says"]: part["verdict"] for part in found["calibration-beats-other-starts"]["findings"]}
    assert starts == {"calibrated is better than copied": verdict, "calibrated is better than taylor": "holds"}
    (window,) = found["window-beats-linear-students"]["findings"]
    if sign > 0:
        # three linear students, and those of the other questions, at 0.2 to 0.9 above the window
        assert window["effect"] == pytest.approx((0.2 + 0.3 + 0.4 + 0.2 + 0.5 + 0.2 - 0.8 + 0.5 + 0.7) / 9, abs=0.01)


def timed(objective: str, seconds: float, loss: float, seed: int) -> dict:
    """An arm of the study of objectives, whose stage 3 took so long."""
    row = arm(seed=seed, agreement__perplexity=math.exp(loss))
    row["axes"]["objective"] = objective
    row["stages"] = [{"stage": "hidden", "seconds": 99.0}, {"stage": "logits", "seconds": seconds}]
    return row


def test_an_objective_is_compared_with_what_the_plain_arms_reach_in_its_time():
    """The plain loss falls by 0.2 with each doubling; 14.14 s are half a doubling more than 10 s."""
    plain = [("ce_kl", 10, 3.0), ("ce_kl_x2", 20, 2.8), ("ce_kl_x4", 40, 2.6)]
    rows = [timed(*one, seed) for seed in range(3) for one in plain]
    rows += [timed("gram", 10 * 2**0.5, 2.87 + 0.001 * seed, seed) for seed in range(3)]
    rows += [timed("exits", 9, 2.95 + 0.001 * seed, seed) for seed in range(3)]  # as fast as plain, but for chance
    rows += [timed("on_policy", 60, 2.5, seed) for seed in range(3)]
    labels = ("ce_kl", "ce_kl_x2", "ce_kl_x4")
    gaps = {
        name: gap_at_equal_time(rows, log_perplexity, "objective", name, labels, "logits")
        for name in ("gram", "exits", "on_policy")
    }
    assert gaps["gram"]["1"] == pytest.approx([2.9 - 2.871])
    assert gaps["exits"]["2"] == pytest.approx([3.0 - 2.952])
    assert gaps["on_policy"] == {}
    assert len(gaps["on_policy"].left_out) == 3
    found = {one["name"]: one for one in evaluate_claims(["objective-gram-helps", "objective-exits-helps"], rows)}
    assert found["objective-gram-helps"]["verdict"] == "holds"
    assert [part["verdict"] for part in found["objective-exits-helps"]["findings"]] == ["holds", "holds"]
    slow = evaluate_claims(["objective-on-policy-helps"], rows)[0]
    assert slow["verdict"] == "undecided", "better at equal tokens; nothing is known at equal time"


def test_the_correlation_of_two_orders_is_the_one_by_hand():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0, "only here": 0.0, "diverged": math.nan}
    second = {"a": 20.0, "b": 10.0, "c": 40.0, "d": 30.0, "e": 50.0, "diverged": 1.0}
    # squared differences of ranks: 1 + 1 + 1 + 1 + 0, so rho = 1 - 6 * 4 / (5 * 24)
    found = correlate_ranks(first, second)
    assert found.names == ("a", "b", "c", "d", "e")
    assert found.rho == pytest.approx(0.8)
    # atanh(0.8) = 1.0986; its standard error is the root of (1 + 0.32) / 2, 0.8124, and 1.96 of those are 1.5923
    assert found.low == pytest.approx(math.tanh(1.0986 - 1.5923), abs=1e-3)
    assert found.high == pytest.approx(math.tanh(1.0986 + 1.5923), abs=1e-3)
    # t = 0.8 * sqrt(3 / (1 - 0.64)) = 2.309 with three degrees of freedom
    assert found.p == pytest.approx(0.104, abs=1e-3)
    # ties share a rank: 1.5, 1.5, 3 against 1, 2, 3 is sqrt(3) / 2
    assert correlate_ranks({"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}).rho == pytest.approx(math.sqrt(3) / 2)
    same = correlate_ranks(first, first)
    assert (same.rho, same.low, same.p) == (pytest.approx(1.0), None, None)
    assert correlate_ranks({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 2, "c": 3}) is None
    assert correlate_ranks({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
