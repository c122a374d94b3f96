"""Any model with its tokenizer, teachers and students, from a folder or the hub: the one way in which all are loaded.

    is_student("someone/my-student")                       # reads the config alone
    model, tokenizer = open_model("someone/my-student")    # float32, on the CPU, frozen

transformers draws missing weights at random, attaches adapters, asks on standard input whether to run foreign code, and
takes over what a config says of somebody's last session. Here each of these is an error or put back (docs/saving.md).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import find_adapter_config_file

import limbeck.model.student  # noqa: F401  registers students with transformers
from limbeck.console import console
from limbeck.errors import LimbeckError, sentences
from limbeck.hub import look_up, split_revision
from limbeck.model.folders import SAVED, adapter, check_folder, check_tokenizer, read_json
from limbeck.model.loading import check_tensors, neutral, savable_generation
from limbeck.quantise import few_bits

HEADS = ("ForCausalLM", "ForConditionalGeneration")  # of the classes called ...For..., those that tell the next token
SAFE = {"trust_remote_code": False}  # not left out: then transformers asks whoever is at standard input


def is_student(name: str) -> bool:
    """Whether a folder or a name on the hub holds a student; of what cannot be read the loading knows more.

    Raises:
        LimbeckError: no folder, and the hub has no model of that name or cannot be reached; or a student's config that
            is damaged.
    """
    place, how = _place(name)
    try:
        return hasattr(AutoConfig.from_pretrained(place, **how), "limbeck")
    except LimbeckError:
        raise
    except Exception:
        return False


def open_model(name: str, student: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for use and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        student: it was asked for as the student of a run, and nothing else will do.

    Raises:
        LimbeckError: see `load_model`; or no student.
    """
    config = load_config(name)
    tokenizer = load_tokenizer(name)
    if student and not hasattr(config, "limbeck"):
        raise LimbeckError(
            f"{name} is no student: its config.json says model_type {config.model_type}",
            expected="the folder as the run exported it",
            hint=f"rm -r {name}, and the run's command again; of its stages nothing is lost",
        )
    model = load_model(name, config)
    return model.eval().requires_grad_(False), tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """The config of a causal language model, without what it says of anybody's last session.

    Raises:
        LimbeckError: no folder and no name on the hub, an adapter, a model with code of its own, of an unknown type, or
            of another kind (an encoder, a sequence-to-sequence model, one for images).
    """
    place, how = _place(name)
    if Path(place).exists() or Path(place).is_symlink():
        check_folder(Path(place))
    elif (found := _adapter_on_hub(place, how)) is not None:
        raise adapter(place, read_json(Path(found)))
    try:
        raw, _ = PreTrainedConfig.get_config_dict(place, **how)
        _check_type(name, raw)
        config = AutoConfig.from_pretrained(place, **how)
    except LimbeckError:
        raise
    except Exception as error:
        where = f"; {Path(name).parent} is a folder without it" if Path(name).parent.is_dir() and "/" in name else ""
        raise LimbeckError(
            f"cannot read the config of '{name}': {sentences(error)}{where}",
            expected=f"{SAVED}, or the name of a model on the hub",
        ) from error
    _check_kind(name, raw, config)
    if not few_bits(config) and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # left behind by somebody who loaded in few bits, and saved in many
    return neutral(config)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        LimbeckError: none there, damaged, or one with code of its own.
    """
    place, how = _place(name)
    if Path(place).exists():
        check_tokenizer(Path(place))
    try:
        return AutoTokenizer.from_pretrained(place, **how)
    except LimbeckError:
        raise
    except Exception as error:
        if "custom code" in str(error):
            raise _own_code(f"the tokenizer of '{name}'") from error
        raise LimbeckError(
            f"cannot load the tokenizer of '{name}': {sentences(error)}",
            expected="the tokenizer's files as its save_pretrained writes them",
        ) from error


def load_model(name: str, config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A model in float32 with all of its weights.

    Args:
        config: see `load_config`.
        settings: more that `from_pretrained` is told.

    Raises:
        LimbeckError: weights that cannot be read, are missing, have other shapes, or are not finite.
    """
    place, how = _place(name)
    generation = _generation_config(name, config)
    if generation is not None:
        settings["generation_config"] = generation
    load: Any = AutoModelForCausalLM  # with the loading info it returns a pair, which its types do not say
    try:
        model, info = load.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_tensors` names them, transformers does not
            **how,
            **settings,
        )
    except LimbeckError:
        raise
    except Exception as error:
        if "Weights only load failed" in str(error):
            raise LimbeckError(
                f"the weights of '{name}' are a pickle that holds more than tensors, and is not executed",
                expected="safetensors, or a pickle of tensors alone",
            ) from error
        raise LimbeckError(f"cannot load the weights of '{name}': {sentences(error)}", expected=SAVED) from error
    check_tensors(name, info)
    if info["unexpected_keys"]:
        console.print(f"{name}: {_listed(info['unexpected_keys'])} of the file not used", markup=False)
    check_finite(name, model)
    if not savable_generation(model):
        console.print(f"{name}: generation_config.json contradicts itself; only its tokens are used", markup=False)
    return model


def check_finite(name: str, model: nn.Module) -> None:
    """Raises LimbeckError where a weight is NaN or infinite; names it."""
    bad = [key for key, tensor in _floats(model) if not (tensor.sum().isfinite() or tensor.isfinite().all())]
    if bad:
        raise LimbeckError(
            f"weights of '{name}' are not finite (NaN or infinity): {_listed(bad)}",
            expected="finite weights",
            hint="download or export it again; a training that diverged has to be repeated",
        )


def _floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            yield key, parameter.detach()


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given, and told beside it; a name that is no folder is looked up on the hub."""
    if Path(name).exists() or Path(name).is_symlink():
        return name, dict(SAFE)
    how: dict[str, Any] = {**SAFE, "local_files_only": True} if look_up(name) else dict(SAFE)
    repository, revision = split_revision(name)
    return repository, how if revision is None else {**how, "revision": revision}


def _adapter_on_hub(name: str, how: dict[str, Any]) -> str | None:
    try:
        return find_adapter_config_file(name, **{key: value for key, value in how.items() if key not in SAFE})
    except Exception:  # the loading of the config says more of it
        return None


def _check_type(name: str, raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind is None:
        raise LimbeckError(
            f"the config of '{name}' has no model_type", expected="config.json as save_pretrained writes it"
        )
    if kind in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise _own_code(f"'{name}' (model_type {kind})")
    raise LimbeckError(
        f"this transformers ({transformers.__version__}) knows no model_type '{kind}', which '{name}' is of",
        expected="a family of transformers",
        hint="pip install --upgrade transformers",
    )


def _check_kind(name: str, raw: dict[str, Any], config: PreTrainedConfig) -> None:
    """Refuse what tells no next token, though transformers may find a class for it that does with random weights."""
    classes = [str(one) for one in raw.get("architectures") or []]
    what = f"'{name}' is of the family {config.model_type}" + (f" ({', '.join(classes)})" if classes else "")
    expected = "a causal language model (decoder only)"
    if raw.get("is_encoder_decoder"):
        raise LimbeckError(f"{what}, a sequence-to-sequence model with an encoder", expected=expected)
    known = hasattr(config, "limbeck") or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if classes and all("For" in one and not one.endswith(HEADS) for one in classes):
        raise LimbeckError(f"{what}, which does not tell the next token", expected=expected)
    if not known:
        raise LimbeckError(f"{what}, for which transformers has no causal language model", expected=expected)


def _own_code(what: str) -> LimbeckError:
    return LimbeckError(
        f"{what} comes with code of its own, and code that lies beside weights is not executed",
        expected="a family that is part of transformers",
        hint="pip install --upgrade transformers",
    )


def _generation_config(name: str, config: PreTrainedConfig) -> GenerationConfig | None:
    """A substitute where generation_config.json cannot be read, told in a line; None where it can, or is not there."""
    place, how = _place(name)
    try:
        GenerationConfig.from_pretrained(place, **how)
    except OSError:
        return None
    except Exception as error:
        console.print(f"{name}: generation_config.json is left out: {sentences(error, 1)}", markup=False)
        return GenerationConfig.from_model_config(config)
    return None


def _listed(names: Iterable[str], shown: int = 3) -> str:
    every = sorted(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more
