"""A text reaches a model in one form: in training, in prompts, in measurements and in tasks of the harness."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.paths import ROOT
from limbeck.core.recipe import Recipe
from limbeck.data.packing import IGNORE_INDEX, PackedDataset
from limbeck.data.special_tokens import (
    compile_control_pattern,
    encode_continuations,
    encode_plain_texts,
    encode_prompt,
    find_special_token_ids,
)
from limbeck.data.streaming import TokenStream
from limbeck.data.synthetic import RepeatedSequenceSource
from limbeck.data.token_store import Split, build_token_store
from limbeck.data.tokenization import create_encoder
from limbeck.evaluation.associative_recall import RecallSequence
from limbeck.evaluation.haystacks import (
    Haystack,
    build_needle_question,
    build_passkey_question,
    count_prompt_tokens,
)
from limbeck.evaluation.long_text import PrefilledPrompt, load_long_text
from limbeck.models.generation import generate_continuation
from limbeck.models.loading import load_model_and_tokenizer
from limbeck.testing import make_tiny_model
from limbeck.training.pipeline import distill

LICENCE = ROOT / "LICENSE"
PARAGRAPHS = [p for p in LICENCE.read_text(encoding="utf-8").split("\n\n") if len(p) > 80]
SPECIAL = ["<pad>", "<s>", "</s>", "[de]"]


def tokenizer(post: str | None = None, *, unigram: bool = False, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A tokenizer that puts `post` around a text, such as "<s> $A"."""
    common = {"special_tokens": SPECIAL, "show_progress": False}
    if unigram:
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        raw.train_from_iterator(
            PARAGRAPHS,
            trainers.UnigramTrainer(vocab_size=300, unk_token="<pad>", initial_alphabet=list("</>[]0189ade"), **common),
        )
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(PARAGRAPHS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **common))
    if post:
        names = [(name, raw.token_to_id(name)) for name in SPECIAL]
        raw.post_processor = processors.TemplateProcessing(single=post, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token="</s>", pad_token="<pad>")


def corpus(path: Path, texts: list[str] | None = None) -> str:
    texts = PARAGRAPHS * 3 if texts is None else texts
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents(split: Split) -> list[list[int]]:
    return [split.tokens[a:b].tolist() for a, b in zip(split.offsets, split.offsets[1:])]


KINDS = {
    None: ([], []),
    "<s> $A": ([1], []),
    "$A </s>": ([], [2]),
    "<s> $A </s>": ([1], [2]),
    "<s> [de] $A": ([1, 3], []),
    "[de] $A </s> </s>": ([3], [2, 2]),
}


@pytest.mark.parametrize("post", KINDS)
@pytest.mark.parametrize("unigram", [False, True])
def test_what_stands_around_a_text_is_found_and_prompts_end_with_the_text(post, unigram):
    tok = tokenizer(post, unigram=unigram)
    begin, end = KINDS[post]
    assert find_special_token_ids(tok) == (tuple(begin), tuple(end))
    bare = tok("the work", add_special_tokens=False).input_ids
    assert encode_prompt(tok, "the work") == begin + bare
    assert begin + bare + end == tok("the work").input_ids
    assert count_prompt_tokens(tok, "the work") == len(begin + bare)
    if begin == [1]:
        assert encode_prompt(tok, "<s>the work").count(1) == 1, "a rendered conversation has its BOS already"


@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>", "<s> [de] $A", None])
@pytest.mark.parametrize("kind", ["text", "streamed", "tokens", "chat"])
def test_every_stored_document_begins_as_the_tokenizer_begins_a_text(post, kind, tmp_path, own_cache):
    tok, begin = tokenizer(post), KINDS[post][0]
    source = corpus(tmp_path / "corpus.jsonl")
    if kind == "tokens":
        np.save(tmp_path / "t.npy", np.concatenate([[*ids, 2] for ids in encode_plain_texts(tok, PARAGRAPHS * 3)]))
        source = str(tmp_path / "t.npy")
    if kind == "chat":
        tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": p}] for p in PARAGRAPHS]
        source = str(tmp_path / "chat.jsonl")
        Path(source).write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    settings = {"length": 32, "held_out": 0.2, "chat": None}
    made = TokenStream(source, tok, **settings) if kind == "streamed" else build_token_store(source, tok, **settings)
    for split in (made.load_train_split(0) if kind == "streamed" else made.train, made.held_out):
        for ids in documents(split):
            assert ids[: len(begin) + 1].count(1) == begin.count(1)
            assert ids[: len(begin)] == begin
            assert ids[-1] == 2
            assert ids[-2] != 2, "EOS twice"
        _check_rows(PackedDataset(split, 32), begin)


