"""Studies: grids of runs on one teacher or several, their shared work, their tables, and which claims hold.

study = Study.load("paper-experiment-1", size="gpu")
run_study(study)["claims"]
"""

from limbeck.study.grid import Arm, Study, built_in
from limbeck.study.run import run_study

__all__ = ["Arm", "Study", "built_in", "run_study"]
