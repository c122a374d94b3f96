"""llama.cpp by its C interface, from the prebuilt library in the package `xllamacpp`.

    with LlamaCpp("student-f16.gguf") as engine:
        logits = engine.decode([1, 2, 3])                 # [3, vocabulary]; the state goes on from call to call
        engine.reset()
        ids = engine.tokenize("Hello")
    run = run_in_process("student-f16.gguf", ids, "Hello", threads=1)

Only what a verification and a conversation need. Structs are described up to the last field that is set here, with room
behind them, because llama.cpp adds fields at their ends; the defaults that the library fills in show whether the fields
are where they are expected.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from limbeck.core.errors import LimbeckError
from limbeck.models.export import EngineFailedError, EngineMissingError

PACKAGE = "xllamacpp"
F32, F16 = 0, 1  # ggml_type
MIN_CONTEXT = 256  # llama.cpp rounds context lengths up to a multiple of it
ERROR_LEVEL = 4  # ggml_log_level


class ModelParams(ctypes.Structure):
    """`llama_model_params`, none of whose fields are set here."""

    _fields_ = [("room", ctypes.c_char * 512)]


class ContextParams(ctypes.Structure):
    """`llama_context_params` up to the types of the cache."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn", c_float * 4),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("room", ctypes.c_char * 512),
    ]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
# name: result, arguments
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
}
_errors: list[str] = []  # what the library logged as an error since the last load


@LogCallback
def _log(level: int, text: bytes, user: Any) -> None:
    if level == ERROR_LEVEL:
        _errors.append(text.decode("utf-8", errors="replace").strip())


def get_version() -> str:
    """Return the installed version of the package that has the library.

    Raises:
        EngineMissingError: it is not installed.
    """
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineMissingError(
            "llama.cpp is not installed, so the file was not opened",
            expected=f"the package {PACKAGE}",
            hint="pip install 'limbeck[export]'",
        ) from error


@cache
def load_library() -> ctypes.CDLL:
    """Load the library once, and check that its structs are laid out as described here.

    Raises:
        EngineMissingError: not installed, or another interface.
    """
    version = get_version()
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    file = next((f for pattern in ("*.so", "*.pyd", "*.dylib") for f in sorted(folder.glob(pattern))), None)
    try:
        if file is None:
            raise OSError(f"no library in {folder}")
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise _unknown_interface(version, str(error)) from error
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    defaults = library.llama_context_default_params()
    seen = [defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.n_seq_max, defaults.flash_attn_type]
    if [*seen, defaults.type_k, defaults.type_v] != [512, 2048, 512, 1, -1, F16, F16]:
        raise _unknown_interface(version, "its context parameters are laid out in another way")
    return library


def _unknown_interface(version: str, problem: str) -> EngineMissingError:
    return EngineMissingError(
        f"{version} has another interface than this version of Limbeck knows: {problem}",
        expected="the version in constraints.txt",
        hint="pip install -c constraints.txt 'limbeck[export]'",
    )


class LlamaCpp:
    """A GGUF file, loaded, with one sequence.

    Args:
        file: the GGUF file.
        context: tokens for which there is room.
        threads: of the CPU.
    """

    def __init__(self, file: str | Path, context: int = 512, threads: int = 1):
        self.library = load_library()
        self.model: Any = None
        self.context: Any = None
        self.length = -(-context // MIN_CONTEXT) * MIN_CONTEXT
        _errors.clear()
        self.model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self.model:
            raise self._error(f"llama.cpp does not load {file}")
        params = self.library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.length
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        # in half precision, the cache of softmax layers would be the largest difference
        params.type_k = params.type_v = F32
        self.context = self.library.llama_init_from_model(self.model, params)
        if not self.context:
            self.close()
            raise self._error(f"llama.cpp cannot run {file}")
        self.vocab = self.library.llama_model_get_vocab(self.model)
        self.vocabulary: int = self.library.llama_vocab_n_tokens(self.vocab)
        self.position = 0

    def decode(self, ids: Sequence[int], *, last_only: bool = False) -> np.ndarray:
        """Read further tokens; return the logits behind each of them, or behind the last: [T or 1, vocabulary]."""
        if self.position + len(ids) > self.length:
            raise LimbeckError(
                f"{self.position + len(ids)} tokens do not fit the context", expected=f"{self.length} at most"
            )
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.logits[i] = not last_only or i == len(ids) - 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            code = self.library.llama_decode(self.context, batch)
            if code:
                raise self._error(f"llama.cpp ended with code {code}")
            wanted = range(len(ids) - 1 if last_only else 0, len(ids))
            rows = [self.library.llama_get_logits_ith(self.context, i) for i in wanted]
            logits = np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])
        finally:
            self.library.llama_batch_free(batch)
        self.position += len(ids)
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.position = 0

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Split a text into tokens.

        Args:
            special: read control tokens in the text as such; nothing is put before or behind the text.
        """
        raw = text.encode()
        room = len(raw) + 8
        ids = (c_int32 * room)()
        count = self.library.llama_tokenize(self.vocab, raw, len(raw), ids, room, False, special)
        return list(ids[:count])

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self.context:
            self.library.llama_free(self.context)
        if self.model:
            self.library.llama_model_free(self.model)
        self.context = self.model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, problem: str) -> LimbeckError:
        said = f": {_errors[0]}" if _errors else ""
        return EngineFailedError(
            problem + said, expected="a GGUF file that this version reads", hint=f"another version than {get_version()}"
        )


# ------------------------------------------------------------------ in a process of its own


@dataclass(frozen=True)
class EngineRun:
    """What llama.cpp makes of some tokens: logits [T, vocabulary] at once and step by step; and of a text: tokens."""

    prompt: np.ndarray
    steps: np.ndarray
    tokens: list[int]


def run_in_process(file: str | Path, ids: Sequence[int], text: str, threads: int) -> EngineRun:
    """Run a file in a child process, because llama.cpp ends its process where it finds an error in a graph.

    Raises:
        EngineFailedError: the file does not load, or the child was ended.
        EngineMissingError: llama.cpp is not installed.
    """
    get_version()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.npz"
        task = json.dumps({"file": str(file), "ids": list(ids), "text": text, "threads": threads, "out": str(out)})
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=task,
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
        with np.load(out) as saved:
            return EngineRun(saved["prompt"], saved["steps"], saved["tokens"].tolist())


def _run_task(task: dict[str, Any]) -> None:
    with LlamaCpp(task["file"], len(task["ids"]), threads=task["threads"]) as engine:
        prompt = engine.decode(task["ids"])
        engine.reset()
        steps = np.concatenate([engine.decode([token]) for token in task["ids"]])
        np.savez(task["out"], prompt=prompt, steps=steps, tokens=np.array(engine.tokenize(task["text"]), np.int64))


if __name__ == "__main__":
    try:
        _run_task(json.loads(sys.stdin.read()))
    except LimbeckError as error:
        sys.exit(f"{error}" if not isinstance(error, EngineMissingError) else error.exit_code)
