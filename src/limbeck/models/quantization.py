"""Fewer bits: of the teacher's weights during training (bitsandbytes), and of a finished student's on a CPU.

    teacher, tokenizer = load_teacher("Qwen/Qwen3-0.6B", device, bits=8)    # `teacher_bits` in recipes
    fast = pack_float16(student)                                            # the given student is not changed

A student is never trained with quantized weights: it starts from those of the unquantized checkpoint.
docs/guides/training.md and docs/guides/generation.md lead to measurements of both.
"""

import copy
import functools
import logging
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.core.extras import require


def build_teacher_kwargs(bits: int | None, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a teacher in 8 or 4 bits; none for None.

    Raises:
        LimbeckError: bitsandbytes or accelerate is not installed.
    """
    if bits is None:
        return {}
    require("bitsandbytes", "a quantized teacher", extra="quantised")
    require("accelerate", "a quantized teacher", extra="quantised")
    # bitsandbytes warns at every product that it casts to float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_not_quantized(config: PreTrainedConfig, what: str) -> None:
    """Raise LimbeckError for a checkpoint or model (`what`) with quantized weights: a student needs float weights."""
    if not is_quantized(config):
        return
    raise LimbeckError(
        f"{what} has quantized weights, but a student is made from float weights",
        expected="the unquantized checkpoint; a run can still quantize the teacher when it loads it (teacher_bits: 8)",
        hint="--set teacher_bits=8   or, if there is no other checkpoint, save model.dequantize()",
    )


def exclude_mixers(quantization_config: Any, cls: Any, config: PreTrainedConfig) -> Any:
    """Return a quantization config under which a student's mixers and head stay in float, for any quantizer.

    Args:
        quantization_config: one of transformers, or a dict; modules that it excludes already stay excluded.
        cls: the student's class.
        config: the student's config.
    """
    names = [f"{layer['module']}.mixer" for layer in config.limbeck["layers"]]  # type: ignore[attr-defined]
    settings = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
    bitsandbytes = any(key in settings for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit"))
    fields = ("llm_int8_skip_modules",) if bitsandbytes else ("modules_to_not_convert", "skip_modules")
    field = next((f for f in fields if f in settings), fields[0])
    excluded = settings.get(field)
    if excluded is None:  # quantizers exclude the head by default, but not if a list is given
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
        head = model.get_output_embeddings()
        excluded = [name for name, module in model.named_modules() if module is head]
    changed = copy.deepcopy(quantization_config)
    if isinstance(changed, dict):
        changed[field] = [*excluded, *names]
    else:
        setattr(changed, field, [*excluded, *names])
    return changed


def is_quantized(config: PreTrainedConfig) -> bool:
    """Return whether a config says that the weights are quantized."""
    entry = getattr(config, "quantization_config", None)
    if not entry:
        return False
    settings = entry if isinstance(entry, dict) else entry.to_dict()
    if settings.get("quant_method") not in (None, "bitsandbytes"):
        return True
    # an entry of bitsandbytes that switches on neither width quantizes nothing
    return any(settings.get(key) for key in ("load_in_8bit", "load_in_4bit"))


def count_unquantized_parameters(module: nn.Module) -> int:
    """Count the parameters of a module as before quantization; four-bit ones are stored two in a number."""
    shapes = [getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters()]
    return sum(shape.numel() for shape in shapes)


def pack_float16(model: PreTrainedModel, plain: Sequence[str] = ()) -> PreTrainedModel:
    """Copy a model for decoding on a CPU, with the weights of its linear layers, head included, in float16.

    They are half as many bytes to read for each token, which is what decoding spends its time on; products are summed
    in float32. Embeddings, norms and the mixers' own parameters stay in float32 and are shared with the given model.

    Args:
        model: in float32, on a CPU; students and teachers.
        plain: names of modules whose linear layers keep plain tensors in float16, as compiled ones read them
            (`limbeck.models.compiled_decoding`).

    Raises:
        LimbeckError: not in float32 on a CPU, a CPU without FBGEMM, or a weight beyond float16.
    """
    _check_packable(model, "float16")
    if not {"fbgemm", "x86"} & {torch.backends.quantized.engine}:
        raise LimbeckError(
            "this CPU or build of torch has no products with float16 weights",
            expected="an x86 CPU with AVX2 and a torch with FBGEMM",
            hint="leave out --fp16",
        )
    small = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    head = small.get_output_embeddings()
    names = _linear_layers(small, narrowing=True) | {n for n, m in small.named_modules() if m is head}
    for name in sorted(names):
        linear = small.get_submodule(name)
        if type(linear) is not nn.Linear:
            continue
        largest = float(linear.weight.detach().abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise LimbeckError(
                f"{name} has weights up to {largest:.3g}, more than float16 holds", expected="at most 65,504"
            )
        is_plain = any(name == module or name.startswith(f"{module}.") for module in plain)
        small.set_submodule(name, HalfLinear(linear) if is_plain else Float16Linear(linear))
    small.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return small.eval()


class Float16Linear(nn.Module):
    """A linear layer with its weights in float16, for inference: y = x Wᵀ + b in float32 [..., outputs].

    Packed when torch has one thread, it calls FBGEMM's product directly, which that thread alone then computes. The
    operator that shares a product among threads hands its weights over as an object; that takes 20 microseconds a call,
    as long as a small matrix.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.weight_bytes = 2 * weight.numel() + (0 if bias is None else 4 * bias.numel())
        self.bias: torch.Tensor | None = None
        self.is_direct = torch.get_num_threads() == 1 and _has_direct_product()
        if self.is_direct:
            self.packed, self.bias = torch.fbgemm_pack_gemm_matrix_fp16(weight), bias
        else:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_direct:
            return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.bias)
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

    def __deepcopy__(self, memo: dict) -> "Float16Linear":
        # What is packed is never written to, and the bytes of its tensor are an address: a copy shares it.
        twin = type(self).__new__(type(self))
        twin.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(self).items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_to_save()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class HalfLinear(nn.Module):
    """A linear layer with its weights in float16 as a plain tensor: y = x Wᵀ + b in the dtype of x [..., outputs].

    Compiled, it widens weights where it reads them. Uncompiled it widens all of them first, which is slow for a token
    and makes no difference for a prompt.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float16), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@functools.cache
def _has_direct_product() -> bool:
    """Return whether torch has FBGEMM's product with float16 weights, also without a bias, as a plain function."""
    try:
        with warnings.catch_warnings():
            # deprecated in PyTorch: a later version may not have it, and this one says so at the first call
            warnings.simplefilter("ignore")
            packed = torch.fbgemm_pack_gemm_matrix_fp16(torch.eye(2))
            product = torch.fbgemm_linear_fp16_weight_fp32_activation(torch.eye(2), packed, None)
        return torch.equal(product, torch.eye(2))
    except (AttributeError, TypeError, RuntimeError):
        return False


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model for decoding on a CPU, with weights and inputs of the backbone's linear layers in int8.

    Smaller than float16 and much less exact: an input has one scale per call, and rare large entries use up the range
    of all others. Layers whose input is wider than the model (an MLP's last) stay in float, because their inputs have
    most of these entries. So do embeddings, norms, head and the mixers' own parameters (gates, decays, feature maps):
    the mixers' are few, and an error in a decay is raised to the power of the length.

    Args:
        model: in float32, on a CPU; students and teachers.

    Raises:
        LimbeckError: not in float32 on a CPU, or a torch without dynamic quantization.
    """
    _check_packable(model, "int8")
    try:
        # optional: deprecated in PyTorch, so a later version may not have it
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise LimbeckError(
            f"torch {torch.__version__} no longer has dynamic quantization", expected="float16 weights: --fp16"
        ) from error
    small = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = dict.fromkeys(_linear_layers(small, narrowing=False), per_channel_dynamic_qconfig)
        quantize_dynamic(small, names, dtype=torch.qint8, inplace=True)
    small.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return small.eval()


def _check_packable(model: PreTrainedModel, what: str) -> None:
    check_not_quantized(model.config, "this model")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise LimbeckError(
            f"{what} is for CPUs and made from float32; the model is in {model.dtype} on {model.device}",
            expected="a model in float32 on the CPU",
            hint="model.to('cpu', torch.float32)",
        )


def count_weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights in memory, shared ones once, packed ones by their contents."""
    sizes = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                sizes[id(tensor)] = _tensor_bytes(tensor)
        if isinstance(module, Float16Linear):
            sizes[id(module)] = module.weight_bytes
        packed = getattr(module, "_packed_params", None)
        if isinstance(packed, nn.Module):
            weight, bias = packed._weight_bias()  # type: ignore[operator]
            sizes[id(packed)] = weight.numel() + 8 * weight.shape[0] + (4 * bias.numel() if bias is not None else 0)
    return sum(sizes.values())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes; for a wrapper subclass those of the tensors inside."""
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


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise LimbeckError(
        "a student with packed weights cannot be saved: transformers could not load it again",
        expected="the float student saved, and pack_float16 or quantize_int8 after loading it",
    )
