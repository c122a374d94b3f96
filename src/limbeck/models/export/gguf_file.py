"""GGUF files for llama.cpp, Ollama and LM Studio: one file with weights, tokenizer, chat template and settings.

    EXPORTER.check(student)                                      # [] if one of the layouts fits
    EXPORTER.write(student, tokenizer, folder, "q8_0")           # student-q8_0.gguf
    EXPORTER.verify(student, tokenizer, folder)
    EXPORTER.score(folder, sequences), EXPORTER.speak(folder, ids, 32)

The layout follows from the student's mixers: RWKV-7 is `arwkv7`, Gated DeltaNet is `qwen35`. Matrices are written in
the chosen precision, vectors and small factors in float32.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.core.version import __version__
from limbeck.models.export import (
    Exporter,
    ExportPlan,
    Fit,
    Reason,
    Speech,
    Verification,
    gguf_qwen35,
    gguf_rwkv7,
    qwen3_5,
)
from limbeck.models.export.body import list_mixers_by_layer
from limbeck.models.export.container import Container
from limbeck.models.export.gguf_tokenizer import check_tokenizer, describe_tokenizer
from limbeck.models.export.llama_cpp import get_version
from limbeck.models.export.llama_cpp_process import compare_in_process, score_in_process, speak_in_process
from limbeck.models.export.verification import compare, compute_logits, compute_step_logits, sample_tokens


@dataclass(frozen=True)
class Precision:
    """A precision of weights: llama.cpp's number of such files, bits of a number, and the precision of the head."""

    file_type: int
    bits: float
    head: str | None = None  # None: the same

    @property
    def in_blocks(self) -> bool:
        """Whether `BLOCK` numbers share a scale."""
        return self.bits % 16 != 0


LAYOUTS: dict[str, ModuleType] = {"rwkv7": gguf_rwkv7, "gated_deltanet": gguf_qwen35}
# Of each precision: llama_ftype, bits of a number, and the precision of the head. As in llama.cpp's own files, the head
# of a file with four or five bits has more of them: every logit is a product with it.
FORMATS = {
    "f16": Precision(1, 16),
    "q8_0": Precision(7, 8.5),
    "q5_1": Precision(9, 6, head="q8_0"),
    "q5_0": Precision(8, 5.5, head="q8_0"),
    "q4_1": Precision(3, 5, head="q8_0"),
    "q4_0": Precision(2, 4.5, head="q8_0"),
    "f32": Precision(0, 32),
}
# Difference of a logit, in standard deviations of all logits: the largest one in f32, the typical one of rounded
# weights, where logits that have nothing to do with the student's come to 1.4. llama.cpp rounds activations too.
BOUNDS = {"f32": 1e-3, "f16": 0.1, "q8_0": 0.6, "q5_1": 0.8, "q5_0": 0.8, "q4_1": 1.0, "q4_0": 1.0}
BLOCK = 32  # numbers that share a scale in q8_0, q5 and q4
SAMPLE_TEXT = "In 1984, the 12 guests said: «It's fine!»\n\n\tI'm 3.5% naïve, aren't  you?"


def find_layout(student: Any) -> ModuleType | None:
    """Return the layout for the student's mixers; None if there is none."""
    names = {mixer.name for mixer in list_mixers_by_layer(student) if mixer is not None}
    return next((layout for name, layout in LAYOUTS.items() if name in names), None)


def check(student: Any, tokenizer: Any) -> list[Reason]:
    """Return why neither layout fits, or why the tokenizer does not; an empty list if all does."""
    layout = find_layout(student)
    if layout is None:
        names = sorted({mixer.name for mixer in list_mixers_by_layer(student) if mixer is not None})
        reasons = [
            Reason(
                f"llama.cpp has no layout with {' or '.join(names)} in the place of a teacher's attention",
                "student.mixer=rwkv7 or gated_deltanet",
            )
        ]
    else:
        reasons = layout.check(student, tokenizer)
    return reasons + check_tokenizer(tokenizer, student.get_input_embeddings().num_embeddings)


def build(student: Any) -> Container:
    """Return keys and tensors of the file for a student that `check` accepts."""
    layout = find_layout(student)
    assert layout is not None
    return layout.build(student)


def choose_type(container: Container, name: str, quantization: str) -> str:
    """Return the precision of a tensor: float32 for exact ones, float16 for rows that do not fill blocks."""
    if name in container.exact:
        return "f32"
    precision = FORMATS[quantization]
    if precision.in_blocks and container.tensors[name].shape[-1] % BLOCK:
        return "f16"
    # without a head of its own, the embeddings are the head
    head = "output.weight" if "output.weight" in container.tensors else "token_embd.weight"
    return precision.head or quantization if name == head else quantization


def plan(student: Any, tokenizer: Any, quantization: str) -> ExportPlan:
    """Return the file that would be written, and its size."""
    container = build(student)
    size = sum(
        tensor.numel() * FORMATS[choose_type(container, name, quantization)].bits / 8
        for name, tensor in container.tensors.items()
    )
    notes = [f"{len(container.tensors)} tensors, vocabulary and chat template"]
    if container.keys["block_count"] > len(list_mixers_by_layer(student)):
        notes.append("the last layer is a null layer: llama.cpp refuses a model of linear layers alone")
    return ExportPlan(container.layout, {file_name(quantization): int(size)}, notes)


def file_name(quantization: str) -> str:
    """Return the name of the file in a given precision."""
    return f"student-{quantization}.gguf"


def write(student: Any, tokenizer: Any, folder: Path, quantization: str) -> None:
    """Write the file."""
    name = f"{type(student).__name__.removesuffix('ForCausalLM').removeprefix('Limbeck')} student"
    write_container(build(student), name, student, tokenizer, folder / file_name(quantization), quantization)


