"""Conversations: only the answers are learnt, whatever the template can tell of them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from limbeck.core.errors import LimbeckError
from limbeck.data.chat import ChatEncoder
from limbeck.data.packing import IGNORE_INDEX, PackedDataset
from limbeck.data.streaming import TokenStream
from limbeck.data.token_store import build_token_store
from limbeck.models import loading

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# like templates that show what was thought in the last answer only
REWRITES = (
    "{% for m in messages %}<s>{{ m.role }}{% if loop.last %} now{% endif %}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What turns wine into spirit?"},
    {"role": "assistant", "content": "A still."},
    {"role": "user", "content": "And slowly?"},
    {"role": "assistant", "content": "A slow fire."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path / "cache"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([m["content"] for m in CHAT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def learnt(tok, ids, mask) -> list[str]:
    """The stretches that are learnt, as text."""
    edges = np.flatnonzero(np.diff([0, *mask.tolist(), 0]))
    return [tok.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2])]


def encoded(tok, chat=CHAT):
    return ChatEncoder(tok, tok.eos_token_id).encode([json.dumps(chat).encode()])[0]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_answers_and_their_ends_are_learnt(template):
    tok = tokenizer(template)
    ids, mask = encoded(tok)
    assert learnt(tok, ids, mask) == ["A still.</s>", "A slow fire.</s>"]
    assert tok.decode(ids.tolist()) == tok.apply_chat_template(CHAT, tokenize=False)


def test_a_template_without_an_end_gets_one():
    tok = tokenizer(NO_END)
    ids, mask = encoded(tok)
    assert ids[-1] == tok.eos_token_id
    assert mask[-1] == 1
    assert learnt(tok, ids, mask) == [" A still.\n", " A slow fire.\n</s>"]


def test_answers_are_found_where_a_template_shows_earlier_ones_otherwise():
    tok = tokenizer(REWRITES)
    ids, mask = encoded(tok)
    assert tok.decode(ids.tolist()) == tok.apply_chat_template(CHAT, tokenize=False)
    assert learnt(tok, ids, mask) == ["A still.</s>", "A slow fire.</s>"]


def test_conversations_that_cannot_be_rendered_are_dropped_and_counted(capsys):
    tok = tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN)
    one = ChatEncoder(tok, tok.eos_token_id)
    short = [{"role": "assistant", "content": "A still."}]
    made = one.encode([json.dumps(chat).encode() for chat in (CHAT, short, CHAT[:2])])
    assert [len(ids) > 0 for ids, _ in made] == [False, True, False]
    one.report("chats")
    said = capsys.readouterr().err
    assert "2 of 3 conversations of 'chats' were dropped: no system (1); no assistant turn (1)" in said
    one.encode([json.dumps(CHAT).encode()])
    with pytest.raises(LimbeckError, match="1 of 1 conversations of 'chats' were dropped: no system"):
        one.report("chats")


def chats(n: int = 60) -> list[list[dict]]:
    words = ["wine", "spirit", "water", "salt", "fire", "still"]
    return [
        [{"role": "user", "content": f"{i} {words[i % 6]}?"}, {"role": "assistant", "content": f"{words[i % 5]} {i}."}]
        for i in range(n)
    ]


def write(path: Path, field: str = "messages") -> str:
    path.write_text(
        "".join(json.dumps({field: chat, "id": i}) + "\n" for i, chat in enumerate(chats())), encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "streamed"])
def test_a_source_with_messages_is_a_chat_source_and_batches_hide_the_rest(kind, tmp_path):
    import datasets

    tok = tokenizer(PLAIN)
    source = write(tmp_path / "chat.jsonl")
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats()])
    if kind == "parquet":
        source = str(tmp_path / "chat.parquet")
        rows.to_parquet(source)
    if kind == "saved":
        source = str(tmp_path / "saved")
        rows.save_to_disk(source)
    common = {"length": 16, "held_out": 0.1, "chat": None}
    store = build_token_store(source, tok, **common) if kind != "streamed" else None
    split = store.train if store else TokenStream(source, tok, **common).load_train_split(0)
    answers = {f"{chat[1]['content']}</s>" for chat in chats()}
    assert split.mask is not None
    found = [learnt(tok, split.tokens[a:b], split.mask[a:b]) for a, b in pairwise(split.offsets)]
    assert all(len(one) == 1 and one[0] in answers for one in found)
    assert len(found) > 40
    packed = PackedDataset(split, 16, seed=1)
    batch = packed.batch(0, packed.n_sequences)
    assert 0 < batch.n_targets < batch.targets.numel() / 2
    rest = batch.targets[batch.targets != IGNORE_INDEX]
    assert not (rest == tok.bos_token_id).any()


def test_the_field_can_have_another_name_and_text_stays_text(tmp_path):
    tok = tokenizer(PLAIN)
    common = {"length": 16, "held_out": 0.1}
    other = write(tmp_path / "other.jsonl", "talk")
    assert build_token_store(other, tok, chat=True, text_field="talk", **common).train.mask is not None
    with pytest.raises(LimbeckError, match="no field 'messages', only: talk, id"):
        build_token_store(other, tok, chat=True, **common)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": chat[0]["content"] * 9, "messages": chat}) + "\n" for chat in chats()),
        encoding="utf-8",
    )
    assert build_token_store(str(text), tok, chat=None, **common).train.mask is None  # a field `text` goes first
    key = build_token_store(str(text), tok, chat=False, **common).key
    assert (
        key
        == build_token_store(str(text), tok, chat=None, **common).key
        != build_token_store(str(text), tok, chat=True, **common).key
    )
    marked = tokenizer(MARKED)
    assert (
        build_token_store(str(text), marked, chat=True, **common).key
        != build_token_store(str(text), tok, chat=True, **common).key
    )
    with pytest.raises(LimbeckError, match="holds no conversation"):
        build_token_store(other, tok, chat=True, text_field="id", **common)


def test_a_tokenizer_without_a_template_is_said_so(tmp_path):
    with pytest.raises(LimbeckError, match="the tokenizer has no chat template"):
        build_token_store(write(tmp_path / "chat.jsonl"), tokenizer(None), length=16, chat=None)


@pytest.mark.assets
def test_a_real_template(monkeypatch):

    monkeypatch.delenv("LIMBECK_CACHE")
    tok = AutoTokenizer.from_pretrained(loading.resolve_teacher("embedded"))
    ids, mask = encoded(tok)
    assert learnt(tok, ids, mask) == ["A still.<|im_end|>", "A slow fire.<|im_end|>"]
    assert tok.decode(ids.tolist()) == tok.apply_chat_template(CHAT, tokenize=False)
