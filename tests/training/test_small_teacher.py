"""Teachers that are trained here: their text, vocabulary and steps, and that a killed training ends as any other."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe
from limbeck.data.held_out import hash_document
from limbeck.data.offline import embedded
from limbeck.data.offline.recall import (
    REPEAT_MARKER,
    PassageSampler,
    find_common_words,
    make_copied_passage,
    make_pairs,
    make_word_list,
    write_recall_documents,
)
from limbeck.data.packing import IGNORE_INDEX, Batch
from limbeck.data.tokenization import END_OF_TEXT, train_tokenizer
from limbeck.models import loading
from limbeck.report.teacher_info import resolve_teacher_info
from limbeck.testing import make_tiny_model
from limbeck.training import pretraining
from limbeck.training.induction_init import init_induction_heads
from limbeck.training.pretraining import NextTokenStage, plan_teacher_training, train_or_load_teacher

RECIPE = """
name: mine
model: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
vocab_size: 400
data: {seq_len: 32, held_out: 0.05, sources: [{source: "embedded:quick"}, {source: "embedded:recall"}]}
stages:
  - {stage: repeats, tokens: 128, seq_len: 16, batch_size: 2, lr: 1.0e-2}
  - {stage: next_token, tokens: 384, batch_size: 2, lr: 1.0e-2}
  - {stage: next_token, tokens: 256, seq_len: 64, batch_size: 1, lr: 1.0e-3}
