"""Public tools for authors of mixers: the contract that every mixer has to fulfil, and tiny models to test on.

    limbeck check path/to/mine.py                               # on the command line

    from limbeck.testing import CHECKS, MixerVariant, list_cases, run_checks
    for result in run_checks("gla", families=["llama"]):        # a registered mixer
        print(result.check.name, result.family, result.failure or "passed")

    @pytest.mark.parametrize(("check", "family"), list_cases())     # in a test suite
    def test_contract(check, family):
        CHECKS[check](MixerVariant("my_mixer"), family)             # raises AssertionError if it fails

`CHECKS[name].summary` says what a check demands; docs/guides/own_mixer.md lists all of them. `limbeck.testing.survey`
tries which families of transformers can be converted.
"""

# These modules register their checks in CHECKS, in this order: the first failure is then the nearest to its cause.
from limbeck.testing import module_checks, numerics, student_checks  # noqa: F401
from limbeck.testing.contract import CHECKS, QUICK_FAMILIES, Check, CheckResult, MixerVariant, list_cases, run_checks
from limbeck.testing.tiny_models import FAMILIES, make_tiny_model

__all__ = [
    "CHECKS",
    "FAMILIES",
    "QUICK_FAMILIES",
    "Check",
    "CheckResult",
    "MixerVariant",
    "list_cases",
    "make_tiny_model",
    "run_checks",
]
