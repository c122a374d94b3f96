"""A tokenizer as the keys of a GGUF file: vocabulary, merges, special tokens, chat template, how a text begins.

    reasons = check_tokenizer(tokenizer, vocabulary=49_152)
    for key, value in describe_tokenizer(tokenizer, vocabulary=49_152).items(): ...

llama.cpp has the splitting rules of byte-level BPE tokenizers by name, so the rule in tokenizer.json has to be one that
it knows; BPE over characters with a byte fallback (Llama 2, Mistral 7B) it reads as SentencePiece.
"""

import json
from typing import Any

from limbeck.data.special_tokens import find_special_token_ids
from limbeck.models.export import Reason

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# regular expression of a Split before a byte-level step: name of the rule in llama.cpp
SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST: "qwen2",
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}


def check_tokenizer(tokenizer: Any, vocabulary: int) -> list[Reason]:
    """Return why llama.cpp would split texts otherwise; an empty list if it does not."""
    raw = _read(tokenizer)
    if raw is None:
        return [Reason("the tokenizer has no tokenizer.json, from which the vocabulary is read")]
    reasons = []
    if raw["model"]["type"] != "BPE":
        reasons.append(Reason(f"the tokenizer is of type {raw['model']['type']}, and BPE is what is written"))
    elif not raw["model"].get("byte_fallback") and find_splitting_rule(raw) is None:
        reasons.append(Reason("llama.cpp has no name for the rule by which the tokenizer splits words"))
    elif not raw["model"].get("byte_fallback") and (changes := _list_normalizers(raw) - {"NFC"}):
        # NFC leaves nearly all texts as they are, and llama.cpp's own converter passes over it
        names = ", ".join(sorted(changes))
        reasons.append(Reason(f"the tokenizer changes texts before it splits them ({names}), which llama.cpp does not"))
    if len(tokenizer) > vocabulary:
        reasons.append(Reason(f"the tokenizer has {len(tokenizer)} tokens and the embeddings {vocabulary} rows"))
    return reasons


def find_splitting_rule(raw: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the splitting rule in a tokenizer.json; None if it has none."""
    step = raw.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    kinds = [one.get("type") for one in steps]
    if kinds == ["ByteLevel"] and _is_byte_level(steps[0], regex=True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and _is_byte_level(steps[1], regex=True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and _is_byte_level(steps[1], regex=False):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def _is_byte_level(step: dict[str, Any], *, regex: bool) -> bool:
    return step.get("use_regex", True) is regex and not step.get("add_prefix_space")


def describe_tokenizer(tokenizer: Any, vocabulary: int, generation_config: Any = None) -> dict[str, Any]:
    """Return the keys behind `tokenizer.` of a tokenizer that `check_tokenizer` accepts.

    Args:
        vocabulary: rows of the embeddings; tokens that the tokenizer does not have are marked as unused.
        generation_config: with the tokens at which generation ends, where there are several.
    """
    raw = _read(tokenizer)
    assert raw is not None
    is_sentencepiece = bool(raw["model"].get("byte_fallback"))
    ids = tokenizer.get_vocab()
    texts = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for text, index in ids.items():
        texts[index], types[index] = text, NORMAL
        if is_sentencepiece and len(text) == 6 and text.startswith("<0x"):
            types[index] = BYTE
    if is_sentencepiece and raw["model"].get("unk_token") in ids:
        types[ids[raw["model"]["unk_token"]]] = UNKNOWN
    for index, token in tokenizer.added_tokens_decoder.items():
        if types[index] != UNKNOWN:
            types[index] = CONTROL if token.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    keys: dict[str, Any] = {
        "ggml.model": "llama" if is_sentencepiece else "gpt2",
        "ggml.tokens": texts,
        "ggml.token_type": types,
    }
    if is_sentencepiece:
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        # pieces are joined by the highest score first, as merges are by the lowest rank
        keys["ggml.scores"] = [-float(ranks.get(text, 0)) for text in texts]
        keys["ggml.add_space_prefix"] = _adds_space(raw)
    else:
        keys |= {"ggml.pre": find_splitting_rule(raw), "ggml.merges": merges}
    keys |= _describe_special_tokens(tokenizer, generation_config)
    if isinstance(tokenizer.chat_template, str):
        keys["chat_template"] = tokenizer.chat_template
    return keys


def _describe_special_tokens(tokenizer: Any, generation_config: Any) -> dict[str, Any]:
    prefix, suffix = find_special_token_ids(tokenizer)
    ends = getattr(generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    names = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        # a second token at which an answer ends
        "eot": next((token for token in ends if token != eos), None),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    keys: dict[str, Any] = {f"ggml.{name}_token_id": index for name, index in names.items() if index is not None}
    return keys | {"ggml.add_bos_token": bool(prefix), "ggml.add_eos_token": bool(suffix)}


def _list_normalizers(raw: dict[str, Any]) -> set[str]:
    """List what is done to a text before it is split, by the types in tokenizer.json."""
    normalizer = raw.get("normalizer") or {"normalizers": []}
    return {one["type"] for one in normalizer.get("normalizers", [normalizer])}


def _adds_space(raw: dict[str, Any]) -> bool:
    """Return whether a space is put before a text, by a normalizer or by the splitting."""
    step = raw.get("pre_tokenizer") or {}
    return "Prepend" in _list_normalizers(raw) or step.get("prepend_scheme") in ("always", "first")


def _read(tokenizer: Any) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())