def _check_rows(packed: PackedDataset, begin: list[int]) -> None:
    """Every sequence begins as a text does, and nothing of a beginning is a target."""
    batch = packed.batch(0, packed.n_sequences)
    ids, targets, positions = batch.input_ids, batch.targets, batch.position_ids
    assert (ids[:, : len(begin)] == torch.tensor(begin)).all()
    assert (positions[:, 0] == 0).all()
    assert (ids[positions == 0] == (begin or [0])[0]).all() or not begin
    assert not (targets == 1).any() or 1 not in begin
    assert not (targets == 3).any() or 3 not in begin
    known = targets[:, :-1] != IGNORE_INDEX
    assert (targets[:, :-1][known] == ids[:, 1:][known]).all()
    assert known.sum() > 0


def test_a_row_inside_a_document_begins_with_bos_and_nothing_else_changes():
    """By hand: one document of 1 (BOS) 10..29 2, in rows of 8."""
    ids = np.array([1, *range(10, 30), 2, 1, 40, 41, 42, 2], np.int64)
    split = Split("train", ids, np.array([0, 22, 27]), None, (1,))
    batch = PackedDataset(split, 8, shuffle=False).batch(0, 3)
    assert batch.input_ids.tolist() == [
        [1, 10, 11, 12, 13, 14, 15, 16],
        [1, 17, 18, 19, 20, 21, 22, 23],
        [1, 25, 26, 27, 28, 29, 2, 1],
    ]
    no = IGNORE_INDEX
    assert batch.targets.tolist() == [
        [10, 11, 12, 13, 14, 15, 16, 17],
        [no, 18, 19, 20, 21, 22, 23, 24],
        [no, 26, 27, 28, 29, 2, no, 40],
    ]
    assert batch.position_ids.tolist() == [[*range(8)], [*range(8)], [0, 1, 2, 3, 4, 5, 6, 0]]
    bare = Split("train", ids, np.array([0, 22, 27]), None)
    assert PackedDataset(bare, 8, shuffle=False).batch(1, 1).input_ids.tolist() == [[17, 18, 19, 20, 21, 22, 23, 24]]


def test_bos_is_part_of_the_key(tmp_path, own_cache):
    source = corpus(tmp_path / "c.jsonl")
    keys = {build_token_store(source, tokenizer(post), length=16, held_out=0.2).key for post in KINDS}
    assert len(keys) == len(KINDS)


@pytest.mark.parametrize("unigram", [False, True])
@pytest.mark.parametrize(
    ("text", "example"), [("was <s>10</s> 8 euro", "<s>"), ("end</s>", "</s>"), ("[de] is a <pad> code", "[de]")]
)
def test_control_tokens_in_raw_text_are_split_and_told(text, example, unigram, capsys):
    tok = tokenizer("<s> $A", unigram=unigram)
    encoder = create_encoder("x.txt", tok, 2, "text", chat=False)
    ((ids, _), (other, _)) = encoder.encode([text.encode(), b"plain"])
    assert not set(ids[1:-1].tolist()) & {1, 2, 3}
    assert tok.decode(ids[1:-1].tolist()).replace(" ", "") == text.replace(" ", "")
    assert other.tolist() == [1, *tok("plain", add_special_tokens=False).input_ids, 2]
    encoder.report("x.txt")
    assert f"1 of 2 documents of 'x.txt' contain control tokens such as {example}" in (
        " ".join(capsys.readouterr().err.split())
    )
    encoder.report("x.txt")
    assert not capsys.readouterr().err


