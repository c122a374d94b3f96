"""A student's folder, opened again and compared with the student before anybody relies on it.

    student.save_pretrained(folder), tokenizer.save_pretrained(folder)
    check_export(folder, student, tokenizer)              # LimbeckError unless all of it comes back, bit for bit

What is written and what is meant may differ: an adapter alone is saved in the place of the model, a tensor is taken for
tied, a tokenizer loses a setting. Weights are compared one tensor at a time, so no second student is in memory.

Any model with its tokenizer, teachers and students, from a folder or the hub: the one way in which all are loaded.

    is_student("someone/my-student")                       # reads the config alone
    model, tokenizer = load_model_and_tokenizer("someone/my-student")    # float32, on the CPU, frozen

transformers draws missing weights at random, attaches adapters, asks on standard input whether to run foreign code, and
takes over what a config says of somebody's last session. Here each of these is an error or put back (docs/saving.md).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
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

import limbeck.models.modeling  # noqa: F401  registers students with transformers
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError, suggest_closest, summarize_error
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.storage import load_valid_manifest
from limbeck.data.offline.embedded import ensure_embedded_teacher, get_embedded_teacher_folder
from limbeck.models.checkpoint import check_loading_info, make_generation_config_savable, reset_session_settings
from limbeck.models.folders import SAVED_MODEL_FOLDER, build_adapter_error, check_folder, check_tokenizer, read_json
from limbeck.models.hub import check_hub_model, split_revision
from limbeck.models.quantization import is_quantized

HEADS = ("ForCausalLM", "ForConditionalGeneration")  # of the classes called ...For..., those that tell the next token
SAFE_KWARGS = {"trust_remote_code": False}  # not left out: then transformers asks whoever is at standard input


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


def load_model_and_tokenizer(
    name: str, require_student: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for use and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        require_student: it was asked for as the student of a run, and nothing else will do.

    Raises:
        LimbeckError: see `load_model`; or no student.
    """
    config = load_config(name)
    tokenizer = load_tokenizer(name)
    if require_student and not hasattr(config, "limbeck"):
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
        raise build_adapter_error(place, read_json(Path(found)))
    try:
        raw, _ = PreTrainedConfig.get_config_dict(place, **how)
        _check_type(name, raw)
        config = AutoConfig.from_pretrained(place, **how)
    except LimbeckError:
        raise
    except Exception as error:
        where = f"; {Path(name).parent} is a folder without it" if Path(name).parent.is_dir() and "/" in name else ""
        raise LimbeckError(
            f"cannot read the config of '{name}': {summarize_error(error)}{where}",
            expected=f"{SAVED_MODEL_FOLDER}, or the name of a model on the hub",
        ) from error
    _check_kind(name, raw, config)
    if not is_quantized(config) and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # left behind by somebody who loaded in few bits, and saved in many
    return reset_session_settings(config)


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
            f"cannot load the tokenizer of '{name}': {summarize_error(error)}",
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
            ignore_mismatched_sizes=True,  # `check_loading_info` names them, transformers does not
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
        raise LimbeckError(
            f"cannot load the weights of '{name}': {summarize_error(error)}", expected=SAVED_MODEL_FOLDER
        ) from error
    check_loading_info(name, info)
    if info["unexpected_keys"]:
        console.print(f"{name}: {_listed(info['unexpected_keys'])} of the file not used", markup=False)
    check_finite(name, model)
    if not make_generation_config_savable(model):
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
        return name, dict(SAFE_KWARGS)
    how: dict[str, Any] = {**SAFE_KWARGS, "local_files_only": True} if check_hub_model(name) else dict(SAFE_KWARGS)
    repository, revision = split_revision(name)
    return repository, how if revision is None else {**how, "revision": revision}


def _adapter_on_hub(name: str, how: dict[str, Any]) -> str | None:
    try:
        return find_adapter_config_file(name, **{key: value for key, value in how.items() if key not in SAFE_KWARGS})
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
        console.print(f"{name}: generation_config.json is left out: {summarize_error(error, 1)}", markup=False)
        return GenerationConfig.from_model_config(config)
    return None


