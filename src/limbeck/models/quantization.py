"""Fewer bits: the teacher's weights while it teaches (bitsandbytes), and a finished student's on a CPU (int8).

    teacher, tokenizer = load_teacher("Qwen/Qwen3-0.6B", device, bits=8)       # what recipes call teacher_bits
    small = quantize_int8(student)                                                      # the given student stays as it is

A student is never trained in few bits: its weights are those of the unquantised checkpoint. What to expect of either is
in docs/peft.md.
"""

import copy
import importlib.util
import logging
import warnings
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.core.errors import LimbeckError

EXTRA = "pip install 'limbeck[quantised]'"


def build_teacher_kwargs(bits: int | None, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told for a teacher in so many bits; nothing for None.

    Raises:
        LimbeckError: bitsandbytes or accelerate is not installed.
    """
    if bits is None:
        return {}
    _need("bitsandbytes", "a teacher in few bits")
    _need("accelerate", "a teacher in few bits")
    from transformers import BitsAndBytesConfig

    # it says at every product that it rounds to float16 on the way
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == 8:
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    return {"quantization_config": quantised, "device_map": {"": device}}


def check_not_quantized(config: PreTrainedConfig, what: str) -> None:
    """Raises LimbeckError for a checkpoint or model whose weights have few bits: a student is made of float weights."""
    if not is_quantized(config):
        return
    raise LimbeckError(
        f"{what} has quantised weights, and a student is made of float weights",
        expected="the unquantised checkpoint; a run can still load the teacher in few bits (teacher_bits: 8)",
        hint="--set teacher_bits=8   or, where there is no other checkpoint, save model.dequantize()",
    )


def exclude_mixers(quantised: Any, cls: Any, config: PreTrainedConfig) -> Any:
    """A quantisation config under which a student's mixers and head stay in float, whatever quantises the rest.

    Args:
        quantised: a quantisation config of transformers, or a dict; what it leaves out already is left out still.
        cls: the student's class; config: its config.
    """
    names = [f"{layer['module']}.mixer" for layer in config.limbeck["layers"]]  # type: ignore[attr-defined]
    known = quantised if isinstance(quantised, dict) else vars(quantised)
    bitsandbytes = "load_in_4bit" in known or "load_in_8bit" in known or "_load_in_4bit" in known
    fields = ("llm_int8_skip_modules",) if bitsandbytes else ("modules_to_not_convert", "skip_modules")
    field = next((f for f in fields if f in known), fields[0])
    left_out = known.get(field)
    if left_out is None:  # the head is left out by itself, but not beside a list
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
        head = model.get_output_embeddings()
        left_out = [name for name, module in model.named_modules() if module is head]
    changed = copy.deepcopy(quantised)
    if isinstance(changed, dict):
        changed[field] = [*left_out, *names]
    else:
        setattr(changed, field, [*left_out, *names])
    return changed


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights that a config stands for have few bits; an entry that asks for none does not count."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return False
    plain = found if isinstance(found, dict) else found.to_dict()
    idle = plain.get("quant_method") in (None, "bitsandbytes")
    return not idle or any(plain.get(key) for key in ("load_in_8bit", "load_in_4bit"))


def count_unquantized_parameters(module: nn.Module) -> int:
    """Parameters of a module as they were before quantisation; four-bit ones are stored two in a number."""
    shapes = [getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters()]
    return sum(shape.numel() for shape in shapes)


def quantize_int8(student: PreTrainedModel, quantize_activations: bool = False) -> PreTrainedModel:
    """A copy of a model for decoding on a CPU, the linear layers of its body in int8.

    Embeddings, norms, head and the mixers' own parameters (gates, decays, feature maps) stay in float: the mixers' are
    few, and an error in a decay is taken to the power of the length. What stays is shared with the given model.

    Args:
        student: in float32, on a CPU; a teacher works too.
        quantize_activations: also round what goes into a layer, one scale a call. Faster, but rare large entries take the room
            of all others, so the answers differ visibly. Layers whose input is wider than the model (an MLP's last)
            stay in float then, because their inputs have most of these. False rounds weights alone, one scale an
            output.

    Raises:
        LimbeckError: not on a CPU, or torchao is not installed.
    """
    if student.device.type != "cpu":
        raise LimbeckError(f"int8 is for CPUs, the model is on {student.device}", expected="model.to('cpu')")
    check_not_quantized(student.config, "this model")
    small = copy.deepcopy(student, {id(p): p for p in student.parameters()})
    names = _linear_layers(small, narrowing=not quantize_activations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if quantize_activations:
            _round_all(small, names)
        else:
            _round_weights(small, names)
    small.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return small.eval()


def count_weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, shared ones counted once, packed ones by their contents."""
    sizes = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                sizes[id(tensor)] = _tensor_bytes(tensor)
        packed = getattr(module, "_packed_params", None)
        if isinstance(packed, nn.Module):
            weight, bias = packed._weight_bias()  # type: ignore[operator]
            sizes[id(packed)] = weight.numel() + 8 * weight.shape[0] + (4 * bias.numel() if bias is not None else 0)
    return sum(sizes.values())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """A tensor's bytes; those of its parts where it is a wrapper around some."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _linear_layers(model: PreTrainedModel, narrowing: bool) -> set[str]:
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and ".mixer." not in name
        and (narrowing or module.in_features <= model.config.get_text_config().hidden_size)
    }


def _round_weights(model: PreTrainedModel, names: set[str]) -> None:
    _need("torchao", "int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names)


def _round_all(model: PreTrainedModel, names: set[str]) -> None:
    # torchao has this too, but what it runs without a compiler is three times slower than float on a CPU
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise LimbeckError(
            f"torch {torch.__version__} has no dynamic quantisation any more", expected="int8 of the weights alone"
        ) from error
    quantize_dynamic(model, dict.fromkeys(names, per_channel_dynamic_qconfig), dtype=torch.qint8, inplace=True)


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise LimbeckError(
        "a student in int8 is for running: transformers could not load it again",
        expected="the float student saved, and quantize_int8(student) after loading it",
    )


def _need(library: str, what: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise LimbeckError(f"{what} needs the library {library}", hint=EXTRA)
