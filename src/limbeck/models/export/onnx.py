"""ONNX: the whole student as one graph of opset 27, which reads prompts and single tokens with its state in and out.

    EXPORTER.check(student, tokenizer)                       # mixers that the operators compute, families that export
    EXPORTER.write(student, tokenizer, folder, "f32")        # model.onnx and the tokenizer
    EXPORTER.verify(student, tokenizer, folder)              # onnxruntime beside the student
    session = GraphSession(folder)                           # logits and states of a call

A graph computes in float32, whatever the student's precision. docs/guides/export.md has a program that generates text
with nothing but onnxruntime and tokenizers.

Shapes: B batch, T tokens.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.version import __version__
from limbeck.mixers import Mixer
from limbeck.mixers.sliding_window import SlidingWindow
from limbeck.models.export import EngineMissingError, Exporter, ExportPlan, Fit, Reason, Verification
from limbeck.models.export.onnx_graph import INPUTS, build_graph, present_name, save_graph
from limbeck.models.export.onnx_operators import LINEAR_OPERATORS
from limbeck.models.export.onnx_step import StudentStep, copy_in_float32
from limbeck.models.export.verification import NUM_TOKENS, compare, compute_logits, sample_tokens, sum_losses
from limbeck.models.layers import format_ranges
from limbeck.models.modeling import get_mixers
from limbeck.models.quantization import is_quantized

MODEL_FILE = "model.onnx"
BOUND = 1e-3  # largest difference of logits in a verification, in standard deviations
TOLERANCE = 1e-3  # of the step beside the student before it is written, likewise
CHUNK = 128  # tokens that are read at once
MOST_TOKENS = 512  # of a verification that is to see tokens leave a window
# Mixers that are put together from others, or compute around an operator in a way that a graph can follow.
COMPOSED = ("hybrid", "head_split", "rwkv6", "sliding_window", "softmax")
# Why the others do not fit; all other mixers are one call of an operator, or are checked by that.
UNFIT = {
    "gsa": "its second recurrence decays by value channel, and LinearAttention by key channel",
    "lolcats": "one normalizer for window and state, which neither LinearAttention nor Attention gives",
    "mlstm": "its running maximum over the past, for which there is no operator",
    "window_memory": "its memory reads a token only when the window drops it, which its own code does",
    "rwkv7": "it erases along another vector than it writes to, and LinearAttention along its key",
}


def check(student: Any, tokenizer: Any) -> list[Reason]:
    """Return why a student cannot be written; for one that can, the step of the graph has been run beside it."""
    if is_quantized(student.config):
        return [Reason("its weights are quantized, and the graph's are float32")]
    mixers = get_mixers(student)
    found: dict[Reason, list[int]] = {}
    for mixer in mixers.values():
        for reason in _check_mixer(mixer):
            found.setdefault(reason, []).append(mixer.teacher_shape.layer)
    if found:
        return [Reason(f"{r.problem} (layers {format_ranges(layers)})", r.switch) for r, layers in found.items()]
    if getattr(student.config.get_text_config(), "attention_chunk_size", None) and _keeps_softmax(student):
        return [Reason("its softmax layers attend in chunks", "student.softmax_layers=none")]
    return _check_step(student)


def plan(student: Any, tokenizer: Any, quantization: str) -> ExportPlan:
    """Describe the files that `write` makes."""
    # by tensor, so that a tied head counts once
    size = sum(4 * parameter.numel() for parameter in student.parameters())
    notes = ["opset 27: onnxruntime 1.32 or newer", "feed the states back: docs/guides/export.md, ONNX"]
    return ExportPlan("ONNX graph, opset 27", {MODEL_FILE: size}, notes)


def write(student: Any, tokenizer: Any, folder: Path, quantization: str) -> None:
    """Write the graph, the generation settings and the tokenizer into an empty folder."""
    _require("onnxscript", "limbeck export --to onnx")
    model = build_graph(StudentStep(student))
    model.producer_name, model.producer_version = "limbeck", __version__
    mixers = {mixer.teacher_shape.layer: mixer.name for mixer in get_mixers(student).values()}
    model.metadata_props.update(
        {"limbeck.mixers": json.dumps(mixers), "limbeck.family": student.config.limbeck["base_model_type"]}
    )
    save_graph(model, folder / MODEL_FILE)
    student.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def verify(student: Any, tokenizer: Any, folder: Path) -> Verification:
    """Compare onnxruntime with the student on the same tokens: at once, and one by one."""
    session = GraphSession(folder)
    reference = copy_in_float32(student)
    ids = sample_tokens(student, _count_tokens(student))
    logits, _ = session.run([ids], session.make_empty_states(1))
    states, steps = session.make_empty_states(1), []
    for token in ids:
        step, states = session.run([[token]], states)
        steps.append(step[0, 0])
    return compare(
        compute_logits(reference, ids),
        logits[0].astype(np.float64),
        np.stack(steps).astype(np.float64),
        engine="onnxruntime",
        version=session.version,
        bound=BOUND,
    )


def score(folder: Path, sequences: list[list[int]]) -> float:
    """Sum onnxruntime's loss in nats over all tokens but the first of each sequence."""
    session, loss = GraphSession(folder), 0.0
    for ids in sequences:
        states = session.make_empty_states(1)
        for begin in range(0, len(ids) - 1, CHUNK):
            targets = ids[begin + 1 : begin + CHUNK + 1]
            logits, states = session.run([ids[begin : begin + len(targets)]], states)
            loss += sum_losses(logits[0], targets)
    return loss


