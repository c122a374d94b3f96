"""Which of transformers' causal language models can become students, found out by doing it.

    for row in walk(["qwen3", "bloom"], mixer="gated_deltanet"):
        print(row.family, row.status, row.problem)      # qwen3 works; bloom no: attention code of its own

Every family is made as a tiny random model (`tiny.py`), converted and put through the checks (`checks.py`).
"""

from limbeck.families.tiny import names, tiny
from limbeck.families.trial import COMMON, Row, examine, markdown, walk

__all__ = ["COMMON", "Row", "examine", "markdown", "names", "tiny", "walk"]
