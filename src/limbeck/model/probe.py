"""What a model's attention looks like, found by running two tokens through it rather than by knowing its family.

    sites = attention_sites(model)       # one per self-attention module, in the order of the layers
    sites[0].module, sites[0].heads, sites[0].output        # 'model.layers.0.self_attn', 9, 'o_proj'

Knows no family; what it finds is written into the student's config, so that loading needs no second look.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.mixers import HeadShape

PROBE = "limbeck_probe"


@dataclass(frozen=True)
class Site:
    """One self-attention module: its name, its decoder block's name, its output projection and its head shape."""

    module: str
    block: str
    output: str
    shape: HeadShape


def attention_sites(model: PreTrainedModel) -> list[Site]:
    """All self-attention modules that go through transformers' attention interface.

    Raises:
        LimbeckError: the family has attention code of its own (bloom, mpt, gptj, codegen, falcon ...).
    """
    AttentionInterface.register(PROBE, _record)
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, dict] = {}
    hook = _find_output(calls)
    handles = [module.register_forward_hook(hook) for module in names]
    old = model.config._attn_implementation
    _record.calls = calls  # type: ignore[attr-defined]
    try:
        model.config._attn_implementation = PROBE
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    except LimbeckError:
        raise
    except Exception as error:
        raise _no_interface(model) from error
    finally:
        model.config._attn_implementation = old
        del _record.calls  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()
    found = [module for module in calls if calls[module].get("output") is not None]
    if not found:
        raise _no_interface(model)
    sites = []
    for index, module in enumerate(found):
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise LimbeckError(f"{names[module]} does not know its layer number, so it cannot find its cache")
        output = next(name for name, child in module.named_modules() if child is calls[module]["output"])
        shape = dataclasses.replace(calls[module]["shape"], layer=index, layers=len(found))
        sites.append(Site(names[module], _block(model, names[module]), output, shape))
    return sites


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, scaling=None, **kwargs):
    """Attention function that mixes nothing: notes the shapes, returns each token its own value."""
    heads, groups = query.shape[1], key.shape[1]
    shape = HeadShape(
        hidden=0,
        heads=heads,
        kv_heads=groups,
        key_width=query.shape[-1],
        value_width=value.shape[-1],
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
    )
    _record.calls[module] = {"shape": shape}  # type: ignore[attr-defined]
    return value.repeat_interleave(heads // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _find_output(calls: dict):
    """Forward hook: the projection called last within an attention module is its output projection."""
    projections: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple, output) -> None:
        if _widths(module) is not None:
            projections.append(module)
        elif module in calls:
            result = output[0] if isinstance(output, tuple) else output
            shape = dataclasses.replace(calls[module]["shape"], hidden=result.shape[-1])
            inside = set(module.modules())
            last = next((p for p in reversed(projections) if p in inside), None)
            if last is not None and _widths(last) == (shape.heads * shape.value_width, shape.hidden):
                calls[module] = {"shape": shape, "output": last}

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


def _no_interface(model: PreTrainedModel) -> LimbeckError:
    return LimbeckError(
        f"the family '{model.config.model_type}' ({type(model).__name__}) computes attention in code of its own",
        expected="a family that dispatches through transformers' attention interface (llama, qwen3, gemma2, ...)",
    )
