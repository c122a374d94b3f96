"""Several processes, on one machine or many, that work on one run: who is who, sums over all, and one end for all.

    with together():                                  # joins the processes that torchrun or accelerate started
        first, count = share(settings.batch_size)          # this process's rows of a step
        counts = add_up({"tokens": 2048.0})           # sums over all processes
        add_gradients(parameters)
        result = on_main(write_the_report)            # done by process 0, while the others wait for it

Alone, each of these does nothing, and nothing is communicated.
"""

from limbeck.distributed.answers import main_first, on_main, take_from_main, tensors_from_main
from limbeck.distributed.session import barrier, together
from limbeck.distributed.sums import add_gradients, add_tensors, add_up, agree
from limbeck.distributed.world import World, local_device, one_voice, share, world

__all__ = [
    "World",
    "add_gradients",
    "add_tensors",
    "add_up",
    "agree",
    "barrier",
    "local_device",
    "main_first",
    "on_main",
    "one_voice",
    "share",
    "take_from_main",
    "tensors_from_main",
    "together",
    "world",
]
