"""Checks of a model before it is used: a folder on disk, and a model object that something is wrapped around.

    check_folder(Path("runs/quickstart/student"))      # LimbeckError unless config and weights are there and complete
    check_not_wrapped(model)                           # LimbeckError for PEFT, torch.compile, accelerate's hooks, ...

Each error says what the thing is instead, and how to get the model from it. Only local files are read, and of weight
files only their headers, before any other library opens them.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError, format_python_command, suggest_closest

ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FOREIGN = {"*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX", "*.pth": "the original release"}
TOKENIZER = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt", "special_tokens_map.json")
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
SAVED_MODEL_FOLDER = "a folder made by save_pretrained"


def check_folder(path: Path) -> None:
    """Refuse a path that is not a complete model of transformers, with config and weights.

    Raises:
        LimbeckError: a link to nothing, a single file, a run without a student, an adapter, a folder without config
            or weights, pointers of Git LFS in their place, or safetensors files that are cut or damaged.
    """
    if not path.exists():
        if path.is_symlink():
            raise LimbeckError(
                f"{path} is a link to {path.readlink()}, which does not exist", expected=SAVED_MODEL_FOLDER
            )
        siblings = [d.name for d in path.parent.iterdir() if d.is_dir()] if path.parent.is_dir() else []
        raise LimbeckError(
            f"there is no folder {path}{suggest_closest(path.name, siblings)}", expected=SAVED_MODEL_FOLDER
        )
    if path.is_file():
        raise _single_file_error(path)
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise build_adapter_error(
            str(path), read_json(path / ADAPTER_CONFIG_NAME), has_model=(path / "config.json").is_file()
        )
    if not (path / "config.json").is_file():
        raise _missing_config_error(path)
    read_json(path / "config.json")
    _check_weights(path)


def check_tokenizer(path: Path) -> None:
    """Refuse a folder without a tokenizer.

    Raises:
        LimbeckError: no tokenizer, a damaged JSON file, or a Git LFS pointer in the place of a file.
    """
    files = [file for pattern in TOKENIZER for file in path.glob(pattern) if file.is_file()]
    if not files:
        hint = (
            "load the tokenizer of the model that this one was made from, and call its save_pretrained with this folder"
        )
        # transformers' Trainer saves the tokenizer beside its checkpoints, not in them
        if path.name.startswith("checkpoint-") and any(path.parent.glob("tokenizer*")):
            hint = f"cp {shlex.quote(str(path.parent))}/*token* {shlex.quote(str(path))}"
        raise LimbeckError(
            f"no tokenizer in {path}",
            expected="the tokenizer's files beside the weights, as its save_pretrained writes them",
            hint=hint,
        )
    for file in files:
        if file.suffix == ".json":
            read_json(file)
        else:
            _check_not_lfs_pointer(file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; LimbeckError for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        _check_not_lfs_pointer(path)
        raise LimbeckError(f"{path} is not JSON: {error}", expected="the file as save_pretrained wrote it") from error
    except OSError as error:
        raise LimbeckError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise LimbeckError(
            f"{path} holds a {type(content).__name__}", expected="a mapping, as save_pretrained wrote it"
        )
    return content


def build_adapter_error(name: str, config: dict[str, Any], has_model: bool = False) -> LimbeckError:
    """Return the error for an adapter (PEFT), alone or beside the weights of a model.

    Args:
        name: folder, or name on the hub.
        config: its adapter_config.json.
        has_model: there is a config.json, and so a model, in the same folder.
    """
    base = config.get("base_model_name_or_path")
    folder = Path(name)
    has_tokenizer = folder.is_dir() and any(folder.glob("tokenizer*"))
    out = f"{folder.name}-merged"
    merge = (
        "import limbeck; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({name!r}).merge_and_unload().save_pretrained({out!r}); "
        f"T.from_pretrained({(name if has_tokenizer else base)!r}).save_pretrained({out!r})"
    )
    command = f"{format_python_command(merge)}   # writes {out}"
    if not has_model:
        return LimbeckError(
            f"{name} holds an adapter, not a model; its base is {base}",
            expected="a complete model: merge the adapter into its base first",
            hint=command,
        )
    files = " ".join(shlex.quote(str(file)) for file in sorted(folder.glob("adapter_*")))
    if "limbeck" in read_json(folder / "config.json"):  # a student is not loaded while the adapter is in its folder
        separate = shlex.quote(f"{name}-adapter")
        command = f"mkdir {separate} && mv {files} {separate}   # for PeftModel.from_pretrained(student, folder)"
    return LimbeckError(
        f"an adapter lies beside the model in {name}, and transformers would apply it to the weights",
        expected="either a model or an adapter",
        hint=f"rm {files}   # if it has been merged already; otherwise: {command}",
    )


def _single_file_error(path: Path) -> LimbeckError:
    if path.suffix == ".gguf":
        return LimbeckError(
            f"{path} is a GGUF file with quantized weights",
            expected="the folder or hub name of the checkpoint that it was made from",
        )
    if (path.parent / "config.json").is_file():
        return LimbeckError(f"{path} is a single file", expected="its folder", hint=str(path.parent))
    return LimbeckError(f"{path} is a file", expected=SAVED_MODEL_FOLDER)


def _missing_config_error(path: Path) -> LimbeckError:
    """Return the error for a folder without config.json, which says what the folder seems to be instead."""
    problem = f"no config.json in {path}"
    if (path / "student" / "config.json").is_file():
        return LimbeckError(f"{path} is a run, not a model", expected="its student", hint=f"{path}/student")
    if (path / "recipe.yaml").is_file():
        command = f"limbeck distill {shlex.quote(str(path / 'recipe.yaml'))} --out {shlex.quote(str(path))}"
        return LimbeckError(f"{path} is a run without a student yet", expected="a finished run", hint=command)
    checkpoints = [
        d for d in path.glob("checkpoint-*") if (d / "config.json").is_file() or (d / ADAPTER_CONFIG_NAME).is_file()
    ]
    if checkpoints:
        last = max(checkpoints, key=lambda d: (len(d.name), d.name))
        return LimbeckError(
            f"{problem}, which holds a trainer's checkpoints", expected="one of them", hint=f"{last}, the last one"
        )
    snapshots = sorted(path.glob("snapshots/*/config.json"), key=lambda file: file.stat().st_mtime)
    if snapshots:
        return LimbeckError(
            f"{path} is a folder of the hub's cache",
            expected="the hub name, or a snapshot",
            hint=str(snapshots[-1].parent),
        )
    if any(path.glob("*.gguf")):
        return LimbeckError(
            f"{path} holds GGUF files with quantized weights",
            expected="the folder or hub name of the checkpoint that they were made from",
        )
    if (path / "params.json").is_file() or any(path.glob("consolidated*")):
        return LimbeckError(
            f"{problem}: a checkpoint in its original format", expected="the one converted for transformers"
        )
    models = sorted(d.name for d in path.iterdir() if (d / "config.json").is_file())
    if models:
        return LimbeckError(
            f"{problem}, but in {', '.join(models[:4])}", expected=SAVED_MODEL_FOLDER, hint=str(path / models[0])
        )
    return LimbeckError(f"{problem}{'' if any(path.iterdir()) else ', which is empty'}", expected=SAVED_MODEL_FOLDER)


def _check_weights(path: Path) -> None:
    files = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not files:
        if read_json(path / "config.json").get("transformers_weights") or any(path.glob("**/*.distcp")):
            return  # other names and layouts, which transformers supports
        other = next((kind for pattern, kind in FOREIGN.items() if any(path.glob(pattern))), None)
        raise LimbeckError(
            f"no weights in {path}{f', but some for {other}' if other else ''}",
            expected=f"model.safetensors, or its parts with model.safetensors.index.json; {SAVED_MODEL_FOLDER}",
        )
    first = files[0]
    _check_not_lfs_pointer(first)
    shards = [first]
    if first.suffix == ".json":
        names = read_json(first).get("weight_map")
        if not isinstance(names, dict):
            raise LimbeckError(f"{first} has no weight_map", expected="the file as save_pretrained wrote it")
        shards = [path / name for name in sorted(set(map(str, names.values())))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise LimbeckError(
                f"{len(missing)} of {len(shards)} weight files are missing in {path}: {', '.join(missing[:3])}",
                expected=f"all files that {first.name} lists",
                hint="download or copy the folder again",
            )
    for shard in shards:
        _check_not_lfs_pointer(shard)
        if shard.suffix == ".safetensors":
            check_safetensors(shard)


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that is truncated or damaged, by its size and header.

    Raises:
        LimbeckError: no header, or another number of bytes after it than the header says.
    """
    size = path.stat().st_size
    hint = "download or copy it again"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size):
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise LimbeckError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise LimbeckError(
            f"{path} ({size:,} bytes) is truncated or damaged: {error}", expected="a safetensors file", hint=hint
        ) from error
    if size != 8 + length + end:
        raise LimbeckError(
            f"{path} is truncated or damaged: it has {size:,} bytes", expected=f"{8 + length + end:,} bytes", hint=hint
        )


