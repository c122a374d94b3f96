"""The contract of a mixer: what all of them are held to, for anyone to run on their own.

    limbeck check path/to/mine.py                      # on the command line
    contract.run_checks("gla", families=["llama"])            # from Python: one outcome after the other
    contract.CHECKS["split"](MixerVariant("gla"))           # a single check; AssertionError where it fails

What each check asks for is its summary; docs/own_mixer.md lists them.
"""

from limbeck.testing import module_checks, numerics, student_checks  # noqa: F401, I001
from limbeck.testing.tiny_models import FAMILIES, make_tiny_model
from limbeck.testing.contract import CHECKS, QUICK_FAMILIES, Check, CheckResult, list_cases, run_checks
from limbeck.testing.contract import MixerVariant


# They fill CHECKS, in this order: what fails first is then nearest to its cause.

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
