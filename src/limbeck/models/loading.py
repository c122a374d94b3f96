"""Loading of models and tokenizers, teachers and students, from a folder or the hub.

    model, tokenizer = load("small")                                         # float32, on the CPU, frozen
    teacher, tokenizer = load_teacher("Qwen/Qwen3-0.6B", torch.device("cpu"))
    is_student("someone/my-student")                                         # reads only the config
    resolve_model("runs/one")                                                # ("runs/one/student", True)

transformers initializes missing weights at random, attaches adapters, asks on standard input whether to run custom
code, and applies settings that a past session left in a config. Here each of these is an error or is reset
(docs/guides/generation.md).
"""

from pathlib import Path
from typing import Any

import torch
import transformers
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
from limbeck.core.cache import load_valid_manifest
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError, suggest_closest, suggest_hub_name, summarize_error
from limbeck.core.recipe import TeacherRecipe
from limbeck.data.offline.embedded import ensure_embedded_teacher, get_embedded_teacher_folder
from limbeck.models.checkpoint import (
    check_loading_info,
    format_names,
    make_generation_config_savable,
    reset_session_settings,
)
from limbeck.models.compiled_decoding import find_obstacle, list_compiled_modules
from limbeck.models.folders import SAVED_MODEL_FOLDER, build_adapter_error, check_folder, check_tokenizer, read_json
from limbeck.models.hub import check_hub_model, find_similar_folder, split_revision
from limbeck.models.quantization import (
    build_teacher_kwargs,
    check_not_quantized,
    is_quantized,
    pack_float16,
    quantize_int8,
)
from limbeck.models.registration import get_teacher_maker
from limbeck.models.temporary import quiet_transformers

GENERATIVE_HEADS = ("ForCausalLM", "ForConditionalGeneration")  # endings of classes that predict the next token
SAFE_KWARGS = {"trust_remote_code": False}  # explicit, because without it transformers asks on standard input


def is_student(name: str) -> bool:
    """Return whether a folder or a name on the hub holds a student, by its config.

    Raises:
        LimbeckError: no folder, and the hub has no such model or cannot be reached; or a damaged config of a student.
    """
    path, kwargs = _locate(name)
    try:
        return hasattr(AutoConfig.from_pretrained(path, **kwargs), "limbeck")
    except LimbeckError:
        raise
    except Exception:  # loading the model reports what is wrong with it
        return False


