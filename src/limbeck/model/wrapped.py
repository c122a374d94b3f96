"""Models that are not bare: something is wrapped around them or hooked into them that a student must not inherit.

check_bare(model)        # LimbeckError that says what is around it, and how to take it off
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from limbeck.errors import LimbeckError

BARE = "a bare model of transformers, as AutoModelForCausalLM loads it"
MERGE = "model = model.merge_and_unload()   # where AutoPeftModelForCausalLM loaded it"


def check_bare(model: Any) -> None:
    """Refuse what is no bare model of transformers: a student is a copy of it, with all that hangs on it.

    Raises:
        LimbeckError: adapters, a compiled, parallel or sharded model, hooks of accelerate, a class that is not of
            transformers, or no model at all.
    """
    if isinstance(model, str | Path):
        raise LimbeckError(
            f"'{model}' is a name, not a model",
            expected=BARE,
            hint=f"limbeck.convert(AutoModelForCausalLM.from_pretrained({str(model)!r}), ...)",
        )
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise LimbeckError(
            "this model went through torch.compile", expected=BARE, hint="convert model._orig_mod, compile the student"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or _adapted(model):
        raise LimbeckError(
            "adapters (PEFT) are attached to this model", expected="them merged into it first", hint=MERGE
        )
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None) or getattr(model, "model", None)
        name = "module" if hasattr(model, "module") else "model"
        hint = f"model.{name}" if isinstance(inner, PreTrainedModel) else None
        raise LimbeckError(
            f"this is a {type(model).__module__}.{kind}{', around a model' if hint else ''}", expected=BARE, hint=hint
        )
    compiled = next((name for name, module in model.named_modules() if hasattr(module, "_orig_mod")), None)
    if compiled is not None:
        raise LimbeckError(
            f"{compiled} went through torch.compile", expected=BARE, hint="convert first, compile the student"
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise LimbeckError(
            "accelerate's hooks are in this model: it was loaded in parts, with a device_map",
            expected=BARE,
            hint="load it whole, on one device",
        )
    if any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise LimbeckError("this model's weights are sharded over processes", expected="whole weights in each process")
    if getattr(transformers, kind, None) is not type(model) and not hasattr(model.config, "limbeck"):
        raise LimbeckError(
            f"{kind} is a class of {type(model).__module__}, and a student is saved under a class of transformers",
            expected=BARE,
            hint="models with code of their own are not supported",
        )


def _adapted(model: Any) -> bool:
    modules = model.modules() if hasattr(model, "modules") else ()
    return any(type(module).__module__.partition(".")[0] == "peft" for module in modules)
