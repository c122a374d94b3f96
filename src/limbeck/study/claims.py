"""The paper's findings as claims that a study's numbers can confirm or refute.

    evaluate_claims(["xlstm-first"], rows)[0]["verdict"]      # "holds", "does not hold" or "undecided"

A claim has one or several hypotheses; it holds where all of them hold, and does not hold where one does not. Losses are
compared in nats a token (the logarithm of perplexity), so an effect of 0.01 is one percent of perplexity. The paper is
arXiv 2504.14366, v2 of May 2025 and v3 of January 2026; a statement is our wording of its finding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.core.objectives import Objectives
from limbeck.study.effects import (
    cache_growth,
    log_perplexity,
    loss_growth_terms,
    make_gain_over_window,
    make_window_comparison,
    select_by_length,
    select_mean,
    select_value,
    token_time_gain,
    token_time_growth,
)
from limbeck.study.statistics import (
    ArmResult,
    Contrasts,
    Effect,
    Finding,
    Term,
    decide_verdict,
    difference,
    gap_at_equal_time,
    rank_correlation_by_seed,
)

MIN_EFFECT = 0.01  # nats a token: smaller differences are of no practical use


@dataclass(frozen=True)
class Hypothesis:
    """A testable part of a claim: an effect, and what is claimed of its size.

    kind: "more": the effect is above zero and matters; "little": it does not reach the margin.
    discrete: the effect is a count or a rank; equal numbers from all seeds are expected then and need no test.
    """

    description: str
    effect: Callable[[list[ArmResult]], dict[str, list[float]]]
    kind: Literal["more", "little"] = "more"
    margin: float = MIN_EFFECT
    discrete: bool = False


@dataclass(frozen=True)
class Claim:
    """A statement with its source; `hypotheses` builds what to test from the records of the finished arms."""

    statement: str
    source: str
    unit: str
    hypotheses: Callable[[list[ArmResult]], list[Hypothesis]]


def evaluate_claim(name: str, claim: Claim, rows: list[ArmResult]) -> dict[str, Any]:
    """Evaluate a claim: its verdict, and of each hypothesis the effect and why it is undecided, ready for JSON."""
    hypotheses = claim.hypotheses(rows)
    findings = [
        decide_verdict(
            hypothesis.effect(rows), hypothesis.kind, hypothesis.margin, len(hypotheses), hypothesis.discrete
        )
        for hypothesis in hypotheses
    ]
    return {
        "name": name,
        "statement": claim.statement,
        "source": claim.source,
        "unit": claim.unit,
        "verdict": _combine_verdicts(findings),
        "findings": [
            {"says": hypothesis.description, "kind": hypothesis.kind, "margin": hypothesis.margin, **finding.to_dict()}
            for hypothesis, finding in zip(hypotheses, findings)
        ],
    }


def _combine_verdicts(findings: list[Finding]) -> str:
    """Combine the verdicts of a claim's hypotheses into its own."""
    verdicts = [finding.verdict for finding in findings]
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and all(verdict == "holds" for verdict in verdicts) else "undecided"


KERNEL_ONLY = ("linear_attention", "rebased", "hedgehog", "based", "cosformer", "hadamard", "t2r", "dpfp", "elu")
FIXED_DECAY = ("retnet",)
DYNAMIC_DECAY = ("gla", "metala", "mlstm", "mamba2", "hgrn2", "rwkv6", "gsa", "gated_deltanet", "kda", "rwkv7")
DELTA = ("deltanet", "gated_deltanet", "kda", "rwkv7")
ADDITIVE = (*KERNEL_ONLY, *FIXED_DECAY, "gla", "metala", "mlstm", "mamba2", "hgrn2", "rwkv6", "gsa")
LINEAR = (*ADDITIVE, *DELTA)
WINDOWS = ("sliding_window",)  # also with groups of heads that see further
CONTROLS = ("softmax",)  # arms that are no subquadratic student
NEGLIGIBLE_EFFECT = 0.02  # nats a token: what counts as little