def _check_not_lfs_pointer(path: Path) -> None:
    """Refuse the short text file that Git leaves in the place of a file stored in LFS."""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise LimbeckError(
            f"{path} is a pointer of Git LFS, not the file itself",
            expected="the file",
            hint=f"git -C {shlex.quote(str(path.parent))} lfs pull",
        )


BARE = "a plain model of transformers, as AutoModelForCausalLM loads it"


def check_not_wrapped(model: Any) -> None:
    """Refuse anything but a plain model of transformers: a student is a copy of it, with everything attached to it.

    Raises:
        LimbeckError: adapters, a compiled, parallel or sharded model, accelerate's hooks, a class that is not part of
            transformers, one with an encoder, or no model at all.
    """
    if isinstance(model, str | Path):
        raise LimbeckError(
            f"'{model}' is a name, not a model",
            expected=BARE,
            hint=f"limbeck.convert(AutoModelForCausalLM.from_pretrained({str(model)!r}), ...)",
        )
    class_name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise LimbeckError(
            "this model went through torch.compile", expected=BARE, hint="convert model._orig_mod, compile the student"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or _has_peft_modules(model):
        raise LimbeckError(
            "adapters (PEFT) are attached to this model",
            expected="a model with its adapters merged",
            hint="model = model.merge_and_unload()   # if AutoPeftModelForCausalLM loaded it",
        )
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None) or getattr(model, "model", None)
        name = "module" if hasattr(model, "module") else "model"
        hint = f"model.{name}" if isinstance(inner, PreTrainedModel) else None
        raise LimbeckError(
            f"this is a {type(model).__module__}.{class_name}{', around a model' if hint else ''}",
            expected=BARE,
            hint=hint,
        )
    compiled = next((name for name, module in model.named_modules() if hasattr(module, "_orig_mod")), None)
    if compiled is not None:
        raise LimbeckError(
            f"{compiled} went through torch.compile", expected=BARE, hint="convert first, compile the student"
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise LimbeckError(
            "accelerate's hooks are in this model: it was split over devices by a device_map",
            expected=BARE,
            hint="load it on one device, without device_map",
        )
    if any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise LimbeckError("this model's weights are sharded over processes", expected="all weights in each process")
    if getattr(transformers, class_name, None) is not type(model) and not hasattr(model.config, "limbeck"):
        raise LimbeckError(
            f"{class_name} is a class of {type(model).__module__}, and a student needs a class of transformers",
            expected=BARE,
            hint="models with custom code are not supported",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise LimbeckError(
            f"{class_name} is a sequence-to-sequence model with an encoder",
            expected="a causal language model (decoder only)",
        )


def _has_peft_modules(model: Any) -> bool:
    modules = model.modules() if hasattr(model, "modules") else ()
    return any(type(module).__module__.partition(".")[0] == "peft" for module in modules)
