"""The linear-time recurrences, each in three forms that agree: `recurrent`, `chunked` and `matrix`.

from limbeck.ops import delta_rule
o, state = delta_rule.chunked(q, k, v, beta, log_decay)
"""

from limbeck.ops import delta_rule, scalar_decay, vector_decay

__all__ = ["delta_rule", "scalar_decay", "vector_decay"]