def evaluate_claims(names: list[str], rows: list[ArmResult]) -> list[dict[str, Any]]:
    """Evaluate each named claim, as `evaluate_claim` does.

    Args:
        rows: records of finished arms. Claims select students by `mixer`, not by the name that a study gives them;
            the name stands in where a record has no mixer.
    """
    rows = [{**row, "axes": {**row["axes"], "mixer": row.get("mixer") or row["axes"]["student"]}} for row in rows]
    return [evaluate_claim(name, CLAIMS[name], rows) for name in names]


def _hypothesis(
    description: str, effect: Effect, kind: Literal["more", "little"] = "more", margin: float = MIN_EFFECT
) -> Hypothesis:
    return Hypothesis(description, effect.compute_contrasts, kind, margin)


def _fixed_hypotheses(*hypotheses: Hypothesis) -> Callable[[list[ArmResult]], list[Hypothesis]]:
    """Return the same hypotheses whatever arms there are."""
    return lambda rows: list(hypotheses)


def _loss_gap(better: dict, worse: dict, within: dict | None = None) -> Effect:
    """Define the effect: how much lower the loss of `better` is than that of `worse`."""
    return difference(log_perplexity, worse, better, within)


def _mixer_loss_gap(better: str, worse: str) -> Effect:
    return _loss_gap({"mixer": (better,)}, {"mixer": (worse,)})


def _best_of_all(name: str) -> Callable[[list[ArmResult]], list[Hypothesis]]:
    """Build a hypothesis for each other mixer of the study: that this one has the lower loss."""

    def build(rows: list[ArmResult]) -> list[Hypothesis]:
        mixers = dict.fromkeys(row["axes"]["mixer"] for row in rows)
        rivals = [rival for rival in mixers if rival != name and rival not in CONTROLS]
        return [
            Hypothesis(f"{name} is better than {rival}", _mixer_loss_gap(name, rival).compute_contrasts, margin=0.0)
            for rival in rivals
        ]

    return build


def _better_than_other_starts(rows: list[ArmResult]) -> list[Hypothesis]:
    """Build a hypothesis for each other value of the axis `start`: that a calibrated student has the lower loss."""
    starts = dict.fromkeys(row["axes"]["start"] for row in rows if "start" in row["axes"])
    return [
        _hypothesis(f"calibrated is better than {start}", _loss_gap({"start": ("calibrated",)}, {"start": (start,)}))
        for start in starts or ("copied",)
        if not start.startswith("calibrated")  # with other amounts of text: "calibrated-33k"
    ]


def _order_agreement(axis: str) -> Callable[[list[ArmResult]], Contrasts]:
    """Correlate the students' order by loss between neighboring values of an axis; see `rank_correlation_by_seed`."""
    return lambda rows: rank_correlation_by_seed(rows, axis, log_perplexity)


_OTHERS = {"mixer": (*KERNEL_ONLY, *FIXED_DECAY, "deltanet")}
_DYNAMIC, _KERNEL = {"mixer": DYNAMIC_DECAY}, {"mixer": KERNEL_ONLY}
_STAGE_3, _STAGES_23, _STAGES_123 = {"stages": ("3",)}, {"stages": ("2+3",)}, {"stages": ("1+2+3",)}
_NIAH = r"niah \d, (\d+) tokens, among \d+"
_COPIED, _FRESH = {"copy_projections": (True,)}, {"copy_projections": (False,)}


def _beats_ce_and_kl(name: str) -> Claim:
    """Build the claim that a further objective of stage 3 helps, beside CE + KL on as many tokens and for as long."""
    longer = "ce_kl", "ce_kl_x2", "ce_kl_x4"  # arms of the study, by what they read
    return Claim(
        f"The objective {name} beside CE + KL gives a better student than CE + KL alone.",
        "a question to its paper, see docs/guides/objectives.md",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis("at equal tokens", _loss_gap({"objective": (name,)}, {"objective": ("ce_kl",)})),
            Hypothesis(
                "at equal time, in which CE + KL reads more tokens",
                lambda rows: gap_at_equal_time(rows, log_perplexity, "objective", name, longer, "logits"),
            ),
        ),
    )


