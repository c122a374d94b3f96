"""The sections of benchmarks/gpu.py, one file each: a function `run(bench)` that measures case after case."""
