"""Finds the self-attention modules of a model and their head shapes, by running two tokens through it.

    sites = find_attention_sites(model)         # one per self-attention module, in the order of the layers
    sites[0].module, sites[0].shape.heads, sites[0].output        # 'model.layers.0.self_attn', 9, 'o_proj'

It contains no code for particular families. What it finds is written into the student's config, so that loading a
student does not probe again.
"""

import dataclasses
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.mixers import HeadShape
from limbeck.models.attention import (
    LIMBECK_PROBE,
    bind_arguments,
    get_hidden_states,
    register_attention,
    softmax_attention_forward,
)
from limbeck.models.checkpoint import session_settings_reset
from limbeck.models.temporary import eval_mode, use_attn_implementation

_thread = threading.local()  # its `calls`: what this thread's probe has recorded, by module


@dataclass(frozen=True)
class Site:
    """One self-attention module: its name, its decoder block's name, its output projection and its head shape."""

    module: str
    block: str
    output: str
    shape: HeadShape


def find_attention_sites(model: PreTrainedModel) -> list[Site]:
    """Find all self-attention modules that go through transformers' attention interface.

    Raises:
        LimbeckError: the family has attention code of its own (bloom, mpt, gptj, codegen, falcon ...) or none at all,
            its attention looks ahead, or it decodes without a cache.
    """
    with session_settings_reset(model.config):
        return _find_sites(model)


def _find_sites(model: PreTrainedModel) -> list[Site]:
    calls, names = _record_calls(model)
    if not calls:
        raise _unsupported_family_error(model)
    modules = [module for module in calls if calls[module].get("output") is not None]
    if not modules:
        raise LimbeckError(
            f"the family '{model.config.model_type}' ({type(model).__name__}) does not make what leaves "
            f"{names[next(iter(calls))]} by one linear map from the heads' values of the same tokens",
            expected="self-attention with an output projection",
        )
    if any(getattr(module, "is_causal", True) is False for module in modules) and _looks_ahead(model):
        raise LimbeckError(
            f"the attention of {type(model).__name__} looks ahead",
            expected="a causal language model; encoders become one with is_decoder=True in their config",
        )
    if not any(calls[module]["cached"] for module in modules):
        raise LimbeckError(
            f"{type(model).__name__} hands its attention no cache in which a mixer could keep its state",
            expected="a family that decodes with transformers' cache",
        )
    sites = []
    for index, module in enumerate(modules):
        output = next(name for name, child in module.named_modules() if child is calls[module]["output"])
        shape = dataclasses.replace(calls[module]["shape"], layer=index, layers=len(modules))
        sites.append(Site(names[module], _block_name(model, names[module]), output, shape))
    return sites


def _record_calls(model: PreTrainedModel) -> tuple[dict[nn.Module, dict], dict[nn.Module, str]]:
    """Run two tokens through the model; return what the attention function recorded by module, and all module names."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, dict] = {}
    hook = _make_output_hook(calls)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    try:
        ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        with use_attn_implementation(model, LIMBECK_PROBE), eval_mode(model), torch.no_grad():
            _thread.calls = calls
            try:
                model(input_ids=ids, use_cache=True)
            except Exception:  # some families have no cache
                calls.clear()
                model(input_ids=ids, use_cache=False)
    except LimbeckError:
        raise
    except Exception as error:
        for handle in handles:
            handle.remove()
        raise (_broken_model_error(model) or _unsupported_family_error(model)) from error
    finally:
        _thread.calls = None
        for handle in handles:
            handle.remove()
    return calls, names


def find_kv_sharing(model: PreTrainedModel) -> dict[int, int]:
    """Return, by layer, the layer whose keys and values it reads instead of its own, in families that share them."""
    config = model.config.get_text_config(decoder=True)
    modes = getattr(config, "kv_sharing_modes", None) or []
    kinds = getattr(config, "layer_types", None) or [None] * len(modes)
    stores = {kinds[i]: i for i, mode in enumerate(modes) if mode == "store"}
    return {i: stores[kinds[i]] for i, mode in enumerate(modes) if mode == "reuse"}


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether the second token changes the first one's logits."""
    ids = torch.tensor([[0, 1], [0, 2]], device=next(model.parameters()).device)
    with torch.no_grad(), eval_mode(model):
        first = model(input_ids=ids, use_cache=False).logits[:, 0]
    return not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-5)


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
    """Attention function of the probe: record the shapes and return each token's own value.

    Passes of other threads over the model meanwhile get softmax attention.
    """
    if getattr(_thread, "calls", None) is None:
        return softmax_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if key.shape[2] != query.shape[2]:
        # keys of other tokens: cross-attention, which no mixer replaces
        return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None
    heads, groups = query.shape[1], key.shape[1]
    shape = HeadShape(
        hidden=0,
        heads=heads,
        kv_heads=groups,
        key_width=query.shape[-1],
        value_width=value.shape[-1],
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
    )
    _thread.calls[module] = {"shape": shape}
    return value.repeat_interleave(heads // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _make_output_hook(calls: dict):
    """Make a forward hook that takes the projection called last in an attention module as its output projection."""
    projections: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if getattr(_thread, "calls", None) is not calls:
            return  # another thread's pass
        if _in_and_out_features(module) is not None:
            projections.append(module)
        elif module in calls:
            result = output[0] if isinstance(output, tuple) else output
            arguments = bind_arguments(module, args, kwargs)
            calls[module]["cached"] = any(isinstance(value, Cache) for value in arguments.values())
            shape = dataclasses.replace(calls[module]["shape"], hidden=get_hidden_states(arguments).shape[-1])
            inside = set(module.modules())
            last = next((p for p in reversed(projections) if p in inside), None)
            expected = shape.heads * shape.value_width, result.shape[-1]
            if last is not None and _in_and_out_features(last) == expected:
                calls[module].update(shape=shape, output=last)

    return hook


def _in_and_out_features(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output width of a linear map: nn.Linear or GPT-2's transposed Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _block_name(model: PreTrainedModel, name: str) -> str:
    """Return the name of the decoder block around an attention module: the element of the outermost module list."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise LimbeckError(f"{name} is not in a list of decoder blocks")


def _broken_model_error(model: PreTrainedModel) -> LimbeckError | None:
    """Return the error for a model that does not run with its own attention either; None if it does."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=next(model.parameters()).device), use_cache=False)
    except Exception as error:
        return LimbeckError(
            f"{type(model).__name__} does not run: {summarize_error(error)}", expected="a model that works"
        )
    return None


def _unsupported_family_error(model: PreTrainedModel) -> LimbeckError:
    name = f"the family '{model.config.model_type}' ({type(model).__name__})"
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return LimbeckError(f"{name} has no attention to replace", expected="a family with softmax attention")
    return LimbeckError(
        f"{name} computes attention in code of its own",
        expected="a family that dispatches through transformers' attention interface (llama, qwen3, gemma2, ...)",
    )


register_attention(LIMBECK_PROBE, _record, sdpa_mask)