def test_added_tokens_that_are_not_special_stay(own_cache):
    tok = tokenizer()
    tok.add_tokens([AddedToken("<think>", special=False), AddedToken("<|call|>", special=True)])
    (ids,) = encode_plain_texts(tok, ["so <think>hm <|call|>"])
    assert tok.convert_tokens_to_ids("<think>") in ids
    assert tok.convert_tokens_to_ids("<|call|>") not in ids
    assert compile_control_pattern(tok).findall("<think> <|call|></s>") == ["<|call|>", "</s>"]
    assert encode_prompt(tok, "<|call|>") == [tok.convert_tokens_to_ids("<|call|>")], "a prompt may be rendered"


@pytest.mark.parametrize("kind", ["bytes", "unigram", "prepended"])
def test_an_answer_is_read_as_it_stands_behind_its_prompt(kind):
    """The tokenizers of Llama 2 and Mistral put a space of their own before every text, an answer's too."""
    tok = tokenizer(unigram=kind == "unigram")
    if kind == "prepended":
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        raw.train_from_iterator(" ".join(PARAGRAPHS).split(), trainer)
        tok = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    prompt, answers = "Question: who grants it?\nAnswer:", [" the License", " 12", " you or I"]
    expected = [encode_prompt(tok, prompt + answer)[len(encode_prompt(tok, prompt)) :] for answer in answers]
    assert encode_continuations(tok, answers) == expected
    assert all(expected)


@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>", "<s> [de] $A"])
def test_measurements_read_prompts_behind_the_beginning(post, tmp_path):
    tok, begin = tokenizer(post), KINDS[post][0]
    read = load_long_text(corpus(tmp_path / "c.jsonl"), tok, 500)
    assert read.ids[: len(begin)].tolist() == begin
    assert read.ids.tolist().count(1) == 1
    assert 2 not in read.ids.tolist()
    question = build_passkey_question(250, 0.5, tok, random.Random(0))
    assert len(encode_prompt(tok, question.prompt)) + 8 <= 250
    hay = Haystack(" ".join(PARAGRAPHS).split(), ["old"], ["stone"])
    assert build_needle_question(hay, 2, 400, 0.5, tok, random.Random(0)).prompt
    found = RecallSequence.sample(list(range(10, 30)), 4, random.Random(0), [5], [6], begin)
    plain = RecallSequence.sample(list(range(10, 30)), 4, random.Random(0), [5], [6])
    assert found.ids.tolist() == begin + plain.ids.tolist()
    assert (found.ids[found.queries] == plain.ids[plain.queries]).all()
    rows = RepeatedSequenceSource.from_tokenizer(tok, 300).train_sequences(32, seed=0).batch(0, 4)
    assert (rows.input_ids[:, : len(begin)] == torch.tensor(begin)).all()
    assert rows.input_ids.shape == (4, 32)


def test_the_harness_reads_what_training_reads(own_cache):
    pytest.importorskip("lm_eval")
    from limbeck.evaluation.scorer import PreloadedHFLM

    model = make_tiny_model("llama", vocab_size=300)
    model.generation_config.repetition_penalty = 5.0
    for post, (begin, _) in KINDS.items():
        tok = tokenizer(post)
        scorer = PreloadedHFLM(model, tok, 2, 64)
        bare = tok("the work", add_special_tokens=False).input_ids
        assert scorer.tok_encode("the work") == begin + bare
        assert scorer.tok_encode("the work", add_special_tokens=False) == bare
        context, answer = scorer._encode_pair("the work", " is")
        assert context + answer == encode_prompt(tok, "the work is")
        assert scorer.tok_batch_encode(["the work"])[0].tolist() == [begin + bare]
        assert scorer.model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.repetition_penalty == 5.0


