"""The contract of a mixer: what all of them are held to, for anyone to run on their own.

    limbeck check path/to/mine.py                      # on the command line
    contract.run("gla", families=["llama"])            # from Python: one outcome after the other
    contract.CHECKS["split"](Variant("gla"))           # a single check; AssertionError where it fails

What each check asks for is its summary; docs/own_mixer.md lists them.
"""

# They fill CHECKS, in this order: what fails first is then nearest to its cause.
from limbeck.contract import on_modules, switches, numerics, in_students  # noqa: F401, I001
from limbeck.contract.families import FAMILIES, tiny
from limbeck.contract.registry import CHECKS, FEW, Check, Outcome, cases, run
from limbeck.contract.variant import Variant

__all__ = ["CHECKS", "FAMILIES", "FEW", "Check", "Outcome", "Variant", "cases", "run", "tiny"]