checkpoint_seconds: 1.0e-9
"""


def pseudo_texts(documents: int = 60, words: int = 300) -> list[str]:
    """Texts of made-up words, more than a thousand different ones in all."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfklmnprst" for b in "aeiou"]
    lexicon = ["".join(rng.choices(syllables, k=rng.choice((2, 3, 4)))) for _ in range(3000)]
    return [" ".join(rng.choices(lexicon, k=words)) + "." for _ in range(documents)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pseudo_texts()


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> Path:
    """A cache with a little text in tier quick, few recall documents, and the recipe of a teacher of seconds."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "RECALL_DOCUMENTS", 60)
    put_text(tmp_path / "cache", texts)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return recipe


def put_text(cache: Path, texts: list[str]) -> None:
    def fill(folder: Path) -> dict:
        lines = [json.dumps({"source": "made up", "text": text}) + "\n" for text in texts]
        (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
        return {}

    ensure_cached_folder(cache / "assets" / "text-quick", fill, what="text")


# ---------------------------------------------------------------------- text


def test_pairs_come_twice_and_each_key_once(texts):
    words = find_common_words(texts)
    for seed in range(20):
        lines = make_pairs(random.Random(seed), words, PassageSampler(texts)).splitlines()
        half = len(lines) // 2
        assert 4 <= half <= 96
        assert sorted(lines[:half]) == sorted(lines[half:])
        said = [word for line in lines[:half] for word in line.split()]
        assert len({word.strip() for word in said}) == 2 * half


@pytest.mark.parametrize("make", [make_word_list, make_copied_passage])
def test_what_stood_first_comes_again(texts, make):
    lengths = set()
    for seed in range(20):
        before, *again = make(random.Random(seed), find_common_words(texts), PassageSampler(texts)).split(REPEAT_MARKER)
        assert all(before.startswith(f"{after}\n\n") for after in again)
        lengths.add((len(again[0].split()), len(again)))
    assert len(lengths) > 5
    assert {count for _, count in lengths} == {1, 2, 3}


def test_the_same_texts_give_the_same_tasks(texts, tmp_path):
    for name in "ab":
        kept = write_recall_documents(tmp_path / name, texts, 30)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_recall_documents(tmp_path / "c", texts, 30, seed=1)
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == ["pairs", "list", "copy"] * 10
    assert kept == {kind: sum(len(row["text"]) for row in rows if row["source"] == kind) for kind in kept}


def test_too_little_text_is_said(tmp_path):
    with pytest.raises(LimbeckError, match="different words in the text"):
        write_recall_documents(tmp_path / "a", ["too few words here."], 3)
    with pytest.raises(LimbeckError, match="no paragraph of a hundred words"):
        PassageSampler(["short.\n\nshorter."])


def test_nothing_is_copied_from_held_out_text(small_world, texts):
    """Passages of a made-up text are long enough to name the document that they are from."""
    learnt = embedded.load_training_texts()
    aside = [text for text in texts if text not in learnt]
    assert 0 < len(aside) < len(texts) / 3
    assert all(hash_document(text.encode())[0] < embedded.RESERVED_FRACTION * 2**64 for text in aside)
    rows = [
        json.loads(line) for line in embedded.ensure_embedded_corpus("recall").read_text(encoding="utf-8").splitlines()
    ]
    copies = [row["text"].split(REPEAT_MARKER)[1] for row in rows if row["source"] == "copy"]
    long = [copy for copy in copies if len(copy.split()) > 15]
    assert long
    assert not any(copy in text for copy in long for text in aside)
    assert all(any(copy in text for text in learnt) for copy in long)


def test_a_vocabulary_is_learnt_alike_and_writes_all_text(texts):
    first, second = (train_tokenizer(texts, 400, max_length=64) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 400
    assert first.eos_token == END_OF_TEXT
    assert first(END_OF_TEXT).input_ids == [first.eos_token_id] == [0]
    text = "Ünïcode, digits 2026\n\n and  spaces: 語"
    assert first.decode(first(text).input_ids) == text
    assert first.convert_ids_to_tokens(first("2026").input_ids) == ["2", "0", "2", "6"]


# ---------------------------------------------------------------------- the stage


def test_the_loss_is_that_of_the_model_itself_however_a_step_is_split():
    model = make_tiny_model("llama").float().eval()
    ids = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    targets[0, 3:9] = IGNORE_INDEX
    batch = Batch(ids, torch.arange(16)[None].repeat(4, 1), targets)
    stage = NextTokenStage(model)
    counts = stage.count(batch)
    assert counts == {"targets": float((targets != IGNORE_INDEX).sum())}
    loss = stage.backward(batch, counts)["loss"]
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss.float(), expected.detach())
    torch.testing.assert_close(stage.evaluate(batch)["loss"].float(), expected.detach())
    whole = {name: p.grad.clone() for name, p in stage.parameters().items()}
    model.zero_grad()
    for row in range(4):
        one = Batch(*(t[row : row + 1] for t in (ids, batch.position_ids, targets)))
        stage.backward(one, counts)
    for name, p in stage.parameters().items():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- the start


def small_llama(**fields):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 500, "tie_word_embeddings": True, "pad_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**sizes, **fields})).eval()


@torch.no_grad()
def attention_to_what_followed(model) -> tuple[float, float]:
    """Mean attention of the first layer's first head to the place before, and of the second layer's to the place behind
    the same token, on 20 different tokens that come twice."""
    ids = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:20].repeat(2)[None]
    model.config._attn_implementation = "eager"
    first, second = (a[0, 0] for a in model(input_ids=ids, output_attentions=True).attentions)
    again = torch.arange(20, 40)
    return float(first[again, again - 1].mean()), float(second[again, again - 19].mean())


def test_a_start_that_looks_back_does_so_and_a_random_one_does_not():
    model = small_llama()
    assert max(attention_to_what_followed(model)) < 0.06
    init_induction_heads(model)
    before, followed = attention_to_what_followed(model)
    assert before > 0.8
    assert followed > 0.15


def test_models_that_cannot_look_back_are_refused():
    with pytest.raises(LimbeckError, match="model_type: llama"):
        init_induction_heads(make_tiny_model("gpt2"))
    with pytest.raises(LimbeckError, match="tied embeddings"):
        init_induction_heads(small_llama(tie_word_embeddings=False))
    with pytest.raises(LimbeckError, match="width of 64 is too small"):
        init_induction_heads(small_llama(hidden_size=64, num_attention_heads=2))


# ---------------------------------------------------------------------- a whole teacher


def test_a_teacher_is_made_once_and_says_what_it_is(small_world, capfd):
    assert plan_teacher_training(small_world).steps == 14
    folder = train_or_load_teacher(small_world)
    assert "teacher 'mine': 0.03 M parameters, 0.00 M tokens in 14 steps" in capfd.readouterr().err
    manifest = load_valid_manifest(folder, verify=True)
    assert manifest["key"] == TeacherRecipe.load(small_world).key
    assert [stage["tokens"] for stage in manifest["stages"]] == [128, 384, 256]
    assert manifest["held_out_perplexity"].keys() == {"embedded:quick", "embedded:recall"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 400
    assert tokenizer.model_max_length == 64
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_or_load_teacher(small_world) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list((folder.parents[1] / "teachers").glob("mine-*"))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("killed_at", [1, 4, 8, 12])
def test_a_killed_training_ends_bit_for_bit_as_any_other(small_world, monkeypatch, texts, killed_at):
    whole = train_or_load_teacher(small_world).joinpath("model.safetensors").read_bytes()
    other = small_world.parent / "other"
    monkeypatch.setenv("LIMBECK_CACHE", str(other))
    put_text(other, texts)
    steps, backward = 0, NextTokenStage.backward

    def dies(self, batch, counts):
        nonlocal steps
        steps += 1
        if steps == killed_at + 7:  # the plan took six
            raise KeyboardInterrupt
        return backward(self, batch, counts)

    monkeypatch.setattr(NextTokenStage, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        train_or_load_teacher(small_world)
    assert not list((other / "assets").glob("teacher-*"))
    folder = train_or_load_teacher(small_world)
    assert folder.is_relative_to(other)
    assert folder.joinpath("model.safetensors").read_bytes() == whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["stage_index"], line["step"]) for line in lines] == [
        *((0, i) for i in range(1, 5)),
        *((1, i) for i in range(1, 7)),
        *((2, i) for i in range(1, 5)),
    ]


def test_the_key_knows_what_counts_and_nothing_else():
    recipe = TeacherRecipe.load("small")
    assert recipe.key != TeacherRecipe.load("tiny").key
    assert recipe.model_copy(update={"checkpoint_seconds": 1.0, "name": "other"}).key == recipe.key
    assert recipe.model_copy(update={"seed": 1}).key != recipe.key
    assert TeacherRecipe.names() == ["small", "tiny"]


def test_several_processes_are_told_to_train_it_first(small_world, monkeypatch):
    class Two:
        world_size = 2

    monkeypatch.setattr(pretraining, "get_process_info", lambda: Two)
    with pytest.raises(LimbeckError, match=r"(?s)has to be trained in a single process.*limbeck assets --teacher"):
        train_or_load_teacher(small_world)


def test_the_names_are_teachers_everywhere(small_world, monkeypatch):
    monkeypatch.setattr(pretraining, "train_or_load_teacher", lambda name, **_: Path("/somewhere") / name)
    assert loading.resolve_teacher("small") == "/somewhere/small"
    assert loading.resolve_teacher("tiny") == "/somewhere/tiny"
    with pytest.raises(LimbeckError, match="did you mean 'small'"):
        loading.resolve_teacher("smal")


def test_the_command_plans_and_makes(small_world):
    from limbeck.cli import assets as _  # noqa: F401  registers the verb

    runner = CliRunner()
    plan = runner.invoke(app, ["assets", "--teacher", str(small_world), "--plan"])
    assert plan.exit_code == 0
    assert "14 steps" in plan.output
    assert not TeacherRecipe.load(small_world).folder.exists()
    made = runner.invoke(app, ["assets", "--teacher", str(small_world)])
    assert made.exit_code == 0
    assert load_valid_manifest(TeacherRecipe.load(small_world).folder)


@pytest.mark.assets
def test_the_small_teacher_writes_and_remembers():
    folder = TeacherRecipe.load("small").folder
    if not load_valid_manifest(folder):
        pytest.skip("the small teacher is not in the cache; make it with limbeck assets --teacher small")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = " river water\n market green\n music early\n winter paper\n market green\n winter paper\n river"
    best = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " water"


def test_a_teacher_trained_here_is_no_model_on_the_hub():
    with pytest.raises(LimbeckError, match="teacher's license"):
        resolve_teacher_info("small")
    teacher_info = resolve_teacher_info("small", license="cc-by-sa-4.0")
    assert (teacher_info.display_name, teacher_info.repo_id, teacher_info.license) == (
        "small",
        None,
        {"license": "cc-by-sa-4.0"},
    )