def load(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a teacher, a run's student or any other model by its name, in float32, with its tokenizer.

    Example:
        >>> teacher, tokenizer = limbeck.load("my-teacher")
        >>> student = limbeck.convert(teacher, mixer="gla")

    Args:
        name: a run directory, a folder, a Hub name, "embedded", or a small teacher, which is trained first if it is not
            in the cache.

    Returns:
        The model, in evaluation mode and without gradients, and its tokenizer.

    Raises:
        LimbeckError: there is no such model, or it cannot be loaded.
    """
    with quiet_transformers():
        checkpoint, is_run = resolve_model(str(name))
        return load_model_and_tokenizer(checkpoint, require_student=is_run)


def check_given_teacher(teacher: Any) -> None:
    """Raise LimbeckError for anything but a name, a folder, None, or a model in memory with its tokenizer."""
    kinds = (PreTrainedModel, PreTrainedTokenizerBase)
    is_pair = isinstance(teacher, tuple) and len(teacher) == 2 and all(map(isinstance, teacher, kinds))
    if teacher is None or isinstance(teacher, str | Path) or is_pair:
        return
    parts = ", ".join(type(part).__name__ for part in teacher) if isinstance(teacher, tuple) else ""
    raise LimbeckError(
        f"the teacher is {f'({parts})' if parts else f'a {type(teacher).__name__}'}",
        expected="a folder, a Hub name or 'embedded'; or a model of transformers with its tokenizer",
        hint="teacher=(model, tokenizer)",
    )


def find_own_name(folder: str) -> str:
    """Return the name under which Limbeck knows a folder of its cache, as "embedded"; else the folder itself."""
    known = {str(get_embedded_teacher_folder()): "embedded"}
    known |= {str(TeacherRecipe.load(name).folder): name for name in TeacherRecipe.names()}
    return known.get(folder, folder)


def load_model_and_tokenizer(
    name: str, require_student: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen model in float32 and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        require_student: refuse any model but a student, because the folder is that of a run's student.

    Raises:
        LimbeckError: see `load_model`; or not a student.
    """
    config = load_config(name)
    tokenizer = load_tokenizer(name)
    if require_student and not hasattr(config, "limbeck"):
        raise LimbeckError(
            f"{name} is not a student: its config.json has model_type {config.model_type}",
            expected="the folder as the run exported it",
            hint=f"rm -r {name}, then repeat the run's command; its finished stages are not repeated",
        )
    model = load_model(name, config)
    return model.eval().requires_grad_(False), tokenizer


def load_for_generation(
    name: str, fp16: bool = False, int8_dynamic: bool = False, compiled: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer to generate text: on a GPU if there is one.

    Args:
        name: as `load` takes it.
        fp16: stay on the CPU, with weights in float16.
        int8_dynamic: stay on the CPU, and compute in int8; not along with `fp16`.
        compiled: stay on the CPU, ready for `limbeck.models.compiled_decoding.compile_decoding`.

    Raises:
        LimbeckError: see `load`; or a torch without dynamic quantization.
    """
    checkpoint, is_run = resolve_model(name)
    model, tokenizer = load_model_and_tokenizer(checkpoint, require_student=is_run)
    if fp16 and compiled and find_obstacle(model) is None:
        return pack_float16(model, list_compiled_modules(model)), tokenizer
    if fp16 or int8_dynamic:
        return (pack_float16 if fp16 else quantize_int8)(model), tokenizer
    if compiled:
        return model, tokenizer
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return model, tokenizer


def load_teacher(
    name: str, device: torch.device, bits: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen teacher in float32 and its tokenizer.

    Args:
        name: a local folder, or a name on the Hugging Face hub.
        bits: 8 or 4 quantizes the backbone's linear layers (bitsandbytes); None keeps all weights in float32.

    Raises:
        LimbeckError: see `load_config` and `load_model`; the model is a student, its weights are stored quantized, or
            `bits` is given and bitsandbytes is not installed.
    """
    settings = build_teacher_kwargs(bits, device)
    config = load_config(name)
    check_not_quantized(config, f"'{name}'")
    if hasattr(config, "limbeck"):
        raise LimbeckError(f"'{name}' is a student already", expected="a softmax teacher")
    tokenizer = load_tokenizer(name)
    model = load_model(name, config, **settings)
    if bits is None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """Load the config of a causal language model, without settings of a past session.

    Raises:
        LimbeckError: no such folder or name on the hub, an adapter, a model with custom code, of an unknown type, or of
            another kind (an encoder, a sequence-to-sequence model, one for images).
    """
    path, kwargs = _locate(name)
    if Path(path).exists() or Path(path).is_symlink():
        check_folder(Path(path))
    elif (adapter_config := _find_adapter_on_hub(path, kwargs)) is not None:
        raise build_adapter_error(path, read_json(Path(adapter_config)))
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        _check_model_type(name, raw)
        config = AutoConfig.from_pretrained(path, **kwargs)
    except LimbeckError:
        raise
    except Exception as error:
        missing = "" if Path(path).exists() else f"there is no folder '{name}', and on the hub: "
        raise LimbeckError(
            f"{missing}cannot read the config of '{name}': {summarize_error(error)}",
            expected=f"{SAVED_MODEL_FOLDER}, or the name of a model on the hub",
            hint=find_similar_folder(name),
        ) from error
    _check_is_causal_lm(name, raw, config)
    if not is_quantized(config) and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # left over from a model that was loaded quantized and saved dequantized
    return reset_session_settings(config)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        LimbeckError: there is none, it is damaged, or it has custom code.
    """
    path, kwargs = _locate(name)
    if Path(path).exists():
        check_tokenizer(Path(path))
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except LimbeckError:
        raise
    except Exception as error:
        if "custom code" in str(error):
            raise _custom_code_error(f"the tokenizer of '{name}'") from error
        raise LimbeckError(
            f"cannot load the tokenizer of '{name}': {summarize_error(error)}",
            expected="the tokenizer's files as its save_pretrained writes them",
        ) from error


def load_model(name: str, config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """Load a model in float32 with all of its weights.

    Args:
        config: from `load_config`.
        settings: further arguments of `from_pretrained`.

    Raises:
        LimbeckError: weights that cannot be read, are missing, have other shapes, or are not finite.
    """
    path, kwargs = _locate(name)
    try:
        GenerationConfig.from_pretrained(path, **kwargs)
    except OSError:  # there is none
        pass
    except Exception as error:
        console.print(f"{name}: ignoring generation_config.json: {summarize_error(error, 1)}", markup=False)
        settings["generation_config"] = GenerationConfig.from_model_config(config)
    load: Any = AutoModelForCausalLM  # its type hints do not say that with the loading info it returns a pair
    try:
        model, info = load.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loading_info` names them, transformers does not
            **kwargs,
            **settings,
        )
    except LimbeckError:
        raise
    except Exception as error:
        if "Weights only load failed" in str(error):
            raise LimbeckError(
                f"the weights of '{name}' are a pickle that contains more than tensors, so it is not executed",
                expected="safetensors, or a pickle of tensors only",
            ) from error
        raise LimbeckError(
            f"cannot load the weights of '{name}': {summarize_error(error)}", expected=SAVED_MODEL_FOLDER
        ) from error
    check_loading_info(name, info)
    if info["unexpected_keys"]:
        console.print(f"{name}: unused tensors in the file: {format_names(info['unexpected_keys'])}", markup=False)
    check_finite(name, model)
    if not make_generation_config_savable(model):
        console.print(f"{name}: generation_config.json contradicts itself; using only its special tokens", markup=False)
    return model


def check_finite(name: str, model: nn.Module) -> None:
    """Raise LimbeckError, with their names, if weights are NaN or infinite."""
    bad = [
        key
        for key, tensor in model.named_parameters()
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor.detach())
    ]
    if bad:
        raise LimbeckError(
            f"weights of '{name}' are not finite (NaN or infinity): {format_names(bad)}",
            expected="finite weights",
            hint="download or export it again; if its training diverged, it has to be repeated",
        )


def _is_finite(tensor: Tensor) -> bool:
    # the sum needs no memory; it may overflow although all entries are finite
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return the path and keyword arguments for `from_pretrained`; a name that is no folder is checked on the hub."""
    if Path(name).exists() or Path(name).is_symlink():
        return name, dict(SAFE_KWARGS)
    kwargs: dict[str, Any] = {**SAFE_KWARGS, "local_files_only": True} if check_hub_model(name) else dict(SAFE_KWARGS)
    repository, revision = split_revision(name)
    return repository, kwargs if revision is None else {**kwargs, "revision": revision}


def _find_adapter_on_hub(name: str, kwargs: dict[str, Any]) -> str | None:
    try:
        return find_adapter_config_file(name, **{key: value for key, value in kwargs.items() if key not in SAFE_KWARGS})
    except Exception:  # loading the config reports more about it
        return None


def _check_model_type(name: str, raw: dict[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise LimbeckError(
            f"the config of '{name}' has no model_type", expected="config.json as save_pretrained writes it"
        )
    if model_type in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise _custom_code_error(f"'{name}' (model_type {model_type})")
    raise LimbeckError(
        f"this transformers ({transformers.__version__}) has no model_type '{model_type}', which '{name}' needs",
        expected="a family of transformers",
        hint="pip install --upgrade transformers",
    )


def _check_is_causal_lm(name: str, raw: dict[str, Any], config: PreTrainedConfig) -> None:
    """Refuse other kinds of models, even if transformers has a causal class that it would load with a random head."""
    classes = [str(cls) for cls in raw.get("architectures") or []]
    model = f"'{name}' is of the family {config.model_type}" + (f" ({', '.join(classes)})" if classes else "")
    expected = "a causal language model (decoder only)"
    if raw.get("is_encoder_decoder"):
        raise LimbeckError(f"{model}, a sequence-to-sequence model with an encoder", expected=expected)
    if classes and all("For" in cls and not cls.endswith(GENERATIVE_HEADS) for cls in classes):
        raise LimbeckError(f"{model}, which does not predict the next token", expected=expected)
    if not hasattr(config, "limbeck") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LimbeckError(f"{model}, for which transformers has no causal language model", expected=expected)


def _custom_code_error(what: str) -> LimbeckError:
    return LimbeckError(
        f"{what} comes with code of its own, and code beside weights is not executed",
        expected="a family that is part of transformers",
        hint="pip install --upgrade transformers",
    )


def resolve_teacher(name: str) -> str:
    """Return what to pass to `from_pretrained` for a teacher's name in a recipe or on the command line.

    That is a folder of the cache for "embedded" and for the teachers that Limbeck trains itself (made first if missing
    or damaged), the path of a local folder, or the name itself.

    Raises:
        LimbeckError: a path without a model, or a misspelled name of one of Limbeck's own teachers.
    """
    if name == "embedded":
        return str(ensure_embedded_teacher(verify=True))
    if name in TeacherRecipe.names():
        return str(_own_teacher_folder(name))
    path = Path(name).expanduser()
    if path.exists() or path.is_symlink():
        check_folder(path)
        return str(path)
    repository, _ = split_revision(name)
    if repository != name and repository in ("embedded", *TeacherRecipe.names()):
        raise LimbeckError(
            f"no teacher '{name}'",
            expected="owner/name@revision: only models on the hub have revisions",
            hint=f"--teacher {repository}",
        )
    looks_like_path = name.startswith((".", "/", "~")) or repository.count("/") > 1
    near = "" if "/" in name else suggest_closest(name, ["embedded", *TeacherRecipe.names()])
    if looks_like_path or near:
        raise LimbeckError(
            f"no teacher '{name}'{near}",
            expected="'embedded', 'small', a folder made by save_pretrained, or on the hub owner/name or owner/name@v1",
            hint=suggest_hub_name(name) or find_similar_folder(name),
        )
    return name


def resolve_model(name: str) -> tuple[str, bool]:
    """Return what to load for a model given as a run directory, a folder, "embedded" or a name.

    Returns:
        What to pass to `from_pretrained`, and whether it is the student of a run.

    Raises:
        LimbeckError: see `resolve_teacher`.
    """
    folder = Path(name).expanduser() / "student"
    return (str(folder), True) if folder.is_dir() else (resolve_teacher(name), False)


def _own_teacher_folder(name: str) -> Path:
    """Return the folder of a teacher that Limbeck trains itself; it is trained first if it is not in the cache."""
    if (make := get_teacher_maker()) is not None:
        return make(name)
    if (folder := find_cached_teacher(name)) is not None:
        return folder
    raise LimbeckError(
        f"the teacher '{name}' is not in the cache",
        expected="a trained teacher",
        hint=f"limbeck assets --teacher {name}",
    )


def find_cached_teacher(name: str) -> Path | None:
    """Return the folder of "embedded" or of a teacher that Limbeck trains, if it is in the cache (by file sizes)."""
    folder = get_embedded_teacher_folder() if name == "embedded" else TeacherRecipe.load(name).folder
    return folder if load_valid_manifest(folder) else None
