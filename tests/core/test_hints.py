"""What error messages tell people to type: verbs, options, recipe keys and extras that exist."""

import ast
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from helpers.paths import ROOT
from limbeck import Recipe, mixers
from limbeck.core.config import _models_in
from limbeck.core.recipe import TeacherRecipe
from limbeck.evaluation import measure
from limbeck.study import Study

SRC = ROOT / "src" / "limbeck"
# of transformers, torch, datasets, Python: names in hints that are not ours
FOREIGN = {
    "attn_implementation", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
    "penalty_alpha", "trust_remote_code", "input_ids", "attention_mask", "save_pretrained", "from_pretrained",
    "base_model", "tie_word_embeddings", "eos_token", "save_to_disk", "device_map",
}  # fmt: skip


def text_of(node: ast.AST) -> list[str]:
    """The texts that an expression can be, what is filled in as {}; of a conditional both."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [
            [part.value] if isinstance(part, ast.Constant) else text_of(part.value) or ["{}"]  # type: ignore[attr-defined]
            for part in node.values
        ]
        return ["".join(one) for one in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return [*text_of(node.body), *text_of(node.orelse)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in text_of(node.left) or ["{}"] for b in text_of(node.right) or ["{}"]]
    return []


def hints() -> list[tuple[str, str]]:
    """(place, text) of each `hint` in the package; a name stands for its module's constant."""
    found = []
    for path in sorted(SRC.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                value = constants.get(node.value.id, node.value) if isinstance(node.value, ast.Name) else node.value
                found += [(f"{path.relative_to(SRC)}:{node.value.lineno}", text) for text in text_of(value)]
    return found


HINTS = hints()


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of settings; items of a list under N."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in set(_models_in(field.annotation)):
            if inner is not model:
                yield from keys_of(inner, f"{prefix}{name}.")
                yield from keys_of(inner, f"{prefix}{name}.N.")


@pytest.fixture(scope="module")
def keys() -> set[str]:
    found = set(keys_of(Recipe)) | set(keys_of(TeacherRecipe)) | set(keys_of(Study))
    for name in measure.MEASURE_MODULES:
        found |= {f"{name}.{key}" for key in measure.get_measure(name).settings.model_fields}
    return found


def test_hints_are_found():
    assert len(HINTS) > 110
    assert any("limbeck select" in text for _, text in HINTS)


@pytest.mark.parametrize(("place", "text"), HINTS)
def test_a_hint_names_what_exists(place, text, verbs, keys):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for install in re.findall(r"pip install ([^;,\n]*)", text):
        for word in shlex.split(install.replace("{}", "x")):
            assert re.fullmatch(r"(--upgrade|[\w.-]+(\[[\w,]+\])?)", word), f"pip does not take {word!r}"
            for extra in re.findall(r"limbeck\[([\w,]+)\]", word):
                assert set(extra.split(",")) <= set(extras), extra
    options = {option for verb in verbs.values() for one in verb.params for option in one.opts}
    for verb, rest in re.findall(r"(?<![\w-])limbeck ([a-z]+)((?: [^;,(`]*)?)", text):
        assert verb in verbs, f"no verb {verb}"
        mine = {option for one in verbs[verb].params for option in one.opts}
        assert set(re.findall(r"(?<!\S)(--[a-z][a-z0-9-]+)", rest)) <= mine, rest
    known = options | {"--nproc-per-node", "--no-deps", "--upgrade", "--head", "--mixer-file"}
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", text)) <= known
    for key in re.findall(r"--set '?([\w.{}]+)=", text):
        plain = re.sub(r"\{\}|\b\d+\b", "N", key)
        assert plain in keys or plain == "N" or plain.startswith("N."), f"no key {key}"
    bare = re.findall(r"(?<!--set )(?<!--set ')(?<![\w.])([a-z_]+\.[\w.]+=[^\s,]+)", text)
    assert not bare, "a key is given by --set"
    names = {part for key in keys for part in key.split(".")} | set(mixers.list_mixers())
    names |= FOREIGN
    ours = re.sub(r"limbeck\.[\w.]+", "", re.sub(r"[\w/]+\.json\b|LIMBECK_CACHE|HF_\w+|[A-Z_]{3,}", "", text))
    for word in re.findall(r"(?<![\w.{/'-])[a-z]+(?:_[a-z]+)+(?!\w)", ours):
        assert word in names, f"{word} is no key of a recipe, no setting of a measure and no mixer"
