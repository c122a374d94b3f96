"""Every mixer under the whole contract, on every family; and the contract itself against mixers that break it."""

import dataclasses

import pytest
import torch
from _pytest.mark import ParameterSet

from helpers.paths import ROOT
from helpers.tiers import FAST_MIXERS
from limbeck import LimbeckError, mixers, testing
from limbeck.testing import CHECKS, FAMILIES, QUICK_FAMILIES, MixerVariant, contract
from limbeck.testing.contract import sample_inputs

# each mixer as it is by default, and one with every common switch turned
FULL = {"conv": 4, "output_norm": "rms", "output_gate": "silu", "rope": True}
VARIANTS = {
    **{name: MixerVariant(name) for name in mixers.list_mixers()},
    "gated_deltanet-full": MixerVariant("gated_deltanet", FULL),
}
# one of each operator; the slow checks run on all families for these, on few for the others
THOROUGH = ("gla", "gated_deltanet-full", "mlstm")


def cases() -> list[ParameterSet]:
    chosen = []
    for variant in VARIANTS:
        for check, family in testing.list_cases():
            if family is None or family in QUICK_FAMILIES or variant in THOROUGH or not CHECKS[check].slow:
                marks = () if is_fast(variant, check, family) else pytest.mark.slow
                chosen.append(pytest.param(variant, check, family, marks=marks))
    return chosen


def is_fast(variant: str, check: str, family: str | None) -> bool:
    """Whether the fast tier has the case: quick checks of one mixer of each operator, and of one in every family."""
    variants = FAST_MIXERS if family in (None, "llama") else ("gated_deltanet-full",)
    return variant in variants and not CHECKS[check].slow


@pytest.mark.parametrize(("variant", "check", "family"), cases())
def test_contract(variant, check, family):
    CHECKS[check](VARIANTS[variant], family)


@pytest.mark.parametrize("name", mixers.list_mixers())
@torch.no_grad()
def test_at_the_start_no_gate_looks_at_the_hidden_states(name):
    module = MixerVariant(name, {"output_norm": "none"}).build_module(perturbation=0.0)
    q, k, v, x = sample_inputs(module, 2, 20)
    other = sample_inputs(module, 2, 20, seed=9)[3]
    assert torch.allclose(module(q, k, v, x)[0], module(q, k, v, other)[0], atol=1e-12)


# ------------------------------------------------------- what the checks find


class Broken(mixers.get("gla")):
    """A GLA with one thing wrong, said by an attribute."""

    name, summary = "broken", "a GLA with a mistake"
    mistake = ""

    def inputs(self, q, k, v, x, tokens, state):
        arguments = super().inputs(q, k, v, x, tokens, state)
        if self.mistake == "looks ahead":
            arguments.log_decay = arguments.log_decay - (x.mean() ** 2)
        if self.mistake == "forgets the state":
            arguments.k = arguments.k * (1 if state else 2)
        if self.mistake == "reads padding":
            arguments.q = arguments.q + x.cumsum(1)[..., :1, None] * 1e-3
        if self.mistake == "takes no gradient":
            arguments.log_decay = arguments.log_decay.detach()
        if self.mistake == "overflows":
            arguments.q = arguments.q * x.mean(-1)[..., None, None].mul(30).exp()
        return arguments

    def memory_numel(self):
        return super().memory_numel() + (self.mistake == "miscounts")


@pytest.mark.parametrize(
    ("mistake", "check", "message"),
    [
        ("looks ahead", "split", "cut at"),
        ("forgets the state", "three_forms", "token 1 alone"),
        ("reads padding", "padded_module", "tokens of padding"),
        ("takes no gradient", "gradients", "no finite gradient: .*decay_up"),
        ("overflows", "extreme_gates", "not finite"),
        ("miscounts", "state_size", r"state_numel\(\) is"),
    ],
)
def test_a_mistake_is_found(mistake, check, message, monkeypatch):
    monkeypatch.setitem(mixers.registry._REGISTRY, "broken", Broken)
    monkeypatch.setattr(Broken, "mistake", mistake)
    family = "llama" if CHECKS[check].per_family else None
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](MixerVariant("broken"), family)


def test_a_run_reports_failures_and_goes_on(monkeypatch):
    monkeypatch.setitem(mixers.registry._REGISTRY, "broken", Broken)
    monkeypatch.setattr(Broken, "mistake", "miscounts")
    kept = {name: CHECKS[name] for name in ("described", "state_size", "padding")}
    crash = dataclasses.replace(CHECKS["described"], name="crash", function=lambda variant: {}["nothing"])
    monkeypatch.setattr(contract, "CHECKS", {**kept, "crash": crash})
    outcomes = list(testing.run_checks("broken", families=["llama", "opt"]))
    assert [(o.check.name, o.family) for o in outcomes] == [
        ("described", None),
        ("state_size", None),
        ("padding", "llama"),
        ("padding", "opt"),
        ("crash", None),
    ]
    assert outcomes[0].failure is None
    assert "state_numel() is" in outcomes[1].failure
    assert outcomes[4].failure == "KeyError: 'nothing'"


def test_cases():
    assert {family for _, family in testing.list_cases()} == {None, *FAMILIES}
    quick = testing.list_cases(quick=True)
    assert {family for _, family in quick} == {None, *QUICK_FAMILIES}
    assert not any(CHECKS[check].slow for check, _ in quick)
    with pytest.raises(LimbeckError, match="did you mean 'gemma2'"):
        testing.list_cases(["gemma"])
    with pytest.raises(LimbeckError, match="unknown mixer"):
        list(testing.run_checks("nothing"))


def test_the_document_lists_the_checks_and_shows_the_example():
    root = ROOT
    text = (root / "docs" / "guides" / "own_mixer.md").read_text(encoding="utf-8")
    for check in CHECKS.values():
        assert f"| `{check.name}` | {check.summary} |" in text
    example = (root / "examples" / "lightning" / "limbeck_lightning.py").read_text(encoding="utf-8")
    shown = text.split("## 2. The file")[1].split("```python\n")[1].split("```")[0]
    # the page leaves out annotations and the names that only these need
    other = ("def ", "from limbeck.mixers")
    code = [line for line in shown.splitlines() if line and not line.lstrip().startswith(other)]
    assert not [line for line in code if line not in example.splitlines()]
    scope = {"__name__": "mine"}
    exec(shown.replace("@register", ""), scope)  # a reader who copies it has a mixer
    assert issubclass(scope["Lightning"], mixers.Mixer)
