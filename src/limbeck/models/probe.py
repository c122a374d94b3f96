"""What a model's attention looks like, found by running two tokens through it rather than by knowing its family.

    sites = find_attention_sites(model)       # one per self-attention module, in the order of the layers
    sites[0].module, sites[0].heads, sites[0].output        # 'model.layers.0.self_attn', 9, 'o_proj'

Knows no family; what it finds is written into the student's config, so that loading needs no second look.
"""

import dataclasses
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.mixers import HeadShape
from limbeck.models.attention import bind_arguments, get_hidden_states, softmax_attention_forward
from limbeck.models.checkpoint import session_settings_reset
from limbeck.models.packed import eval_mode, use_attn_implementation

PROBE = "limbeck_probe"
_own = threading.local()  # `calls`: what this thread's probe has seen


@dataclass(frozen=True)
class Site:
    """One self-attention module: its name, its decoder block's name, its output projection and its head shape."""

    module: str
    block: str
    output: str
    shape: HeadShape


def find_attention_sites(model: PreTrainedModel) -> list[Site]:
    """All self-attention modules that go through transformers' attention interface.

    Raises:
        LimbeckError: the family has attention code of its own (bloom, mpt, gptj, codegen, falcon ...) or none at all,
            its attention looks ahead, or it decodes without a cache.
    """
    with session_settings_reset(model.config):
        return _sites(model)


def _sites(model: PreTrainedModel) -> list[Site]:
    calls, names = _try_out(model)
    if not calls:
        raise _no_interface(model)
    found = [module for module in calls if calls[module].get("output") is not None]
    if not found:
        raise LimbeckError(
            f"the family '{model.config.model_type}' ({type(model).__name__}) does not make what leaves "
            f"{names[next(iter(calls))]} by one linear map from the heads' values of the same tokens",
            expected="self-attention with an output projection",
        )
    if any(getattr(module, "is_causal", True) is False for module in found) and _looks_ahead(model):
        raise LimbeckError(
            f"the attention of {type(model).__name__} looks ahead",
            expected="a causal language model; encoders become one with is_decoder=True in their config",
        )
    if not any(calls[module]["cached"] for module in found):
        raise LimbeckError(
            f"{type(model).__name__} hands its attention no cache in which a mixer could keep its state",
            expected="a family that decodes with transformers' cache",
        )
    sites = []
    for index, module in enumerate(found):
        output = next(name for name, child in module.named_modules() if child is calls[module]["output"])
        shape = dataclasses.replace(calls[module]["shape"], layer=index, layers=len(found))
        sites.append(Site(names[module], _block(model, names[module]), output, shape))
    return sites


def _try_out(model: PreTrainedModel) -> tuple[dict[nn.Module, dict], dict[nn.Module, str]]:
    """What the attention function saw in each module when two tokens ran through the model, and all modules' names."""
    AttentionInterface.register(PROBE, _record)
    AttentionMaskInterface.register(PROBE, sdpa_mask)
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, dict] = {}
    hook = _find_output(calls)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    try:
        ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        with use_attn_implementation(model, PROBE), eval_mode(model), torch.no_grad():
            _own.calls = calls
            try:
                model(input_ids=ids, use_cache=True)
            except Exception:
                calls.clear()
                model(input_ids=ids, use_cache=False)
    except LimbeckError:
        raise
    except Exception as error:
        for handle in handles:
            handle.remove()
        raise (_cannot_run(model) or _no_interface(model)) from error
    finally:
        _own.calls = None
        for handle in handles:
            handle.remove()
    return calls, names


def find_kv_sharing(model: PreTrainedModel) -> dict[int, int]:
    """By layer number: whose keys and values a layer reads instead of its own, in families that share them."""
    config = model.config.get_text_config(decoder=True)
    modes = getattr(config, "kv_sharing_modes", None) or []
    kinds = getattr(config, "layer_types", None) or [None] * len(modes)
    stores = {kinds[i]: i for i, mode in enumerate(modes) if mode == "store"}
    return {i: stores[kinds[i]] for i, mode in enumerate(modes) if mode == "reuse"}


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Does the second token change the first one's logits?"""
    ids = torch.tensor([[0, 1], [0, 2]], device=next(model.parameters()).device)
    with torch.no_grad(), eval_mode(model):
        first = model(input_ids=ids, use_cache=False).logits[:, 0]
    return not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-5)


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
    """Attention function that mixes nothing: notes the shapes, returns each token its own value.

    What passes through the model in another thread meanwhile gets softmax attention.
    """
    if getattr(_own, "calls", None) is None:
        return softmax_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if key.shape[2] != query.shape[2]:
        return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None  # of other tokens: no mixer's
    heads, groups = query.shape[1], key.shape[1]
    shape = HeadShape(
        hidden=0,
        heads=heads,
        kv_heads=groups,
        key_width=query.shape[-1],
        value_width=value.shape[-1],
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
    )
    _own.calls[module] = {"shape": shape}
    return value.repeat_interleave(heads // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _find_output(calls: dict):
    """Forward hook: the projection called last within an attention module is its output projection."""
    projections: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if getattr(_own, "calls", None) is not calls:
            return  # another thread's pass
        if _widths(module) is not None:
            projections.append(module)
        elif module in calls:
            result = output[0] if isinstance(output, tuple) else output
            given = bind_arguments(module, args, kwargs)
            calls[module]["cached"] = any(isinstance(value, Cache) for value in given.values())
            shape = dataclasses.replace(calls[module]["shape"], hidden=get_hidden_states(given).shape[-1])
            inside = set(module.modules())
            last = next((p for p in reversed(projections) if p in inside), None)
            if last is not None and _widths(last) == (shape.heads * shape.value_width, result.shape[-1]):
                calls[module].update(shape=shape, output=last)

    return hook


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear map: nn.Linear or GPT-2's transposed Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _block(model: PreTrainedModel, name: str) -> str:
    """Name of the decoder block around an attention module: the outermost list element on the way to it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise LimbeckError(f"{name} does not stand in a list of decoder blocks")


def _cannot_run(model: PreTrainedModel) -> LimbeckError | None:
    """What is said of a model that does not run with its own attention either; None where it does."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=next(model.parameters()).device), use_cache=False)
    except Exception as error:
        return LimbeckError(
            f"{type(model).__name__} does not run: {summarize_error(error)}", expected="a model that works"
        )
    return None


def _no_interface(model: PreTrainedModel) -> LimbeckError:
    name = f"the family '{model.config.model_type}' ({type(model).__name__})"
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return LimbeckError(f"{name} has no attention to replace", expected="a family with softmax attention")
    return LimbeckError(
        f"{name} computes attention in code of its own",
        expected="a family that dispatches through transformers' attention interface (llama, qwen3, gemma2, ...)",
    )