def _listed(names: Iterable[str], shown: int = 3) -> str:
    every = sorted(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


SAMPLE = "In 1984, the café's 12 guests said: «It's fine!»\n\n\tnaïve 你好 🙂"


def check_export(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: bool = True
) -> None:
    """Refuse a folder from which another student would be loaded than the one that was saved there.

    Args:
        weights: compare the weights too; False where only a few of them were written, as a rehearsal.

    Raises:
        LimbeckError: what is missing or differs; or weights of the student that are not finite.
    """
    config = load_config(str(folder))
    GenerationConfig.from_pretrained(folder)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, **SAFE_KWARGS)
    ours, theirs = _shapes(student), _shapes(made)
    wrong = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if type(made) is not type(student) or wrong:
        raise _differs(folder, f"it opens as {type(made).__name__}", wrong)
    again = load_tokenizer(str(folder))
    if again(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids or again.chat_template != tokenizer.chat_template:
        raise _differs(folder, "its tokenizer reads a text otherwise, or has another chat template", [])
    if weights:
        check_finite("the student", student)
        _check_weights(folder, student, config)


def _check_weights(folder: Path, student: PreTrainedModel, config: Any) -> None:
    ours = student.state_dict()
    files = sorted(folder.glob("*.safetensors"))
    written: set[str] = set()
    wrong = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it has no iterator
                written.add(name)
                if name in ours and not _same(tensors.get_tensor(name), ours[name]):
                    wrong.append(name)
    if not written <= ours.keys():  # a family whose files are laid out otherwise than its modules
        loaded = load_model(str(folder), config).state_dict()
        wrong = [name for name, tensor in ours.items() if not _same(loaded[name], tensor)]
    else:
        held = {ours[name].data_ptr() for name in written}
        wrong += [name for name, tensor in ours.items() if name not in written and tensor.data_ptr() not in held]
    if wrong:
        raise _differs(folder, "weights came back otherwise, or not at all", wrong)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _differs(folder: Path, how: str, names: list[str]) -> LimbeckError:
    several = f": {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else ""
    return LimbeckError(
        f"what was written to {folder} is not the student: {how}{several}",
        expected="the same student, read back",
        hint="the same command again writes it anew; what the stages learnt is kept",
    )


def resolve_teacher(name: str) -> str:
    """What to hand to `from_pretrained`: a folder for "embedded" and for the teachers that Limbeck trains itself (made
    if they are not in the cache, or damaged), the path of a local folder, else the name as it is.

    Raises:
        LimbeckError: a path at which no model lies, or something near to one of our own names.
    """
    if name == "embedded":
        return str(ensure_embedded_teacher(verify=True))
    if name in TeacherRecipe.names():
        from limbeck.training.pretraining import train_or_load_teacher

        return str(train_or_load_teacher(name, verify=True))
    path = Path(name).expanduser()
    if path.exists() or path.is_symlink():
        from limbeck.models.folders import check_folder

        check_folder(path)
        return str(path)
    repository, _ = split_revision(name)
    if repository != name and repository in ("embedded", *TeacherRecipe.names()):
        raise LimbeckError(
            f"no teacher '{name}'",
            expected="owner/name@revision: only models of the hub have revisions",
            hint=f"--teacher {repository}",
        )
    looks_like_path = name.startswith((".", "/", "~")) or repository.count("/") > 1
    near = "" if "/" in name else suggest_closest(name, ["embedded", *TeacherRecipe.names()])
    if looks_like_path or near:
        raise LimbeckError(
            f"no teacher '{name}'{near}",
            expected="'embedded', 'small', a folder by save_pretrained, or of the hub: owner/name or owner/name@v1",
        )
    return name


def find_cached_teacher(name: str) -> Path | None:
    """The folder of "embedded" or of a teacher that Limbeck trains itself, where it is in the cache (by size only)."""
    folder = get_embedded_teacher_folder() if name == "embedded" else TeacherRecipe.load(name).folder
    return folder if load_valid_manifest(folder) else None