CLAIMS: dict[str, Claim] = {
    "dynamic-decay-beats-kernel-only": Claim(
        "Students whose decay depends on the input end at a lower loss than linear attention by a feature map alone.",
        "v2, experiment 1",
        "nats a token",
        _fixed_hypotheses(_hypothesis("lower loss on held-out text", _loss_gap(_DYNAMIC, _KERNEL))),
    ),
    "xlstm-first": Claim(
        "xLSTM (mLSTM) is the best of all students.",
        "v2, experiment 1; v3, table 2",
        "nats a token",
        _best_of_all("mlstm"),
    ),
    "hidden-state-alignment-helps": Claim(
        "Aligning hidden states is the most dependable gain: it lowers the loss, by more than aligning matrices does.",
        "v2, experiment 1",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis("2+3 is better than 3", _loss_gap(_STAGES_23, _STAGE_3)),
            _hypothesis(
                "what stage 2 gains is more than what stage 1 gains on top",
                Effect(
                    tuple(
                        Term(weight, log_perplexity, stages)
                        for weight, stages in ((1.0, _STAGE_3), (-2.0, _STAGES_23), (1.0, _STAGES_123))
                    )
                ),
            ),
        ),
    ),
    "matrix-mixing-adds-little": Claim(
        "Aligning mixing matrices before hidden states gains little.",
        "v2, experiment 1",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis("what 1+2+3 gains over 2+3", _loss_gap(_STAGES_123, _STAGES_23), "little", NEGLIGIBLE_EFFECT)
        ),
    ),
    "copying-starts-faster-but-is-not-enough": Claim(
        "Copying the teacher's projections speeds up the start, but a copied student still needs alignment.",
        "v2, experiment 1",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "the loss in the first tenth of stage 3 is lower with copies",
                difference(select_value("stages.logits.early_loss"), _FRESH, _COPIED, within=_STAGE_3),
            ),
            _hypothesis("with copies, 2+3 is still better than 3", _loss_gap(_STAGES_23, _STAGE_3, within=_COPIED)),
        ),
    ),
    "dynamic-decay-keeps-perplexity-with-length": Claim(
        "Past the training length the loss of students with dynamic decay rises less than that of the others.",
        "v2, figure 2",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "rise of the loss, others minus these",
                Effect((*loss_growth_terms(_OTHERS, 1.0), *loss_growth_terms(_DYNAMIC, -1.0))),
            )
        ),
    ),
    "delta-rule-keeps-retrieval": Claim(
        "Students with the delta rule recall associations that additive ones lose.",
        "v3, table 3",
        "share of the questions",
        _fixed_hypotheses(
            _hypothesis(
                "key-value pairs recalled, delta rule minus additive",
                difference(select_mean("recall", r"recall, \d+ pairs"), {"mixer": DELTA}, {"mixer": ADDITIVE}),
            ),
        ),
    ),
    "delta-rule-keeps-needles": Claim(
        "Students with the delta rule find needles in long texts that additive ones lose.",
        "v3, table 3",
        "share of the questions",
        _fixed_hypotheses(
            _hypothesis(
                "needles found, delta rule minus additive",
                difference(select_mean("needle", _NIAH), {"mixer": DELTA}, {"mixer": ADDITIVE}),
            ),
        ),
    ),
    "memory-constant-in-length": Claim(
        "A student's cache does not grow with the text.",
        "v2, figure 4",
        "share of the teacher's growth",
        _fixed_hypotheses(Hypothesis("growth of the cache a token", cache_growth, "little", 0.001, discrete=True)),
    ),
    "time-constant-in-length": Claim(
        "A token takes a student as long behind a long text as behind a short one.",
        "v2, figure 4",
        "share of the time at the shortest length",
        _fixed_hypotheses(Hypothesis("growth of a token's time", token_time_growth, "little", 0.1)),
    ),
    "faster-than-the-teacher-at-length": Claim(
        "Behind the longest text that was measured a student's token takes less time than the teacher's.",
        "v2, figure 4",
        "logarithm of the teacher's time over the student's",
        _fixed_hypotheses(Hypothesis("gain in a token's time", token_time_gain, "more", 0.0)),
    ),
    "order-stable-over-teachers": Claim(
        "Which student is better than which does not depend on the size of the teacher.",
        "v3, table 2",
        "Kendall's tau",
        _fixed_hypotheses(
            Hypothesis(
                "agreement of the order between teachers", _order_agreement("teacher"), margin=0.5, discrete=True
            )
        ),
    ),
    "gaps-set-early": Claim(
        "The order of the students is set early: a larger budget keeps it.",
        "v3, budget curves",
        "Kendall's tau",
        _fixed_hypotheses(
            Hypothesis("agreement of the order between budgets", _order_agreement("tokens"), margin=0.5, discrete=True)
        ),
    ),
    "head-gates-beat-channel-gates": Claim(
        "A decay for each head is better than one for each channel.",
        "v3, discussion",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "Gated DeltaNet is better than KDA, which differs by that alone",
                _mixer_loss_gap("gated_deltanet", "kda"),
            ),
            _hypothesis("Mamba-2 is better than GLA", _mixer_loss_gap("mamba2", "gla")),
        ),
    ),
    "delta-rule-beats-additive-at-equal-state": Claim(
        "With heads, state, convolution, gate and norm alike the delta rule is better than the additive update.",
        "v3, discussion; here under control",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "Gated DeltaNet is better than Mamba-2",
                _mixer_loss_gap("gated_deltanet", "mamba2"),
            )
        ),
    ),
    "decay-beats-none-at-equal-state": Claim(
        "With all else alike an input-dependent decay is better than none.",
        "v2, experiment 1; here under control",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "Mamba-2 is better than linear attention",
                _mixer_loss_gap("mamba2", "linear_attention"),
            )
        ),
    ),
    "outputs-beat-matrices": Claim(
        "At equal budget, aligning outputs before stage 3 is better than aligning T x T matrices.",
        "RADLADS (arXiv 2505.03005) against MOHAWK (arXiv 2408.10189)",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "2+3 is better than 1+3", _loss_gap(_STAGES_23, {"stages": ("1+3",)}, within={"target": ("attention",)})
            )
        ),
    ),
    "block-outputs-add-little": Claim(
        "Aligning the outputs of whole blocks gains little over those of the attention alone.",
        "a question that the papers leave open",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis(
                "what the block's output gains over the attention's",
                _loss_gap({"target": ("block",)}, {"target": ("attention",)}, within=_STAGES_23),
                "little",
                NEGLIGIBLE_EFFECT,
            )
        ),
    ),
    "most-tokens-to-stage-3": Claim(
        "Of a fixed budget the paper's split, nine tenths for stage 3, is better than equal parts.",
        "v2, settings",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis("the paper's split is better", _loss_gap({"split": ("paper",)}, {"split": ("even",)}))
        ),
    ),
    "window-beats-linear-students": Claim(
        "At equal budget a sliding window ends at a lower loss than linear students.",
        "arXiv 2608.28444, of windows without training; here trained",
        "nats a token",
        _fixed_hypotheses(
            Hypothesis("loss of linear students, minus the best window's", make_window_comparison(WINDOWS, LINEAR))
        ),
    ),
    "training-beats-untrained-window": Claim(
        "A trained student is better than the untrained sliding window of its memory.",
        "arXiv 2608.28444, which finds the opposite for retrieval",
        "nats a token",
        _fixed_hypotheses(
            Hypothesis("loss of the untrained window, minus the student's", make_gain_over_window(CONTROLS)),
        ),
    ),
    "heads-beat-layers": Claim(
        "Softmax kept in groups of heads is better than in whole layers, with as many heads.",
        "arXiv 2602.11374",
        "nats a token",
        _fixed_hypotheses(
            _hypothesis("lower loss on held-out text", _loss_gap({"softmax": ("heads",)}, {"softmax": ("layers",)})),
            _hypothesis(
                "lower loss on a passage that comes again",
                difference(
                    select_by_length("exam", r"student_repeat_loss@(\d+)", last=True),
                    {"softmax": ("layers",)},
                    {"softmax": ("heads",)},
                ),
            ),
        ),
    ),
    "calibration-beats-other-starts": Claim(
        "A student whose output projections are solved in closed form is better than with any other start.",
        "our own; other starts from arXiv 2606.16429 and 2605.08301",
        "nats a token",
        _better_than_other_starts,
    ),
    **{f"objective-{name.replace('_', '-')}-helps": _beats_ce_and_kl(name) for name in Objectives.model_fields},
}
