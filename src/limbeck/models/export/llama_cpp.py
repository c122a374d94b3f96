"""llama.cpp by its C interface, from the prebuilt library in the package `xllamacpp`.

    with LlamaCpp("student-f16.gguf") as engine:
        logits = engine.decode([1, 2, 3])                 # [3, vocabulary]; the state goes on from call to call
        engine.reset()
        ids = engine.tokenize("Hello")

Only what a verification, a score and a conversation need. Structs are described up to the last field that is set here,
with room behind them, because llama.cpp adds fields at their ends; the defaults that the library fills in show whether
the fields are where they are expected.
"""

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
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
    """`llama_context_params` up to whether sequences share the cache's cells."""

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
        ("between", c_void_p * 3),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
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
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_model_is_recurrent": (c_bool, [c_void_p]),
    "llama_model_is_hybrid": (c_bool, [c_void_p]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
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
    flags = [defaults.embeddings, defaults.offload_kqv, defaults.swa_full, defaults.kv_unified]
    if [*seen, defaults.type_k, defaults.type_v, *flags] != [512, 2048, 512, 1, -1, F16, F16, False, True, True, False]:
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
        exact: keep the cache of softmax layers in float32, where it would be the largest difference, and read a prompt
            at once; else as llama.cpp does by itself.
    """

    def __init__(self, file: str | Path, context: int = 512, threads: int = 1, *, exact: bool = True):
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
        params.n_ctx = params.n_batch = self.length
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.n_ubatch = self.length
            params.flash_attn_type = 0
            params.type_k = params.type_v = F32
        else:
            # a second sequence, for `repeat_context`
            params.n_seq_max, params.kv_unified = 2, True
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

    @property
    def is_recurrent(self) -> bool:
        """Whether all layers have a state of fixed size."""
        return bool(self.library.llama_model_is_recurrent(self.model))

    @property
    def state_bytes(self) -> int:
        """Size of the sequence's cache and states."""
        return int(self.library.llama_state_seq_get_size(self.context, 0))

    def repeat_context(self, times: int) -> None:
        """Put the cache's cells there `times` times, for measurements of speed: as many cells as after a longer text.

        The copies keep their positions, so what the model says next means nothing. What a token costs depends on the
        number of cells and not on what is in them.

        Raises:
            LimbeckError: the model has layers without cells, or no room for the copies.
        """
        if self.is_recurrent or self.library.llama_model_is_hybrid(self.model):
            raise LimbeckError("the model has layers with a state of fixed size", expected="softmax layers alone")
        if times * self.position > self.length:
            raise LimbeckError(f"{times * self.position} tokens", expected=f"{self.length} at most")
        memory, size = self.library.llama_get_memory(self.context), self.state_bytes
        state = ctypes.create_string_buffer(size)
        self.library.llama_state_seq_get_data(self.context, state, size, 0)
        for _ in range(times - 1):
            if not self.library.llama_state_seq_set_data(self.context, state, size, 1):
                raise self._error("llama.cpp does not take its own state back")
            self.library.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            self.library.llama_memory_seq_rm(memory, 1, -1, -1)

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
