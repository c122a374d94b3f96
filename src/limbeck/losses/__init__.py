"""The distances between student and teacher.

Each returns a sum and the caller divides by a count known beforehand, so no loss depends on how a batch was split, on
padding or on the length.
"""

from limbeck.losses.layers import HIDDEN, hidden_distance, matrix_distance
from limbeck.losses.logits import FromDisk, FromHidden, Signal, check_top, logit_losses, tokens_at_once
from limbeck.losses.objectives import OBJECTIVES, Weights

__all__ = [
    "HIDDEN",
    "OBJECTIVES",
    "FromDisk",
    "FromHidden",
    "Signal",
    "Weights",
    "check_top",
    "hidden_distance",
    "logit_losses",
    "matrix_distance",
    "tokens_at_once",
]
