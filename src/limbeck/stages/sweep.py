"""A sweep of learning rates over one stage, and the rate that it suggests.

sweep.rates, sweep.losses, sweep.suggested          # made by limbeck.find_rate
"""

from dataclasses import dataclass, field

SMOOTH = 0.7  # of the running mean from which slope and lowest loss are read


@dataclass
class Sweep:
    """The sweep of one stage."""

    index: int
    stage: str
    begun_from: str  # what was done before it: stages by name
    given: float  # the recipe's rate
    sequences: int  # that every step sees
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # before the step of that rate

    @property
    def smooth(self) -> list[float]:
        """The running mean of the losses, corrected for its start."""
        found, mean = [], 0.0
        for number, loss in enumerate(self.losses, 1):
            mean = SMOOTH * mean + (1 - SMOOTH) * loss
            found.append(mean / (1 - SMOOTH**number))
        return found

    @property
    def lowest(self) -> int:
        """Where the loss is lowest."""
        smooth = self.smooth
        return min(range(len(smooth)), key=smooth.__getitem__)

    @property
    def suggested(self) -> float | None:
        """The rate at which the loss falls fastest; None where it nowhere falls."""
        smooth, end = self.smooth, self.lowest
        falls = {i: smooth[i + 1] - smooth[i - 1] for i in range(1, end)}
        if not falls or min(falls.values()) >= 0:
            return None
        return self.rates[min(falls, key=falls.__getitem__)]
