"""What is left of a study as lists of tasks, and how long so many workers take for them.

    first, later = lists(arms, states, workers=8)
    wall_seconds(first, later, seconds, workers=8)      # seconds(task, in_first) -> float

In the first list are the arms that learn together and those that share nothing with any other; in the second each arm
of the former to its end. Where there are fewer tasks than workers, the largest teams are split: the teacher runs once
for each part then, and the weights stay what they are, since an arm's do not depend on who learns beside it.
"""

import heapq
from collections.abc import Callable

from limbeck.study.grid import Arm
from limbeck.study.sharing import teams
from limbeck.study.team import shares_a_pass
from limbeck.study.work import Task


def lists(arms: list[Arm], states: dict[str, str], workers: int = 1) -> tuple[list[Task], list[Task]]:
    """The tasks that can be done at once, and those that come after them.

    Args:
        states: of each arm by name, see `limbeck.study.record.state`.
        workers: how many tasks can be done side by side.
    """
    left = [arm for arm in arms if states[arm.name] != "finished"]
    groups = [team for team in teams([arm for arm in left if states[arm.name] == "train"]) if shares_a_pass(team)]
    grouped = {arm.name for team in groups for arm in team}
    lone = [arm.name for arm in left if arm.name not in grouped]
    parts = _split([[arm.name for arm in team] for team in groups], workers - len(lone))
    first = [Task("together" if len(part) > 1 else "alone", tuple(part)) for part in parts]
    at_once = {name for task in first if task.kind == "alone" for name in task.arms}
    first += [Task("alone", (name,)) for name in lone]
    later = [Task("alone", (arm.name,)) for arm in left if arm.name in grouped - at_once]
    return first, later


def wall_seconds(
    first: list[Task], later: list[Task], seconds: Callable[[Task, bool], float], workers: int = 1
) -> float:
    """Seconds until all is done, each free worker taking the next task; the second list waits for the first."""
    total = 0.0
    for tasks in (first, later):
        free = [0.0] * workers
        for task in tasks:
            heapq.heappush(free, heapq.heappop(free) + seconds(task, tasks is first))
        total += max(free)
    return total


def _split(groups: list[list[str]], wanted: int) -> list[list[str]]:
    """Halve the largest group until there are so many or all have one member; the largest come first."""
    parts = sorted(groups, key=len, reverse=True)
    while parts and len(parts) < wanted and len(parts[0]) > 1:
        largest = parts.pop(0)
        middle = (len(largest) + 1) // 2
        parts = sorted([*parts, largest[:middle], largest[middle:]], key=len, reverse=True)
    return parts
