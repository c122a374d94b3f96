"""Shared by all tests: one thread, no hub, a tiny teacher with a tokenizer of its own on disk."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiers import select_fast
from limbeck.mixers import registry
from limbeck.testing import make_tiny_model

LICENCE = Path(__file__).parent.parent / "LICENSE"  # real English that every checkout has


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all tests, not only the fast tier")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
    if config.getoption("--full") or any("::" in argument for argument in config.args):
        return
    items[:], rest = select_fast(items)
    config.hook.pytest_deselected(items=rest)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_registry():
    """Mixers that a test loads from a file are gone after it."""
    names, files = set(registry._REGISTRY), set(registry._FILES)
    yield
    for module in set(registry._FILES) - files:
        for cls in registry._FILES.pop(module).classes:
            if cls.name not in names:
                registry._REGISTRY.pop(cls.name, None)


@pytest.fixture(scope="session")
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 97 tokens, for fixtures that outlive a test: nothing may change it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    raw.train_from_iterator(
        LICENCE.read_text(encoding="utf-8").splitlines(),
        trainers.BpeTrainer(vocab_size=97, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tokenizer(shared_tokenizer) -> PreTrainedTokenizerFast:
    """A test's own copy of the tokenizer, which it may give a chat template."""
    return copy.deepcopy(shared_tokenizer)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The licence's paragraphs as JSON lines."""
    import json

    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    paragraphs = [p for p in LICENCE.read_text(encoding="utf-8").split("\n\n") if len(p) > 80]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, shared_tokenizer) -> Path:
    """A tiny random llama and the tokenizer, as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny-llama"
    make_tiny_model("llama").save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder that is not the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("LIMBECK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def verbs() -> dict:
    """The verbs of the command line, by name."""
    import typer

    from limbeck.cli import app, main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["limbeck", "--version"])
        with pytest.raises(SystemExit):
            main()  # registers the verbs
    return typer.main.get_command(app).commands
