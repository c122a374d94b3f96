"""What lies at a path that was given as a model, told as what it is before any other library looks at it.

    check_folder(Path("runs/quickstart/student"))      # LimbeckError unless config and weights lie there, and are whole

Only local files are read here, and of weights only their headers.

Models that are not bare: something is wrapped around them or hooked into them that a student must not inherit.

check_not_wrapped(model)        # LimbeckError that says what is around it, and how to take it off
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
POINTER = b"version https://git-lfs"
HEADER = 100_000_000  # bytes; safetensors allows no longer header
SAVED_MODEL_FOLDER = "a folder made by save_pretrained"


def check_folder(path: Path) -> None:
    """Refuse what is not a whole model of transformers, config and weights.

    Raises:
        LimbeckError: a link to nothing, a single file, a run without a student, an adapter, a folder without config
            or weights, pointers of Git LFS in their place, or safetensors files that are cut or damaged.
    """
    if not path.exists():
        if path.is_symlink():
            raise LimbeckError(f"{path} is a link to {path.readlink()}, where nothing is", expected=SAVED_MODEL_FOLDER)
        raise LimbeckError(f"there is no folder {path}{_near(path)}", expected=SAVED_MODEL_FOLDER)
    if path.is_file():
        raise _single_file(path)
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise build_adapter_error(
            str(path), read_json(path / ADAPTER_CONFIG_NAME), has_model=(path / "config.json").is_file()
        )
    if not (path / "config.json").is_file():
        raise _without_config(path)
    read_json(path / "config.json")
    _check_weights(path)


def check_tokenizer(path: Path) -> None:
    """Refuse a folder in which no tokenizer lies.

    Raises:
        LimbeckError: none, or a pointer of Git LFS in its place.
    """
    found = [file for pattern in TOKENIZER for file in path.glob(pattern) if file.is_file()]
    if not found:
        expected = "the tokenizer's files beside the weights, as its save_pretrained writes them"
        above = path.parent
        if path.name.startswith("checkpoint-") and any(above.glob("tokenizer*")):
            raise LimbeckError(
                f"no tokenizer in {path}",
                expected=expected,
                hint=f"cp {shlex.quote(str(above))}/*token* {shlex.quote(str(path))}",
            )
        raise LimbeckError(
            f"no tokenizer in {path}",
            expected=expected,
            hint="AutoTokenizer.from_pretrained(...) of the model that it was made from, and save_pretrained there",
        )
    for file in found:
        if file.suffix == ".json":
            read_json(file)
        else:
            _check_pointer(file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; LimbeckError where it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        _check_pointer(path)
        raise LimbeckError(f"{path} is no JSON: {error}", expected="the file as save_pretrained wrote it") from error
    except OSError as error:
        raise LimbeckError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(found, dict):
        raise LimbeckError(f"{path} holds a {type(found).__name__}", expected="a mapping, as save_pretrained wrote it")
    return found


def build_adapter_error(name: str, config: dict[str, Any], has_model: bool = False) -> LimbeckError:
    """What is said of an adapter (PEFT), alone or beside the weights of a model.

    Args:
        name: folder, or name on the hub.
        config: its adapter_config.json.
        has_model: whether a config.json, and with it a model, lies there too.
    """
    base = config.get("base_model_name_or_path")
    folder = Path(name)
    own = folder.is_dir() and any(folder.glob("tokenizer*"))
    out = f"{folder.name}-merged"
    merge = (
        "import limbeck; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({name!r}).merge_and_unload().save_pretrained({out!r}); "
        f"T.from_pretrained({(name if own else base)!r}).save_pretrained({out!r})"
    )
    command = f"{format_python_command(merge)}   # writes {out}"
    if not has_model:
        return LimbeckError(
            f"{name} holds an adapter, not a model; its base is {base}",
            expected="a whole model: merge the adapter into its base first",
            hint=command,
        )
    files = " ".join(shlex.quote(str(file)) for file in sorted(folder.glob("adapter_*")))
    if "limbeck" in read_json(folder / "config.json"):  # a student is not loaded so long as the adapter lies there
        apart = shlex.quote(f"{name}-adapter")
        command = f"mkdir {apart} && mv {files} {apart}   # for PeftModel.from_pretrained(student, folder)"
    return LimbeckError(
        f"an adapter lies beside the model in {name}, and transformers would put it on top of the weights",
        expected="one or the other",
        hint=f"rm {files}   # where it has been merged in already; else: {command}",
    )


def _single_file(path: Path) -> LimbeckError:
    if path.suffix == ".gguf":
        return LimbeckError(
            f"{path} is a GGUF file, whose weights are rounded to few bits",
            expected="the folder or hub name of the checkpoint that it was made from",
        )
    if (path.parent / "config.json").is_file():
        return LimbeckError(f"{path} is a single file", expected="its folder", hint=str(path.parent))
    return LimbeckError(f"{path} is a file", expected=SAVED_MODEL_FOLDER)


def _without_config(path: Path) -> LimbeckError:
    """What is said of a folder without config.json: what it seems to be instead."""
    nothing = f"no config.json in {path}"
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
            f"{nothing}, which holds a trainer's checkpoints", expected="one of them", hint=f"{last}, the last"
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
            f"{path} holds GGUF files, whose weights are rounded to few bits",
            expected="the folder or hub name of the checkpoint that they were made from",
        )
    if (path / "params.json").is_file() or any(path.glob("consolidated*")):
        return LimbeckError(
            f"{nothing}: a checkpoint as its makers trained it", expected="the one converted for transformers"
        )
    inside = sorted(d.name for d in path.iterdir() if (d / "config.json").is_file())
    if inside:
        return LimbeckError(
            f"{nothing}, but in {', '.join(inside[:4])}", expected=SAVED_MODEL_FOLDER, hint=str(path / inside[0])
        )
    return LimbeckError(f"{nothing}{'' if any(path.iterdir()) else ', which is empty'}", expected=SAVED_MODEL_FOLDER)


def _check_weights(path: Path) -> None:
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        if read_json(path / "config.json").get("transformers_weights") or any(path.glob("**/*.distcp")):
            return  # other names and layouts, which transformers knows
        other = next((kind for pattern, kind in FOREIGN.items() if any(path.glob(pattern))), None)
        raise LimbeckError(
            f"no weights in {path}{f', but some for {other}' if other else ''}",
            expected=f"model.safetensors, or its parts with model.safetensors.index.json; {SAVED_MODEL_FOLDER}",
        )
    first = found[0]
    _check_pointer(first)
    parts = [first]
    if first.suffix == ".json":
        names = read_json(first).get("weight_map")
        if not isinstance(names, dict):
            raise LimbeckError(f"{first} has no weight_map", expected="the file as save_pretrained wrote it")
        parts = [path / name for name in sorted(set(map(str, names.values())))]
        lost = [part.name for part in parts if not part.is_file()]
        if lost:
            raise LimbeckError(
                f"{len(lost)} of {len(parts)} files of weights are not in {path}: {', '.join(lost[:3])}",
                expected=f"all that {first.name} names",
                hint="download or copy the folder again",
            )
    for part in parts:
        _check_pointer(part)
        if part.suffix == ".safetensors":
            check_safetensors(part)


def check_safetensors(path: Path) -> None:
    """Refuse a file that is cut or damaged, by what its header says of its size.

    Raises:
        LimbeckError: no header, or another number of bytes behind it than it says.
    """
    size = path.stat().st_size
    hint = "download or copy it again"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER, size):
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise LimbeckError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise LimbeckError(
            f"{path} ({size:,} bytes) is cut or damaged: {error}", expected="a safetensors file", hint=hint
        ) from error
    if size != 8 + length + end:
        raise LimbeckError(
            f"{path} is cut or damaged: it has {size:,} bytes", expected=f"{8 + length + end:,} bytes", hint=hint
        )


def _check_pointer(path: Path) -> None:
    """Refuse the few lines that Git leaves in the place of a file that it keeps in LFS."""
    with open(path, "rb") as file:
        pointer = file.read(len(POINTER)) == POINTER
    if pointer:
        raise LimbeckError(
            f"{path} is a pointer of Git LFS, not the file itself",
            expected="the file",
            hint=f"git -C {shlex.quote(str(path.parent))} lfs pull",
        )


def _near(path: Path) -> str:
    inside = [d.name for d in path.parent.iterdir() if d.is_dir()] if path.parent.is_dir() else []
    return suggest_closest(path.name, inside)


BARE = "a bare model of transformers, as AutoModelForCausalLM loads it"
MERGE = "model = model.merge_and_unload()   # where AutoPeftModelForCausalLM loaded it"


def check_not_wrapped(model: Any) -> None:
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
