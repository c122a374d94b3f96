"""Studies: grids of runs on one teacher or several, their shared work, their tables, and tests of claims.

study = Study.load("paper-experiment-1", size="gpu")
run_study(study)["claims"]
"""

from limbeck.study.runner import run_study
from limbeck.study.spec import Arm, Study, list_builtin_studies

__all__ = ["Arm", "Study", "list_builtin_studies", "run_study"]