def write_container(container: Container, name: str, model: Any, tokenizer: Any, file: Path, quantization: str) -> None:
    """Write keys and tensors of a model, with its vocabulary and its settings of generation, to a GGUF file."""
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, container.layout)
    try:
        writer.add_name(name)
        _add_keys(writer, model, tokenizer, container, quantization)
        _add_tensors(gguf, writer, container, quantization)
    finally:
        writer.close()


def _add_keys(writer: Any, model: Any, tokenizer: Any, container: Container, quantization: str) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    writer.add_string("general.converter", f"limbeck {__version__}")
    writer.add_file_type(FORMATS[quantization].file_type)
    if FORMATS[quantization].in_blocks:
        writer.add_quantization_version(2)
    for key, value in {**container.keys, "vocab_size": vocabulary}.items():
        _add_key(writer, f"{container.layout}.{key}", value)
    for key, value in describe_tokenizer(tokenizer, vocabulary, model.generation_config).items():
        _add_key(writer, f"tokenizer.{key}", value)
    for key, value in _sampling(model.generation_config).items():
        _add_key(writer, f"general.sampling.{key}", value)


def _sampling(config: Any) -> dict[str, Any]:
    """Return the sampling settings that come with the model; none where it decodes greedily."""
    if config is None or not config.do_sample:
        return {}
    names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    return {key: value for key, name in names.items() if (value := getattr(config, name, None)) is not None}


def _add_key(writer: Any, key: str, value: Any) -> None:
    """Add a key in the type that llama.cpp expects: bools, 32-bit numbers, strings, and lists of them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensors(gguf: Any, writer: Any, container: Container, quantization: str) -> None:
    """Announce all tensors, then write one at a time, so that no second student is in memory."""
    kinds = {name: choose_type(container, name, quantization) for name in container.tensors}
    for name, tensor in container.tensors.items():
        kind, in_blocks = gguf.GGMLQuantizationType[kinds[name].upper()], FORMATS[kinds[name]].in_blocks
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if in_blocks else tuple(tensor.shape)
        dtype = np.dtype({"f32": np.float32, "f16": np.float16}.get(kinds[name], np.uint8))
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind if in_blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in container.tensors.items():
        values = _to_numpy(name, tensor, kinds[name])
        writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kinds[name].upper()]))


def _to_numpy(name: str, tensor: Tensor, kind: str) -> np.ndarray:
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind == "f16" and float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise LimbeckError(
            f"{name} has numbers up to {float(values.abs().max()):.3g}, more than half precision holds",
            expected="weights of at most 65,504",
            hint="--quantization f32",
        )
    return values.numpy()


def import_gguf() -> Any:
    """Import the package that writes GGUF files; LimbeckError where it is missing."""
    try:
        # late: an optional dependency
        import gguf
    except ImportError as error:
        raise LimbeckError(
            "the package gguf is not installed, which writes GGUF files",
            expected="gguf 0.17 or newer",
            hint="pip install 'limbeck[export]'",
        ) from error
    return gguf


def verify(student: Any, tokenizer: Any, folder: Path) -> Verification:
    """Run the file in llama.cpp beside the student, as a prompt and step by step, and split a text with both."""
    version = get_version()
    file = find_file(folder)
    weights = file.stem.removeprefix("student-")
    ids = sample_tokens(student)
    run = compare_in_process(file, ids, SAMPLE_TEXT, threads=torch.get_num_threads())
    return compare(
        compute_logits(student, ids),
        run.prompt,
        run.steps,
        own_steps=compute_step_logits(student, ids),
        engine="llama.cpp",
        version=version,
        bound=BOUNDS[weights],
        rounded=weights != "f32",
        same_text_tokens=run.tokens == tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids,
    )


def score(folder: Path, sequences: list[list[int]]) -> float:
    """Sum llama.cpp's loss in nats over all tokens but the first of each sequence."""
    return score_in_process(find_file(folder), sequences, threads=torch.get_num_threads())


def speak(folder: Path, ids: list[int], count: int) -> Speech:
    """Continue a prompt in llama.cpp by `count` tokens."""
    return speak_in_process(find_file(folder), ids, count, threads=torch.get_num_threads())


def find_file(folder: Path) -> Path:
    """Return the file that `write` left in a folder."""
    return next(folder / file_name(kind) for kind in FORMATS if (folder / file_name(kind)).is_file())


def fit(config: Any, mixer: str | None = None) -> Fit:
    """Return the settings of a student of this teacher that will fit: RWKV-7 where the body allows it, else GDN."""
    if mixer not in (None, *LAYOUTS):
        raise LimbeckError(f"the format has no {mixer}", expected=" or ".join(LAYOUTS), hint="--student rwkv7")
    rwkv7 = None if mixer == "gated_deltanet" else gguf_rwkv7.fit(config)
    if rwkv7 is None and mixer == "rwkv7":
        raise LimbeckError(
            "RWKV-7 students of this teacher do not fit the format",
            expected="a teacher without biases and q/k norms, with heads as wide together as the model",
            hint="--student gated_deltanet",
        )
    return qwen3_5.fit(config) if rwkv7 is None else rwkv7


EXPORTER = Exporter(
    name="gguf",
    summary="RWKV-7 (arwkv7) or Gated DeltaNet (qwen35) in a Llama-like body",
    engine="llama.cpp",
    check=check,
    plan=plan,
    write=write,
    verify=verify,
    score=score,
    fit=fit,
    quantizations=tuple(FORMATS),
    speak=speak,
    packages=("gguf",),
)
