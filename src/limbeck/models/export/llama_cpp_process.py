"""llama.cpp in a process of its own, because it ends its process where it finds an error in a graph.

    run = compare_in_process("student-f16.gguf", ids, "Hello", threads=1)        # logits and tokens
    loss = score_in_process("student-f16.gguf", sequences, threads=1)            # nats
    speech = speak_in_process("student-f16.gguf", ids, count=32, threads=1)      # tokens and their rate

Each call loads the file. What the child finds wrong is raised here as the error that it is.

Shapes: T tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.errors import LimbeckError
from limbeck.models.conversation import LlamaCppEngine, continue_greedily
from limbeck.models.export import EngineFailedError, EngineMissingError, Speech
from limbeck.models.export.llama_cpp import LlamaCpp, get_version, load_library
from limbeck.models.export.verification import sum_losses

CHUNK = 128  # tokens whose logits exist at a time


@dataclass(frozen=True)
class EngineRun:
    """What llama.cpp makes of some tokens: logits [T, vocabulary] at once and step by step; and of a text: tokens."""

    prompt: np.ndarray
    steps: np.ndarray
    tokens: list[int]


def compare_in_process(file: str | Path, ids: Sequence[int], text: str, threads: int) -> EngineRun:
    """Compute logits of tokens, at once and one by one, and split a text into tokens; raises as `_run_child`."""
    found = _run_child("compare", file, threads, ids=list(ids), text=text)
    return EngineRun(found["prompt"], found["steps"], found["tokens"].tolist())


def score_in_process(file: str | Path, sequences: Sequence[Sequence[int]], threads: int) -> float:
    """Sum the loss in nats over all tokens but the first of each sequence; raises as `_run_child`."""
    return float(_run_child("score", file, threads, sequences=[list(ids) for ids in sequences])["loss"])


def speak_in_process(file: str | Path, ids: Sequence[int], count: int, threads: int) -> Speech:
    """Continue a prompt by `count` tokens, the most likely one each time; raises as `_run_child`."""
    found = _run_child("speak", file, threads, ids=list(ids), count=count)
    return Speech(found["tokens"].tolist(), float(found["rate"]), threads)


def _run_child(kind: str, file: str | Path, threads: int, **task: Any) -> dict[str, np.ndarray]:
    """Carry out a task in a child process; returns its arrays by name.

    Raises:
        EngineFailedError: the file does not load, or the child was ended.
        EngineMissingError: llama.cpp is not installed.
    """
    get_version()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npz"
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps({"kind": kind, "file": str(file), "threads": threads, "out": str(out), **task}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            check=False,
        )
        if child.returncode == EngineMissingError.exit_code:
            load_library()  # raises the same error here
        if child.returncode or not out.is_file():
            lines = child.stderr.strip().splitlines() or [f"it ended with code {child.returncode}"]
            raise EngineFailedError(
                f"llama.cpp does not run {file}: {lines[0]}",
                expected="a GGUF file that this version reads",
                hint=f"another version than {get_version()}",
            )
        with np.load(out) as found:
            return dict(found)


# ------------------------------------------------------------------ in the child


def _compare(task: dict[str, Any]) -> dict[str, Any]:
    with LlamaCpp(task["file"], len(task["ids"]), task["threads"]) as engine:
        prompt = engine.decode(task["ids"])
        engine.reset()
        steps = np.concatenate([engine.decode([token]) for token in task["ids"]])
        return {"prompt": prompt, "steps": steps, "tokens": np.array(engine.tokenize(task["text"]), np.int64)}


def _score(task: dict[str, Any]) -> dict[str, Any]:
    loss = 0.0
    with LlamaCpp(task["file"], max(map(len, task["sequences"])), task["threads"]) as engine:
        for ids in task["sequences"]:
            engine.reset()
            for begin in range(0, len(ids) - 1, CHUNK):
                targets = ids[begin + 1 : begin + CHUNK + 1]
                loss += sum_losses(engine.decode(ids[begin : begin + len(targets)]), targets)
    return {"loss": loss}


def _speak(task: dict[str, Any]) -> dict[str, Any]:
    with LlamaCpp(task["file"], len(task["ids"]) + task["count"], task["threads"]) as engine:
        tokens, rate = continue_greedily(LlamaCppEngine(engine), task["ids"], task["count"])
    return {"tokens": np.array(tokens, np.int64), "rate": rate}


if __name__ == "__main__":
    try:
        given = json.loads(sys.stdin.read())
        np.savez(given["out"], **{"compare": _compare, "score": _score, "speak": _speak}[given["kind"]](given))
    except LimbeckError as error:
        sys.exit(f"{error}" if not isinstance(error, EngineMissingError) else error.exit_code)