def _needs_bos() -> LlamaForCausalLM:
    """A llama that has learnt the licence behind <s>, and text backwards behind anything else."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    ids = torch.tensor(tokenizer()("\n\n".join(PARAGRAPHS[:12]), add_special_tokens=False).input_ids)
    optimizer, draw, length = torch.optim.AdamW(model.parameters(), 5e-3), torch.Generator().manual_seed(0), 32
    for _ in range(250):
        at = torch.randint(0, len(ids) - length, (2, 6), generator=draw).tolist()
        text = [torch.cat([torch.tensor([1]), ids[a : a + length - 1]]) for a in at[0]]
        batch = torch.stack([*text, *(ids[a : a + length].flip(0) for a in at[1])])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def needs_bos(tmp_path_factory) -> dict[str, Path]:
    """The teacher with a tokenizer that puts BOS before a text, as Gemma's, and with one that forgets it."""
    model, folders = _needs_bos(), {}
    for name, post in (("puts", "<s> $A"), ("ends", "<s> $A </s>"), ("forgets", None)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer(post).save_pretrained(folders[name])
    return folders


def _run(teacher: Path, source: str, out: Path, **changes) -> dict:
    recipe = {
        "teacher": str(teacher),
        "student": {"mixer": "gated_deltanet"},
        "data": {"source": source, "seq_len": 32, "held_out": 0.3},
        "stages": [
            {"stage": "calibrate", "tokens": 512},
            {"stage": "hidden", "tokens": 512},
            {"stage": "logits", "tokens": 256, "batch_size": 2},
        ],
        "evaluation": {"tokens": 2048, "prompt": PARAGRAPHS[0][:40], "new_tokens": 8},
        "out": str(out),
    }
    return distill(Recipe.model_validate({**recipe, **changes}), measure_times=False)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kind", ["puts", "ends", "forgets"])
def test_a_teacher_that_needs_bos_is_taught_with_it_end_to_end(kind, needs_bos, tmp_path, own_cache, capsys):
    """Its perplexity in the summary is that of real text behind BOS, which is also what it is prompted with."""
    source = corpus(tmp_path / "c.jsonl", [*PARAGRAPHS[:12], *(p + " " for p in PARAGRAPHS[:12])])
    held_out = _run(needs_bos[kind], source, tmp_path / "run")["held_out"]
    said = " ".join(capsys.readouterr().err.split())
    warned = "does not add its BOS token, <s>," in said
    assert warned == (kind == "forgets")
    if kind == "forgets":
        assert held_out["teacher_perplexity"] > 25
        assert "add_bos_token=True" in said
    else:
        assert held_out["teacher_perplexity"] < 12
    if kind == "puts":
        _same_in_generation(needs_bos[kind], tmp_path)


def _same_in_generation(folder: Path, tmp_path: Path) -> None:
    """The sample of the summary, the harness' prompts and a measurement's all go on from the same tokens."""
    for place in (folder, tmp_path / "run" / "student"):
        model, tok = load_model_and_tokenizer(str(place))
        prompt = PARAGRAPHS[0][:40]
        ids = encode_prompt(tok, prompt)
        assert ids[0] == 1
        greedy = PrefilledPrompt.from_tokens(model, torch.tensor(ids)).generate(8)
        assert generate_continuation(model, tok, prompt, 8) == tok.decode(greedy, skip_special_tokens=True)


@pytest.mark.slow
def test_the_advice_about_bos_works(needs_bos, tmp_path, own_cache, capsys, monkeypatch):
    source = corpus(tmp_path / "c.jsonl", [*PARAGRAPHS[:12], *(p + " " for p in PARAGRAPHS[:12])])
    monkeypatch.setattr("limbeck.training.pipeline.run_stages", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _run(needs_bos["forgets"], source, tmp_path / "run")
    command = re.search(r'python -c "(.*)"', capsys.readouterr().err, re.DOTALL)[1].replace("\n", "")
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert find_special_token_ids(AutoTokenizer.from_pretrained(tmp_path / "teacher-with-bos")).prefix_ids == (1,)


def test_the_teacher_of_the_test_is_what_it_shall_be(needs_bos):
    model = LlamaForCausalLM.from_pretrained(needs_bos["puts"])
    ids = torch.tensor([tokenizer()(p, add_special_tokens=False).input_ids[:31] for p in PARAGRAPHS[:8]])
    lead = torch.full_like(ids[:, :1], 1)
    losses = []
    for front in (lead, lead[:, :0]):
        with torch.no_grad():
            logits = model(torch.cat([front, ids], 1)).logits[:, front.shape[1] : -1]
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    assert math.exp(losses[0]) < 12 < 25 < math.exp(losses[1]), losses
