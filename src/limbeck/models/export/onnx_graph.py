"""From a student's step to an ONNX graph of opset 27, with batch and number of tokens open.

    model = build_graph(StudentStep(student))                # onnx_ir.Model
    save_graph(model, folder / "model.onnx")

torch exports the step as it is, mixers and family alike; nothing here knows either. Inputs are `input_ids`,
`attention_mask` and the states `past.*`, outputs `logits` and the states `present.*`.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.models.export.onnx_operators import NEW_DOMAIN
from limbeck.models.export.onnx_step import BATCH, PAST, StudentStep

if TYPE_CHECKING:
    import onnx_ir

OPSET = 27
# The last opset that torch's exporter writes. For the operators that it uses, those up to 27 allow further types and
# optional inputs, nothing else (onnx.defs), so that the number is all that has to be raised.
TORCH_OPSET = 23
TIME = "time"
INPUTS, LOGITS = ("input_ids", "attention_mask"), "logits"
# A protobuf file ends at 2 GiB; larger weights go into a second file beside it.
MAX_FILE_BYTES = 2**31 - 2**24
WEIGHTS_SUFFIX = ".data"


def build_graph(step: StudentStep) -> "onnx_ir.Model":
    """Export a step.

    Raises:
        LimbeckError: torch is too old, cannot trace the family's code for any number of tokens, or knows no ONNX for
            an operator; with what it says.
    """
    if not hasattr(torch.onnx, "ops"):
        raise LimbeckError(f"torch {torch.__version__} cannot write operators by name", expected="torch 2.8 or newer")
    sizes = {BATCH: 2, TIME: 5, PAST: 4}
    ids = torch.zeros(sizes[BATCH], sizes[TIME], dtype=torch.long)
    states = [
        torch.zeros([sizes[n] if isinstance(n, str) else n for n in s.shape], dtype=s.dtype)
        for s in step.states.values()
    ]
    # From 3 on, so that torch need not ask whether T − 1 tokens are one; the graph has no such question, and takes one.
    dims = {name: torch.export.Dim(name, min=3 if name == TIME else None) for name in sizes}
    tokens = {0: dims[BATCH], 1: dims[TIME]}
    dynamic = [{i: dims[n] for i, n in enumerate(s.shape) if isinstance(n, str)} for s in step.states.values()]
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                step,
                (ids, torch.ones_like(ids), *states),
                dynamic_shapes=(tokens, tokens, tuple(dynamic)),
                strict=False,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=TORCH_OPSET,
                input_names=[*INPUTS, *step.states],
                output_names=[LOGITS, *(present_name(name) for name in step.states)],
                custom_translation_table=_build_translations(),
                verbose=False,
            )
    except Exception as error:
        raise LimbeckError(
            f"torch cannot export the code of {type(step.student).__name__}: {summarize_error(error)}",
            expected="a family whose forward pass does not branch on the values or the number of tokens",
        ) from error
    assert exported is not None
    model = exported.model
    _use_new_opset(model)
    _name_dimensions(model, step)
    return model


def present_name(state: str) -> str:
    """Return the name of a state among the outputs."""
    return state.replace("past.", "present.", 1)


def save_graph(model: "onnx_ir.Model", path: Path) -> None:
    """Write a graph and check the file by ONNX's own rules; more than 2 GiB of weights go to a file of their own."""
    # late: packages of the extra `export`
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, path, external_data=path.name + WEIGHTS_SUFFIX if size > MAX_FILE_BYTES else None)
    onnx.checker.check_model(path, full_check=True)


def _build_translations() -> dict[Any, Callable]:
    """Make translations that keep all digits where a result is close to zero, as that of a slow decay is.

    torch's own give 1 − a = 0 there; onnxruntime's Sigmoid is right to 1e-7 in all, so to 1e-5 of a gate of 0.01.
    """
    # late: a package of the extra `export`
    import onnxscript

    op: Any = onnxscript.opset18

    def expm1(x: Any) -> Any:
        """Compute eˣ − 1 = tanh(x/2) (eˣ + 1)."""
        return op.Mul(op.Tanh(op.Mul(x, op.CastLike(0.5, x))), op.Add(op.Exp(x), op.CastLike(1.0, x)))

    def log1p(x: Any) -> Any:
        """Compute log(1 + x) = 2 artanh(x / (2 + x))."""
        two = op.CastLike(2.0, x)
        return op.Mul(two, op.Atanh(op.Div(x, op.Add(two, x))))

    def sigmoid(x: Any) -> Any:
        """Compute 1 / (1 + e⁻ˣ)."""
        return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.CastLike(1.0, x)))

    def log_sigmoid(x: Any) -> Any:
        """Compute −log(1 + e⁻ˣ)."""
        return op.Neg(op.Softplus(op.Neg(x)))

    aten = torch.ops.aten
    return {
        aten.expm1.default: expm1,
        aten.log1p.default: log1p,
        aten.sigmoid.default: sigmoid,
        aten.log_sigmoid.default: log_sigmoid,
    }


def _use_new_opset(model: "onnx_ir.Model") -> None:
    """Move the nodes of the carrying domain to the standard's, and raise the number of its opset."""
    for node in model.graph:
        if node.domain == NEW_DOMAIN:
            node.domain, node.version = "", OPSET
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = OPSET


def _name_dimensions(model: "onnx_ir.Model", step: StudentStep) -> None:
    """Give the open dimensions the names batch, time and past in place of torch's symbols."""
    # late: a package of the extra `export`
    import onnx_ir

    wanted = [(BATCH, TIME), (BATCH, TIME), *(state.shape for state in step.states.values())]
    names: dict[str, str] = {}
    for value, shape in zip(model.graph.inputs, wanted):
        assert value.shape is not None
        names.update({str(dim): name for dim, name in zip(value.shape.dims, shape) if isinstance(name, str)})
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))

    def rename(value: Any) -> None:
        if value is not None and value.shape is not None:
            renamed = (symbols.sub(lambda found: names[found.group()], str(dim)) for dim in value.shape.dims)
            dims = (int(dim) if dim.isdigit() else dim for dim in renamed)
            value.shape = onnx_ir.Shape(dims)

    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        rename(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's notices on packages that an export could use as well."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