def fit(config: Any, mixer: str | None) -> Fit:
    """Return settings that fit: nearly every mixer does, with any options."""
    if mixer in UNFIT:
        raise LimbeckError(
            f"no student with {mixer} fits ONNX: {UNFIT[mixer]}",
            expected="a mixer with an operator of ONNX",
            hint="--student gated_deltanet",
        )
    return Fit(mixer or "gated_deltanet", {})


class GraphSession:
    """An exported graph in onnxruntime, on the CPU with as many threads as torch has.

    Attributes:
        version: of onnxruntime.

    Raises:
        EngineMissingError: onnxruntime is not installed.
        LimbeckError: it is too old for the graph, or the file is none.
    """

    def __init__(self, folder: Path) -> None:
        runtime = _require("onnxruntime", "the verification", EngineMissingError)
        self.version = runtime.__version__
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = runtime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise LimbeckError(
                f"onnxruntime {self.version} does not open {folder / MODEL_FILE}: {error}",
                expected="onnxruntime 1.32 or newer, which has opset 27",
                hint="pip install -U onnxruntime",
            ) from error
        self.states = {i.name: (i.shape, i.type) for i in self.session.get_inputs() if i.name not in INPUTS}

    def make_empty_states(self, batch: int) -> dict[str, np.ndarray]:
        """Return the states before the first token."""
        sizes, kinds = {"batch": batch, "past": 0}, {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {
            name: np.zeros([sizes.get(n, n) for n in shape], kinds.get(kind, np.bool_))
            for name, (shape, kind) in self.states.items()
        }

    def run(
        self, ids: Sequence[Sequence[int]], states: dict[str, np.ndarray], mask: Sequence[Sequence[int]] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run the tokens ids [B, T] of a call; mask [B, T] is 0 for padding.

        Returns:
            logits [B, T, vocabulary] and the states for the next call.
        """
        tokens = np.array(ids, np.int64)
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens) if mask is None else np.array(mask, np.int64),
        }
        logits, *after = self.session.run(["logits", *map(present_name, states)], {**given, **states})
        return logits, dict(zip(states, after))


def _check_mixer(mixer: Mixer) -> list[Reason]:
    """Return what of a mixer, or of one inside it, ONNX has no operators for."""
    if mixer.name in UNFIT:
        return [Reason(f"the mixer is {mixer.name}: {UNFIT[mixer.name]}", "student.mixer=gated_deltanet")]
    inner = [child for child in mixer.children() if isinstance(child, Mixer)]
    if mixer.name in COMPOSED:
        return [reason for child in inner for reason in _check_mixer(child)]
    if inner or type(mixer).attend is not Mixer.attend or mixer.operator not in LINEAR_OPERATORS:
        return [
            Reason(f"the mixer is {mixer.name}, which computes with code of its own", "student.mixer=gated_deltanet")
        ]
    return []


def _keeps_softmax(student: Any) -> bool:
    """Return whether a layer of the student has no mixer."""
    return len(get_mixers(student)) < student.config.get_text_config().num_hidden_layers


@torch.no_grad()
def _check_step(student: Any) -> list[Reason]:
    """Run the step on padded rows in two calls, and the student on each row alone."""
    try:
        step, reference = StudentStep(student), copy_in_float32(student)
        lengths, pieces = (12, 9), (5, 7)
        vocabulary = student.get_input_embeddings().num_embeddings
        ids = torch.tensor(sample_tokens(student, 24)).view(2, 12) % vocabulary
        mask = torch.stack([torch.arange(12) >= 12 - length for length in lengths]).long()
        states, parts = step.make_empty_states(2), []
        for tokens, valid in zip(ids.split(pieces, 1), mask.split(pieces, 1)):
            logits, *states = step(tokens, valid, *states)
            parts.append(logits)
        found = torch.cat(parts, 1)
        alone = [reference(row[12 - length :][None], use_cache=False).logits[0] for row, length in zip(ids, lengths)]
    except LimbeckError as error:
        return [Reason(error.found)]
    except Exception as error:  # whatever a family's own code does with a cache that is not its own
        return [Reason(f"the code of {type(student).__name__} does not run as a step: {summarize_error(error)}")]
    wanted = torch.cat(alone)
    if float((found[mask.bool()] - wanted).abs().max()) <= TOLERANCE * float(wanted.std()):
        return []
    name = student.config.limbeck["base_model_type"]
    return [Reason(f"the family {name} keeps track of positions or masks in a way that a step cannot follow")]


def _count_tokens(student: Any) -> int:
    """Return how many tokens a verification needs for the first ones to leave every window, if there is one."""
    modules = [module for mixer in get_mixers(student).values() for module in mixer.modules()]
    windows = [m.window + m.options.sinks for m in modules if isinstance(m, SlidingWindow)]
    return min(max([NUM_TOKENS, *(window + NUM_TOKENS // 2 for window in windows)]), MOST_TOKENS)


def _require(package: str, what: str, error: type[LimbeckError] = LimbeckError) -> Any:
    """Import a package of the extra `export`."""
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise error(f"{what} needs {package}", expected=package, hint='pip install "limbeck[export]"') from missing


EXPORTER = Exporter(
    name="onnx",
    summary="one graph of opset 27, state in and out: mixers with an ONNX operator, windows, layers that keep softmax",
    engine="onnxruntime",
    check=check,
    plan=plan,
    write=write,
    verify=verify,
    score=score,
    fit=fit,
    packages=("onnx", "onnxscript"),
)
