"""What the one who waits for a study sees: which arms are done, of how many, and about how long the rest takes.

watcher = Watcher(first, later, workers, plan)
watcher.saw(done)          # prints "3 of 48 arms done: gla_2+3_seed0; about 41 min left"

A task counts as much as the plan says that it takes, without a plan all count alike. The pace is that of the tasks
that have ended.
"""

import time

from limbeck.console import console
from limbeck.study.plan import StudyPlan
from limbeck.study.work import Done, Task


class Watcher:
    """Tells of tasks that have ended.

    Args:
        first, later: the study's lists, see `limbeck.study.schedule`.
        workers: how many tasks go side by side, 0 where that is not known.
        plan: the times of the tasks.
    """

    def __init__(self, first: list[Task], later: list[Task], workers: int, plan: StudyPlan | None):
        tasks = [(task, True) for task in first] + [(task, False) for task in later]
        self.weights = {task: plan.task_seconds(task, early) if plan else 1.0 for task, early in tasks}
        self.arms = len({name for task in self.weights for name in task.arms})
        self.over = 0
        self.worked = 0.0  # weight of the tasks that have ended
        self.began = time.monotonic()
        if self.arms:
            console.print(f"{self.arms} arms to run" + (f", {workers} side by side" if workers > 1 else ""))

    def saw(self, done: Done) -> None:
        """Tell what a task came to."""
        for name, text in done.failures.items():
            console.print(f"arm {name} failed: ", end="", style="bold red")
            console.print(text.splitlines()[0], markup=False)
        self.worked += self.weights.pop(done.task)
        if done.task.kind == "alone":
            self.over += 1
            what = f"{self.over} of {self.arms} arms done: {done.task.arms[0]}"
        else:
            for task in [task for task in self.weights if done.failures.keys() & set(task.arms)]:
                del self.weights[task]  # what failed among others is not tried alone
            self.over += len(done.failures)
            through = len(done.task.arms) - len(done.failures)
            what = f"{self.over} of {self.arms} arms done; {through} are through the stages that they share"
        console.print(f"{what}{self._left()}", markup=False)

    def _left(self) -> str:
        """About how long the rest takes, at the pace of what is done."""
        left = sum(self.weights.values())
        if not self.worked or not left:
            return ""
        return f"; about {(time.monotonic() - self.began) * left / self.worked / 60:.1f} min left"
